"""The quickstart: makes two tiny models, trains with the anchored Conductor and in two other ways, and compares."""

from __future__ import annotations

import contextlib
import json
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from maestro_fast.quickstart.arms import ANCHORED, ARMS, EXAMPLE, example_config, run_config
from maestro_fast.quickstart.control import control_run, has_checkpoint, wait_for
from maestro_fast.quickstart.held_out import save, split, utilities, utility_table, verdict
from maestro_fast.quickstart.model import make_checkpoint
from maestro_fast.quickstart.reward_model import HeldOut, make_reward_model
from maestro_fast.reporting import Table, family_spread, format_table, read_jsonl
from maestro_fast.reporting.json_lines import METRICS_FILE
from maestro_fast.reporting.prompt_weights import family_table, residual_sentence, spread_sentence
from maestro_fast.reporting.recorded_run import recorded_train, try_report
from maestro_fast.training import DataConfig, load_prompts, parse_config
from maestro_fast.training.prompt_weights import load_conductor, prompt_weights
from maestro_fast.training.run_directory import locked

WARM_START = "warm start"


def quickstart(
    out: Path,
    *,
    resume: bool = False,
    epochs: int = 8,
    reward_epochs: int = 4,
    limit: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Runs everything and prints the outcome.

    The three runs go side by side, each on one thread, since a model this small gains nothing from a second thread. Two
    cores share three runs in less time than they need for two runs and then the third.

    Args:
        out: The directory of the models and of all runs. Without ``resume`` it must be empty or not exist yet.
        resume: Whether finished parts in ``out`` are kept, and unfinished runs go on from their last checkpoints. The
            other arguments must be the same as before.
        epochs: The number of epochs of the warm start.
        reward_epochs: The number of epochs in which the reward model is trained.
        limit: The number of prompts that are trained on; None takes all.
        settings: Settings that replace those of the bundled config, by dotted name.

    Returns:
        The directory of the run with the anchored Conductor.

    Raises:
        FileExistsError: ``out`` is not empty, and ``resume`` is not set.
        SettingsError: Another quickstart, or a control run of one, still works in ``out``.
    """
    began = time.monotonic()
    if out.exists() and any(out.iterdir()) and not resume:
        raise FileExistsError(f"--out: {out} is not empty, expected a new directory, or --resume")
    disable_progress_bar()  # hides the bars of loading and saving; every long part has its own bar
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, "--out") as lock, _one_thread(), _resumable(out):
        print(f"1/4  A tiny Qwen3, warm-started on the drafts in {EXAMPLE.name}/prompts.jsonl", flush=True)
        loss = _made(out / "model", lambda folder: make_checkpoint(EXAMPLE / "prompts.jsonl", folder, epochs=epochs))
        print(f"     {loss:.2f} nats a token at the end")
        print(f"2/4  A tinier reward model, from the preferences in {EXAMPLE.name}/pairs.jsonl", flush=True)
        judged = HeldOut(
            *_made(out / "reward_model", lambda folder: make_reward_model(EXAMPLE, folder, epochs=reward_epochs))
        )
        print(textwrap.indent(textwrap.fill(f"it {judged}", 95), "     "))
        split(EXAMPLE / "prompts.jsonl", out, limit)
        _train_all(out, settings, lock)
        _conclude(out, judged, began)
    return out / ANCHORED


def _train_all(out: Path, settings: Mapping[str, Any] | None, lock: int) -> None:
    """Trains the anchored run in this process, and the others beside it."""
    configs = {arm: run_config(out, arm, settings) for arm in ARMS}
    for arm, raw in configs.items():
        raw["trainer"]["disable_tqdm"] = arm != ANCHORED  # A log file has no use for a bar.
    share = configs[ANCHORED]["anchor"]["labels"]["share"]
    with contextlib.ExitStack() as stack:
        controls = {
            arm: stack.enter_context(control_run(raw, out, lock)) for arm, raw in configs.items() if arm != ANCHORED
        }
        print(f"3/4  GRPO with the anchored Conductor, which learns from utilities of {share:.0%} of the prompts")
        print(f"     Beside it run {' and '.join(ARMS[arm].label for arm in controls)}", flush=True)
        if not (out / ANCHORED / "final").exists():
            recorded_train(configs[ANCHORED], resume=has_checkpoint(out / ANCHORED))
        print("4/4  When these have ended, too, all policies are measured on held-out prompts", flush=True)
        for arm, control in controls.items():
            wait_for(control, out / f"{arm}.log")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Lets torch use one thread inside the context."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Tells who stops the quickstart how to go on."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        stopped.add_note(f"Go on with: maestro-fast quickstart --out {out} --resume")
        raise


def _made(folder: Path, make: Callable[[Path], Any]) -> Any:
    """Lets ``make`` fill ``folder`` unless that has been done before, and returns what ``make`` returned.

    The folder gets its name only when it is complete, so an interrupted quickstart never leaves a part of it.
    """
    outcome = "outcome.json"
    if not folder.exists():
        unfinished = folder.with_name(f".{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        made = make(unfinished)
        (unfinished / outcome).write_text(json.dumps(made), encoding="utf-8")
        unfinished.rename(folder)
    return json.loads((folder / outcome).read_text(encoding="utf-8"))


def _conclude(out: Path, judged: HeldOut, began: float) -> None:
    """Measures all policies on held-out prompts, prints tables and sentences, and writes the report."""
    run, raw = out / ANCHORED, example_config(out)
    lines = read_jsonl(run / METRICS_FILE)
    held_out = load_prompts(DataConfig(str(out / "held_out.jsonl")), parse_config(raw).chat)
    models = {WARM_START: out / "model"} | {own.label: out / arm / "final" for arm, own in ARMS.items()}
    found = {label: utilities(raw, model, held_out) for label, model in models.items()}
    save(found, out / "held_out_utilities.json")
    weights = prompt_weights(load_conductor(run / "final"), held_out)
    by_family = family_table(weights)
    tables = [utility_table(found), *([by_family] if by_family else []), _change_table(lines)]
    summary = [
        *verdict(found, ARMS[ANCHORED].label, WARM_START),
        f"Utilities were known for {_mean(lines, 'anchor/labelled'):.0%} of the responses in training.",
        f"Weights on held-out prompts. {spread_sentence(weights) or ''}",
        residual_sentence(run / METRICS_FILE),
        f"The reward model behind `preference` {judged}.",
    ]
    for table in tables:
        print("\n" + format_table(table))
    print("\n" + "\n".join(textwrap.fill(sentence, 100) for sentence in summary))
    others = {own.label: out / arm for arm, own in ARMS.items() if arm != ANCHORED}
    where = try_report(run, title="Quickstart", summary=summary, tables=tables, compare=others)
    print(f"\n{where}\nPrompt by prompt: maestro-fast conductor show {run}/final --on {out}/held_out.jsonl")
    print(f"{time.monotonic() - began:.0f} seconds in all.")


def _change_table(lines: list[dict[str, Any]]) -> Table:
    """The mean reward of each family over the first and the last third of the anchored run."""
    third = max(1, len(lines) // 3)
    spread = family_spread(lines)
    rows = []
    for family in spread.families:
        keys = [f"families/{family}/rewards/{name}" for name in spread.rewards]
        rows.append((family, *(f"{_mean(lines[:third], k):.2f} > {_mean(lines[-third:], k):.2f}" for k in keys)))
    return Table("Anchored: mean reward, first third > last third of the run", ("family", *spread.rewards), tuple(rows))


def _mean(lines: list[dict[str, Any]], key: str) -> float:
    """The mean over the lines that have a value under the key; NaN if none has."""
    values = [line[key] for line in lines if line.get(key) is not None]
    return sum(values) / len(values) if values else float("nan")
