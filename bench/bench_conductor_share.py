"""What the Conductor adds to a training step of the quickstart, on the CPU.

The same run with the Conductor and with equal weights, a pair at a time and in turn. The policy's learning rate is 0:
so it samples the same responses in both, and every forward and backward is the same work. An entropy reward has both
read the training forward. What remains is the Conductor: its pooling, its weights, its update.

Target (DESIGN.md): less than 2 % of a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch

from bench.tables import emit
from maestro_fast.ops import pool_hidden
from maestro_fast.quickstart.model import make_checkpoint
from maestro_fast.quickstart.reward_model import make_reward_model
from maestro_fast.quickstart.run import EXAMPLE, example_config
from maestro_fast.records import StepRecord
from maestro_fast.settings import override
from maestro_fast.training import forward, parse_config, train

PAIRS, STEPS, WARM_UP = 4, 8, 2  # steps of a run, the first of which are not counted
TARGET = 2.0  # per cent of a step
CONDUCTOR_STAGES = ("weights", "conductor_update")


@dataclass
class Run:
    """Seconds by stage and records of each step; pooling, which is part of another stage, by itself."""

    stages: list[dict[str, float]] = field(default_factory=list)
    pooling: list[float] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)
    source: str = ""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's two models, schooled for one epoch: their speed is that of the finished ones."""
    out = tmp_path_factory.mktemp("quickstart")
    make_checkpoint(EXAMPLE / "prompts.jsonl", out / "model", epochs=1)
    make_reward_model(EXAMPLE, out / "reward_model", epochs=1)
    return out


def run_once(models: Path, name: str, weights: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> Run:
    """One run of the quickstart's config, with its own weights (None) or others."""
    raw = example_config(models)
    changes = {"max_steps": STEPS, "learning_rate": 0.0, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    override(raw, "run_dir", str(models / name))
    for key, value in changes.items():
        override(raw, f"trainer.{key}", value)
    if weights is not None:
        raw["weights"] = weights
    run, spent = Run(), [0.0]

    def timed_pooling(*args: Any, **options: Any) -> torch.Tensor:
        start = time.perf_counter()
        pooled = pool_hidden(*args, **options)
        spent[0] += time.perf_counter() - start
        return pooled

    def note(timings: dict[str, float]) -> None:
        run.stages.append(timings)
        run.pooling.append(spent[0])
        spent[0] = 0.0

    monkeypatch.setattr(forward, "pool_hidden", timed_pooling)
    trainer = train(parse_config(raw), raw, observers=[run.records.append], timing_observers=[note])
    run.source = trainer.pipeline.scoring.source
    return run


def assert_same_work(ours: Run, equal: Run) -> None:
    """Nothing wrong is timed: the same forwards, responses and rewards at every step, under weights that differ."""
    assert ours.source == equal.source == "training"
    assert len(ours.records) == len(equal.records) == STEPS
    for one, other in zip(ours.records, equal.records, strict=True):
        assert one.completions == other.completions
        torch.testing.assert_close(one.rewards_BK, other.rewards_BK, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(one.lengths_B, other.lengths_B)
    expected = torch.stack([record.expected_weights_BK for record in ours.records])
    assert (expected[-1] - 1 / expected.shape[-1]).abs().max() > 1e-3, "the Conductor learned nothing"
    assert all((record.weights_BK == record.weights_BK[0, 0]).all() for record in equal.records)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (normal approximation)."""
    return mean(values), 1.96 * stdev(values) / len(values) ** 0.5


def test_conductor_share(
    benchmark: Any, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs: list[tuple[Run, Run]] = []

    def one_pair() -> None:
        number = len(pairs)
        runs: dict[str, Run] = {}
        names: list[tuple[str, dict[str, Any] | None]] = [("conductor", None), ("equal", {"policy": "equal"})]
        for name, weights in names if number % 2 else names[::-1]:  # balanced order
            runs[name] = run_once(models, f"{name}-{number}", weights, monkeypatch)
        assert_same_work(runs["conductor"], runs["equal"])
        pairs.append((runs["conductor"], runs["equal"]))

    benchmark.pedantic(one_pair, rounds=PAIRS, iterations=1)
    report(benchmark, capsys, pairs)


def report(benchmark: Any, capsys: pytest.CaptureFixture[str], pairs: list[tuple[Run, Run]]) -> None:
    """Prints the share by stage and as the difference of whole steps; leaves both with pytest-benchmark."""
    steps = [(a, b, i) for a, b in pairs for i in range(WARM_UP, STEPS)]
    whole = mean(equal.stages[i]["total"] for _, equal, i in steps)

    def share(seconds: Callable[[Run, Run, int], float]) -> tuple[float, float, float]:
        """Milliseconds a step, per cent of a step, and half the width of the interval of that."""
        values = [seconds(*step) for step in steps]
        middle, half = interval(values)
        return 1e3 * middle, 100 * middle / whole, 100 * half / whole

    rows = {"pooling": share(lambda a, _, i: a.pooling[i])}
    for name in CONDUCTOR_STAGES:
        rows[name] = share(lambda a, b, i, name=name: a.stages[i][name] - b.stages[i][name])  # type: ignore[misc]
    rows["all of these"] = share(
        lambda a, b, i: a.pooling[i] + sum(a.stages[i][n] - b.stages[i][n] for n in CONDUCTOR_STAGES)
    )
    # both runs pool: the trainer reads the states off its forward whoever wants them
    rows["difference of whole steps, and pooling"] = share(
        lambda a, b, i: a.pooling[i] + a.stages[i]["total"] - b.stages[i]["total"]
    )
    lines = [f"{'the Conductor, minus equal weights':42}{'ms a step':>11}{'% of a step':>13}{'95 % interval':>16}"]
    lines += [f"{name:42}{ms:11.3f}{per_cent:13.2f}{'+- ' + format(half, '.2f'):>16}" for name, (ms, per_cent, half) in
              rows.items()]  # fmt: skip
    _, per_cent, half = rows["all of these"]
    verdict = "met" if per_cent + half < TARGET else "missed"
    lines.append(f"target: all of these below {TARGET:g} % of a step: {per_cent:.2f} +- {half:.2f} %, {verdict}")
    title = f"Quickstart step of {1e3 * whole:.0f} ms, {len(steps)} pairs of steps with identical forwards"
    benchmark.extra_info |= {"step_ms": 1e3 * whole, "steps": len(steps), "share": rows, "target": verdict}
    emit(capsys, title, lines)
