"""One context vector per response from its hidden states.

    last:  h_b = x[start_b + length_b - 1]                        0 where length_b = 0
    mean:  h_b = sum_t x[start_b + t] / max(length_b, 1)          t = 0 .. length_b - 1

In a packed batch sequence b begins at row ``bounds[b]`` of x and ends where the next one begins, or after ``limit[b]``
tokens if only its prompt counts. In a padded batch there are no bounds: sequence b begins at row b * width and has
``limit[b]`` tokens. Every kernel reads bounds and limits itself, so no extra launch computes anything from them. A mask
takes one launch more (``mask_segments``), which writes bounds and limits.

A mean takes two launches. The first sums up each sequence in chunks of ``CHUNK_TOKENS`` tokens, the second adds up the
sums of the chunks in their order. So the result of a sequence does not depend on what else is in the batch. One launch
is enough where no sequence can be longer than a chunk.

Chunk c of sequence b writes its sum into row ``start_b // CHUNK_TOKENS + b + c`` of a scratch buffer. We call that row
its slot. No two chunks share a slot, because a sequence has at most one chunk more than the multiples of
``CHUNK_TOKENS`` that it covers. So T // CHUNK_TOKENS + B slots are enough, and the host does not have to know the
lengths. The program of a slot finds its sequence by comparing ``_PIVOTS`` sequences at a time, which takes one step for
up to 128 sequences and two for up to 16,384.

Bytes moved: the T d elements of the input, once, and 8 d per slot for the partial sums, which mostly stay in the L2.
For T = 65,536, d = 4,096 in bfloat16 and B = 64 that is 537 MB + 10 MB, 0.127 ms at the 4.3 TB/s of an H200 and
0.182 ms at the 3.0 TB/s of an H100. Two things come on top. At the end, the processors run dry for half a program's
time, which costs 3 %: 128 registers let 4 programs run on each of 132 processors, and these hold 35 MB of the 547. The
second launch takes 2 us. So 0.133 ms were predicted for an H200. With B = 128, 0.140 ms were measured there, which is
0.88 of the bandwidth of a copy of as many bytes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from maestro_fast.kernels.bound_launch import BoundLaunch, blocks

# Tokens of one chunk. With _COLUMNS they are 64 KB of bfloat16, so the case above has 8,192 programs of full chunks.
CHUNK_TOKENS = 256
_TOKENS = 64  # tokens of one step: 16 KB of bfloat16, which are eight loads of 16 bytes per thread
_COLUMNS = 128  # columns of one program, 256 bytes of a bfloat16 row; programs that run at once read whole rows
_STAGES = 3  # two steps are being loaded, 32 KB per program; 26 KB per processor would cover 0.8 us of latency
_PIVOTS = 128  # sequences that one step of the search compares, one per thread
_LAST_COLUMNS, _COMBINED_COLUMNS = 1024, 256  # columns of one program in ``_last`` and ``_combine``
_AHEAD = 8  # chunks whose sums the second launch loads before it adds them


@triton.jit
def segment(bounds_ptr, limit_ptr, b, inside, HAS_LIMIT: tl.constexpr):
    """The first row and the number of tokens of sequences b of a packed batch, int64; both 0 where not ``inside``."""
    start = tl.load(bounds_ptr + b, mask=inside, other=0).to(tl.int64)
    length = tl.load(bounds_ptr + b + 1, mask=inside, other=0).to(tl.int64) - start
    if HAS_LIMIT:
        length = tl.minimum(length, tl.load(limit_ptr + b, mask=inside, other=0).to(tl.int64))
    return start, length


@triton.jit
def _first_row(bounds_ptr, width, b, inside, PACKED: tl.constexpr):
    """The first rows of sequences b, int64."""
    if PACKED:
        return tl.load(bounds_ptr + b, mask=inside, other=0).to(tl.int64)
    else:
        return b.to(tl.int64) * width


@triton.jit
def _segment(bounds_ptr, limit_ptr, width, b, PACKED: tl.constexpr, HAS_LIMIT: tl.constexpr):
    """``segment`` of one sequence, which may be a padded row of ``width`` tokens, of which ``limit`` count."""
    if PACKED:
        return segment(bounds_ptr, limit_ptr, b, b >= 0, HAS_LIMIT)
    else:
        return b.to(tl.int64) * width, tl.load(limit_ptr + b).to(tl.int64)


@triton.jit(do_not_specialize=["width"])
def _last(
    x_ptr,
    bounds_ptr,
    limit_ptr,
    out_ptr,
    width,
    d,
    stride_xt,
    PACKED: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    BD: tl.constexpr,
):
    """One program copies BD columns of the last token of one sequence; those of an empty sequence are 0."""
    b = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    start, length = _segment(bounds_ptr, limit_ptr, width, b, PACKED, HAS_LIMIT)
    row_ptr = x_ptr + (start + length - 1) * stride_xt
    x_D = tl.load(row_ptr + column, mask=column < tl.where(length > 0, d, 0), other=0.0)
    tl.store(out_ptr + b * d + column, x_D.to(tl.float32), mask=column < d)


@triton.jit
def chunk_sum(x_ptr, row, tokens, column, d, stride_xt, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr):
    """The sum [BD] over the ``tokens`` rows of x from ``row`` on.

    The loop names its stages, because only then does the compiler pipeline loads that feed no matrix product. They go
    to shared memory ``STAGES`` - 1 steps ahead, without passing through registers.
    """
    # Every thread adds up the elements of its own places in the steps; places are added up once, at the end.
    sum_TD = tl.zeros([BT, BD], tl.float32)
    row_T = tl.arange(0, BT)
    x_TD_ptr = x_ptr + (row + row_T)[:, None] * stride_xt + column[None, :]
    for t in tl.range(0, tokens, BT, num_stages=STAGES):
        mask_TD = (t + row_T < tokens)[:, None] & (column < d)[None, :]
        sum_TD += tl.load(x_TD_ptr, mask=mask_TD, other=0.0).to(tl.float32)
        x_TD_ptr += BT * stride_xt
    return tl.sum(sum_TD, 0)


@triton.jit
def first_slot(start, b, CHUNK: tl.constexpr):
    """The slot of the first chunk of sequence b, which begins at row ``start``."""
    return start // CHUNK + b


@triton.jit
def _owner(bounds_ptr, width, slot, B, PACKED: tl.constexpr, CHUNK: tl.constexpr, BB: tl.constexpr):
    """The last sequence whose first slot is not after this one, or -1 if there is none.

    Each step compares BB sequences at equal distances and goes on between two of them, because first slots ascend.
    """
    lowest = tl.zeros([], tl.int32)  # the sequence is one of [lowest, lowest + span)
    span = tl.zeros([], tl.int32) + B
    found = tl.zeros([], tl.int32)
    while span > 0:
        step = tl.cdiv(span, BB)
        b = lowest + tl.arange(0, BB) * step
        inside = b < lowest + span
        first = first_slot(_first_row(bounds_ptr, width, b, inside, PACKED), b, CHUNK)
        found = tl.sum((inside & (first <= slot)).to(tl.int32), 0)
        end = lowest + span
        lowest += tl.maximum(found - 1, 0) * step
        # One sequence is left after a step of 1, and none if even the first begins after the slot.
        span = tl.where((step > 1) & (found > 0), tl.minimum(step, end - lowest), 0)
    return tl.where(found > 0, lowest, -1)


@triton.jit(do_not_specialize=["B", "width"])
def _sums(
    x_ptr,
    bounds_ptr,
    limit_ptr,
    out_ptr,
    B,
    width,
    d,
    stride_xt,
    CHUNK: tl.constexpr,
    SINGLE: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BB: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program sums BD columns of one chunk into out [slots, d]; a slot without a chunk is not written.

    With SINGLE every sequence is one chunk, its slot is its number, and out [B, d] gets the mean.
    """
    programs = tl.cdiv(d, BD)  # of one chunk; they follow each other, and so read whole rows at once
    slot = tl.program_id(0) // programs
    column = (tl.program_id(0) % programs) * BD + tl.arange(0, BD)
    b = slot if SINGLE else _owner(bounds_ptr, width, slot, B, PACKED, CHUNK, BB)
    if b >= 0:
        start, length = _segment(bounds_ptr, limit_ptr, width, b, PACKED, HAS_LIMIT)
        begin = start * 0 if SINGLE else (slot - first_slot(start, b, CHUNK)) * CHUNK  # the chunk's first token
        if SINGLE or begin < length:
            tokens = tl.minimum(length - begin, CHUNK).to(tl.int32)
            sum_D = chunk_sum(x_ptr, start + begin, tokens, column, d, stride_xt, BT, BD, STAGES)
            if SINGLE:
                sum_D = tl.div_rn(sum_D, tl.zeros([BD], tl.float32) + tl.maximum(length, 1).to(tl.float32))
            tl.store(out_ptr + slot.to(tl.int64) * d + column, sum_D, mask=column < d)


