"""Log-probs and entropies of target tokens from hidden states. The logits of the whole batch never exist at once.

    z_v = softcap(scale * h . W_v + b_v) / T          softcap(x) = cap * tanh(x / cap)
    log p_y = z_y - logsumexp(z)                      H = logsumexp(z) - sum_v p_v z_v
    dL/dz_v = -p_v (dlp + dH (log p_v + H)) + dlp 1[v = y]

``ops.head`` has the matrix products and takes all rows through a head, ``ops.head_rows`` has the maths of one row.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from maestro_fast.ops.backend import Backend
from maestro_fast.ops.gpu import operator
from maestro_fast.ops.head import Head, HeadGradients, head_backend, head_backward, head_forward
from maestro_fast.ops.tensors import check_number, check_tensors, contiguous_columns, library, readable
from maestro_fast.specs import EntropyMode, HeadSpec, RowStatistics, TokenLogprobs, as_text, from_text

Strategy = Literal["chunked", "fused", "auto"]


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
        lm_head: [V, d], the head's weight, in the dtype of ``hidden``.
        targets: int64 [T], token ids in [0, V) or ``ignore_index``.
        bias: [V] or None.
        logit_scale: the factor of the logits before the bias, which Granite and Cohere have.
        softcap: the bound of a tanh soft cap on the logits, which Gemma has, or None.
        temperature: the divisor of the logits, which comes last. In GRPO it is the sampling temperature.
        entropy: "none", "value" (without a gradient) or "grad".
        ignore_index: the target of rows that return 0 and get no gradient.
        strategy: how the forward pass works. With "chunked" the logits of one chunk of rows exist at a time. With
            "fused", which only Triton serves, no logits are written to memory, and less memory is needed. Two "fused"
            calls are bitwise equal, but "fused" and "chunked" are not. The backward pass works by chunks with both.
            "auto" takes "fused" where it was measured to be faster and no gradient is wanted. It suits log-probs that
            are not compared bit by bit with those of a training forward, such as a reference model's.
        backend: "cpp", "triton", "torch", or None. None means C++ on the CPU and Triton on a CUDA device, unless
            ``hidden`` is float64. They compute the rows of logits; with "chunked" the matrix products are PyTorch's.

    Returns:
        A ``TokenLogprobs``, float32 (float64 for float64 inputs), in nats. Its gradient cannot be differentiated again.
        Logits are computed and summed in that precision, under autocast too. On a CUDA device the gradient by each
        logit of a 16-bit head is rounded to 16 bits before the products add it up in float32, as autograd of such a
        head does. For float16 this gradient is scaled by a power of two, because float16 would round a token's share
        of the loss to 0.

    Raises:
        ValueError: a shape is wrong, the temperature or the softcap is not positive, a target is out of range (not
            checked on a CUDA device, where it gives NaN), or ``backend`` does not serve these tensors or this strategy.
        TypeError: a dtype is wrong.
    """
    spec = HeadSpec(logit_scale, softcap, temperature, ignore_index, entropy)
    check_head_inputs(hidden, lm_head, targets, bias, spec)
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy: {strategy!r}, expected 'chunked', 'fused' or 'auto'")
    served = head_backend("token_logprobs", backend, hidden, lm_head, bias=bias, others=[targets])
    if served != "triton" and strategy == "fused":
        raise ValueError(f"strategy: 'fused' is served by backend 'triton' alone, here by {served!r}")
    if strategy == "auto":
        strategy = _faster_strategy(hidden, lm_head, bias) if served == "triton" else "chunked"
    if served == "triton" and torch.compiler.is_compiling():
        logprobs, _, _, entropies = _statistics_by_triton(hidden, lm_head, bias, targets, spec, strategy)
    else:
        logprobs, entropies = _TokenLogprobs.apply(hidden, lm_head, bias, targets, spec, served, strategy)  # type: ignore[no-untyped-call]
    return TokenLogprobs(logprobs, None if entropy == "none" else entropies)


def _faster_strategy(hidden: Tensor, lm_head: Tensor, bias: Tensor | None) -> Strategy:
    """What "auto" stands for with Triton. A graph keeps to chunks."""
    wants_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, lm_head, bias))
    if wants_gradient or torch.compiler.is_compiling():
        return "chunked"
    from maestro_fast.kernels import token_logprobs as kernel

    return "fused" if kernel.is_faster(contiguous_columns(hidden), contiguous_columns(lm_head)) else "chunked"


def check_head_inputs(hidden: Tensor, lm_head: Tensor, targets: Tensor, bias: Tensor | None, spec: HeadSpec) -> None:
    """Checks the arguments of ``token_logprobs``.

    Raises:
        ValueError, TypeError: see ``token_logprobs``.
    """
    check_tensors(3, hidden=hidden, lm_head=lm_head, targets=targets, bias=bias)
    if hidden.ndim != 2:
        raise ValueError(f"hidden: shape {tuple(hidden.shape)}, expected [T, d]")
    if lm_head.ndim != 2 or lm_head.shape[1] != hidden.shape[1] or not lm_head.numel():
        raise ValueError(f"lm_head: shape {tuple(lm_head.shape)}, expected [V, {hidden.shape[1]}] with V and d above 0")
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
    if isinstance(spec.ignore_index, bool) or not isinstance(spec.ignore_index, int):
        raise TypeError(f"ignore_index: got {type(spec.ignore_index).__name__}, expected an int")
    if not -(2**63) <= spec.ignore_index < 2**63:
        raise ValueError("ignore_index: beyond int64, expected a number that targets can hold")
    check_number("temperature", spec.temperature, 0.0, above=True)
    check_number("logit_scale", spec.scale)
    if spec.softcap is not None:
        check_number("softcap", spec.softcap, 0.0, above=True)
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


