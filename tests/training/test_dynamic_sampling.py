"""Dynamic sampling fills a batch with groups that have a signal, says what that cost, and is resumed exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_fast.training import MaestroTrainer
from maestro_fast.training.step import Step
from tests.training.test_trainer import parameters, run

WEIGHTS: list[Any] = [
    "equal",
    {"type": "conductor", "period": 1, "learning_rate": 0.05},
    {"type": "conductor", "context": "reference_prompt_mean", "period": 1},
    "saw",
    "anchored",
]


@pytest.fixture
def sparse(raw_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run in which groups of half of the prompts have no signal: their rewards are the same for all responses."""
    rows = [json.loads(line) for line in Path(raw_config["data"]["path"]).read_text().splitlines()]
    lines = [json.dumps(row | {"prompt": f"{row['prompt']} {i}", "live": i % 2}) for i, row in enumerate(rows)]
    Path(raw_config["data"]["path"]).write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "own.py").write_text(
        "def mine(completion_ids, live, **columns):\n"
        "    return [float(sum(ids) % 7) * on for ids, on in zip(completion_ids, live)]\n"
        "def utility(completion_ids, live, **columns):\n"
        "    return [float(sum(ids) % 3) if on else None for ids, on in zip(completion_ids, live)]\n"
        "def other(completion_ids, live, **columns):\n"
        "    return [float(sum(ids) % 5) * on for ids, on in zip(completion_ids, live)]\n",
        encoding="utf-8",
    )
    raw_config["rewards"] = [f"{tmp_path}/own.py:mine", f"{tmp_path}/own.py:other"]
    raw_config["weights"] = "equal"
    raw_config["batch"] |= {"no_signal": "refill", "max_refills": 8}
    return raw_config


