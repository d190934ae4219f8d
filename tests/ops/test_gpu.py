"""Launches as operators. Triton launches on the current device, so a launch makes that of its tensors current."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import maestro_fast.ops
from maestro_fast.ops import cpp, gpu
from tests.ops.helpers import assert_same_compiled


class Devices:
    """Two CUDA devices that are not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.switches = 0, 0
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", self.made_current)

    def made_current(self, device: torch.device) -> Any:
        devices, before = self, self.current

        class Switch:
            def __enter__(self) -> None:
                devices.current, devices.switches = device.index, devices.switches + 1

            def __exit__(self, *_: object) -> None:
                devices.current = before

        return Switch()


def on(name: str) -> Any:
    return SimpleNamespace(device=torch.device(name))


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    return Devices(monkeypatch)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(("name", "ran_on", "switches"), [("cuda:1", 1, 1), ("cuda:0", 0, 0), ("cpu", 0, 0)])
def test_a_launch_runs_on_the_device_of_its_first_tensor(
    name: str, ran_on: int, switches: int, listed: bool, devices: Devices
) -> None:
    launch = gpu.on_its_device(lambda first, other: (devices.current, other))
    assert launch([on(name)] if listed else on(name), 5) == (ran_on, 5)
    assert devices.current == 0 and devices.switches == switches


def test_an_operator_is_guarded_in_eager_calls(devices: Devices) -> None:
    @gpu.operator("test_guarded(Tensor x, int y) -> Tensor", lambda x, y: torch.empty_like(x))
    def launch(x: Any, y: int) -> int:
        return devices.current + y

    assert launch(on("cuda:1"), 10) == 11 and devices.current == 0


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@cpp.operator(
    "test_records(Tensor x, float[] shifts) -> (Tensor, Tensor, Tensor)",
    lambda x, shifts: tuple(torch.empty_like(x) for _ in range(3)),
    flat=lambda x, shifts: (x, [float(shift) for shift in shifts]),
    whole=lambda x, shifts: (x, tuple(shifts)),
    result=lambda x, first, second: (x, Pair(first, second)),
)
def records(x: Tensor, shifts: tuple[int, int]) -> tuple[Tensor, Pair]:
    assert isinstance(shifts, tuple)
    return x.clone(), Pair(x + shifts[0], x + shifts[1])


def test_records_pass_through_an_operator_and_come_back() -> None:
    """A graph gets what an eager call gets: a tuple with a record in it, made of the operator's three tensors."""

    def function(x: Tensor) -> Tensor:
        same, pair = records(x, (1, 2))
        return same + 10 * pair.first + 100 * pair.second

    assert_same_compiled(function, torch.arange(3.0))
    assert function(torch.zeros(1)).item() == 210


def test_no_op_reaches_a_kernel_without_a_guard() -> None:
    """Each function of ``ops`` that imports a kernel to launch it is one that a guard wraps, or that one calls."""
    # constants, a question, and what is guarded outside
    helpers = {"_loss_by_triton", "_mask_segments", "_faster_strategy", "_forward"}
    found = set()
    for path in sorted(Path(next(iter(maestro_fast.ops.__path__))).glob("*.py")):
        module = importlib.import_module(f"maestro_fast.ops.{path.stem}")
        for name, function in vars(module).items():
            if not inspect.isfunction(function) or function.__module__ != module.__name__ or name in helpers:
                continue
            inner = inspect.unwrap(function)
            if "from maestro_fast.kernels" in inspect.getsource(inner):
                assert inner is not function, f"{module.__name__}.{name} launches without a guard"
                found.add(name)
    assert {"_by_triton", "_launch", "_dlogits_in_place", "_dlogits_into", "triton_row_statistics"} <= found
