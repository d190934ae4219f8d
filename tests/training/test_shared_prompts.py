"""A run that computes shared prompts once is the run that computes them for each response, and resumes bit by bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from maestro_fast.model.layouts import Layouts
from maestro_fast.model.rows import Rows, Sequences
from maestro_fast.reporting.recorded_run import recorded_train
from tests.training.test_checkpoint import assert_same_run, killed_and_resumed
from tests.training.test_trainer import parameters, run


def with_sections(raw: dict[str, Any], name: str, sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A run in a directory of its own, with some settings changed."""
    raw = copy.deepcopy(raw) | {"run_dir": f"{raw['run_dir']}-{name}"}
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values}
    return raw


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int, int]]:
    """Whether the rows of each forward share prompts, and the tokens of its rows and of its sequences.

    A forward of fewer than 8 responses is a trial of the layouts.
    """
    seen: list[tuple[bool, int, int]] = []
    original = Layouts.rows_of

    def spy(layouts: Layouts, sequences: Sequences) -> Rows:
        rows = original(layouts, sequences)
        if len(sequences) >= 8:
            seen.append((rows.trees is not None, rows.input_ids.numel(), sum(sequences.lengths)))
        return rows

    monkeypatch.setattr(Layouts, "rows_of", spy)
    return seen


@pytest.mark.parametrize(
    "sections",
    [
        {"batch": {"updates_per_batch": 2}, "loss": {"kl_coef": 0.1}},
        {"batch": {"micro_batch": 16}, "loss": {"kl_coef": 0.1, "entropy_coef": 0.01}, "model": {"lora": {"r": 2}}},
    ],
    ids=["scored before, several updates", "judged in the training forward, adapters"],
)
def test_a_run_with_shared_prompts_is_the_run_without(
    steady: dict[str, Any], counted: list[tuple[bool, int, int]], sections: dict[str, dict[str, Any]]
) -> None:
    """Scoring, reference and training forwards share; weights of the Conductor and of the policy are the same."""
    steady["trainer"] |= {"learning_rate": 0.05}
    results = []
    for attention in ("sdpa", "shared"):
        raw = with_sections(steady, attention, sections)
        raw["model"] |= {"attention": attention}
        counted.clear()
        trainer, records = run(raw)
        results.append((parameters(trainer), trainer.step.weights.state_dict(), records, [*counted]))
    (plain, plain_conductor, plain_records, without), (shared, conductor, records, with_shared) = results

    assert not any(is_shared for is_shared, *_ in without)
    assert all(is_shared for is_shared, *_ in with_shared) and len(with_shared) == len(without) >= 4
    assert sum(tokens for _, tokens, _ in with_shared) < 0.7 * sum(tokens for _, _, tokens in with_shared)
    for ours, theirs in zip(records, plain_records, strict=True):
        torch.testing.assert_close(ours.advantages_B, theirs.advantages_B, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.weights_BK, theirs.weights_BK, rtol=1e-4, atol=1e-5)
    for name, value in conductor.items():
        torch.testing.assert_close(value, plain_conductor[name], rtol=1e-4, atol=1e-4, msg=name)
    for name, value in shared.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("attention", ["shared", "auto"])
def test_a_killed_run_with_shared_prompts_repeats_the_uninterrupted_one(
    raw_config: dict[str, Any], counted: list[tuple[bool, int, int]], attention: str
) -> None:
    """It is resumed between the two updates of a batch."""
    sections = {
        "model": {"attention": attention},
        "batch": {"updates_per_batch": 2},
        "loss": {"kl_coef": 0.1},
        "trainer": {"max_steps": 4, "save_steps": 1},
    }
    whole, killed = (with_sections(raw_config, name, sections) for name in ("whole", "killed"))
    recorded_train(whole)
    killed_and_resumed(killed, step=4)

    assert_same_run(whole["run_dir"], killed["run_dir"])
    assert counted and all(is_shared for is_shared, *_ in counted)
