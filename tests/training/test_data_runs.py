"""Whole runs on a mixture, on a stream, and on prompts that are too long; each is killed and goes on bit by bit."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from maestro_fast.config_file import check_paths, read_config
from maestro_fast.data.load import load_prompts
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.settings import SettingsError
from maestro_fast.training import parse_config
from tests.training.test_checkpoint import assert_same_run, killed_and_resumed


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def talk(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Name colour {i}."}, {"role": "assistant", "content": f"red {i}"}]


@pytest.fixture
def raw(steady: dict[str, Any]) -> dict[str, Any]:
    """Five steps of four prompts each, on a reward that reads the column of references."""
    steady["rewards"][0] = steady["rewards"][0].replace("own.py", "reads.py")
    Path(steady["rewards"][0].partition(":")[0]).write_text(
        "def mine(completion_ids, reference, **columns):\n"
        "    assert all(isinstance(text, str) for text in reference), reference\n"
        "    return [float(sum(ids) % 7) for ids in completion_ids]\n",
        encoding="utf-8",
    )
    steady["trainer"] |= {"max_steps": 5, "save_steps": 2}
    return steady


def run_twice(raw: dict[str, Any], **data: Any) -> list[dict[str, Any]]:
    """Runs once whole and once killed in step 4; returns the rollouts of the whole run."""
    whole, killed = ({**copy.deepcopy(raw), "run_dir": f"{raw['run_dir']}-{name}"} for name in ("whole", "killed"))
    recorded_train(whole)
    killed_and_resumed(killed, 4)
    assert_same_run(whole["run_dir"], killed["run_dir"])
    lines = (Path(whole["run_dir"]) / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_mixture_keeps_its_shares_and_resumes_bit_by_bit(raw: dict[str, Any], tmp_path: Path) -> None:
    """Supervised conversations in "messages" and prompts in "prompt" make one run."""
    sets = [
        {"path": write(tmp_path / "a.jsonl", [{"messages": talk(i)} for i in range(5)]), "share": 3, "family": "talk"},
        {
            "path": write(tmp_path / "b.jsonl", [{"prompt": f"Sea {i}.", "reference": "sea"} for i in range(4)]),
            "share": 1,
            "system_prompt": "Be brief.",
        },
    ]
    rollouts = run_twice(raw | {"data": sets})
    by_step = {step: [line for line in rollouts if line["step"] == step] for step in range(1, 6)}

    for lines in by_step.values():
        assert Counter(line["family"] for line in lines) == {"talk": 3 * 4, "": 4}
    prompts = Counter(str(line["prompt"]) for line in rollouts)
    assert sorted(prompts.values()) == [4] * 3 + [8] + [12] * 5, "Each set begins anew by itself."
    assert all("Be brief." in prompt for prompt in prompts if "Sea" in prompt)
    assert not any("red" in prompt or "Be brief." in prompt for prompt in prompts if "colour" in prompt)


def test_a_stream_resumes_bit_by_bit_and_leaves_out_what_is_too_long(
    raw: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "the sea " * 40 if i % 4 == 0 else f"Sea {i}.", "reference": "r"} for i in range(18)]
    stream = {"streaming": True, "shuffle_buffer": 3, "max_prompt_tokens": 30, "too_long": "drop"}
    raw["data"] = {"path": write(tmp_path / "s.jsonl", rows), **stream}
    with caplog.at_level(logging.INFO, logger="maestro_fast"):
        rollouts = run_twice(raw)
    seen = list(dict.fromkeys((line["step"], line["prompt"]) for line in rollouts))
    bounds = [0, 3, 6, 9, 12, 13, 16, 19]  # The stream has 13 such prompts, and begins anew.
    chunks = [sorted(prompt for _, prompt in seen[i:j]) for i, j in itertools.pairwise(bounds)]
    kept = [row["prompt"] for row in rows if len(row["prompt"]) < 20]

    assert len(seen) == 20 and len(kept) == 13
    assert chunks == [sorted(kept[i : i + 3]) for i in (0, 3, 6, 9, 12, 0, 3)], "Chunks of three are shuffled."
    assert "data: the stream has ended after 13 prompts, and begins anew" in caplog.text


def test_prompts_left_out_are_counted_before_a_batch_is_too_large(raw: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": "the sea " * 40 if i % 4 else f"Sea {i}.", "reference": "r"} for i in range(12)]
    raw["data"] = {"path": write(tmp_path / "s.jsonl", rows), "max_prompt_tokens": 30, "too_long": "drop"}

    with pytest.raises(ValueError, match=r"batch\.prompts_per_batch: 4, but the data holds 3 prompts"):
        recorded_train(raw)


@pytest.mark.parametrize(
    ("data", "trainer", "complaint"),
    [
        ([], {}, r"data: an empty list, expected at least one data set"),
        ({"path": "a", "share": 1}, {}, r"data\.share: 1.0, but there is one data set, expected a list"),
        (
            [{"path": "a", "share": 1}, {"path": "b"}],
            {},
            r"data\[1\]\.share: missing, but data\[0\] has one, expected a share for every set",
        ),
        ([{"path": "a", "share": 0}], {}, r"data\[0\]\.share: 0.0, expected a finite number above 0"),
        ([{"path": "a", "share": float("nan")}], {}, r"data\[0\]\.share: nan, expected a finite number above 0"),
        ([{"path": "a"}, {"paht": "b"}], {}, r"data\[1\]\.paht: unknown setting"),
        ({"path": "a", "too_long": "drop"}, {}, r"data\.too_long: drop, but max_prompt_tokens is null"),
        ({"path": "a", "too_long": "left"}, {}, r"data\.too_long: got str 'left', expected one of error, drop, cut"),
        ({"path": "a", "family": ""}, {}, r"data\.family: '', expected the name of a task family"),
        ({"path": "a", "streaming": True}, {}, r"data\.streaming: true, but max_prompt_tokens is null"),
        ({"path": "a", "shuffle_buffer": 0}, {}, r"data\.shuffle_buffer: 0, expected at least 1"),
        (
            [{"path": "a", "streaming": True, "max_prompt_tokens": 9}],
            {},
            r"data\[0\]\.streaming: true in a list, expected one data set under data",
        ),
        (
            {"path": "a", "streaming": True, "max_prompt_tokens": 9},
            {"max_steps": -1},
            r"trainer\.max_steps: missing, and data\.streaming is true",
        ),
        (
            {"path": "a", "streaming": True, "max_prompt_tokens": 9},
            {"dataloader_num_workers": 1},
            r"trainer\.dataloader_num_workers: 1, and data\.streaming is true, expected 0",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_named(
    raw: dict[str, Any], data: Any, trainer: dict[str, Any], complaint: str
) -> None:
    raw["trainer"] |= trainer
    with pytest.raises(SettingsError, match=f"^(?:{complaint})"):
        parse_config(raw | {"data": data})


@pytest.mark.parametrize(
    ("evaluation", "complaint"),
    [
        ({"data": []}, r"evaluation\.data: an empty list"),
        ({"data": [{"path": "a", "share": 2}]}, r"evaluation\.data\[0\]\.share: 2.0, but an evaluation reads every"),
        (
            {"data": {"path": "a", "streaming": True, "max_prompt_tokens": 9}},
            r"evaluation\.data\.streaming: true, but an evaluation reads the same prompts",
        ),
        ({"data": {"path": "a"}, "prompts": 0}, r"evaluation\.prompts: 0, expected at least 1 or null"),
    ],
)
def test_held_out_data_that_cannot_be_served_are_named(
    raw: dict[str, Any], evaluation: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(SettingsError, match=f"^{complaint}"):
        parse_config(raw | {"evaluation": evaluation})


def test_a_mistake_in_the_only_data_set_is_answered_with_its_name_here(raw: dict[str, Any]) -> None:
    """The section may be a list, too, but the hint is that for a mapping."""
    with pytest.raises(
        SettingsError, match=r"^data\.prompt_key: unknown setting; here verl's data\.prompt_key is data\.prompt_col"
    ):
        parse_config(raw | {"data": {"path": "a", "prompt_key": "question"}})
    config = parse_config(raw)
    assert len(load_prompts(config.data)) == 16


def test_the_configs_of_the_page_are_understood(raw: dict[str, Any]) -> None:
    page = Path(__file__).parents[2] / "maestro_fast" / "data" / "README.md"
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)

    assert len(blocks) == 3
    for block in blocks:
        parse_config(raw | yaml.safe_load(block))


def test_the_paths_of_a_list_start_in_the_folder_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    write(tmp_path / "conf" / "a.jsonl", [{"prompt": "a"}])
    config = tmp_path / "conf" / "run.yaml"
    config.write_text("data: [{path: a.jsonl}, {path: none.jsonl}]\nevaluation: {data: [{path: a.jsonl}]}\n")
    values = read_config(config)

    assert values["data"][0]["path"] == values["evaluation"]["data"][0]["path"] == str(tmp_path / "conf" / "a.jsonl")
    with pytest.raises(SettingsError, match=r"^data\[1\]\.path: there is no file /.*/none\.jsonl"):
        check_paths(values)
