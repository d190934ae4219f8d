"""Figures of a batch over all processes, and seconds by stage."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState

from maestro_fast.records import TOKEN_COUNTS, PolicyOutputs, Prompts, Rollouts, StepRecord
from maestro_fast.training import metrics, parse_config, train
from maestro_fast.training.metrics import (
    MetricMeans,
    SamplerGaps,
    StageClock,
    policy_metrics,
    reward_figures,
    sampler_metrics,
)
from maestro_fast.training.progress import StageProgress, bar_figures
from tests.training.test_trainer import run

NAN = float("nan")


def test_the_reward_is_the_one_that_trl_logs() -> None:
    """A reward that abstains adds nothing; a response from which all abstain is left out."""
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    rewards_BK = torch.tensor([[1.0, 2.0], [NAN, 4.0], [NAN, NAN], [0.5, -1.0]])
    weights_BK = torch.tensor([[0.5, 0.5], [0.2, 0.8], [0.5, 0.5], [1.0, 0.0]])
    totals_B = (rewards_BK * weights_BK).nansum(dim=1)  # This and the next four lines are what TRL does.
    totals_B[rewards_BK.isnan().all(dim=1)] = NAN
    found = reward_figures(rewards_BK, weights_BK)

    assert found["reward"] == pytest.approx(totals_B.nanmean().item()) == pytest.approx((1.5 + 3.2 + 0.5) / 3)
    assert found["reward_std"] == pytest.approx(nanstd(totals_B).item())
    assert reward_figures(rewards_BK[2:3], weights_BK[2:3]) == {}
    assert reward_figures(rewards_BK[:1], weights_BK[:1]) == {"reward": 1.5}


def test_the_log_has_the_reward_of_the_batch_and_counts_steps_as_the_responses_do(raw_config: dict[str, Any]) -> None:
    """Two optimiser steps from a batch: the line of the first has the batch's means, and the responses its number."""
    raw_config["batch"] |= {"updates_per_batch": 2}
    trainer, records = run(raw_config, trainer__max_steps=4)
    lines = {line["step"]: line for line in trainer.state.log_history if "reward" in line}

    assert [record.step for record in records] == sorted(lines) == [1, 3]
    for record in records:
        reward = (record.rewards_BK * record.weights_BK).sum(1).mean().item()
        assert lines[record.step]["reward"] == pytest.approx(reward) and abs(reward) > 0.1
        assert lines[record.step]["rewards/brevity/mean"] == pytest.approx(record.rewards_BK[:, 1].mean().item())


@pytest.mark.parametrize("where", ["score", "loss", "own loss", "own loss, judged in the training forward"])
def test_the_kl_is_logged_wherever_there_is_one(raw_config: dict[str, Any], tmp_path: Any, where: str) -> None:
    """It is 0 before the first update, and a mean of k3, so never negative."""
    raw_config["advantages"] = {"profile": "maestro" if where == "score" else "grpo"}
    raw_config["loss"] = {"kl_coef": 0.1}
    if where.startswith("own loss"):
        (tmp_path / "own.py").write_text(
            "def loss(inputs):\n"
            "    assert inputs.ref_logprobs is not None\n"
            "    advantages = inputs.advantages.repeat_interleave(inputs.cu_seqlens.diff())\n"
            "    return -(inputs.logprobs * advantages).sum() / inputs.normalizer, {}\n",
            encoding="utf-8",
        )
        raw_config["loss"] = {"type": "function", "function": f"{tmp_path}/own.py:loss", "needs_reference": True}
    raw_config["batch"]["micro_batch"] = 16 if where.endswith("forward") else 8
    trainer, _ = run(raw_config, trainer__learning_rate=0.02)
    kl = [line["kl"] for line in trainer.state.log_history if "kl" in line]

    assert len(kl) == 2 and kl[0] == pytest.approx(0, abs=1e-9) and kl[1] > 1e-5


