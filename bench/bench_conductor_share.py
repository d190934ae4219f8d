"""Measures what the Conductor adds to a training step of the quickstart, on the CPU.

The same run is made with the Conductor and with equal weights. The policy's learning rate is 0, so it samples the same
completions in both, and every forward and backward is the same work. An entropy reward makes both read the training
forward. What remains is the Conductor: its pooling, its weights, its update.

It is measured twice, by the clocks of its stages and as the difference of whole steps. For the latter, runs come in
blocks, Conductor - equal - equal - Conductor or the other way round by turns, so that a drift of the machine cancels
within a block. A block is one figure of the interval, because what disturbs a run disturbs all of its steps. The first
run of either kind is thrown away. The processor time of the process stands beside the wall clock; it does not count
what other processes take.

The target is less than 2 % of a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from bench.table import bound_of
from bench.tables import emit
from maestro_fast.evals.statistics import paired_difference
from maestro_fast.model import forward
from maestro_fast.ops import pool_hidden
from maestro_fast.quickstart.arms import EXAMPLE, example_config
from maestro_fast.quickstart.model import make_checkpoint
from maestro_fast.quickstart.reward_model import make_reward_model
from maestro_fast.records import StepRecord
from maestro_fast.settings import override
from maestro_fast.training import parse_config, train

BLOCKS, STEPS, WARM_UP = 8, 6, 1  # blocks of four runs; steps of a run; steps at its start that are not counted
TARGET = bound_of("conductor_share, CPU")  # per cent of a step
CONDUCTOR_STAGES = ("weights", "advantages", "conductor_update")  # one op makes weights and advantages together
CLOCKS = "all of these, by the clocks"


@dataclass
class Run:
    """What a run measured, step by step.

    Attributes:
        stages: The seconds by stage.
        pooling: The seconds of pooling, which are part of a stage.
        processor: The seconds of processor time since the end of the step before.
        records: What the trainer recorded.
        source: The forward that the hidden states came from.
    """

    stages: list[dict[str, float]] = field(default_factory=list)
    pooling: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)
    source: str = ""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's two models after one epoch of training. They are as fast as the finished ones."""
    out = tmp_path_factory.mktemp("quickstart")
    make_checkpoint(EXAMPLE / "prompts.jsonl", out / "model", epochs=1)
    make_reward_model(EXAMPLE, out / "reward_model", epochs=1)
    return out


