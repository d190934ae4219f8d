"""The maths of a row of logits, in plain PyTorch: from the output of the head's GEMM to log-probs, and back.

    u_v = scale * x_v + b_v            x = h @ W.T, the output of the GEMM
    y_v = softcap(u_v)                 softcap(u) = cap * tanh(u / cap)
    z_v = y_v / T
    log p_y = z_y - logsumexp(z)       H = logsumexp(z) - sum_v p_v z_v
    dL/dz_v = -p_v (dlp + dH (log p_v + H)) + dlp 1[v = y]

Every row stands for itself: its results depend on no other row of its chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_fast.specs import HeadSpec, RowStatistics


def row_statistics(x: Tensor, targets: Tensor, bias: Tensor | None, spec: HeadSpec) -> RowStatistics:
    """Statistics of a chunk.

    Args:
        x: [C, V], float32 or float64; left as it is.
        targets: int64 [C], in [0, V) or ``spec.ignore_index``.
        bias: [V] in the dtype of ``x``, or None.
    """
    live = targets != spec.ignore_index
    y = capped_logits(x, bias, spec)
    # Not log_softmax: its sums on the CPU are sequential, which costs 2e-5 in every log-prob at V = 151,936.
    peaks = y.amax(-1)
    shifted = _gaps(y, peaks, spec)
    exp = shifted.exp()
    totals = exp.sum(-1)
    chosen = shifted.gather(1, torch.where(live, targets, 0)[:, None])[:, 0]
    logprobs = torch.where(live, chosen - totals.log(), 0.0)
    if spec.entropy == "none":
        return RowStatistics(logprobs, peaks, totals, None)
    entropies = totals.log() - exp.mul_(shifted).sum(-1) / totals
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
    """dL/du of a chunk: with respect to scale * x + bias, which is the bias's gradient before it is summed.

    A row that is ignored, or whose two gradients are 0, becomes exactly 0, whatever ``x`` holds there.

    Args:
        x, targets, bias: as in ``row_statistics``.
        stats: of the same chunk.
        dlogprobs, dentropies: dL/dlog p_y and dL/dH [C] in the dtype of ``x``; ``dentropies`` needs
            ``stats.entropies``, None stands for 0.
        out: [C, V] of any floating dtype, where the gradient is written; None: over ``x``.
    """
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
        assert stats.entropies is not None
        logp = shifted.sub_(stats.totals.log()[:, None])
        dent = torch.where(dead, 0.0, dentropies)[:, None]
        dz -= p.mul_(dent).mul_(logp.add_(stats.entropies[:, None]))
    dz.scatter_add_(1, torch.where(live, targets, 0)[:, None], dlp)
    if spec.temperature != 1.0:
        dz /= spec.temperature
    if spec.softcap is not None:
        dz *= 1.0 - (y / spec.softcap) ** 2
    (x if out is None else out).copy_(dz.masked_fill_(dead[:, None], 0.0))


def capped_logits(x: Tensor, bias: Tensor | None, spec: HeadSpec) -> Tensor:
    """y [C, V], the logits before the temperature; ``x`` itself where nothing is to be done."""
    u = x * spec.scale if spec.scale != 1.0 else x
    if bias is not None:
        u = u + bias
    return u if spec.softcap is None else spec.softcap * torch.tanh(u / spec.softcap)


def _gaps(y: Tensor, peaks: Tensor, spec: HeadSpec) -> Tensor:
    """z_v - max z, [C, V]."""
    gaps = y - peaks[:, None]
    return gaps if spec.temperature == 1.0 else gaps.div_(spec.temperature)
