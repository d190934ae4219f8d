"""A generation batch of the trainer makes weights and advantages in one op, and trains on the bits of the two."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields
from typing import Any

import pytest
import torch

from maestro_fast.records import StepRecord
from maestro_fast.settings import override
from maestro_fast.training import parse_config, train
from tests.weighting.one_op import FUSED, SINGLE, apart, counted

BATCHES = 2


def trained(raw: dict[str, Any], folder: str, **changes: Any) -> tuple[list[StepRecord], dict[str, torch.Tensor]]:
    """Records of the batches, and the tensors that training left: of the model and of the weight policy."""
    raw = deepcopy(raw)
    raw["run_dir"] += folder
    for dotted, value in changes.items():
        override(raw, dotted.replace("__", "."), value)
    records: list[StepRecord] = []
    trainer = train(parse_config(raw), raw, observers=[records.append])
    return records, {**trainer.model.state_dict(), **trainer.step.weights.state_dict()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch__micro_batch": 16},
        {"loss__kl_coef": 0.05},
        {"weights__context": "reference_prompt_mean", "advantages__profile": "grpo"},
        {"weights__hidden": 8, "weights__estimator": "all_actions"},
    ],
    ids=[
        "a scoring forward",
        "the training forward",
        "a KL in the score",
        "the reference's states",
        "an MLP",
    ],
)
def test_one_op_for_each_batch(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch:
        calls = counted(patch)
        ours, left = trained(raw_config, "-one", **changes)
    assert calls == {name: count * BATCHES for name, count in FUSED.items()}
    apart(monkeypatch)
    calls = counted(monkeypatch)
    theirs, expected = trained(raw_config, "-two", **changes)
    assert calls == {name: count * BATCHES for name, count in SINGLE.items()}

    assert len(ours) == len(theirs) == BATCHES and ours[-1].advantages_B.abs().max() > 0
    assert (ours[-1].weights_BK != ours[-1].weights_BK[0]).any()
    for one, two in zip(ours, theirs, strict=True):
        for item in fields(StepRecord):
            got, wanted = getattr(one, item.name), getattr(two, item.name)
            equal = torch.equal(got, wanted) if isinstance(wanted, torch.Tensor) else got == wanted
            assert equal, item.name
    assert left.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(left[name], tensor), name


@pytest.mark.parametrize(
    ("weights", "profile", "calls_of_a_batch"),
    [
        ("equal", "maestro", {"group_advantages": 1}),
        ({"policy": "conductor", "mode": "group"}, "maestro", SINGLE),
        ({"policy": "conductor", "period": 1, "guard": {"window": 2, "warmup": 4}}, "maestro", SINGLE),
        ("conductor", "gdpo", SINGLE),
        ("conductor", "verl_gdpo", SINGLE),
    ],
    ids=["no Conductor", "one action per group", "a guard", "scores over the batch", "scores over tokens"],
)
def test_single_ops_elsewhere(
    raw_config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    weights: Any,
    profile: str,
    calls_of_a_batch: dict[str, int],
) -> None:
    if "guard" in weights:
        raw_config["anchor"] = {"name": "truth", "kind": "length", "target": 3}
    calls = counted(monkeypatch)
    trained(raw_config | {"weights": weights, "advantages": {"profile": profile}}, "")
    assert calls == {name: count * BATCHES for name, count in calls_of_a_batch.items()}


def test_the_clock_gives_the_one_op_to_the_weights(raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for fused in (True, False):
        laps: list[dict[str, float]] = []
        raw = {**raw_config, "run_dir": f"{raw_config['run_dir']}-{fused}"}
        train(parse_config(raw), raw, timing_observers=[laps.append])
        assert len(laps) == BATCHES and all(lap["weights"] > 0 for lap in laps)
        assert all(("advantages" in lap) != fused for lap in laps)
        apart(monkeypatch)
