"""Compiles what a launcher launches for a GPU that is not here, and reads what the compiled kernels need.

``recorded`` runs a launcher on CPU tensors, in a process without the interpreter, and takes note of its launches
instead of starting them. So the compiled variants are those of the launchers, with the types and the divisibility by
16 that Triton would specialise on.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from maestro_fast.kernels.bound_launch import BoundLaunch

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One launch: its kernel, grid, arguments by name, and compiler options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__.rsplit('.', 1)[-1]}.{self.kernel.fn.__name__}"


def recorded(launcher: Callable[[], Any]) -> list[Launch]:
    """The launches of a launcher, none of which is started: its outputs hold nothing."""
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        assert set(arguments) == set(self.arg_names), set(arguments) ^ set(self.arg_names)
        launches.append(Launch(self, grid, arguments, options))

    # Without a key a launch goes the long way, which asks for no device.
    with mock.patch.object(JITFunction, "run", run), mock.patch.object(BoundLaunch, "_key", lambda *_: None):
        launcher()
    return launches


@dataclass(frozen=True)
class Resources:
    """Per thread: registers, and bytes of stack, which is what spilled; per program: bytes of shared memory."""

    registers: int
    stack: int
    shared: int
    cubin: bytes = field(repr=False)

    @cached_property
    def instructions(self) -> dict[str, int]:
        """How often the machine code has each of ``INSTRUCTIONS``. To read it takes as long as to compile it."""
        code = _cuobjdump("-sass", self.cubin)
        counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}
        return {name: count for name, count in counts.items() if count}


# matrix products of a warp group (sm_90), of the tensor cores of sm_100, and of a warp; loads by tensor descriptor;
# barriers of a program
INSTRUCTIONS = ("HGMMA", "UTCHMMA", "HMMA", "UTMALDG", "BAR")


def compiled(launch: Launch, arch: int) -> Resources:
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                divisible[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif parameter.do_not_specialize or value != 1:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
    source = ASTSource(launch.kernel, signature, constants, divisible)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    cubin = kernel.asm["cubin"]
    usage = _cuobjdump("--dump-resource-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Resources(int(found[1]), int(found[2]), kernel.metadata.shared, cubin)


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout
