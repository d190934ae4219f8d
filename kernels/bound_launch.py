"""Launches that remember the kernels that Triton compiled for them.

``kernel[grid](...)`` binds, specialises and looks up its arguments anew at every call, which costs the host more than
the small kernels of this package cost the device. A ``BoundLaunch`` fixes the compile-time arguments once, and keeps
the compiled kernel of each specialisation that it has met. The next launch of the same specialisation goes straight to
the driver.

The key of a remembered kernel holds everything that Triton specialises on, and possibly more: the device, the dtype of
every tensor, which tensors are None, the values of the integers that Triton specialises on, and whether the other
integers fit into 32 bits. A launch with a tensor whose address is no multiple of 16 bytes is not remembered and goes
through Triton. Tests compare the key with Triton's own specialisation.
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

_MOST_REMEMBERED = 4096  # kernels that one ``BoundLaunch`` remembers; when there would be more, it forgets all


def blocks(total: int, size: int) -> int:
    """The number of blocks of a size that cover the total. Triton's own ``cdiv`` costs the host several us."""
    return -(-total // size)


def power_of_2(number: int) -> int:
    """The smallest power of 2 that is at least the positive number. Triton's function is as slow as its ``cdiv``."""
    return 1 << (number - 1).bit_length()


class BoundLaunch:
    """A kernel with its compile-time arguments and compiler options. A call takes a grid and all other arguments.

    The arguments whose names end in ``_ptr`` are tensors or None, all others are numbers, as in every kernel of this
    package.
    """

    def __init__(self, kernel: JITFunction, constants: Constants, **options: bool | int) -> None:
        """Fixes the compile-time arguments and the options; nothing is compiled before the first call.

        Args:
            kernel: a ``triton.jit`` function.
            constants: every ``tl.constexpr`` argument, by name.
            options: the compiler's options ``num_warps``, ``num_stages``, ``maxnreg`` and ``enable_fp_fusion``. The
                last is False by default: a product and a sum then stay two operations, which round as on the host.
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
        """The key of the compiled kernel, which begins with the device. None if the launch is not to be remembered."""
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
        # A width is 0 for a number that fits into 32 bits with its sign. ~x is for -2^31, whose bit_length is 32.
        widths = [(x if x >= 0 else ~x).bit_length() >> 5 for x in map(integers.__getitem__, self._widths)]
        return driver.active.get_current_device(), *kinds, *values, *widths
