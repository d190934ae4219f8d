"""Log-probs and entropies of target tokens from hidden states; the logits of the whole batch never exist.

    z_v = softcap(scale * h . W_v + b_v) / T          softcap(x) = cap * tanh(x / cap)
    log p_y = z_y - logsumexp(z)                      H = logsumexp(z) - sum_v p_v z_v
    dL/dz_v = -p_v (dlp + dH (log p_v + H)) + dlp 1[v = y]

The way through all rows is that of ``ops.head_pass``, the GEMMs and their chunks are those of ``ops.head_chunks``, the
maths of a row is that of ``ops.head_rows``.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from maestro_fast.ops import gpu_token_logprobs
from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.head_chunks import Head
from maestro_fast.ops.head_pass import head_backward, head_forward
from maestro_fast.ops.head_rows import capped_logits
from maestro_fast.ops.tensors import readable, without_autocast
from maestro_fast.specs import EntropyMode, HeadSpec, RowStatistics

Strategy = Literal["chunked", "fused"]


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
    y = capped_logits(x, bias, HeadSpec(logit_scale, softcap, temperature, ignore_index, "grad"))
    logp_TV = (y / temperature).log_softmax(-1)
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
    strategy: Strategy = "chunked",
    backend: Backend | None = None,
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
        strategy: of the forward. "chunked": the logits of a chunk of rows exist at a time. "fused", by Triton alone: no
            logit does, for memory that is scarce or a small d; bitwise equal to itself, not to "chunked". The backward
            pass is the same, and works by chunks.
        backend: "triton", "torch", or None: Triton on a CUDA device unless there is float64.

    Returns:
        ``TokenLogprobs``, float32 (float64 for float64 inputs), in nats. Logits are formed and summed in that
        precision, under autocast too. On a CUDA device the gradient of a 16-bit head is rounded to 16 bits once per
        logit before the products that sum it, in float32, as autograd of such a head does; for float16 it is scaled by
        a power of two while it is so, since float16 would round a token's share of the loss to 0.

    Raises:
        ValueError: shapes, a non-positive temperature or softcap, a target out of range (read on CPU tensors only; on a
            CUDA device it gives NaN), ``backend`` does not serve these tensors, or not this strategy.
        TypeError: dtypes.
    """
    spec = HeadSpec(logit_scale, softcap, temperature, ignore_index, entropy)
    check_head_inputs(hidden, lm_head, targets, bias, spec)
    if strategy not in ("chunked", "fused"):
        raise ValueError(f"strategy: {strategy!r}, expected 'chunked' or 'fused'")
    served = resolve("token_logprobs", backend, hidden, lm_head, bias)
    if served == "triton":
        logprobs, entropies = gpu_token_logprobs.token_logprobs(
            hidden, lm_head, bias, targets, spec, fused=strategy == "fused"
        )
    elif strategy == "fused":
        raise ValueError(f"strategy: 'fused' is served by backend 'triton' alone, here by {served!r}")
    else:
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
        stats = head_forward(Head.of(weight, bias, spec, "torch"), hidden, targets)
        logprobs, peaks, totals, entropies = stats
        assert entropies is not None
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
        stats = RowStatistics(peaks, peaks, totals, entropies)  # its log-probs are not read
        dhidden, dweight, dbias = head_backward(
            Head.of(weight, bias, ctx.spec, "torch"),
            hidden,
            weight,
            bias,
            targets,
            stats,
            dlogprobs,
            dentropies if ctx.spec.entropy == "grad" else None,
            ctx.needs_input_grad[:3],
        )
        return dhidden, dweight, dbias, None, None
