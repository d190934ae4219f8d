"""Bound launches tell apart whatever Triton compiles apart, and go the long way where they remember nothing."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from maestro_fast.kernels import bound_launch
from maestro_fast.kernels.bound_launch import BoundLaunch, blocks, power_of_2
from tests.kernels.helpers import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@triton.jit(do_not_specialize=["B"])
def _kernel(x_ptr, y_ptr, B, stride, scale, SOFT: tl.constexpr):
    pass


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Launches that take note of their arguments, on a device that is not there."""
    launches: list[tuple[Any, ...]] = []
    device = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    monkeypatch.setattr(bound_launch, "driver", SimpleNamespace(active=device))
    compiled = SimpleNamespace(
        run=lambda *given: launches.append(("bound", *given)), function="function", packed_metadata="metadata"
    )

    def long_way(self: Any, *given: Any, grid: Any, warmup: bool, **arguments: Any) -> Any:
        launches.append(("long way", grid, arguments))
        return compiled

    monkeypatch.setattr(type(_kernel), "run", long_way)
    return launches


def arguments(**others: Any) -> dict[str, Any]:
    return {"x_ptr": torch.zeros(8), "y_ptr": None, "B": 3, "stride": 8, "scale": 0.5} | others


def test_the_second_launch_of_a_kind_goes_straight_to_the_driver(started: list[tuple[Any, ...]]) -> None:
    launch = BoundLaunch(_kernel, {"SOFT": True}, num_warps=2)
    launch((5,), **arguments())
    again = arguments(B=17, scale=2.5)
    launch((9, 2), **again)

    (way, grid, given), (straight, *sent) = started
    assert (way, grid, straight) == ("long way", (5,), "bound")
    assert given["SOFT"] is True and given["num_warps"] == 2 and given["enable_fp_fusion"] is False
    assert sent[:9] == [9, 2, 1, 7, "function", "metadata", None, None, None]
    assert sent[9] is again["x_ptr"] and sent[10:] == [None, 17, 8, 2.5, True]


def test_a_tensor_that_is_not_aligned_goes_the_long_way_every_time(started: list[tuple[Any, ...]]) -> None:
    launch = BoundLaunch(_kernel, {"SOFT": False})
    for _ in range(2):
        launch((1,), **arguments(x_ptr=torch.zeros(8)[1:]))
    assert [way for way, *_ in started] == ["long way"] * 2


def test_what_is_remembered_is_bounded(started: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound_launch, "_MOST_REMEMBERED", 2)
    launch = BoundLaunch(_kernel, {"SOFT": False})
    for stride in (1, 2, 3, 1):
        launch((1,), **arguments(stride=stride))
    assert [way for way, *_ in started] == ["long way"] * 4 and len(launch._compiled) == 2


def test_launches_of_one_key_are_of_one_specialisation(started: list[tuple[Any, ...]]) -> None:
    """Triton's own binder says what it would compile apart, for the kinds of arguments that kernels get."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(_kernel.signature, _kernel.params, backend)
    launch = BoundLaunch(_kernel, {"SOFT": False})
    tensors = [None, *(torch.zeros(8, dtype=t) for t in (torch.float32, torch.bfloat16, torch.int64, torch.bool))]
    integers = [0, 1, 2, 15, 16, 48, -1, -16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, -(2**31)]
    apart: dict[Any, set[str]] = {}
    for x, y in product(tensors, repeat=2):
        for B, stride in product([*integers, 2**63, 2**64 - 1], integers):
            given = arguments(x_ptr=x, y_ptr=y, B=B, stride=stride)
            _, specialisation, _ = binder(**given, SOFT=False)
            apart.setdefault(launch._key(given), set()).add(str(specialisation))
    assert None not in apart and len(apart) > 900
    assert all(len(found) == 1 for found in apart.values())


@pytest.mark.parametrize("number", [1, 2, 3, 8, 9, 4096, 151_936])
def test_arithmetic_of_the_host_is_tritons(number: int) -> None:
    assert power_of_2(number) == triton.next_power_of_2(number)
    for size in (1, 16, 100):
        assert blocks(number, size) == triton.cdiv(number, size)
