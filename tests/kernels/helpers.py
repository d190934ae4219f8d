"""What the tests of several kernels share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"  # to be collected without a device, too
# In the interpreter bfloat16 arithmetic is silently wrong (Triton issue 11584).
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


T = TypeVar("T")
RUNS = 1 if INTERPRETED else 2  # how often ``runs`` runs a kernel


def on_device(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.to(DEVICE) for x in tensors]


def assert_close(ours: Tensor, truth: Tensor, plain: Tensor | None = None, *, epsilon: float, what: str = "") -> None:
    """Error of ours <= error of the plain op in the same dtype + epsilon * max(1, largest truth), all against float64.

    Everything that is not a float has to be equal.
    """
    ours = ours.detach().cpu()
    assert ours.shape == truth.shape, (what, ours.shape, truth.shape)
    if not truth.is_floating_point():
        assert torch.equal(ours, truth), (what, ours, truth)
        return
    if truth.numel() == 0:
        return
    same = ours.double() == truth  # infinities
    error = torch.where(same, 0.0, (ours.double() - truth).abs())
    finite = truth[truth.isfinite()]
    allowed = epsilon * max(1.0, finite.abs().max().item() if finite.numel() else 1.0)
    if plain is not None:
        allowed += torch.where(plain.double() == truth, 0.0, (plain.double() - truth).abs()).max().item()
    if bool((error <= allowed).all()):  # False for NaN
        return
    worst = int(torch.where(error.isnan(), float("inf"), error).argmax())
    got, expected = ours.flatten()[worst].item(), truth.flatten()[worst].item()
    raise AssertionError(f"{what} element {worst}: {got!r}, truth {expected!r}, allowed error {allowed:.3g}")


def runs(run: Callable[[], T], *inputs: Tensor | None) -> list[T]:
    """The results of two runs of a kernel, which have to be the same bits.

    The interpreter has no choice, as it runs the programs of a launch one after another. There the kernel runs once,
    and has to leave its inputs as they were, which otherwise the second run would show.
    """
    if not INTERPRETED:
        return [run() for _ in range(RUNS)]
    before = [None if x is None else x.detach().clone() for x in inputs]
    out = run()
    for x, y in zip(inputs, before, strict=True):
        if x is not None:
            torch.testing.assert_close(x.detach(), y, rtol=0.0, atol=0.0, equal_nan=True)
    return [out]


def counted_launches(monkeypatch: pytest.MonkeyPatch, *, start: bool = True) -> list[str]:
    """A list that takes note of every bound launch from now on, by the name of its kernel.

    Without ``start`` none is started, so the outputs hold nothing.
    """
    from maestro_fast.kernels.bound_launch import BoundLaunch

    launches: list[str] = []
    real = BoundLaunch.__call__

    def call(self: Any, grid: Any, **arguments: Any) -> None:
        launches.append(self.kernel.fn.__name__)
        if start:
            real(self, grid, **arguments)

    monkeypatch.setattr(BoundLaunch, "__call__", call)
    return launches
