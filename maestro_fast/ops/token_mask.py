"""From tokens to responses and back, in the padded layout [B, L]: lengths, sums, and a response's value at its tokens.

    lengths_b = sum_t mask_bt          sum_tokens: s_b = sum_t x_bt          spread: y_bt = v_b mask_bt

Frameworks such as verl want an advantage for each token. Their masks are int64, so at B = 4096 and L = 1024 the mask
takes 33 MB, and reading it costs more than the advantages do. C++ reads it once: where the tokens of a row are its
first ones, as they mostly are, their number says all about it. A mask with holes (turns of a user or a tool) is read
again where it is spread.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maestro_fast.ops import cpp
from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.tensors import check_tensors, floats, is_integer

# How C++ reads a mask, by the number of ``enum class MaskType`` in csrc/token_mask.hpp.
_TYPES = {torch.int64: 0, torch.int32: 1, torch.bool: 2, torch.uint8: 2, torch.float32: 3}


@dataclass(frozen=True)
class TokenMask:
    """A mask and what one pass over it finds.

    Attributes:
        mask_BL: the mask [B, L].
        lengths_B: [B], the number of tokens of each response; int64, or floating for a floating mask that has other
            values than 0 and 1.
        prefix_B: bool [B], whether the tokens of a response are the first ones of its row; None where PyTorch serves.
    """

    mask_BL: Tensor
    lengths_B: Tensor
    prefix_B: Tensor | None

    def spread(self, values: Tensor) -> Tensor:
        """Each response's value at its tokens, and 0 elsewhere.

        Args:
            values: floating [B], on the device of the mask.

        Returns:
            [B, L], of the dtype of ``values``.

        Raises:
            ValueError: the shape or the device is wrong.
            TypeError: the values are no dense tensor, or are not floating.
        """
        check_tensors(1, values=values)
        if not values.is_floating_point():
            raise TypeError(f"values: dtype {values.dtype}, expected a floating dtype")
        if values.shape != self.mask_BL.shape[:1]:
            raise ValueError(f"values: shape {tuple(values.shape)}, expected ({self.mask_BL.shape[0]},)")
        if values.device != self.mask_BL.device:
            raise ValueError(f"values: on {values.device}, expected {self.mask_BL.device} as the mask")
        wants_gradient = values.requires_grad and torch.is_grad_enabled()
        if self.prefix_B is None or values.dtype is not torch.float32 or wants_gradient:
            weighted_BL = values[:, None] * self.mask_BL.to(values.dtype)
            return torch.where(self.mask_BL != 0, weighted_BL, 0.0)  # A value may be NaN or infinite.
        out_BL = torch.empty(self.mask_BL.shape, dtype=torch.float32)
        values = values.contiguous()
        cpp._C.spread_over_tokens(
            values.data_ptr(),
            self.mask_BL.data_ptr(),
            _TYPES[self.mask_BL.dtype],
            self.mask_BL.shape[0],
            self.mask_BL.shape[1],
            self.lengths_B.data_ptr(),
            self.prefix_B.data_ptr(),
            out_BL.data_ptr(),
            torch.get_num_threads(),
        )
        return out_BL


def token_mask(mask: Tensor, *, backend: Backend | None = None) -> TokenMask:
    """Looks at a mask once.

    Args:
        mask: [B, L], bool, uint8, signed integer or floating, 1 where a token counts and 0 elsewhere. Other values are
            weights, which only "torch" serves.
        backend: "cpp" or "torch". None takes C++ for a mask of 0 and 1 on the CPU.

    Raises:
        ValueError: the shape is wrong, the mask holds no values, or ``backend`` cannot serve it.
        TypeError: the mask is no dense tensor, or has another dtype.
    """
    check_tensors(1, mask=mask)
    if mask.ndim != 2:
        raise ValueError(f"mask: shape {tuple(mask.shape)}, expected [B, L]")
    if not (mask.dtype in (torch.bool, torch.uint8) or is_integer(mask) or mask.is_floating_point()):
        raise TypeError(f"mask: dtype {mask.dtype}, expected bool, uint8, a signed integer or a floating dtype")
    if mask.is_meta:
        raise ValueError("mask: on meta, expected a tensor that holds values")
    if resolve("token_mask", backend, mask) == "cpp":
        found = _by_cpp(mask)
        if found is not None:
            return found
        if backend == "cpp":
            raise ValueError("mask: holds values other than 0 and 1, which backend 'cpp' does not serve")
    lengths_B = (mask.float() if mask.is_floating_point() and mask.element_size() < 4 else mask).sum(1)
    plain = lengths_B.is_floating_point() and bool(((mask == 0) | (mask == 1)).all())
    return TokenMask(mask, lengths_B.long() if plain else lengths_B, None)


def _by_cpp(mask: Tensor) -> TokenMask | None:
    """The mask as C++ reads it; None if it has other values than 0 and 1."""
    if mask.dtype not in _TYPES:
        mask = mask.float() if mask.is_floating_point() else mask.int()
    mask = mask.contiguous()
    lengths_B = torch.empty(mask.shape[0], dtype=torch.int64)
    prefix_B = torch.empty(mask.shape[0], dtype=torch.bool)
    plain = cpp._C.examine_mask(
        mask.data_ptr(),
        _TYPES[mask.dtype],
        mask.shape[0],
        mask.shape[1],
        lengths_B.data_ptr(),
        prefix_B.data_ptr(),
        torch.get_num_threads(),
    )
    return TokenMask(mask, lengths_B, prefix_B) if plain else None


def sum_tokens(values: Tensor, *, backend: Backend | None = None) -> Tensor:
    """The sum [B] of each row of ``values`` [B, L], in the dtype of ``values``; C++ adds float32 up in double.

    Args:
        values: floating [B, L].
        backend: "cpp" or "torch". None takes C++ for float32 on the CPU.

    Raises:
        ValueError: the shape is wrong, or ``backend`` cannot serve these values.
        TypeError: the values are no dense tensor, or are not floating.
    """
    check_tensors(1, values=values)
    if values.ndim != 2:
        raise ValueError(f"values: shape {tuple(values.shape)}, expected [B, L]")
    if not values.is_floating_point():
        raise TypeError(f"values: dtype {values.dtype}, expected a floating dtype")
    if resolve("sum_tokens", backend, values) == "torch":
        return values.sum(1)
    given = floats(values).contiguous()
    out_B = torch.empty(values.shape[0], dtype=torch.float32)
    rows, width = given.shape
    cpp._C.sum_over_tokens(given.data_ptr(), rows, width, out_B.data_ptr(), torch.get_num_threads())
    return out_B.to(values.dtype)