@triton.jit(do_not_specialize=["width"])
def _combine(
    sums_ptr,
    bounds_ptr,
    limit_ptr,
    out_ptr,
    width,
    d,
    CHUNK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    AHEAD: tl.constexpr,
    BD: tl.constexpr,
):
    """One program adds up BD columns of the chunks of one sequence, and divides by its tokens."""
    b = tl.program_id(0)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    start, length = _segment(bounds_ptr, limit_ptr, width, b, PACKED, HAS_LIMIT)
    slot_ptr = sums_ptr + first_slot(start, b, CHUNK) * d + column
    chunks = tl.cdiv(length, CHUNK).to(tl.int32)
    total_D = tl.zeros([BD], tl.float32)
    for c in range(0, chunks, AHEAD):
        # The loads of AHEAD chunks do not wait for each other. Chunks are added in their order; a missing one adds 0.
        for i in tl.static_range(AHEAD):
            total_D += tl.load(slot_ptr, mask=column < tl.where(chunks > c + i, d, 0), other=0.0)
            slot_ptr += d
    mean_D = tl.div_rn(total_D, tl.zeros([BD], tl.float32) + tl.maximum(length, 1).to(tl.float32))
    tl.store(out_ptr + b.to(tl.int64) * d + column, mean_D, mask=column < d)


