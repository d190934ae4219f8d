"""The Conductor's forward in Triton equals the reference in float64, and its draws are the same bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from maestro_fast.kernels import conductor_weights as kernel
from maestro_fast.ops import ConductorParams
from maestro_fast.ops.conductor_weights import conductor_weights as reference
from maestro_fast.ops.philox import uniform
from maestro_fast.specs import ConductorChoice
from tests.kernels.helpers import DEVICE, DTYPES, assert_close, runs

EPSILON = 3e-6  # three TF32 products stand for one of float32, over d = 200 terms


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("_LINEAR_SPLIT", 64),
        ("_HIDDEN_SPLIT", 64),
        ("_LINEAR_INNER", 32),
        ("_HIDDEN", 16),
        ("_HIDDEN_INNER", 32),
        ("UNITS", 16),
    ):
        monkeypatch.setattr(kernel, name, value)


def head(size: int, rewards: int, units: int | None, *, seed: int = 0) -> ConductorParams:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    last = (rewards, size if units is None else units)
    return ConductorParams(
        normal(size),
        1 / (0.5 + torch.rand(size, generator=generator)),
        normal(*last) / last[1] ** 0.5,
        normal(rewards) * 0.1,
        None if units is None else normal(units, size) / size**0.5,
        None if units is None else normal(units) * 0.1,
    )


def moved(params: ConductorParams, **to: Any) -> ConductorParams:
    return ConductorParams(*(None if x is None else x.to(**to) for x in vars(params).values()))


def check(h: Tensor, params: ConductorParams, *, mode: str, **options: Any) -> None:
    settings = {"tau": 0.7, "min_prob": 0.02, "alpha": 0.3} | options
    choice = ConductorChoice(**settings, mode=mode)
    there = moved(params, device=DEVICE)
    states = h.to(DEVICE)
    ours, *others = runs(lambda: kernel.conductor_weights(states, there, choice), states, *vars(there).values())
    truth = reference(h.double(), moved(params, dtype=torch.float64), mode=mode, **settings)
    plain = reference(h.float(), params, mode=mode, **settings)
    for name, x, expected, simple in zip(truth._fields, ours, truth, plain, strict=True):
        assert_close(x, expected, simple, epsilon=EPSILON, what=name)
        assert all(torch.equal(x, getattr(again, name)) for again in others), f"{name} differs between two runs"


@pytest.mark.parametrize("units", [None, 24])
@pytest.mark.parametrize("mode", ["sample", "soft"])
@pytest.mark.parametrize(("batch", "rewards", "size"), [(1, 3, 64), (19, 1, 50), (40, 8, 200)])
def test_heads_and_modes(batch: int, rewards: int, size: int, mode: str, units: int | None) -> None:
    h = torch.randn(batch, size, generator=torch.Generator().manual_seed(batch)) * 2 + 0.5
    check(h, head(size, rewards, units), mode=mode, seed=5, step=3, offset=7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("units", [None, 24])
def test_dtypes_and_rows_with_a_stride(dtype: torch.dtype, units: int | None) -> None:
    wide = torch.randn(20, 80, generator=torch.Generator().manual_seed(1)).to(dtype)
    check(wide[:, :70], head(70, 4, units), mode="sample")


def test_a_probability_of_zero() -> None:
    """Without a floor, far logits underflow. The entropy has no NaN then, and a drawn action has a finite log-prob."""
    params = head(32, 3, None)
    h = torch.randn(6, 32, generator=torch.Generator().manual_seed(2)) * 2000
    check(h, params, mode="soft", min_prob=0.0, tau=0.01)
    choice = ConductorChoice(tau=0.01, min_prob=0.0, alpha=0.3)
    out = kernel.conductor_weights(h.to(DEVICE), moved(params, device=DEVICE), choice)
    assert (out.probs == 0).any() and out.log_probs.isfinite().all() and out.entropy.isfinite().all()


def test_last_layer_of_zeros_weighs_equally() -> None:
    params = head(32, 4, 24)
    params = ConductorParams(**vars(params) | {"weight": torch.zeros(4, 24), "bias": torch.zeros(4)})
    choice = ConductorChoice(tau=1.0, min_prob=0.05, alpha=0.3, mode="soft")
    out = kernel.conductor_weights(torch.randn(5, 32).to(DEVICE), moved(params, device=DEVICE), choice)
    torch.testing.assert_close(out.weights.cpu(), torch.full((5, 4), 0.25))


@triton.jit(do_not_specialize=["seed", "step", "offset"])
def _draws(out_ptr, seed, step, offset, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, kernel.uniform(seed, step, i.to(tl.int64) + offset))


@pytest.mark.parametrize(
    ("seed", "step", "offset"),
    [(0, 0, 0), (5, 1, 3), (2**31, 2**31 + 1, 2**32 - 4), (2**40 + 7, 2**32 - 1, 2**40), (2**64 - 1, 9, 2**62)],
)
def test_draws_are_those_of_the_reference_bit_for_bit(seed: int, step: int, offset: int) -> None:
    out = torch.empty(8, device=DEVICE)
    _draws[(1,)](out, seed, step, offset, BLOCK=8)
    assert torch.equal(out.cpu(), uniform(seed, step, offset, 8, torch.device("cpu")))