def test_the_bar_shows_rewards_that_mean_something() -> None:
    means = {"rewards/format/mean": 0.75, "rewards/brevity/mean": -0.25}
    line = {"reward": 0.512, **means, "completions/mean_length": 31.4}
    assert bar_figures(line) == "reward 0.512, format 0.75, brevity -0.25, 31 tokens"
    assert bar_figures(line | {"anchor/utility": 0.3, "kl": 0.0123}) == (
        "reward 0.512, format 0.75, brevity -0.25, utility 0.3, kl 0.0123, 31 tokens"
    )
    slash = line | {"rewards/org/judge/mean": 0.5}
    assert bar_figures(slash) == "reward 0.512, format 0.75, brevity -0.25, org/judge 0.5, 31 tokens"
    del line["rewards/brevity/mean"]
    assert bar_figures(line) == "reward 0.512, 31 tokens"


def test_the_bar_of_a_resumed_run_starts_where_the_run_does() -> None:
    bar, state = StageProgress(), TrainerState(max_steps=10, global_step=6)
    args, control = SimpleNamespace(), TrainerControl()
    bar.on_train_begin(args, state, control)  # type: ignore[arg-type]
    assert (bar.training_bar.n, bar.training_bar.initial, bar.training_bar.total) == (6, 6, 10)
    state.global_step = 7
    bar.on_step_end(args, state, control)  # type: ignore[no-untyped-call]
    assert bar.training_bar.n == 7
    bar.training_bar.close()


def share(lengths: list[int], seed: int) -> tuple[Rollouts, PolicyOutputs]:
    """The responses and outputs of one process."""
    random = torch.Generator().manual_seed(seed)
    ids = [[7] * length for length in lengths]
    ours, theirs, entropies = (torch.rand(sum(lengths), generator=random) for _ in range(3))
    rollouts = Rollouts(
        Prompts(["p"] * len(ids), [[1]] * len(ids)), ids, [""] * len(ids), torch.zeros(len(ids)).bool(), theirs
    )
    return rollouts, PolicyOutputs(ours, entropies, None)


def on_all(shares: list[tuple[Rollouts, PolicyOutputs]]) -> list[dict[str, float]]:
    """The metrics that each process gets."""
    rows: list[Tensor] = []
    for each in shares:
        policy_metrics(*each, gather=lambda row: rows.append(row) or row)
    return [policy_metrics(*each, gather=lambda row: torch.cat(rows)) for each in shares]


@pytest.mark.parametrize("lengths", [[[3, 2], [4, 1]], [[3, 2], [0, 0]]], ids=["tokens", "one without any"])
def test_every_process_gets_the_figures_of_all_tokens(lengths: list[list[int]]) -> None:
    shares = [share(each, seed) for seed, each in enumerate(lengths)]
    entropies = torch.cat([outputs.entropies_C for _, outputs in shares if outputs.entropies_C is not None]).double()
    differences = torch.cat([o.logprobs_C - r.sampling_logprobs_C for r, o in shares]).double()
    gaps = differences.abs()
    expected = {
        "entropy": entropies.mean().item(),
        "sampling/logprob_gap_mean": gaps.mean().item(),
        "sampling/logprob_gap_max": gaps.max().item(),
        "sampling/k3": (differences.exp() - 1 - differences).mean().item(),
    }

    for found in on_all(shares):
        assert found == pytest.approx(expected, rel=1e-12)


def test_nothing_is_said_of_no_tokens() -> None:
    assert on_all([share([0, 0], 0), share([0], 1)]) == [{}, {}]


def test_gaps_of_micro_batches_are_those_of_their_batch() -> None:
    gaps = SamplerGaps(lambda row: row)
    rollouts, outputs = share([3, 2, 4], 0)
    assert rollouts.sampling_logprobs_C is not None
    for _ in range(2):  # the figures of the second batch hold nothing of the first
        bounds = ((0, 3, False), (3, 5, False), (5, 9, True))
        found = [
            gaps.add(outputs.logprobs_C[a:b], rollouts.sampling_logprobs_C[a:b], last=last) for a, b, last in bounds
        ]
        expected = sampler_metrics(outputs.logprobs_C, rollouts.sampling_logprobs_C, lambda row: row)
        assert found == [{}, {}, expected]
    assert gaps.add(outputs.logprobs_C, None, last=True) == {}