# --- one forward and one backward, for both backends ---


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    spec: HeadSpec,
    backend: Backend,
    strategy: Strategy,
) -> RowStatistics:
    if backend == "triton":
        hidden, weight, targets = contiguous_columns(hidden), contiguous_columns(weight), targets.contiguous()
    if strategy == "chunked":
        return head_forward(Head.of(weight, bias, spec, backend), hidden, targets)
    from maestro_fast.kernels import token_logprobs as kernel

    return kernel.token_logprobs(hidden, weight, targets, None if bias is None else bias.contiguous(), spec)


def _backward(
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor],
    stats: RowStatistics,
    gradients: tuple[Tensor, Tensor],
    spec: HeadSpec,
    backend: Backend,
    strategy: Strategy,
    wanted: tuple[bool, bool, bool],
) -> HeadGradients:
    """The gradients by ``inputs`` (hidden, weight, bias, targets) from the ``gradients`` by log-probs and entropies.

    The fused forward pass has not the same bits as the chunks here, so their statistics are computed again after it.
    """
    hidden, weight, bias, targets = inputs
    if backend == "triton":
        hidden, weight, targets = contiguous_columns(hidden), contiguous_columns(weight), targets.contiguous()
    found = head_backward(
        Head.of(weight, bias, spec, backend),
        hidden,
        targets,
        stats if strategy == "chunked" else None,
        gradients[0],
        gradients[1] if spec.entropy == "grad" else None,
        wanted,
    )
    return found if found.bias is None or bias is None else found._replace(bias=found.bias.to(bias.dtype))


class _TokenLogprobs(torch.autograd.Function):
    """Autograd of both backends in eager calls, and of PyTorch's in a compiled graph."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        spec: HeadSpec,
        backend: Backend,
        strategy: Strategy,
    ) -> tuple[Tensor, Tensor]:
        logprobs, peaks, totals, entropies = _forward(hidden, weight, bias, targets, spec, backend, strategy)
        ctx.save_for_backward(hidden, weight, bias, targets, peaks, totals, entropies)
        ctx.options = spec, backend, strategy
        if spec.entropy != "grad":
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, peaks, totals, entropies = ctx.saved_tensors
        stats = RowStatistics(peaks, peaks, totals, entropies)  # A gradient does not read the log-probs.
        spec, backend, strategy = ctx.options
        wanted = ctx.needs_input_grad[:3]
        found = _backward(tuple(inputs), stats, gradients, spec, backend, strategy, wanted)  # type: ignore[arg-type]
        return *found, None, None, None, None


# --- Triton in a compiled graph: one operator for the forward pass, one for the backward pass ---


def _empty_statistics(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    _, spec, _ = rest
    tokens = hidden.shape[0]
    sizes = tokens, tokens, tokens, 0 if from_text(HeadSpec, spec).entropy == "none" else tokens
    return tuple(hidden.new_empty(size, dtype=torch.float32) for size in sizes)


@operator(
    "triton_token_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, str spec, str strategy)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _empty_statistics,
    flat=lambda *given: (*given[:4], as_text(given[4]), given[5]),
    whole=lambda *given: (*given[:4], from_text(HeadSpec, given[4]), given[5]),
    result=RowStatistics,
)
def _statistics_by_triton(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, spec: HeadSpec, strategy: Strategy
) -> RowStatistics:
    return _forward(hidden, weight, bias, targets, spec, "triton", strategy)


def _empty_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """Empty outputs of the operator below. They are contiguous, whatever the strides of the inputs are."""
    return tuple(
        x.new_empty(x.shape) if x is not None and want else hidden.new_empty(0, dtype=torch.float32)
        for x, want in zip((hidden, weight, bias), rest[-1], strict=True)
    )


@operator(
    "triton_token_logprobs_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor peaks,"
    " Tensor totals, Tensor entropies, Tensor dlogprobs, Tensor dentropies, str spec, str strategy, bool[3] wanted)"
    " -> (Tensor, Tensor, Tensor)",
    _empty_gradients,
)
def _gradients_by_triton(*given: Any) -> tuple[Tensor, ...]:
    """The backward pass; the signature above names the arguments. A gradient that is not wanted has no elements."""
    *inputs, peaks, totals, entropies, dlogprobs, dentropies, spec, strategy, wanted = given
    stats = RowStatistics(peaks, peaks, totals, entropies)
    spec = from_text(HeadSpec, spec)
    found = _backward(tuple(inputs), stats, (dlogprobs, dentropies), spec, "triton", strategy, tuple(wanted))
    return tuple(peaks.new_empty(0) if x is None else x for x in found)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, *ctx.options = inputs
    _, peaks, totals, entropies = output
    has_gradient = from_text(HeadSpec, ctx.options[0]).entropy == "grad"
    ctx.mark_non_differentiable(peaks, totals, *(() if has_gradient else (entropies,)))
    ctx.save_for_backward(hidden, weight, bias, targets, peaks, totals, entropies)


def _differentiate(ctx: Any, dlogprobs: Tensor, _: Tensor, __: Tensor, dentropies: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [bool(x) for x in ctx.needs_input_grad[:3]]
    backward = torch.ops.maestro_fast.triton_token_logprobs_backward
    found = backward(*ctx.saved_tensors, dlogprobs, dentropies, *ctx.options, wanted)
    return *(x if want else None for x, want in zip(found, wanted, strict=True)), *[None] * 3


torch.library.register_autograd(
    "maestro_fast::triton_token_logprobs", _differentiate, setup_context=_remember, lib=library
)