@triton.jit(do_not_specialize=["B", "width"])
def _mask_segments(
    mask_ptr,
    prompt_ptr,
    bounds_ptr,
    limit_ptr,
    B,
    width,
    stride_mb,
    stride_mt,
    HAS_PROMPT: tl.constexpr,
    BW: tl.constexpr,
):
    """One program finds where one row of the mask has its first token, and how many tokens it (or its prompt) has."""
    b = tl.program_id(0).to(tl.int64)
    # Every lane keeps the first token and the number of tokens that it has met in blocks of BW tokens.
    first_W = tl.zeros([BW], tl.int32) + width
    count_W = tl.zeros([BW], tl.int32)
    for t in range(0, width, BW):
        token = t + tl.arange(0, BW)
        live = tl.load(mask_ptr + b * stride_mb + token.to(tl.int64) * stride_mt, mask=token < width, other=0) != 0
        first_W = tl.minimum(first_W, tl.where(live, token, width))
        count_W += live.to(tl.int32)
    length = tl.sum(count_W, 0).to(tl.int64)
    if HAS_PROMPT:
        length = tl.minimum(length, tl.load(prompt_ptr + b).to(tl.int64))
    tl.store(bounds_ptr + b, b * width + tl.min(first_W, 0))
    tl.store(limit_ptr + b, length)
    if b == 0:
        tl.store(bounds_ptr + B, B.to(tl.int64) * width)


