"""Batches with little in them: an empty completion, a group from which every reward abstains, no signal at all."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from maestro_fast.generation import TransformersGenerator
from maestro_fast.records import Rollouts
from maestro_fast.reporting.recorded_run import recorded_train
from tests.faults.reading import metrics, names_step, rollouts

OWN = """
def absent(prompts, completions, **columns):
    first = prompts[0]
    return [None if prompt == first else float(len(text)) for prompt, text in zip(prompts, completions)]

def silent(completions, **columns):
    return [None] * len(completions)

def constant(completions, **columns):
    return [1.0] * len(completions)

def length(completions, **columns):
    assert all(isinstance(text, str) for text in completions)
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    return f"{tmp_path}/own.py"


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch has a response without any token, and one that ends at once."""
    generate = TransformersGenerator.generate

    def with_empty(*args: Any, **kwargs: Any) -> Rollouts:
        found = generate(*args, **kwargs)
        ids, texts = [[], [0], *found.completion_ids[2:]], ["", "", *found.completions[2:]]
        truncated_B = found.truncated_B.clone()
        truncated_B[:2] = False
        return replace(found, completion_ids=ids, completions=texts, truncated_B=truncated_B, sampling_logprobs_C=None)

    monkeypatch.setattr(TransformersGenerator, "generate", with_empty)


@pytest.mark.parametrize(
    ("micro_batch", "weights"),
    [
        (8, "equal"),
        (16, "conductor"),
        *(pytest.param(2, name, marks=pytest.mark.long) for name in ("equal", "conductor")),
    ],
    ids=["scored before", "judged in the training forward", "alone", "alone, with a Conductor"],
)
def test_an_empty_completion_is_judged_and_trained_on_as_any_other(
    raw: dict[str, Any], own: str, empty: None, micro_batch: int, weights: str
) -> None:
    raw |= {"rewards": [f"{own}:length", "format"], "weights": weights, "loss": {"kl_coef": 0.1}}
    raw["batch"]["micro_batch"] = micro_batch
    trainer = recorded_train(raw)

    assert trainer.state.global_step == 3
    for line in metrics(raw):
        assert math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])
        assert line["completions/min_length"] == 0.0
    for step in (1, 2, 3):
        first, second = rollouts(raw, step)[:2]
        assert [(row["completion"], row["length"], row["rewards"]["length"]) for row in (first, second)] == [
            ("", 0, 0.0),
            ("", 1, 0.0),
        ]
        assert first["advantage"] < 0 > second["advantage"]


def test_a_group_from_which_every_reward_abstains_teaches_nothing(raw: dict[str, Any], own: str) -> None:
    raw["rewards"] = [f"{own}:absent"]
    trainer = recorded_train(raw)

    assert trainer.state.global_step == 3
    for line in metrics(raw):
        assert line["rewards/absent/abstained"] == 0.25 and math.isfinite(line["loss"])
    for row in rollouts(raw, 2)[:4]:  # Each line names the step, the prompt and the reward.
        assert (row["rewards"], row["advantage"], row["degenerate"]) == ({"absent": None}, 0.0, True)
    assert any(row["advantage"] != 0 for row in rollouts(raw, 2)[4:])


def test_a_batch_from_which_every_reward_abstains_is_told(
    raw: dict[str, Any], own: str, caplog: pytest.LogCaptureFixture
) -> None:
    raw["rewards"] = [f"{own}:silent"]
    recorded_train(raw)
    (said,) = [text for text in caplog.messages if text.startswith("every reward")]
    assert said.startswith("every reward (silent) abstained on all 16 completions of a batch, in ") and names_step(
        said, 1
    )
    assert all(row["prompt"] in said for row in rollouts(raw, 1))
    assert [line["loss"] for line in metrics(raw)] == [0.0] * 3


@pytest.mark.parametrize("no_signal", ["train", "drop", pytest.param("refill", marks=pytest.mark.long)])
def test_a_run_without_a_signal_leaves_the_policy_as_it_was(
    raw: dict[str, Any], own: str, no_signal: str, caplog: pytest.LogCaptureFixture
) -> None:
    raw["rewards"] = [f"{own}:constant"]
    raw["batch"]["no_signal"] = no_signal
    with caplog.at_level(logging.WARNING):
        trainer = recorded_train(raw)

    assert trainer.state.global_step == 3
    before, after = (
        load_file(Path(folder) / "model.safetensors") for folder in (raw["model"]["path"], f"{raw['run_dir']}/final")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [(line["loss"], line["grad_norm"], line["frac_reward_zero_std"]) for line in metrics(raw)] == [(0, 0, 1)] * 3
    assert all(row["degenerate"] for step in (1, 2, 3) for row in rollouts(raw, step))
    (said,) = [text for text in caplog.messages if "taught" in text or "nothing was learnt from it" in text]
    assert said.startswith("reward 'constant' gave 1 to all 48 completions of the first 3 generation batches")
