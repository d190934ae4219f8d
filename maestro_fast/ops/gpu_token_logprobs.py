"""Log-probs of target tokens by Triton: one operator and its backward, in eager mode and for ``torch.compile``."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from maestro_fast.ops.gpu import define, library
from maestro_fast.ops.gpu_head_rows import SPEC
from maestro_fast.ops.head_chunks import Head
from maestro_fast.ops.head_pass import head_backward, head_forward
from maestro_fast.specs import HeadSpec, RowStatistics

_FIELDS = 5  # of a HeadSpec


def token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, spec: HeadSpec, fused: bool
) -> tuple[Tensor, Tensor]:
    """Log-probs [T] and entropies [T], or [0] with ``entropy="none"``. The arguments are checked."""
    logprobs, _, _, entropies = torch.ops.maestro_fast.triton_token_logprobs(
        hidden, weight, bias, targets, *_plain(spec), fused
    )
    return logprobs, entropies


def _plain(spec: HeadSpec) -> tuple[Any, ...]:
    scale, softcap, temperature, ignore_index, entropy = astuple(spec)
    return float(scale), None if softcap is None else float(softcap), float(temperature), ignore_index, entropy


def _columns_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *more: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *fields, fused = more
    spec = HeadSpec(*fields)
    hidden, weight, targets = _columns_contiguous(hidden), _columns_contiguous(weight), targets.contiguous()
    if fused:
        from maestro_fast.kernels import token_logprobs as kernel

        bias = None if bias is None else bias.contiguous()
        logprobs, peaks, totals, entropies = kernel.token_logprobs(hidden, weight, targets, bias, spec)
    else:
        logprobs, peaks, totals, entropies = head_forward(Head.of(weight, bias, spec, "triton"), hidden, targets)
    return logprobs, peaks, totals, peaks.new_empty(0) if entropies is None else entropies


def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    peaks: Tensor,
    totals: Tensor,
    entropies: Tensor,
    dlogprobs: Tensor,
    dentropies: Tensor,
    *more: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *fields, fused, wanted = more
    spec = HeadSpec(*fields)
    hidden, weight, targets = _columns_contiguous(hidden), _columns_contiguous(weight), targets.contiguous()
    gradients = head_backward(
        Head.of(weight, bias, spec, "triton"),
        hidden,
        weight,
        bias,
        targets,
        None if fused else RowStatistics(peaks, peaks, totals, entropies),  # its log-probs are not read
        dlogprobs,
        dentropies if spec.entropy == "grad" else None,
        tuple(wanted),
    )
    first, second, third = (peaks.new_empty(0) if x is None else x for x in gradients)
    return first, second, third


def _shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *more: Any) -> tuple[Tensor, ...]:
    tokens = hidden.shape[0]
    sizes = tokens, tokens, tokens, 0 if more[_FIELDS - 1] == "none" else tokens
    return tuple(hidden.new_empty(size, dtype=torch.float32) for size in sizes)


def _gradient_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, *more: Any) -> tuple[Tensor, ...]:
    """Contiguous, whatever the strides of the inputs are."""
    return tuple(
        x.new_empty(x.shape) if x is not None and want else hidden.new_empty(0, dtype=torch.float32)
        for x, want in zip((hidden, weight, bias), more[-1], strict=True)
    )


_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
define(f"triton_token_logprobs({_INPUTS}, {SPEC}, bool fused) -> (Tensor, Tensor, Tensor, Tensor)", _forward, _shapes)
define(
    f"triton_token_logprobs_backward({_INPUTS}, Tensor peaks, Tensor totals, Tensor entropies, Tensor dlogprobs,"
    f" Tensor dentropies, {SPEC}, bool fused, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    _backward,
    _gradient_shapes,
)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, *fields = inputs
    _, peaks, totals, entropies = output
    ctx.mark_non_differentiable(peaks, totals, *(() if fields[_FIELDS - 1] == "grad" else (entropies,)))
    ctx.save_for_backward(hidden, weight, bias, targets, peaks, totals, entropies)
    ctx.fields = fields


def _differentiate(ctx: Any, dlogprobs: Tensor, _: Tensor, __: Tensor, dentropies: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [bool(x) for x in ctx.needs_input_grad[:3]]
    found = torch.ops.maestro_fast.triton_token_logprobs_backward(
        *ctx.saved_tensors, dlogprobs, dentropies, *ctx.fields, wanted
    )
    gradients = (x if want else None for x, want in zip(found, wanted, strict=True))
    return *gradients, *[None] * (_FIELDS + 2)


torch.library.register_autograd(
    "maestro_fast::triton_token_logprobs", _differentiate, setup_context=_remember, lib=library
)
