"""Records what tests launch in Triton's interpreter, so that the same launches can be compiled for a GPU later.

    LAUNCHES=file pytest -p bench.record_launches ...

The file gets a pickle of each distinct ``RecordedLaunch``. The interpreter has no bfloat16, so tests use float16 in its
place; ``read`` returns a launch with float16 a second time with bfloat16.
"""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class RecordedLaunch:
    """What compilation depends on in a launch.

    Attributes:
        module: The module of the kernel.
        name: The name of the kernel.
        arguments: The arguments by name. A tensor is ("tensor", dtype, whether it is aligned), and a tensor descriptor
            ("tiles", dtype, block shape).
        options: The options of the compiler, such as num_warps.
    """

    module: str
    name: str
    arguments: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]


def describe(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecordedLaunch:
    """The launch of ``kernel`` with these arguments."""
    parameters = inspect.signature(kernel.fn).parameters
    options = {name: value for name, value in kwargs.items() if name not in parameters}
    given = dict(zip(parameters, args, strict=False)) | {n: v for n, v in kwargs.items() if n in parameters}
    described = [(n, _described(v, "constexpr" in str(parameters[n].annotation))) for n, v in given.items()]
    return RecordedLaunch(kernel.fn.__module__, kernel.fn.__name__, tuple(described), tuple(sorted(options.items())))


def _described(value: Any, constant: bool) -> Any:
    """An argument, reduced to what Triton specialises on: of an integer, whether it is 1, divides by 16 or is large."""
    if isinstance(value, Tensor):
        return "tensor", value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        return "tiles", value.base.dtype, tuple(value.block_shape)
    if constant or isinstance(value, bool) or not isinstance(value, int) or value == 1:
        return value if constant or not isinstance(value, float) else 0.5
    return (16 if value % 16 == 0 else 17) << (32 if abs(value) >= 1 << 31 else 0)


def with_bfloat16(launch: RecordedLaunch) -> Iterator[RecordedLaunch]:
    """The launch, and with bfloat16 in the place of float16 if it has any."""
    yield launch
    swapped = tuple(
        (n, (v[0], torch.bfloat16, v[2]) if isinstance(v, tuple) and torch.float16 in v else v)
        for n, v in launch.arguments
    )
    if swapped != launch.arguments:
        yield replace(launch, arguments=swapped)


def read(path: Path) -> list[RecordedLaunch]:
    """The distinct launches of all processes that wrote to the file, in the order in which they came."""
    found: dict[RecordedLaunch, None] = {}
    with path.open("rb") as file:
        while file.peek(1):
            found.update(dict.fromkeys(with_bfloat16(pickle.load(file))))
    return list(found)


def rebuilt(value: Any) -> Any:
    """An argument that Triton compiles like the recorded one."""
    if not isinstance(value, tuple):
        return value
    kind, dtype, what = value
    if kind == "tiles":
        return TensorDescriptor.from_tensor(torch.empty(what, dtype=dtype), list(what))
    return torch.empty(64, dtype=dtype)[0 if what else 1 :]


def _start_recording(path: str) -> None:
    """Makes the interpreter write every launch to the file before it runs it."""
    launch, seen = InterpretedFunction.run, set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        found = describe(self, args, kwargs)
        if found not in seen:
            seen.add(found)
            with open(path, "ab") as file:
                file.write(pickle.dumps(found))
        return launch(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = run


if path := os.environ.get("LAUNCHES"):
    _start_recording(path)