def run_once(models: Path, name: str, weights: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Makes one run of the quickstart's config. ``weights`` replaces its weight policy unless it is None."""
    raw = example_config(models)
    changes = {"max_steps": STEPS, "learning_rate": 0.0, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    override(raw, "run_dir", str(models / name))
    for key, value in changes.items():
        override(raw, f"trainer.{key}", value)
    if weights is not None:
        raw["weights"] = weights
    run, spent, begun = Run(), [0.0], [time.process_time()]

    def timed_pooling(*args: Any, **options: Any) -> torch.Tensor:
        start = time.perf_counter()
        pooled = pool_hidden(*args, **options)
        spent[0] += time.perf_counter() - start
        return pooled

    def note(timings: dict[str, float]) -> None:
        run.stages.append(timings)
        run.pooling.append(spent[0])
        now = time.process_time()
        run.processor.append(now - begun[0])
        spent[0], begun[0] = 0.0, now

    monkeypatch.setattr(forward, "pool_hidden", timed_pooling)
    trainer = train(parse_config(raw), raw, observers=[run.records.append], timing_observers=[note])
    run.source = trainer.step.scoring.source
    return run


def assert_same_work(ours: Run, equal: Run) -> None:
    """Refuses to time different work: both runs have the same completions and rewards, and only the weights differ."""
    assert ours.source == equal.source == "training"
    assert len(ours.records) == len(equal.records) == STEPS
    for one, other in zip(ours.records, equal.records, strict=True):
        assert one.completions == other.completions
        torch.testing.assert_close(one.rewards_BK, other.rewards_BK, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(one.lengths_B, other.lengths_B)
    expected = torch.stack([record.expected_weights_BK for record in ours.records])
    assert (expected[-1] - 1 / expected.shape[-1]).abs().max() > 1e-3, "the Conductor learned nothing"
    assert all((record.weights_BK == record.weights_BK[0, 0]).all() for record in equal.records)


def test_conductor_share(
    benchmark: Any, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks: list[tuple[list[Run], list[Run]]] = []

    def run(kind: str, name: str) -> Run:
        return run_once(models, name, None if kind == "conductor" else {"type": "equal"}, monkeypatch)

    def one_block() -> None:
        outer, inner = ("conductor", "equal") if len(blocks) % 2 else ("equal", "conductor")
        runs: dict[str, list[Run]] = {"conductor": [], "equal": []}
        for place, kind in enumerate((outer, inner, inner, outer)):
            runs[kind].append(run(kind, f"{kind}-{len(blocks)}-{place}"))
        for ours, equal in zip(*runs.values(), strict=True):
            assert_same_work(ours, equal)
        blocks.append((runs["conductor"], runs["equal"]))

    for kind in ("conductor", "equal"):
        run(kind, f"{kind}-warm-up")
    benchmark.pedantic(one_block, rounds=BLOCKS, iterations=1)
    report(benchmark, capsys, blocks)


def report(benchmark: Any, capsys: pytest.CaptureFixture[str], blocks: list[tuple[list[Run], list[Run]]]) -> None:
    """Prints the share by stage and as the difference of whole steps, and leaves both with pytest-benchmark."""

    def by_block(seconds: Callable[[Run, int], float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives the mean of each block over its counted steps, with the Conductor and with equal weights."""

        def of(runs: list[Run]) -> float:
            return mean(seconds(run, i) for run in runs for i in range(WARM_UP, STEPS))

        return torch.tensor([of(ours) for ours, _ in blocks]), torch.tensor([of(equal) for _, equal in blocks])

    def shared(name: str) -> Callable[[Run, int], float]:
        return lambda run, i: run.stages[i].get(name, 0.0)

    (pooling, _), (wall, equal_wall) = by_block(lambda run, i: run.pooling[i]), by_block(shared("total"))
    processor, equal_processor = by_block(lambda run, i: run.processor[i])
    stages = {name: by_block(shared(name)) for name in CONDUCTOR_STAGES}
    nothing = torch.zeros(len(blocks))
    of_stages = torch.stack([ours - equal for ours, equal in stages.values()]).sum(0)
    # Both runs pool, since the trainer reads the states off its forward whoever wants them.
    pairs = {
        "pooling": (pooling, nothing, equal_wall),
        **{name: (ours, equal, equal_wall) for name, (ours, equal) in stages.items()},
        CLOCKS: (pooling + of_stages, nothing, equal_wall),
        "whole steps and pooling, wall clock": (wall + pooling, equal_wall, equal_wall),
        "whole steps and pooling, processor time": (processor + pooling, equal_processor, equal_processor),
    }
    lines = [f"{'the Conductor, minus equal weights':42}{'ms a step':>11}{'% of a step':>13}{'95 % interval':>16}"]
    rows = {}
    for name, (ours, equal, whole) in pairs.items():
        gap, step = paired_difference(ours, equal), whole.mean().item()
        rows[name] = ms, per_cent, half = 1e3 * gap.mean, 100 * gap.mean / step, 100 * gap.half_width / step
        lines.append(f"{name:42}{ms:11.3f}{per_cent:13.2f}{'+- ' + format(half, '.2f'):>16}")
    _, per_cent, half = rows[CLOCKS]
    verdict = "met" if per_cent + half < TARGET else "missed"
    lines.append(f"target: {CLOCKS} below {TARGET:g} % of a step: {per_cent:.2f} +- {half:.2f} %, {verdict}")
    step_ms, steps = 1e3 * equal_wall.mean().item(), 2 * (STEPS - WARM_UP)
    title = (
        f"Quickstart step of {step_ms:.0f} ms, {len(blocks)} blocks of {steps} pairs of steps with identical forwards"
    )
    benchmark.extra_info |= {"step_ms": step_ms, "blocks": len(blocks), "share": rows, "target": verdict}
    emit(capsys, title, lines)
