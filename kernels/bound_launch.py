"""Launches that remember what Triton compiled for them.

``kernel[grid](...)`` binds, specialises and looks up its arguments anew at every call, which costs the host more than
the small kernels of this package cost the device. A ``BoundLaunch`` fixes the compile-time arguments once, and keeps
the compiled kernel of each specialisation that it has met. The next launch of the same specialisation goes straight to
the driver.

The key under which a kernel is kept holds at least what Triton specialises on: the device, the dtype of every tensor
and which are None, the values of the integers that Triton specialises, and how wide the others are. A launch with a
tensor whose address 16 bytes do not divide goes the long way. Tests compare this with Triton's own specialisation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

Argument = Tensor | int | float | None
Constants = Mapping[str, tl.constexpr]  # values of the ``tl.constexpr`` arguments of a kernel: numbers, strings, None

_MOST_REMEMBERED = 4096  # remembered launches of one kernel with one set of constants; beyond, all are forgotten


def blocks(total: int, size: int) -> int:
    """How many blocks of a size cover the total. Triton's own ``cdiv`` costs the host several microseconds."""
    return -(-total // size)


def power_of_2(number: int) -> int:
    """The least power of 2 that is not below a positive number. Triton's own function is as slow as its ``cdiv``."""
    return 1 << (number - 1).bit_length()


class BoundLaunch:
    """A kernel with its compile-time arguments and compiler options. It is called with a grid and all other arguments.

    The arguments whose names end in ``_ptr`` are tensors or None, all others are numbers, as in every kernel of this
    package.
    """

    def __init__(self, kernel: JITFunction, constants: Constants, **options: bool | int) -> None:
        """
        Args:
            kernel: a ``triton.jit`` function.
            constants: every ``tl.constexpr`` argument, by name.
            options: the compiler's options ``num_warps``, ``num_stages`` and ``maxnreg``. Unless ``enable_fp_fusion``
                is given, a product and a sum stay two operations, which round as on the host.
        """
        self.kernel = kernel
        self.constants = constants
        self.options = {"enable_fp_fusion": False, **options}
        self._compiled: dict[tuple[object, ...], CompiledKernel] = {}
        # The interpreter compiles nothing. On AMD's GPUs Triton also specialises on how large a tensor is.
        self._native = isinstance(kernel, JITFunction) and torch.version.hip is None
        if self._native:
            arguments = [p for p in kernel.params if not p.is_constexpr]
            self._pointers = [p.name for p in arguments if p.name.endswith("_ptr")]
            numbers = [p for p in arguments if not p.name.endswith("_ptr")]
            self._values = [p.name for p in numbers if not p.do_not_specialize]
            self._widths = [p.name for p in numbers if p.do_not_specialize]
            self._order = [p.name for p in kernel.params]

    def __call__(self, grid: tuple[int, ...], **arguments: Argument) -> None:
        if not self._native or knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
            self._launch(grid, arguments)
            return
        key = self._key(arguments)
        if key is None:
            self._launch(grid, arguments)
            return
        found = self._compiled.get(key)
        if found is None:
            if len(self._compiled) >= _MOST_REMEMBERED:
                self._compiled.clear()
            self._compiled[key] = self._launch(grid, arguments)
            return
        arguments.update(self.constants)
        width, height, depth = (*grid, 1, 1)[:3]
        stream = driver.active.get_current_stream(key[0])
        in_order = [arguments[name] for name in self._order]
        # The three None are for hooks, of which there are none.
        found.run(width, height, depth, stream, found.function, found.packed_metadata, None, None, None, *in_order)

    def _launch(self, grid: tuple[int, ...], arguments: dict[str, Argument]) -> CompiledKernel:
        return self.kernel[grid](**arguments, **self.constants, **self.options)

    def _key(self, arguments: Mapping[str, Argument]) -> tuple[object, ...] | None:
        """What the compiled kernel depends on, the device first; None where it is not worth remembering."""
        tensors: Mapping[str, Tensor | None] = arguments  # type: ignore[assignment]  # those under ``_pointers``
        integers: Mapping[str, int] = arguments  # type: ignore[assignment]  # those under ``_widths``
        low_bits = 0
        kinds: list[torch.dtype | None] = []
        for name in self._pointers:
            tensor = tensors[name]
            if tensor is None:
                kinds.append(None)
            else:
                kinds.append(tensor.dtype)
                low_bits |= tensor.data_ptr()
        if low_bits & 15:
            return None
        # Triton does not specialise on floats.
        values = [x if x.__class__ is int else None for x in map(arguments.__getitem__, self._values)]
        # This is 0 for a number that fits into 32 bits with its sign: so does -2^31, whose own bit_length is 32.
        widths = [(x if x >= 0 else ~x).bit_length() >> 5 for x in map(integers.__getitem__, self._widths)]
        return driver.active.get_current_device(), *kinds, *values, *widths
