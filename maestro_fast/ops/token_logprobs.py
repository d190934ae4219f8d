"""Log-probs and entropies of target tokens from hidden states; the logits of the whole batch never exist.

    z_v = softcap(scale * h . W_v + b_v) / T          softcap(x) = cap * tanh(x / cap)
    log p_y = z_y - logsumexp(z)                      H = logsumexp(z) - sum_v p_v z_v
    dL/dz_v = -p_v (dlp + dH (log p_v + H)) + dlp 1[v = y]

Rows are worked in chunks of a fixed size that follows from the vocabulary alone, the last one padded with zeros. Every
GEMM then has the same shape, whatever else is in the batch, so the log-probs of the same hidden states are bitwise the
same in the scoring and in the training forward, and the on-policy ratio is exactly 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from maestro_fast.ops.tensors import readable, wide, without_autocast

EntropyMode = Literal["none", "value", "grad"]

# Float32 logits alive at once: 2 MiB fits a cache, 2 GiB fills a GPU.
_CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**29}


class TokenLogprobs(NamedTuple):
    """Log-probs [T] and entropies [T] in nats (None with ``entropy="none"``); rows that are ignored hold 0."""

    logprobs: Tensor
    entropies: Tensor | None


@dataclass(frozen=True)
class _Head:
    scale: float
    softcap: float | None
    temperature: float
    ignore_index: int
    entropy: EntropyMode
    chunk: int

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits over T [C, V] and the softcap's output before the temperature (for its derivative)."""
        with without_autocast(hidden):
            x = hidden @ weight.T
        if self.scale != 1.0:
            x = x * self.scale
        if bias is not None:
            x = x + bias
        if self.softcap is not None:
            x = self.softcap * torch.tanh(x / self.softcap)
        return (x / self.temperature if self.temperature != 1.0 else x), x


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
    head = _Head(logit_scale, softcap, temperature, ignore_index, "grad", hidden.shape[0])
    live = targets != ignore_index
    z, _ = head.logits(torch.where(live[:, None], hidden, 0.0), lm_head, bias)
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
    _check(hidden, lm_head, targets, bias, softcap, temperature, entropy, ignore_index)
    head = _Head(logit_scale, softcap, temperature, ignore_index, entropy, chunk_rows(lm_head.shape[0], hidden.device))
    logprobs, entropies = _TokenLogprobs.apply(hidden, lm_head, bias, targets, head)  # type: ignore[no-untyped-call]
    return TokenLogprobs(logprobs, None if entropy == "none" else entropies)


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows per chunk: from the vocabulary and the kind of device alone, so that results never depend on the batch."""
    elements = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cuda"])
    return min(max(elements // vocabulary // 16 * 16, 64), 4096)


def _check(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    entropy: str,
    ignore_index: int,
) -> None:
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
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature}, expected a positive number")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: {softcap}, expected a positive number or None")
    if entropy not in ("none", "value", "grad"):
        raise ValueError(f"entropy: {entropy!r}, expected 'none', 'value' or 'grad'")
    for name, tensor in (("lm_head", lm_head), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {hidden.device} as hidden")
    if readable(targets):
        wrong = (targets != ignore_index) & ((targets < 0) | (targets >= lm_head.shape[0]))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"targets: {int(targets[row])} in row {row}, expected [0, {lm_head.shape[0]}) or ignore_index"
            )


def _padded(x: Tensor, rows: int) -> Tensor:
    if x.shape[0] == rows:
        return x
    return torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])


def _hidden_chunk(hidden: Tensor, live: Tensor, head: _Head) -> Tensor:
    """States of one padded chunk [C, d]; 0 in ignored rows, where NaN may stand and 0 * NaN would reach dW."""
    return _padded(wide(torch.where(live[:, None], hidden, 0.0)), head.chunk)


def _wide_head(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    wide_weight = wide(weight)
    return wide_weight, None if bias is None else bias.to(wide_weight.dtype)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, targets, *(() if bias is None else (bias,)))
        ctx.head = head
        wide_weight, wide_bias = _wide_head(weight, bias)
        logprobs = wide_weight.new_zeros(hidden.shape[0])
        entropies = wide_weight.new_zeros(hidden.shape[0] if head.entropy != "none" else 0)
        for start in range(0, hidden.shape[0], head.chunk):
            rows = slice(start, min(start + head.chunk, hidden.shape[0]))
            n = rows.stop - start
            live = targets[rows] != head.ignore_index
            z, _ = head.logits(_hidden_chunk(hidden[rows], live, head), wide_weight, wide_bias)
            shifted, exp, total = _exponentials(z)
            chosen = shifted[:n].gather(1, torch.where(live, targets[rows], 0)[:, None])[:, 0]
            logprobs[rows] = torch.where(live, chosen - total[:n].log(), 0.0)
            if head.entropy != "none":
                entropy = total.log() - (exp * shifted).sum(-1) / total
                entropies[rows] = torch.where(live, entropy[:n], 0.0)
        if head.entropy != "grad":
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        dlogprobs, dentropies = grads
        hidden, weight, targets, *rest = ctx.saved_tensors
        bias = rest[0] if rest else None
        head: _Head = ctx.head
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide_weight, wide_bias = _wide_head(weight, bias)
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(wide_weight) if need_weight else None
        dbias = torch.zeros_like(wide_bias) if need_bias and wide_bias is not None else None
        for start in range(0, hidden.shape[0], head.chunk):
            rows = slice(start, min(start + head.chunk, hidden.shape[0]))
            n = rows.stop - start
            wide_hidden = _hidden_chunk(hidden[rows], targets[rows] != head.ignore_index, head)
            dentropy = dentropies[rows] if head.entropy == "grad" else None
            dx = _dlogits(head, wide_hidden, wide_weight, wide_bias, targets[rows], dlogprobs[rows], dentropy)
            if dbias is not None:
                dbias += dx.sum(0)
            if head.scale != 1.0:
                dx *= head.scale
            with without_autocast(hidden):
                if dhidden is not None:
                    dhidden[rows] = (dx @ wide_weight)[:n].to(hidden.dtype)
                if dweight is not None:
                    dweight.addmm_(dx.T, wide_hidden)
        return (
            dhidden,
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None or bias is None else dbias.to(bias.dtype),
            None,
            None,
        )


def _exponentials(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z - max z and its exponential [C, V], and the sum [C] of the latter.

    Not log_softmax: its sums on the CPU are sequential, which costs 2e-5 in every log-prob at V = 151,936.
    """
    shifted = z - z.amax(-1, keepdim=True)
    exp = shifted.exp()
    return shifted, exp, exp.sum(-1)


def _dlogits(
    head: _Head,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
) -> Tensor:
    """dL/d(scale * h . W_v + b_v) of one padded chunk [C, V]; rows that are ignored or padding are 0."""
    z, capped = head.logits(hidden, weight, bias)
    live = targets != head.ignore_index
    target = _padded(torch.where(live, targets, 0), head.chunk)
    dlp = _padded(torch.where(live, dlogprobs, 0.0), head.chunk)[:, None]
    shifted, exp, total = _exponentials(z)
    p, logp = exp / total[:, None], shifted - total.log()[:, None]
    dz = -p * dlp
    if dentropies is not None:
        dent = _padded(torch.where(live, dentropies, 0.0), head.chunk)[:, None]
        entropy = -(p * logp).sum(-1, keepdim=True)
        dz -= p * dent * (logp + entropy)
    dz.scatter_add_(1, target[:, None], dlp)
    if head.temperature != 1.0:
        dz /= head.temperature
    if head.softcap is not None:
        dz *= 1.0 - (capped / head.softcap) ** 2
    return dz
