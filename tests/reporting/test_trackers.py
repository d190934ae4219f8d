"""Histograms and samples, read back from what real trackers have written."""

from __future__ import annotations

import html
import json
import math
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from maestro_fast.records import StepRecord
from maestro_fast.reporting.trackers import TrackerMedia, as_markdown
from maestro_fast.watching import TrackersConfig, pick_samples

NASTY = "a | b\n<script>x</script> *bold* `code` [link](http://x) \x1b[2J &amp; \\| **"


def record(step: int, completion: str = NASTY) -> StepRecord:
    torch.manual_seed(step)
    rewards, zeros, flags = torch.randn(4, 3), torch.zeros(4), torch.zeros(4, dtype=torch.bool)
    rewards[:, 2], rewards[0, 1] = math.nan, math.nan
    texts: Any = ["first", "first", "second", "second"]
    columns = (rewards, torch.rand(4, 3), torch.ones(4, 3), torch.randn(4), zeros, flags, zeros + 3, flags)
    return StepRecord(step, ("mine", "tone", "never"), ["f"] * 4, texts, [completion] * 4, *columns)


def watched(callback: Any, folder: Path, config: TrackersConfig) -> list[StepRecord]:
    """Four steps of a run that ``callback`` logs, with what we add to them."""
    args = TrainingArguments(str(folder / "run"), use_cpu=True, report_to="none", run_name="run")
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()
    media = TrackerMedia(config, group_size=2, updates=1)
    media.attach([callback])
    callback.on_train_begin(args, state, control)
    records = [record(step) for step in range(1, 5)]
    for own in records:
        media(own)
        state.global_step = own.step
        callback.on_log(args, state, control, logs={"reward": float(own.step)})
    callback.on_train_end(args, state, control)
    return records


def test_tensorboard_gets_them_in_the_file_of_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers.integrations import TensorBoardCallback

    records = watched(TensorBoardCallback(), tmp_path, TrackersConfig(every=2, samples=3))
    (file,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent), {"scalars": 0, "histograms": 0, "tensors": 0})
    events.Reload()

    assert [(event.step, event.value) for event in events.Scalars("train/reward")] == [
        (s, float(s)) for s in range(1, 5)
    ]
    names = {f"distribution/{kind}/{name}" for kind in ("rewards", "weights") for name in ("mine", "tone", "never")}
    assert set(events.Tags()["histograms"]) == names - {"distribution/rewards/never"} | {"distribution/advantages"}
    for name, column in (("rewards/tone", "rewards_BK"), ("weights/tone", "weights_BK"), ("advantages", None)):
        for event, own in zip(events.Histograms(f"distribution/{name}"), records[::2], strict=True):
            values = own.advantages_B if column is None else getattr(own, column)[:, 1]
            values = values[values.isfinite()].double().numpy()
            found = event.histogram_value
            assert (event.step, found.num) == (own.step, len(values))
            assert [found.min, found.max, found.sum] == pytest.approx([values.min(), values.max(), values.sum()])
    texts = [
        (event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors("samples/text_summary")
    ]
    assert texts == [(own.step, as_markdown(pick_samples(own, 2, 3))) for own in records[::2]]


def test_tensorboard_shows_a_text_as_it_is() -> None:
    """Its own renderer makes one table row of a sample, with the very characters that the policy wrote."""
    util = pytest.importorskip("tensorboard.plugin_util")
    (sample,) = pick_samples(record(1), 2, 1)
    shown = util.markdown_to_safe_html(as_markdown([sample]))
    cells = re.findall(r"<td>(.*?)</td>", shown, flags=re.DOTALL)
    assert shown.count("<tr>") == 2 and len(cells) == 12
    assert cells[-2] == sample.prompt
    assert html.unescape(cells[-1].replace("<br>", "\n")) == NASTY.replace("\x1b", "\\x1b")
    assert cells[:3] == ["0", "best", f"{sample.advantage:.4g}"] and "-" in cells[3:9]


def test_no_samples_send_no_texts(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from transformers.integrations import TensorBoardCallback

    watched(TensorBoardCallback(), tmp_path, TrackersConfig(every=2, samples=0))
    (file,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    assert b"distribution/advantages" in file.read_bytes() and b"samples/" not in file.read_bytes()


def history(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run of Weights & Biases, whose file is a log of LevelDB with a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data) and at + 7 + struct.unpack("<H", data[at + 4 : at + 6])[0] <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            entry = Record()
            entry.ParseFromString(whole)
            whole = b""
            if entry.WhichOneof("record_type") == "history":
                yield {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in entry.history.item}


def test_wandb_gets_them_in_the_run_of_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from transformers.integrations import WandbCallback

    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    try:
        records = watched(WandbCallback(), tmp_path, TrackersConfig(every=2, samples=2))
    finally:
        wandb.finish()
    (file,) = tmp_path.rglob("offline-run-*/*.wandb")
    until = time.monotonic() + 20
    while len(lines := list(history(file))) < 6 and time.monotonic() < until:  # Another process writes the file.
        time.sleep(0.1)

    assert [line["train/reward"] for line in lines if "train/reward" in line] == [1, 2, 3, 4]
    ours = [line for line in lines if "distribution/advantages/values" in line]
    assert [line["train/global_step"] for line in ours] == [1, 3]
    for line, own in zip(ours, records[::2], strict=True):
        assert sum(line["distribution/rewards/tone/values"]) == own.rewards_BK[:, 1].isfinite().sum()
        assert "distribution/rewards/never/values" not in line
        assert line["distribution/advantages/bins"][0] == pytest.approx(own.advantages_B.min())
    tables = [json.loads(path.read_text())["data"] for path in tmp_path.rglob("*.table.json")]
    samples = [pick_samples(own, 2, 2) for own in records[::2]]
    assert sorted(table[0][2] for table in tables) == pytest.approx(sorted(best.advantage for best, _ in samples))
    assert all(row[-1] == NASTY for table in tables for row in table) and len(tables) == 2
