"""Takes note of what tests launch in Triton's interpreter, to be compiled later: pytest -p bench.launches

``LAUNCHES`` names the file that gets a pickle of each distinct ``Noted``. The interpreter has no bfloat16, whose place
in tests float16 takes: a launch with float16 in it is also compiled with bfloat16.
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
class Noted:
    """A launch as far as compilation looks at it.

    Attributes:
        module, name: of the kernel.
        arguments: by name; a tensor is ("tensor", dtype, whether it is aligned), a descriptor ("tiles", dtype, block).
        options: of the compiler, e.g. num_warps.
    """

    module: str
    name: str
    arguments: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]


def note(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Noted:
    parameters = inspect.signature(kernel.fn).parameters
    options = {name: value for name, value in kwargs.items() if name not in parameters}
    given = dict(zip(parameters, args, strict=False)) | {n: v for n, v in kwargs.items() if n in parameters}
    described = [(n, _described(v, "constexpr" in str(parameters[n].annotation))) for n, v in given.items()]
    return Noted(kernel.fn.__module__, kernel.fn.__name__, tuple(described), tuple(sorted(options.items())))


def _described(value: Any, constant: bool) -> Any:
    if isinstance(value, Tensor):
        return "tensor", value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        return "tiles", value.base.dtype, tuple(value.block_shape)
    if constant or isinstance(value, bool) or not isinstance(value, int) or value == 1:
        return value if constant or not isinstance(value, float) else 0.5
    return (16 if value % 16 == 0 else 17) << (32 if abs(value) >= 1 << 31 else 0)  # all that Triton specialises on


def with_bfloat16(launch: Noted) -> Iterator[Noted]:
    yield launch
    swapped = tuple(
        (n, (v[0], torch.bfloat16, v[2]) if isinstance(v, tuple) and torch.float16 in v else v)
        for n, v in launch.arguments
    )
    if swapped != launch.arguments:
        yield replace(launch, arguments=swapped)


def read(path: Path) -> list[Noted]:
    """The distinct ones of all processes, in the order in which they came."""
    found: dict[Noted, None] = {}
    with path.open("rb") as file:
        while file.peek(1):
            found.update(dict.fromkeys(with_bfloat16(pickle.load(file))))
    return list(found)


def rebuilt(value: Any) -> Any:
    """Something that Triton takes for the argument that was noted."""
    if not isinstance(value, tuple):
        return value
    kind, dtype, what = value
    if kind == "tiles":
        return TensorDescriptor.from_tensor(torch.empty(what, dtype=dtype), list(what))
    return torch.empty(64, dtype=dtype)[0 if what else 1 :]


def _taking_note(path: str) -> None:
    launch, seen = InterpretedFunction.run, set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        found = note(self, args, kwargs)
        if found not in seen:
            seen.add(found)
            with open(path, "ab") as file:
                file.write(pickle.dumps(found))
        return launch(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = run


if path := os.environ.get("LAUNCHES"):
    _taking_note(path)