def test_means_join_those_of_other_processes() -> None:
    """A process that counted a figure twice as often has twice the weight in its mean."""
    each = [MetricMeans() for _ in range(2)]
    each[0].add({"kl": 1.0, "own": 5.0})
    each[1].add({"kl": 2.0})
    each[1].add({"kl": 6.0})
    joint = MetricMeans()
    joint.join([means.state() for means in each])

    assert joint.pop() == {"kl": 3.0, "own": 5.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> tuple[StageClock, list[float]]:
    """A clock, and a list whose sum is the time that the clock reads."""
    passed = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: sum(passed))
    return StageClock(torch.device("cpu")), passed


def test_a_stage_within_another_counts_once(clock: tuple[StageClock, list[float]]) -> None:
    watch, passed = clock
    shown: list[str] = []
    watch.on_stage = shown.append
    passed.append(1.0)
    with watch.stage("train"):
        passed.append(2.0)
        with watch.stage("rewards"):
            passed.append(4.0)
        passed.append(8.0)
    passed.append(16.0)

    assert watch.lap() == {"train": 10.0, "rewards": 4.0, "total": 31.0}
    assert shown == ["train", "rewards", "train"]


def test_a_stage_that_fails_has_taken_its_time(clock: tuple[StageClock, list[float]]) -> None:
    watch, passed = clock
    with pytest.raises(RuntimeError), watch.stage("rewards"):
        passed.append(3.0)
        raise RuntimeError
    with watch.stage("train"):
        passed.append(1.0)

    assert watch.lap() == {"rewards": 3.0, "train": 1.0, "total": 4.0}
    passed.append(5.0)
    assert watch.lap() == {"total": 5.0}


def test_saving_and_evaluation_count_to_the_batch_before_them(raw_config: dict[str, Any]) -> None:
    raw_config["evaluation"] = {"data": raw_config["data"]}
    raw_config["batch"] = {"prompts_per_batch": 4, "micro_batch": 4, "updates_per_batch": 2}
    raw_config["trainer"] |= {"max_steps": 3, "save_steps": 2, "eval_steps": 2}
    lines: list[dict[str, float]] = []
    train(parse_config(raw_config), raw_config, timing_observers=[lines.append])

    assert [line["step"] for line in lines] == [1, 3]
    for line in lines:  # transformers evaluates and saves after the last step too
        assert {"generate", "train", "evaluate", "save"} < line.keys()
        stages = line.keys() - {"step", "total", *TOKEN_COUNTS}
        assert sum(line[stage] for stage in stages) <= line["total"]


def test_the_tokens_that_shared_prompts_save_are_told(
    raw_config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    raw_config["model"]["attention"] = "shared"
    raw_config["weights"] = {"type": "equal"}
    raw_config["rewards"].remove("entropy")  # Only training forwards are made.
    raw_config["batch"] = {"prompts_per_batch": 4, "micro_batch": 4}
    raw_config["trainer"] |= {"max_steps": 2}
    lines: list[dict[str, float]] = []
    records: list[StepRecord] = []
    with caplog.at_level(logging.INFO, "maestro_fast"):
        config = parse_config(raw_config)
        trainer = train(config, raw_config, timing_observers=[lines.append], observers=[records.append])

    group = config.sampling.group_size
    assert group == 4 and trainer.step.scorer.layouts.sharing == "always"
    totals = [0, 0]
    for line, record in zip(lines, records, strict=True):
        prompts = [len(trainer.processing_class(text)["input_ids"]) for text in record.prompts]
        completions = int(record.lengths_B.sum())
        computed, of_sequences = sum(prompts[::group]) + completions, sum(prompts) + completions
        assert [line[name] for name in TOKEN_COUNTS] == [computed, of_sequences]
        totals = [totals[0] + computed, totals[1] + of_sequences]
    saved = f"{100 * (1 - totals[0] / totals[1]):.0f} % saved by shared prompts"
    assert f"tokens of the run: {totals[0]:,} computed for {totals[1]:,} in the sequences, {saved}" in caplog.text
