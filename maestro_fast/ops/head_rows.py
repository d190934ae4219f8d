"""A row of logits: from the output of the head's matrix product to the log-prob of a token, and back.

    u_v = scale * x_v + b_v            x = h @ W.T, the output of the matrix product
    y_v = softcap(u_v)                 softcap(u) = cap * tanh(u / cap)
    z_v = y_v / T
    log p_y = z_y - logsumexp(z)       H = logsumexp(z) - sum_v p_v z_v
    dL/dz_v = -p_v (dlp + dH (log p_v + H)) + dlp 1[v = y]

No row depends on other rows of its chunk. The reference in PyTorch comes first. Then come the calls of
``csrc/head_rows.cpp`` and the launches of ``kernels/head_rows.py``, which compute the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maestro_fast.ops import cpp, gpu
from maestro_fast.ops.tensors import floats, no_outputs
from maestro_fast.specs import HeadSpec, RowStatistics, as_text, from_text

if TYPE_CHECKING:
    from maestro_fast import _C

# --- PyTorch, the reference ---

# Elements of logits that the reference takes at once on a CPU. They take 2 MiB of float32, which fit into the cache.
_BLOCK = 2**19


def row_statistics(x: Tensor, targets: Tensor, bias: Tensor | None, spec: HeadSpec) -> RowStatistics:
    """The statistics of a chunk of C rows.

    Args:
        x: [C, V], float32 or float64; it is not changed.
        targets: int64 [C], token ids in [0, V) or ``spec.ignore_index``.
        bias: [V] in the dtype of ``x``, or None.
        spec: scale, soft cap, temperature, and whether entropies are wanted.
    """
    found = [_block_statistics(x[rows], targets[rows], bias, spec) for rows in _blocks(x)]
    return found[0] if len(found) == 1 else RowStatistics(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _blocks(x: Tensor) -> list[slice]:
    """Ranges of the rows of ``x`` that the reference takes at once. On a GPU this is all of them."""
    rows, V = x.shape
    step = max(_BLOCK // V, 64) if x.device.type == "cpu" else max(rows, 1)
    return [slice(start, start + step) for start in range(0, max(rows, 1), step)]


def _block_statistics(x: Tensor, targets: Tensor, bias: Tensor | None, spec: HeadSpec) -> RowStatistics:
    if x.shape[0] == 1:  # Several threads would share the sums of a single row, and so add up in another order.
        both = _block_statistics(torch.cat([x, x]), torch.cat([targets, targets]), bias, spec)
        return RowStatistics(*(values[:1] for values in both))
    live = targets != spec.ignore_index
    y = capped_logits(x, bias, spec)
    # log_softmax would add up one after the other on the CPU, which costs 2e-5 in every log-prob at V = 151,936.
    peaks = y.amax(-1)
    shifted = _gaps(y, peaks, spec)
    exp = shifted.exp()
    totals = exp.sum(-1)
    chosen = shifted.gather(1, torch.where(live, targets, 0)[:, None])[:, 0]
    logprobs = torch.where(live, chosen - totals.log(), 0.0)
    if spec.entropy == "none":
        return RowStatistics(logprobs, peaks, totals, x.new_empty(0))
    entropies = totals.log() - exp.mul_(_finite(shifted)).sum(-1) / totals
    return RowStatistics(logprobs, peaks, totals, torch.where(live, entropies, 0.0))


def dlogits_(
    x: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    stats: RowStatistics,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    spec: HeadSpec,
    out: Tensor | None = None,
) -> None:
    """Writes dL/du of a chunk, the gradient by scale * x + bias. Its sum over the rows is the gradient by the bias.

    A row that is ignored, or whose two gradients are 0, becomes exactly 0, whatever ``x`` holds there.

    Args:
        x, targets, bias: as in ``row_statistics``.
        stats: the statistics of the same chunk. Their log-probs are not read, their entropies only with ``dentropies``.
        dlogprobs, dentropies: dL/dlog p_y and dL/dH, both [C] in the dtype of ``x``. None means that dL/dH is 0.
        out: [C, V] of any floating dtype, where the gradient is written; None writes it over ``x``.
    """
    for rows in _blocks(x):
        part = RowStatistics(*(values[rows] for values in stats))
        into = x[rows] if out is None else out[rows]
        dent = None if dentropies is None else dentropies[rows]
        into.copy_(_block_dlogits(x[rows], targets[rows], bias, part, dlogprobs[rows], dent, spec))


def _block_dlogits(
    x: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    stats: RowStatistics,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    spec: HeadSpec,
) -> Tensor:
    live = targets != spec.ignore_index
    dead = ~live | (dlogprobs == 0)
    if dentropies is not None:
        dead = ~live | ((dlogprobs == 0) & (dentropies == 0))
    dlp = torch.where(dead, 0.0, dlogprobs)[:, None]
    y = capped_logits(x, bias, spec)
    shifted = _gaps(y, stats.peaks, spec)
    p = shifted.exp().div_(stats.totals[:, None])
    dz = -p * dlp
    if dentropies is not None:
        logp = _finite(shifted).sub_(stats.totals.log()[:, None])
        dent = torch.where(dead, 0.0, dentropies)[:, None]
        dz -= p.mul_(dent).mul_(logp.add_(stats.entropies[:, None]))
    dz.scatter_add_(1, torch.where(live, targets, 0)[:, None], dlp)
    if spec.temperature != 1.0:
        dz /= spec.temperature
    if spec.softcap is not None:
        dz *= 1.0 - (y / spec.softcap) ** 2
    return dz.masked_fill_(dead[:, None], 0.0)


def capped_logits(x: Tensor, bias: Tensor | None, spec: HeadSpec) -> Tensor:
    """y [C, V], the logits before the temperature. It is ``x`` itself where scale, bias and soft cap change nothing."""
    u = x * spec.scale if spec.scale != 1.0 else x
    if bias is not None:
        u = u + bias
    return u if spec.softcap is None else spec.softcap * torch.tanh(u / spec.softcap)


def _gaps(y: Tensor, peaks: Tensor, spec: HeadSpec) -> Tensor:
    """z_v - max z, [C, V]."""
    gaps = y - peaks[:, None]
    return gaps if spec.temperature == 1.0 else gaps.div_(spec.temperature)


def _finite(gaps: Tensor) -> Tensor:
    """The gaps with the lowest finite number in place of -inf, so that p times the gap is 0 where p is."""
    return gaps.clamp_(min=torch.finfo(gaps.dtype).min)


# --- C++ and Triton ---


def _empty_statistics(x: Tensor, targets: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, ...]:
    rows = x.shape[0]
    with_entropy = from_text(HeadSpec, spec).entropy != "none"
    return *(x.new_empty(rows) for _ in range(3)), x.new_empty(rows if with_entropy else 0)


_STATISTICS = "(Tensor x, Tensor targets, Tensor? bias, str spec) -> (Tensor, Tensor, Tensor, Tensor)"
_STATISTICS_OPERATOR: dict[str, Any] = {
    "flat": lambda x, targets, bias, spec: (x, targets, bias, as_text(spec)),
    "whole": lambda x, targets, bias, spec: (x, targets, bias, from_text(HeadSpec, spec)),
    "result": RowStatistics,
}


@gpu.operator(f"triton_row_statistics{_STATISTICS}", _empty_statistics, **_STATISTICS_OPERATOR)
def triton_row_statistics(x: Tensor, targets: Tensor, bias: Tensor | None, spec: HeadSpec) -> RowStatistics:
    """``row_statistics`` of float32 logits, in one launch. A target that is out of range gives NaN."""
    from maestro_fast.kernels import head_rows as kernel

    return kernel.row_statistics(x, targets, bias, spec)


@cpp.operator(f"cpp_row_statistics{_STATISTICS}", _empty_statistics, **_STATISTICS_OPERATOR)
def cpp_row_statistics(x: Tensor, targets: Tensor, bias: Tensor | None, spec: HeadSpec) -> RowStatistics:
    """``row_statistics`` of float32 logits [C, V], whose columns are contiguous."""
    rows, targets, wants_entropy = x.shape[0], targets.contiguous(), spec.entropy != "none"
    found = RowStatistics(*(x.new_empty(n) for n in (rows, rows, rows, rows if wants_entropy else 0)))
    cpp._C.row_statistics(
        _logit_rows(x, targets),
        _head_numbers(spec, bias),
        cpp.address(found.logprobs),
        cpp.address(found.peaks),
        cpp.address(found.totals),
        cpp.address(found.entropies if wants_entropy else None),
        torch.get_num_threads(),
    )
    return found


def _logit_rows(x: Tensor, targets: Tensor) -> _C.LogitRows:
    return cpp._C.LogitRows(cpp.address(x), x.shape[0], x.shape[1], x.stride(0), cpp.address(targets))


def _head_numbers(spec: HeadSpec, bias: Tensor | None) -> _C.HeadNumbers:
    softcap = 0.0 if spec.softcap is None else float(spec.softcap)
    return cpp._C.HeadNumbers(cpp.address(bias), float(spec.scale), softcap, float(spec.temperature), spec.ignore_index)


def triton_dlogits_(
    x: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    stats: RowStatistics,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    spec: HeadSpec,
    out: Tensor | None = None,
) -> None:
    """``dlogits_`` of float32 logits, in one launch."""
    dentropies = None if dentropies is None else dentropies.contiguous()
    given = targets, bias, stats, dlogprobs.contiguous(), dentropies, spec
    if out is None:
        _dlogits_in_place(x, *given)
    else:
        _dlogits_into(out, x, *given)


_GIVEN = (
    "Tensor targets, Tensor? bias, Tensor peaks, Tensor totals, Tensor entropies, Tensor dlogprobs,"
    " Tensor? dentropies, str spec"
)


def _flat(*arguments: Any) -> tuple[Any, ...]:
    *tensors, stats, dlogprobs, dentropies, spec = arguments
    return *tensors, stats.peaks, stats.totals, stats.entropies, dlogprobs, dentropies, as_text(spec)


def _whole(*arguments: Any) -> tuple[Any, ...]:
    *tensors, peaks, totals, entropies, dlogprobs, dentropies, spec = arguments
    stats = RowStatistics(peaks, peaks, totals, entropies)  # The kernel does not read the log-probs.
    return *tensors, stats, dlogprobs, dentropies, from_text(HeadSpec, spec)


# torch.compile needs two operators, because an operator that writes to its first argument may not read the same memory
# through its second.


@gpu.operator(f"triton_dlogits_(Tensor(a!) x, {_GIVEN}) -> ()", no_outputs, flat=_flat, whole=_whole)
def _dlogits_in_place(
    x: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    stats: RowStatistics,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    spec: HeadSpec,
) -> None:
    from maestro_fast.kernels import head_rows as kernel

    kernel.dlogits(x, targets, bias, stats, dlogprobs, dentropies, spec, x)


@gpu.operator(f"triton_dlogits_into(Tensor(a!) out, Tensor x, {_GIVEN}) -> ()", no_outputs, flat=_flat, whole=_whole)
def _dlogits_into(
    out: Tensor,
    x: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    stats: RowStatistics,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    spec: HeadSpec,
) -> None:
    from maestro_fast.kernels import head_rows as kernel

    kernel.dlogits(x, targets, bias, stats, dlogprobs, dentropies, spec, out)


def cpp_dlogits_(
    x: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    stats: RowStatistics,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    spec: HeadSpec,
) -> Tensor:
    """``dlogits_`` of float32 logits [C, V], whose columns are contiguous. The gradient, which is returned, overwrites
    them, but for a graph: Inductor of torch 2.13 fails on some operators that write into tensors of symbolic sizes."""
    given = targets.contiguous(), bias, stats, floats(dlogprobs), None if dentropies is None else floats(dentropies)
    if torch.compiler.is_compiling():
        return _dlogits_apart(x, *given, spec)
    _dlogits_over(x, *given, spec)
    return x


@cpp.operator(
    f"cpp_dlogits(Tensor x, {_GIVEN}) -> Tensor", lambda x, *_: x.new_empty(x.shape), flat=_flat, whole=_whole
)
def _dlogits_apart(x: Tensor, *given: Any) -> Tensor:
    out = x.new_empty(x.shape).copy_(x)
    _dlogits_over(out, *given)
    return out


def _dlogits_over(
    x: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    stats: RowStatistics,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    spec: HeadSpec,
) -> None:
    cpp._C.dlogits(
        _logit_rows(x, targets),
        _head_numbers(spec, bias),
        cpp.address(stats.peaks),
        cpp.address(stats.totals),
        cpp.address(None if dentropies is None else stats.entropies),
        cpp.address(dlogprobs),
        cpp.address(dentropies),
        torch.get_num_threads(),
    )