def logged(trainer: MaestroTrainer) -> dict[str, float]:
    """The figures of the first step."""
    return next(entry for entry in trainer.state.log_history if "dynamic_sampling/no_signal" in entry)


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: w if isinstance(w, str) else str(w.get("context", "own")))
@pytest.mark.parametrize("micro_batch", [4, 16])
def test_no_group_without_a_signal_is_left(sparse: dict[str, Any], weights: Any, micro_batch: int) -> None:
    sparse["weights"], sparse["batch"]["micro_batch"] = weights, micro_batch
    if weights == "anchored":
        sparse["anchor"] = sparse["rewards"][0].replace("mine", "utility")
    trainer, records = run(sparse, trainer__logging_steps=1)
    figures = logged(trainer)

    for record in records:
        assert not record.degenerate_B.any()
        groups = [record.prompts[i] for i in range(0, 16, 4)]
        assert len(set(groups)) == 4  # No prompt stands twice in a batch.
        assert all(record.prompts[i] == record.prompts[i // 4 * 4] for i in range(16))
    assert figures["dynamic_sampling/no_signal"] > 0
    assert figures["dynamic_sampling/no_signal_left"] == 0
    assert figures["dynamic_sampling/refills"] >= 1
    assert figures["dynamic_sampling/extra_tokens"] > 0
    assert figures["dynamic_sampling/prompts"] > 4
    assert figures["batch/left_out"] == 0


def test_a_batch_that_needs_no_refill_is_the_batch_without(steady: dict[str, Any]) -> None:
    """The weight policy's state, the draws and the parameters are those of a run without dynamic sampling."""
    steady["weights"] |= {"mode": "sample"}
    results = []
    for no_signal in ("train", "refill"):
        trainer, records = run(steady, run_dir=f"{steady['run_dir']}-{no_signal}", batch__no_signal=no_signal)
        assert not any(record.degenerate_B.any() for record in records)
        results.append((parameters(trainer), trainer.step.weights.state_dict(), records[-1].weights_BK))

    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("no_signal", ["refill", "drop"])
def test_silent_groups_beyond_the_bound_are_left_out(sparse: dict[str, Any], no_signal: str) -> None:
    sparse["data"]["limit"] = 4 if no_signal == "refill" else 16  # So there are no others to take.
    trainer, records = run(
        sparse, batch__no_signal=no_signal, loss__kl_coef=0.1, trainer__max_steps=1, trainer__logging_steps=1
    )
    figures = next(entry for entry in trainer.state.log_history if "batch/left_out" in entry)

    degenerate = records[0].degenerate_B
    assert 0 < degenerate.sum() < 16
    assert figures["batch/left_out"] == pytest.approx(degenerate.float().mean().item())
    if no_signal == "refill":
        assert figures["dynamic_sampling/refills"] == 0
        assert figures["dynamic_sampling/no_signal_left"] == figures["dynamic_sampling/no_signal"]


@pytest.mark.parametrize("normalization", ["dapo", "grpo"])
def test_dropped_groups_and_masked_responses_are_in_no_forward(
    sparse: dict[str, Any], monkeypatch: pytest.MonkeyPatch, normalization: str
) -> None:
    """A dropped group counts nowhere; a masked response counts where the loss is a mean over responses, as in TRL."""
    sparse["batch"] |= {"no_signal": "drop", "truncated": "mask", "micro_batch": 16}
    sparse["loss"] = {"normalization": normalization}
    seen = []
    split = Step._micro_batches

    def spy(step: Step, *args: Any) -> Any:
        batches = split(step, *args)
        seen.append((args[0].rollouts.truncated_B, args[1].degenerate, batches))
        return batches

    monkeypatch.setattr(Step, "_micro_batches", spy)
    _, records = run(sparse, trainer__max_steps=2)

    for truncated_B, degenerate_B, batches in seen:
        members = [j for batch in batches for j in batch.members]
        live = (~truncated_B & ~degenerate_B).nonzero().flatten().tolist()
        masked = [j for batch in batches if batch.token_mask_C is not None for j in batch.members]
        assert sorted(members) == sorted(live) or (not live and masked == members)
        tokens = sum(len(ids) for b in batches for ids in b.sequences.completion_ids if b.token_mask_C is None)
        divisor = tokens if normalization == "dapo" else int((~degenerate_B).sum())
        assert all(batch.normalizer == max(divisor, 1) for batch in batches)
    assert any((~t & ~d).any() and not (~t & ~d).all() for t, d, _ in seen)
    assert any(record.truncated_B.any() for record in records)


@pytest.mark.parametrize("reads_reference", [False, True])
def test_micro_batches_without_a_response_change_no_figure(sparse: dict[str, Any], reads_reference: bool) -> None:
    """Of eight micro-batches four are empty: their forward gives log-probs of 0 for a response that does not count."""
    path = Path(sparse["data"]["path"]).with_name("my_loss.py")
    path.write_text(
        "def loss(inputs):\n    return ((inputs.ref_logprobs - inputs.logprobs) * inputs.token_mask).sum(), {}\n",
        encoding="utf-8",
    )
    sparse["batch"] |= {"no_signal": "drop", "prompts_per_batch": 8, "micro_batch": 4}
    sparse["rewards"] = sparse["rewards"][:1]
    if reads_reference:
        sparse["loss"] = {"type": "function", "function": f"{path}:loss", "needs_reference": True}
    trainer, _ = run(sparse, trainer__max_steps=1, trainer__logging_steps=1)
    figures = next(entry for entry in trainer.state.log_history if "batch/left_out" in entry)

    assert figures["batch/left_out"] >= 0.5
    assert figures["sampling/logprob_gap_max"] < 1e-5
    assert figures["kl" if reads_reference else "ratio/mean"] == pytest.approx(0 if reads_reference else 1, abs=1e-6)


@pytest.mark.parametrize("normalization", ["grpo", "bnpo"])
def test_each_update_is_divided_by_what_it_holds(
    sparse: dict[str, Any], monkeypatch: pytest.MonkeyPatch, normalization: str
) -> None:
    """With three live groups, one update has four responses, and the other eight."""
    sparse["batch"] |= {"no_signal": "drop", "prompts_per_batch": 6, "micro_batch": 4, "updates_per_batch": 2}
    sparse["loss"] = {"normalization": normalization}
    seen = []
    split = Step._micro_batches

    def spy(step: Step, *args: Any) -> Any:
        seen.append(split(step, *args))
        return seen[-1]

    monkeypatch.setattr(Step, "_micro_batches", spy)
    run(sparse, trainer__max_steps=4)

    held = []
    for batches in seen:
        for update in (batches[:3], batches[3:]):
            live = [batch for batch in update if not batch.is_empty]
            held.append(sum(len(batch.members) for batch in live))
            for batch in live:
                tokens = int(batch.cu_seqlens[-1])
                assert batch.normalizer == (held[-1] if normalization == "grpo" else tokens * len(live))
    assert len(set(held)) > 1 and any(batch.is_empty for batches in seen for batch in batches)


def test_a_resumed_run_draws_the_same_refills(sparse: dict[str, Any], tmp_path: Path) -> None:
    """Also where it stops between the updates of one batch."""
    sparse["batch"] |= {"updates_per_batch": 2, "micro_batch": 4}
    sparse["weights"] = {"type": "conductor", "period": 1, "learning_rate": 0.05}
    sparse["trainer"] |= {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    whole, records = run(sparse)
    run_dir = Path(sparse["run_dir"])
    shutil.rmtree(run_dir / "final")
    for folder in run_dir.glob("checkpoint-*"):
        if folder.name != "checkpoint-3":
            shutil.rmtree(folder)
    resumed, again = run(sparse, resume=True)

    assert [record.prompts for record in again] == [record.prompts for record in records[2:]]
    assert resumed._origins.rows_N == whole._origins.rows_N
    torch.testing.assert_close(parameters(resumed), parameters(whole), rtol=0, atol=0)
