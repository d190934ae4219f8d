"""One context vector per response from its hidden states.

    last:  h_b = x[start_b + length_b - 1]                        0 where length_b = 0
    mean:  h_b = sum_t x[start_b + t] / max(length_b, 1)          t = 0 .. length_b - 1

A mean runs in chunks of ``_CHUNK`` tokens of a sequence, whose sums a second launch adds in their order, so the
result of a sequence does not depend on what else is in the batch. Where no sequence can be longer than a chunk, one
launch does.

Chunk c of sequence b has slot ``start_b // _CHUNK + b + c`` of the scratch: no two share one, because the chunks of a
sequence are at most one more than the multiples of ``_CHUNK`` that it covers. So T // _CHUNK + B slots suffice, and
nobody has to know the lengths on the host.

Bytes moved: the T d elements of the input, once, and 8 d per slot for the partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 256  # tokens of one program
_TOKENS = 16  # tokens of one step
_COLUMNS = 256  # columns of one program, 512 bytes of a bf16 row


@triton.jit
def _last(x_ptr, start_ptr, length_ptr, out_ptr, d, stride_xt, BD: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    start = tl.load(start_ptr + b).to(tl.int64)
    length = tl.load(length_ptr + b).to(tl.int64)
    row_ptr = x_ptr + (start + length - 1) * stride_xt
    x_D = tl.load(row_ptr + column, mask=column < tl.where(length > 0, d, 0), other=0.0)
    tl.store(out_ptr + b * d + column, x_D.to(tl.float32), mask=column < d)


@triton.jit
def chunk_sum(x_ptr, start, begin, end, column, d, stride_xt, BT: tl.constexpr, BD: tl.constexpr):
    """Sum [BD] over the tokens begin .. end of the sequence that starts at row ``start``."""
    sum_TD = tl.zeros([BT, BD], tl.float32)
    for t in range(begin, end, BT):
        token = t + tl.arange(0, BT)
        mask_TD = (token < end)[:, None] & (column < d)[None, :]
        sum_TD += tl.load(x_ptr + (start + token)[:, None] * stride_xt + column[None, :], mask=mask_TD, other=0.0).to(
            tl.float32
        )
    return tl.sum(sum_TD, 0)


@triton.jit
def first_slot(start, b, CHUNK: tl.constexpr):
    return start // CHUNK + b


@triton.jit
def _owner(start_ptr, slot, B, CHUNK: tl.constexpr, BB: tl.constexpr):
    """The last sequence whose first slot is not behind this one."""
    count_B = tl.zeros([BB], tl.int32)
    for b0 in range(0, B, BB):
        b = b0 + tl.arange(0, BB)
        first_B = first_slot(tl.load(start_ptr + b, mask=b < B, other=0).to(tl.int64), b, CHUNK)
        count_B += ((first_B <= slot) & (b < B)).to(tl.int32)
    return tl.sum(count_B, 0) - 1


@triton.jit(do_not_specialize=["B"])
def _sums(
    x_ptr,
    start_ptr,
    length_ptr,
    out_ptr,
    B,
    d,
    stride_xt,
    CHUNK: tl.constexpr,
    SINGLE: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BB: tl.constexpr,
):
    """out [slots, d]: the sum of each slot's chunk, unless it has none. SINGLE: out [B, d], means of one chunk."""
    slot = tl.program_id(0)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    b = slot if SINGLE else _owner(start_ptr, slot, B, CHUNK, BB)
    if b >= 0:
        start = tl.load(start_ptr + b).to(tl.int64)
        length = tl.load(length_ptr + b).to(tl.int64)
        begin = start * 0 if SINGLE else (slot - first_slot(start, b, CHUNK)) * CHUNK
        if SINGLE or begin < length:
            end = tl.minimum(begin + CHUNK, length)
            sum_D = chunk_sum(x_ptr, start, begin, end, column, d, stride_xt, BT, BD)
            if SINGLE:
                sum_D = tl.div_rn(sum_D, tl.zeros([BD], tl.float32) + tl.maximum(length, 1).to(tl.float32))
            tl.store(out_ptr + slot.to(tl.int64) * d + column, sum_D, mask=column < d)


@triton.jit
def _combine(sums_ptr, start_ptr, length_ptr, out_ptr, d, CHUNK: tl.constexpr, BD: tl.constexpr):
    b = tl.program_id(0)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    start = tl.load(start_ptr + b).to(tl.int64)
    length = tl.load(length_ptr + b).to(tl.int64)
    slot_ptr = sums_ptr + first_slot(start, b, CHUNK) * d
    total_D = tl.zeros([BD], tl.float32)
    for c in range(0, tl.cdiv(length, CHUNK)):
        total_D += tl.load(slot_ptr + c * d + column, mask=column < d, other=0.0)
    mean_D = tl.div_rn(total_D, tl.zeros([BD], tl.float32) + tl.maximum(length, 1).to(tl.float32))
    tl.store(out_ptr + b.to(tl.int64) * d + column, mean_D, mask=column < d)


def _launch_sums(flat: Tensor, start_B: Tensor, length_B: Tensor, out: Tensor, single: bool) -> None:
    size = flat.shape[1]
    _sums[(out.shape[0], triton.cdiv(size, _COLUMNS))](
        flat,
        start_B,
        length_B,
        out,
        start_B.shape[0],
        size,
        flat.stride(0),
        CHUNK=_CHUNK,
        SINGLE=single,
        BT=_TOKENS,
        BD=_COLUMNS,
        BB=1024,
        num_warps=4,
        num_stages=4,
        enable_fp_fusion=False,
    )


def chunk_sums(flat: Tensor, start_B: Tensor, length_B: Tensor) -> Tensor:
    """Sums [slots, d] of all chunks; a slot without a chunk is not written."""
    slots = flat.shape[0] // _CHUNK + start_B.shape[0]
    sums = torch.empty(slots, flat.shape[1], device=flat.device, dtype=torch.float32)
    _launch_sums(flat, start_B, length_B, sums, False)
    return sums


def pool_hidden(flat: Tensor, start_B: Tensor, length_B: Tensor, *, mean: bool, longest: int | None = None) -> Tensor:
    """Pools to float32 [B, d] what ``ops.pool_hidden`` has checked and laid out.

    Args:
        flat: [T, d] hidden states, columns contiguous, any stride of rows: packed, or padded and flattened.
        start_B, length_B: int [B], first row and number of tokens of each sequence; sequences follow one another and
            do not overlap.
        mean: over the sequence; else its last token.
        longest: a bound of ``length_B`` that the host knows, e.g. the padded width: it may save the second launch.
    """
    batch, size = start_B.shape[0], flat.shape[1]
    out = torch.empty(batch, size, device=flat.device, dtype=torch.float32)
    if batch == 0 or size == 0:
        return out
    if not mean:
        _last[(batch, triton.cdiv(size, 1024))](
            flat, start_B, length_B, out, size, flat.stride(0), BD=1024, num_warps=4, enable_fp_fusion=False
        )
    elif min(flat.shape[0], flat.shape[0] if longest is None else longest) <= _CHUNK:
        _launch_sums(flat, start_B, length_B, out, True)
    else:
        sums = chunk_sums(flat, start_B, length_B)
        _combine[(batch, triton.cdiv(size, 512))](
            sums, start_B, length_B, out, size, CHUNK=_CHUNK, BD=512, num_warps=4, enable_fp_fusion=False
        )
    return out
