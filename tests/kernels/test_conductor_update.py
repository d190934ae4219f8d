"""Each of three steps of the update kernel equals the op's reference in float64 from the same parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from maestro_fast.kernels import conductor_update as kernel
from maestro_fast.kernels import conductor_weights
from maestro_fast.ops import ConductorBatch, ConductorParams, ConductorState, ConductorUpdateConfig
from maestro_fast.ops import conductor_update as reference
from tests.kernels.helpers import DEVICE, DTYPES, INTERPRETED, RUNS, assert_close
from tests.kernels.test_conductor_weights import head, moved

EPSILON = 1e-5  # of a parameter: lr 0.01 times the relative error of 1e-3 that a vanishing gradient may have
CONFIG = ConductorUpdateConfig(tau=0.7, min_prob=0.02, entropy_coef=0.3, learning_rate=1e-2, weight_decay=0.05)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_ROWS", 16), ("_COLUMNS", 32)):
        monkeypatch.setattr(kernel, name, value)
    for name in ("_LINEAR_SPLIT", "_HIDDEN_SPLIT"):
        monkeypatch.setattr(conductor_weights, name, 64)


def batch_of(number: int, size: int, rewards: int, seed: int, kind: str = "drawn") -> ConductorBatch:
    """Makes a batch in which some rows do not count. Those hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(number, size, generator=generator) * 2 + 0.5
    actions = torch.randint(0, rewards, (number,), generator=generator)
    live = torch.rand(number, generator=generator) < 0.7
    live[0] = True
    meta = torch.randn(number, *([rewards] if kind == "all actions" else []), generator=generator)
    before = torch.rand(number, generator=generator) + 0.05
    h[~live], meta[~live] = torch.nan, torch.nan
    return ConductorBatch(
        h, meta, None if kind == "all actions" else actions, before if kind == "drawn before" else None, live
    )


def kept(batch: ConductorBatch) -> ConductorBatch:
    """Keeps the live rows of a batch, in float64."""
    assert batch.live is not None
    parts = (batch.h, batch.meta, batch.actions, batch.drawn_probs)
    rows = (None if x is None else x[batch.live] for x in parts)
    return ConductorBatch(*(x.double() if x is not None and x.is_floating_point() else x for x in rows))  # type: ignore[arg-type]


def stepped(state: ConductorState, batch: ConductorBatch) -> kernel.Update:
    """Makes one update of the state's tensors. Its step counts the updates before this one."""
    there = ConductorBatch(*(None if x is None else x.to(DEVICE) for x in vars(batch).values()))  # type: ignore[arg-type]
    made = kernel.activations(there.h, state.params)
    return kernel.conductor_update(replace(state, step=state.step + 1), there, CONFIG, made)


def on_device(params: ConductorParams) -> ConductorState:
    """Copies the parameters to the device, with moments of 0."""
    copies = (None if x is None else x.detach().clone().to(DEVICE) for x in vars(params).values())
    return ConductorState.start(ConductorParams(*copies))  # type: ignore[arg-type]


def widened(state: ConductorState) -> ConductorState:
    """Copies the state to the CPU, in float64."""
    first, second = ({name: x.double().cpu() for name, x in part.items()} for part in (state.first, state.second))
    return ConductorState(moved(state.params, dtype=torch.float64, device="cpu"), first, second, state.step)


def narrowed(value: Any) -> Any:
    """Copies a state or a batch in float32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: narrowed(x) for name, x in value.items()}
    if isinstance(value, (ConductorParams, ConductorState, ConductorBatch)):
        return type(value)(**{name: narrowed(x) for name, x in vars(value).items()})
    return value


KINDS = [("drawn", False), ("drawn before", True), ("all actions", True)]
SIZES = [(1, 3, 32), (45, 1, 50), (40, 8, 130)]
# In the interpreter, which is slow, the smallest and the largest size meet each kind and each head once.
SLOW = {(*size, units, *kind) for size in SIZES[::2] for units, kind in zip((None, 40, None), KINDS, strict=True)}
STEPS = [(*size, units, *kind) for size in SIZES for units in (None, 40) for kind in KINDS]


@pytest.mark.parametrize(
    ("number", "rewards", "size", "units", "kind", "masked"),
    [case for case in STEPS if not INTERPRETED or case[:3] == SIZES[1] or case in SLOW],
)
def test_three_steps(number: int, rewards: int, size: int, units: int | None, kind: str, masked: bool) -> None:
    params = head(size, rewards, units)
    states = [on_device(params) for _ in range(RUNS)]
    for step in (1, 2, 3):
        ours, *others = states = [replace(state, step=step - 1) for state in states]
        state = widened(ours)
        given = batch_of(number, size, rewards, step, kind)
        truth = kept(given)
        if not masked:
            given = ConductorBatch(*(None if x is None else x[given.live] for x in list(vars(given).values())[:4]))
        update, *same = [stepped(own, given) for own in states]
        plain, _ = reference(narrowed(state), narrowed(truth), CONFIG, backend="torch")
        state, metrics = reference(state, truth, CONFIG, backend="torch")
        assert_close(update.objective, metrics["objective"], epsilon=EPSILON, what="objective")
        assert_close(update.grad_norm, metrics["grad_norm"], epsilon=EPSILON, what="grad_norm")
        assert all(torch.equal(update.squares, other.squares) for other in same)
        for name, x in ours.params.learned.items():
            assert_close(x, state.params.learned[name], epsilon=EPSILON, what=f"{name} after step {step}")
            assert all(torch.equal(x, other.params.learned[name]) for other in others), (
                f"{name} differs between two runs"
            )
            for mine, right, simple in zip(
                (ours.first[name], ours.second[name]),
                (state.first[name], state.second[name]),
                (plain.first[name], plain.second[name]),
                strict=True,
            ):
                scale = right.abs().max().clamp(min=1e-12)
                if scale > 1e-6:  # with K = 1 the gradient is rounding noise
                    shares = mine / scale.float().item(), right / scale, simple / scale
                    assert_close(*shares, epsilon=EPSILON, what=f"moments of {name}")


@pytest.mark.parametrize("units", [None, 40])
def test_without_a_live_row_nothing_changes(units: int | None) -> None:
    params = head(50, 3, units)
    ours = on_device(params)
    dead = ConductorBatch(*list(vars(batch_of(20, 50, 3, 0)).values())[:4], live=torch.zeros(20, dtype=torch.bool))
    update = stepped(ours, dead)
    assert update.objective == 0 and update.grad_norm == 0
    for name, x in ours.params.learned.items():
        assert torch.equal(x.cpu(), getattr(params, name))
        assert not ours.first[name].any() and not ours.second[name].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_contexts_of_other_dtypes_with_a_stride(dtype: torch.dtype) -> None:
    params = head(50, 4, None)
    state = ConductorState.start(moved(params, dtype=torch.float64))
    ours = on_device(params)
    wide = kept(batch_of(20, 64, 4, 5))
    h, meta, actions = wide.h.to(dtype)[:, :50], wide.meta.float(), wide.actions
    assert actions is not None
    stepped(ours, ConductorBatch(h, meta, actions.int()))
    reference(state, ConductorBatch(h.double(), meta.double(), actions), CONFIG, backend="torch")
    assert_close(ours.params.weight, state.params.weight, epsilon=EPSILON)
