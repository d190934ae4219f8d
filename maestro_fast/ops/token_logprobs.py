"""Log-probs and entropies of target tokens from hidden states; the logits of the whole batch never exist.

    z_v = softcap(scale * h . W_v + b_v) / T          softcap(x) = cap * tanh(x / cap)
    log p_y = z_y - logsumexp(z)                      H = logsumexp(z) - sum_v p_v z_v
    dL/dz_v = -p_v (dlp + dH (log p_v + H)) + dlp 1[v = y]

The GEMMs and their chunks are those of ``ops.head_chunks``, the maths of a row is that of ``ops.head_rows``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maestro_fast.ops.head_chunks import Chunk, Head
from maestro_fast.ops.head_rows import EntropyMode, HeadSpec, RowStatistics, logits
from maestro_fast.ops.tensors import readable, wide, without_autocast


class TokenLogprobs(NamedTuple):
    """Log-probs [T] and entropies [T] in nats (None with ``entropy="none"``); rows that are ignored hold 0."""

    logprobs: Tensor
    entropies: Tensor | None


def reference_token_logprobs(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> TokenLogprobs:
    """The truth: materialises all logits, differentiates through autograd. For tests and small inputs."""
    live = targets != ignore_index
    with without_autocast(hidden):
        x = torch.where(live[:, None], hidden, 0.0) @ lm_head.T
    z, _ = logits(x, bias, HeadSpec(logit_scale, softcap, temperature, ignore_index, "grad"))
    logp_TV = z.log_softmax(-1)
    logprobs = logp_TV.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    entropies = -(logp_TV.exp() * logp_TV).sum(-1)
    return TokenLogprobs(torch.where(live, logprobs, 0.0), torch.where(live, entropies, 0.0))


def token_logprobs(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: EntropyMode = "none",
    ignore_index: int = -100,
) -> TokenLogprobs:
    """Log-probs, and if wanted entropies, of ``targets`` under a language-model head, in chunks of rows.

    Args:
        hidden: [T, d], float32, bfloat16, float16 or float64: the states that predict ``targets``.
        lm_head: [V, d], the head's weight, same dtype as ``hidden``.
        targets: int64 [T], token ids in [0, V) or ``ignore_index``.
        bias: [V] or None.
        logit_scale: multiplies the logits before the bias (Granite and Cohere scale theirs).
        softcap: bound of a tanh soft cap on the logits, or None (Gemma caps its).
        temperature: divides the logits last; the sampling temperature in GRPO.
        entropy: "none", "value" (no gradient through it) or "grad".
        ignore_index: rows with this target return 0 and get no gradient.

    Returns:
        ``TokenLogprobs``, float32 (float64 for float64 inputs), in nats. Logits are formed and summed in that
        precision, under autocast too.

    Raises:
        ValueError: shapes, a non-positive temperature or softcap, a target out of range (read on CPU tensors only).
        TypeError: dtypes.
    """
    spec = HeadSpec(logit_scale, softcap, temperature, ignore_index, entropy)
    check_head_inputs(hidden, lm_head, targets, bias, spec)
    logprobs, entropies = _TokenLogprobs.apply(hidden, lm_head, bias, targets, spec)  # type: ignore[no-untyped-call]
    return TokenLogprobs(logprobs, None if entropy == "none" else entropies)


def check_head_inputs(hidden: Tensor, lm_head: Tensor, targets: Tensor, bias: Tensor | None, spec: HeadSpec) -> None:
    """
    Raises:
        ValueError, TypeError: see ``token_logprobs``.
    """
    if hidden.ndim != 2:
        raise ValueError(f"hidden: shape {tuple(hidden.shape)}, expected [T, d]")
    if lm_head.ndim != 2 or lm_head.shape[1] != hidden.shape[1]:
        raise ValueError(f"lm_head: shape {tuple(lm_head.shape)}, expected [V, {hidden.shape[1]}]")
    if not hidden.is_floating_point() or hidden.dtype != lm_head.dtype:
        raise TypeError(f"lm_head: dtype {lm_head.dtype} beside hidden {hidden.dtype}, expected one floating dtype")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets: shape {tuple(targets.shape)}, expected ({hidden.shape[0]},)")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: dtype {targets.dtype}, expected torch.int64")
    if bias is not None and bias.shape != lm_head.shape[:1]:
        raise ValueError(f"bias: shape {tuple(bias.shape)}, expected ({lm_head.shape[0]},)")
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"bias: dtype {bias.dtype}, expected a floating dtype")
    if not spec.temperature > 0:
        raise ValueError(f"temperature: {spec.temperature}, expected a positive number")
    if spec.softcap is not None and not spec.softcap > 0:
        raise ValueError(f"softcap: {spec.softcap}, expected a positive number or None")
    if spec.entropy not in ("none", "value", "grad"):
        raise ValueError(f"entropy: {spec.entropy!r}, expected 'none', 'value' or 'grad'")
    for name, tensor in (("lm_head", lm_head), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {hidden.device} as hidden")
    if readable(targets):
        wrong = (targets != spec.ignore_index) & ((targets < 0) | (targets >= lm_head.shape[0]))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"targets: {int(targets[row])} in row {row}, expected [0, {lm_head.shape[0]}) or ignore_index"
            )


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, spec: HeadSpec
    ) -> tuple[Tensor, Tensor]:
        head = Head.of(weight, bias, spec)
        tokens = hidden.shape[0]
        logprobs, peaks, totals = wide(hidden).new_zeros(3, tokens).unbind()
        entropies = peaks.new_zeros(tokens if spec.entropy != "none" else 0)
        for chunk, rows in _chunks(head, hidden, targets):
            stats = chunk.statistics(chunk.logits())
            for whole, part in zip((logprobs, peaks, totals, entropies), stats, strict=True):
                if part is not None:
                    whole[rows] = part[: chunk.rows]
        ctx.save_for_backward(hidden, weight, targets, peaks, totals, entropies, *(() if bias is None else (bias,)))
        ctx.spec = spec
        if spec.entropy != "grad":
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        dlogprobs, dentropies = grads
        hidden, weight, targets, peaks, totals, entropies, *rest = ctx.saved_tensors
        bias = rest[0] if rest else None
        trains_entropy = ctx.spec.entropy == "grad"
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        head = Head.of(weight, bias, ctx.spec)
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(weight, dtype=peaks.dtype) if need_weight else None
        dbias = torch.zeros_like(bias, dtype=peaks.dtype) if need_bias and bias is not None else None
        for chunk, rows in _chunks(head, hidden, targets):
            stats = RowStatistics(
                peaks[rows],  # not read by what follows
                head.padded(peaks[rows]),
                head.padded(totals[rows], 1.0),
                head.padded(entropies[rows]) if trains_entropy else None,
            )
            dlogits = chunk.dlogits(
                chunk.logits(), stats, dlogprobs[rows], dentropies[rows] if trains_entropy else None
            )
            if dbias is not None:
                dbias += dlogits.sum(0, dtype=dbias.dtype)
            if dhidden is not None:
                dhidden[rows] = chunk.dhidden(dlogits).to(hidden.dtype)
            if dweight is not None:
                chunk.add_dweight_(dweight, dlogits)
            del dlogits  # before the next chunk's logits are made
        return (
            dhidden,
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None or bias is None else dbias.to(bias.dtype),
            None,
            None,
        )


def _chunks(head: Head, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Chunk, slice]]:
    for start in range(0, hidden.shape[0], head.chunk):
        rows = slice(start, min(start + head.chunk, hidden.shape[0]))
        yield head.chunk_of(hidden, targets, rows), rows