def mask_segments(mask: Tensor, prompt_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """The bounds [B + 1] and the limit [B] of the rows of a mask [B, width], padded on the left or on the right."""
    batch, width = mask.shape
    room = batch + 2 - batch % 2  # so that both parts begin at a multiple of 16 bytes
    parts = torch.empty(2 * room, device=mask.device, dtype=torch.int64)
    bounds, limit_B = parts[: batch + 1], parts[room : room + batch]
    if batch:
        _mask_launch(prompt_B is not None)(
            (batch,),
            mask_ptr=mask,
            prompt_ptr=prompt_B,
            bounds_ptr=bounds,
            limit_ptr=limit_B,
            B=batch,
            width=width,
            stride_mb=mask.stride(0),
            stride_mt=mask.stride(1),
        )
    return bounds, limit_B


@lru_cache(maxsize=2)
def _mask_launch(has_prompt: bool) -> BoundLaunch:
    return BoundLaunch(_mask_segments, {"HAS_PROMPT": has_prompt, "BW": 1024}, num_warps=4)


def _launch_sums(
    flat: Tensor,
    bounds: Tensor | None,
    limit_B: Tensor | None,
    width: int | None,
    batch: int,
    out: Tensor,
    single: bool,
) -> None:
    """Writes sums of chunks into out [slots, d], or with ``single`` means of sequences into out [B, d]."""
    size = flat.shape[1]
    tiles = CHUNK_TOKENS, _TOKENS, _COLUMNS, _PIVOTS, _STAGES
    _sums_launch(single, bounds is not None, limit_B is not None, *tiles)(
        (out.shape[0] * blocks(size, _COLUMNS),),
        x_ptr=flat,
        bounds_ptr=bounds,
        limit_ptr=limit_B,
        out_ptr=out,
        B=batch,
        width=width or 0,
        d=size,
        stride_xt=flat.stride(0),
    )


@lru_cache(maxsize=64)
def _sums_launch(
    single: bool, packed: bool, has_limit: bool, chunk: int, tokens: int, columns: int, pivots: int, stages: int
) -> BoundLaunch:
    constants = {
        "SINGLE": single,
        "PACKED": packed,
        "HAS_LIMIT": has_limit,
        "CHUNK": chunk,
        "BT": tokens,
        "BD": columns,
        "BB": pivots,
        "STAGES": stages,
    }
    return BoundLaunch(_sums, constants, num_warps=4)


def chunk_sums(flat: Tensor, bounds: Tensor | None, limit_B: Tensor | None = None, width: int | None = None) -> Tensor:
    """The sums [slots, d] of all chunks. A slot without a chunk is not written. The arguments are ``pool_hidden``'s."""
    batch = _batch(bounds, limit_B)
    sums = torch.empty(flat.shape[0] // CHUNK_TOKENS + batch, flat.shape[1], device=flat.device, dtype=torch.float32)
    _launch_sums(flat, bounds, limit_B, width, batch, sums, False)
    return sums


def _batch(bounds: Tensor | None, limit_B: Tensor | None) -> int:
    if bounds is not None:
        return bounds.shape[0] - 1
    assert limit_B is not None
    return limit_B.shape[0]


def pool_hidden(
    flat: Tensor, bounds: Tensor | None, limit_B: Tensor | None = None, *, mean: bool, width: int | None = None
) -> Tensor:
    """Pools hidden states, which ``ops.pool_hidden`` has checked and laid out, to float32 [B, d].

    Args:
        flat: [T, d] hidden states, packed, or padded and flattened, with contiguous columns and any stride of rows.
        bounds: int [B + 1], the ascending first rows of the sequences and the end of the last one. With None the
            sequences are rows of ``width`` tokens, of which ``limit_B`` count.
        limit_B: int [B], the most tokens that count of each sequence, or None for all of a packed sequence.
        mean: whether the mean over the sequence is wanted, and not its last token.
        width: the padded width, or None for packed sequences. No sequence exceeds it, which may save the second launch.
    """
    batch, size = _batch(bounds, limit_B), flat.shape[1]
    out = torch.empty(batch, size, device=flat.device, dtype=torch.float32)
    if batch == 0 or size == 0:
        return out
    packed, has_limit = bounds is not None, limit_B is not None
    where = {"bounds_ptr": bounds, "limit_ptr": limit_B, "out_ptr": out, "width": width or 0, "d": size}
    if not mean:
        grid = (batch, blocks(size, _LAST_COLUMNS))
        _last_launch(packed, has_limit)(grid, x_ptr=flat, stride_xt=flat.stride(0), **where)
    elif min(flat.shape[0], flat.shape[0] if width is None else width) <= CHUNK_TOKENS:
        _launch_sums(flat, bounds, limit_B, width, batch, out, True)
    else:
        sums = chunk_sums(flat, bounds, limit_B, width)
        grid = (batch, blocks(size, _COMBINED_COLUMNS))
        _combine_launch(packed, has_limit, CHUNK_TOKENS)(grid, sums_ptr=sums, **where)
    return out


@lru_cache(maxsize=4)
def _last_launch(packed: bool, has_limit: bool) -> BoundLaunch:
    constants = {"PACKED": packed, "HAS_LIMIT": has_limit, "BD": _LAST_COLUMNS}
    return BoundLaunch(_last, constants, num_warps=4)


@lru_cache(maxsize=16)
def _combine_launch(packed: bool, has_limit: bool, chunk: int) -> BoundLaunch:
    constants = {"PACKED": packed, "HAS_LIMIT": has_limit, "CHUNK": chunk, "AHEAD": _AHEAD, "BD": _COMBINED_COLUMNS}
    return BoundLaunch(_combine, constants, num_warps=4)
