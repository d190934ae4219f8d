"""The policy-gradient loss of GRPO and its relatives, over packed completion tokens.

    rho_t  = exp(log pi - log pi_old)          (1 with its gradient where old_logprobs is None: on-policy)
    rho_t  = exp(mean over the response of log pi - log pi_old)                      with ratio="sequence" (GSPO)
    l_t    = -min(min(rho_t, clip_max) A, clip(rho_t, 1 - clip_low, 1 + clip_high) A)    objective="clip"
    l_t    = -sg(min(rho_t, clip_max)) A log pi                                          objective="cispo"
    w_t    = pi_old / pi_sampler, capped or zeroed past sampler_cap                      sampler_correction
    k3_t   = exp(log pi_ref - log pi) - (log pi_ref - log pi) - 1       (Schulman's k3 estimator of KL(pi || pi_ref))
    k3_t   = rho_t (exp(log pi_ref - log pi) - (log pi_ref - log pi) - 1)                  kl_bias_correction
    loss   = sum_t c_t (w_t l_t + kl_coef k3_t) - entropy_coef * mean_t H_t

    normalization   c_t                                           normalizer is the number of     normalizer=None means
    grpo            1 / (tokens of the response * normalizer)     responses of the optimizer step B
    bnpo            1 / normalizer                                tokens of the micro-batch       the live tokens
    dapo            1 / normalizer                                tokens of the optimizer step    an error
    dr_grpo         1 / (max_completion_length * normalizer)      responses of the optimizer step B

Gradients of micro-batches that were divided by the normalizer of their optimizer step add up to that of the whole step,
however it was divided into micro-batches and processes. bnpo alone averages the means of micro-batches, as TRL does, so
it depends on their size.

Sources: GRPO arXiv 2402.03300, Dr. GRPO 2503.20783, DAPO 2503.14476, GSPO 2507.18071, CISPO 2506.13585; names and
values as in TRL's ``loss_type``, ``importance_sampling_level``, ``delta`` and ``vllm_importance_sampling_mode``.

The formulas stand in ``ops.reference_loss``, which also says what happens where a ratio overflows. The functions below
pass the tensors on as ``LossInputs``, the record that a user's own loss gets, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.gpu import operator
from maestro_fast.ops.loss_function import (
    LogprobGradients,
    call_loss_function,
    function_name,
    loss_function_gradient,
    wants_entropies,
)
from maestro_fast.ops.reference_loss import reference_loss
from maestro_fast.ops.tensors import check_number, check_tensors, is_integer, library, readable
from maestro_fast.specs import (
    LOSS_METRICS,
    LossFunction,
    LossInputs,
    LossWithGradients,
    PolicyLoss,
    PolicyLossConfig,
    as_text,
    from_text,
)


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    entropies: Tensor | None = None,
    token_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    config: PolicyLossConfig | LossFunction,
    backend: Backend | None = None,
) -> PolicyLoss:
    """The policy-gradient loss of B responses with T completion tokens in all.

    Args:
        logprobs: [T], log pi of the sampled tokens in nats; differentiable.
        advantages: [B], the advantage of each response.
        cu_seqlens: int [B + 1]; response b has the tokens ``[cu_seqlens[b], cu_seqlens[b + 1])``.
        old_logprobs: [T], log-probs under the policy that the ratio refers to; None means the current policy.
        ref_logprobs: [T], log-probs under the reference policy, which ``config.kl_coef`` > 0 needs.
        sampling_logprobs: [T], log-probs as the sampler reported them, which ``config.sampler_correction`` needs. NaN
            where the sampler reported none, which counts as a ratio of 1.
        entropies: [T], entropies of the current policy, which ``config.entropy_coef`` > 0 needs; differentiable.
        token_mask: [T]; a zero leaves a token out of loss, lengths and metrics.
        normalizer: the divisor for the whole optimizer step, above 0, see the top of the module. The host does not read
            a tensor on a CUDA device.
        entropy_normalizer: the divisor of the summed entropies; None divides by the number of live tokens.
        config: the variant and its coefficients; or a loss of your own, which is a function of ``LossInputs`` that
            returns the scalar loss and a dict of scalar tensors as metrics. PyTorch calls it with these arguments.
        backend: "triton", "torch", or None, which takes Triton on a CUDA device unless a tensor is float64. Triton
            computes the gradient with the loss, and it cannot be differentiated again.

    Raises:
        ValueError: a shape or device is wrong, an input that ``config`` needs is missing, or a loss of your own
            returned anything else.
        TypeError: a dtype is wrong, or ``config`` is neither a ``PolicyLossConfig`` nor a function.
    """
    inputs = LossInputs(
        logprobs, advantages, cu_seqlens, old_logprobs, ref_logprobs, sampling_logprobs, entropies, token_mask,
        normalizer, entropy_normalizer,
    )  # fmt: skip
    check_loss_inputs(inputs, config)
    return loss_of(inputs, config, backend)


def loss_of(inputs: LossInputs, config: PolicyLossConfig | LossFunction, backend: Backend | None) -> PolicyLoss:
    """``policy_loss`` of inputs that have been checked."""
    if not isinstance(config, PolicyLossConfig):
        if backend not in (None, "torch"):
            raise ValueError(f"backend: {backend!r} cannot serve a loss function, expected 'torch' or None")
        return call_loss_function(config, inputs)
    chosen = _resolve(inputs, backend)
    if chosen == "triton" and (name := _wants_a_gradient(inputs)):
        if backend is not None:
            raise ValueError(
                f"backend: 'triton' cannot serve policy_loss here: {name} wants a gradient, which only log-probs and "
                "entropies get"
            )
        chosen = "torch"
    return _loss_by_triton(inputs, config) if chosen == "triton" else reference_loss(inputs, config)


def policy_gradient(
    inputs: LossInputs, config: PolicyLossConfig | LossFunction, backend: Backend | None = None
) -> LogprobGradients:
    """The gradient of ``policy_loss`` by log-probs and entropies, for inputs that have been checked."""
    if not isinstance(config, PolicyLossConfig):
        return loss_function_gradient(config, inputs)[1]
    if _resolve(inputs, backend) == "triton":
        rows = _launch(*_launch_arguments(inputs, config)).gradients
        return LogprobGradients(rows[0], rows[1] if config.entropy_coef > 0 else None)

    def loss(logprobs: Tensor, entropies: Tensor | None) -> Tensor:
        return reference_loss(inputs._replace(logprobs=logprobs, entropies=entropies), config).loss

    if config.entropy_coef > 0:
        return LogprobGradients(*torch.func.grad(loss, argnums=(0, 1))(inputs.logprobs, inputs.entropies))
    return LogprobGradients(torch.func.grad(loss)(inputs.logprobs, inputs.entropies), None)


def _resolve(inputs: LossInputs, backend: Backend | None) -> Backend:
    return resolve("policy_loss", backend, inputs.logprobs, inputs.advantages, *inputs.of_tokens.values())


# --- checks ---


def check_loss_inputs(inputs: LossInputs, config: PolicyLossConfig | LossFunction) -> None:
    """Checks shapes, dtypes and devices, and that no input is missing that the loss needs.

    Raises:
        ValueError, TypeError: see ``policy_loss``.
    """
    logprobs, advantages, cu_seqlens = inputs.logprobs, inputs.advantages, inputs.cu_seqlens
    if not isinstance(config, PolicyLossConfig) and not callable(config):
        raise TypeError(f"config: got {type(config).__name__}, expected a PolicyLossConfig or a function of LossInputs")
    check_tensors(3, logprobs=logprobs, advantages=advantages, cu_seqlens=cu_seqlens, **inputs.of_tokens)
    if logprobs.ndim != 1 or not logprobs.is_floating_point():
        raise ValueError(f"logprobs: {logprobs.dtype} {tuple(logprobs.shape)}, expected floating [T]")
    if advantages.ndim != 1 or cu_seqlens.shape != (advantages.shape[0] + 1,):
        raise ValueError(
            f"advantages, cu_seqlens: shapes {tuple(advantages.shape)} and {tuple(cu_seqlens.shape)}, "
            "expected [B] and [B + 1]"
        )
    if not is_integer(cu_seqlens):
        raise TypeError(f"cu_seqlens: dtype {cu_seqlens.dtype}, expected a signed integer dtype")
    of_tokens = inputs.of_tokens
    for name, tensor in of_tokens.items():
        if tensor is not None and tensor.shape != logprobs.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(logprobs.shape)}")
    for name, tensor in {**of_tokens, "advantages": advantages, "cu_seqlens": cu_seqlens}.items():
        if tensor is None:
            continue
        if tensor.device != logprobs.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {logprobs.device} as logprobs")
        if name not in ("token_mask", "cu_seqlens") and not tensor.is_floating_point():
            raise TypeError(f"{name}: dtype {tensor.dtype}, expected a floating dtype")
    for name in ("normalizer", "entropy_normalizer"):
        _check_divisor(name, getattr(inputs, name))
    _check_needed(inputs, config)
    check_bounds(cu_seqlens, logprobs.shape[0])


def _check_divisor(name: str, x: float | Tensor | None) -> None:
    if not isinstance(x, Tensor):
        if x is not None:
            check_number(name, x, 0.0, above=True)
        return
    if x.ndim != 0 or x.dtype is torch.bool or x.is_complex():
        raise ValueError(f"{name}: {x.dtype} {tuple(x.shape)}, expected a number or a real scalar tensor")
    if readable(x):
        check_number(name, x.item(), 0.0, above=True)


def _check_needed(inputs: LossInputs, config: PolicyLossConfig | LossFunction) -> None:
    if not isinstance(config, PolicyLossConfig):
        if wants_entropies(config) and inputs.entropies is None:
            name = function_name(config)
            raise ValueError(f"entropies: missing, expected [T] for {name}, which is marked to read them")
        return
    if config.kl_coef > 0 and inputs.ref_logprobs is None:
        raise ValueError(f"ref_logprobs: missing, expected [T] with kl_coef={config.kl_coef}")
    if config.entropy_coef > 0 and inputs.entropies is None:
        raise ValueError(f"entropies: missing, expected [T] with entropy_coef={config.entropy_coef}")
    if config.sampler_correction != "none" and inputs.sampling_logprobs is None:
        raise ValueError(f"sampling_logprobs: missing, expected [T] with {config.sampler_correction}")
    if config.normalization == "dapo" and inputs.normalizer is None:
        raise ValueError("normalizer: missing, expected the token count of the optimiser step with 'dapo'")


def check_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    """Checks bounds that the host can read.

    Raises:
        ValueError: the bounds do not ascend from 0 to the number of tokens.
    """
    if readable(cu_seqlens):
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != tokens or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(f"cu_seqlens: from {first} to {last}, expected non-decreasing from 0 to T = {tokens}")


# --- Triton: the gradient comes with the loss ---


def _wants_a_gradient(inputs: LossInputs) -> str | None:
    """The name of an input that requires a gradient which the Triton kernels do not compute, or None."""
    if torch.is_grad_enabled():
        for name in ("old_logprobs", "ref_logprobs", "sampling_logprobs", "advantages"):
            x = getattr(inputs, name)
            if x is not None and x.requires_grad:
                return name
    return None


def _loss_by_triton(inputs: LossInputs, config: PolicyLossConfig) -> PolicyLoss:
    logprobs, entropies = inputs.logprobs, inputs.entropies if config.entropy_coef > 0 else None
    wants_gradient = logprobs.requires_grad or (entropies is not None and entropies.requires_grad)
    arguments = _launch_arguments(inputs, config)
    if wants_gradient and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        loss, values = _TritonLoss.apply(logprobs, entropies, arguments)  # type: ignore[no-untyped-call]
    else:
        loss, values, _ = _launch(*arguments)
    given = {"kl": inputs.ref_logprobs is not None, "sampler_ratio": inputs.sampling_logprobs is not None}
    metrics = zip(LOSS_METRICS, values.unbind(), strict=False)  # further values come after the metrics
    return PolicyLoss(loss, {name: value for name, value in metrics if given.get(name, True)})


def _launch_arguments(inputs: LossInputs, config: PolicyLossConfig) -> tuple[Tensor, LossInputs, PolicyLossConfig]:
    """The inputs as the kernel takes them: contiguous, and with divisors as numbers or as tensors on the device."""
    device = inputs.logprobs.device
    contiguous = LossInputs(
        logprobs=inputs.logprobs.contiguous(),
        advantages=inputs.advantages.contiguous(),
        cu_seqlens=inputs.cu_seqlens.contiguous(),
        old_logprobs=_contiguous(inputs.old_logprobs),
        ref_logprobs=_contiguous(inputs.ref_logprobs),
        sampling_logprobs=_contiguous(inputs.sampling_logprobs),
        entropies=_contiguous(inputs.entropies) if config.entropy_coef > 0 else None,
        token_mask=_contiguous(inputs.token_mask),
        normalizer=_divisor(inputs.normalizer, device),
        entropy_normalizer=_divisor(inputs.entropy_normalizer, device),
    )
    return contiguous.logprobs, contiguous, config


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _divisor(x: float | Tensor | None, device: torch.device) -> float | Tensor | None:
    if not isinstance(x, Tensor):
        return x
    if x.device != device:
        return float(x) if readable(x) else x.detach().to(device)
    return x.detach()


def _flat(_: Tensor, inputs: LossInputs, config: PolicyLossConfig) -> tuple[Any, ...]:
    *tensors, normalizer, entropy_normalizer = inputs
    divisors = normalizer, entropy_normalizer
    on_the_device = (x if isinstance(x, Tensor) else None for x in divisors)
    numbers = (None if x is None or isinstance(x, Tensor) else float(x) for x in divisors)
    return *tensors, *on_the_device, *numbers, as_text(config)


def _whole(*given: Any) -> tuple[Tensor, LossInputs, PolicyLossConfig]:
    *inputs, normalizer, entropy_normalizer, number, entropy_number, config = given
    inputs.append(number if normalizer is None else normalizer)
    inputs.append(entropy_number if entropy_normalizer is None else entropy_normalizer)
    return inputs[0], LossInputs(*inputs), from_text(PolicyLossConfig, config)


def _empty_results(logprobs: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = 2 if from_text(PolicyLossConfig, rest[-1]).entropy_coef > 0 else 1
    new = logprobs.new_empty
    return new((), dtype=torch.float32), new(8, dtype=torch.float32), new((rows, len(logprobs)), dtype=torch.float32)


@operator(
    "triton_policy_loss(Tensor logprobs, Tensor advantages, Tensor cu_seqlens, Tensor? old, Tensor? ref,"
    " Tensor? sampling, Tensor? entropies, Tensor? mask, Tensor? normalizer, Tensor? entropy_normalizer,"
    " float? number, float? entropy_number, str config) -> (Tensor loss, Tensor values, Tensor gradients)",
    _empty_results,
    flat=_flat,
    whole=_whole,
    result=LossWithGradients,
)
def _launch(logprobs: Tensor, inputs: LossInputs, config: PolicyLossConfig) -> LossWithGradients:
    """Launches the kernels on the device of ``logprobs``, which is ``inputs.logprobs``."""
    from maestro_fast.kernels import policy_loss as kernel

    return kernel.policy_loss(inputs, config)


class _TritonLoss(torch.autograd.Function):
    """The loss, with the gradients that its launch has already computed. The backward pass only scales them.

    It has no ``setup_context``, because torch would then inspect a signature at each call, which takes longer than a
    launch.
    """

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, entropies: Tensor | None, arguments: Any) -> tuple[Tensor, Tensor]:
        output = _launch(*arguments)
        _remember(ctx, logprobs, entropies, output)
        ctx.mark_non_differentiable(output.metrics)
        return output.loss, output.metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx, d_loss), None


def _remember(ctx: Any, logprobs: Tensor, entropies: Tensor | None, output: LossWithGradients) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output.gradients)
    ctx.dtypes = logprobs.dtype, None if entropies is None else entropies.dtype


def _scaled(ctx: Any, d_loss: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by log-probs and entropies times ``d_loss``, in one launch where both are float32."""
    (gradients,), (first, second) = ctx.saved_tensors, ctx.dtypes
    if d_loss is None:
        return None, None
    if second in (None, torch.float32) and first is torch.float32:
        rows = gradients * d_loss
        return rows[0], None if second is None else rows[1]
    return _product(gradients[0], d_loss, first), None if second is None else _product(gradients[1], d_loss, second)


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling():
        return (x * y).to(dtype)
    return torch.mul(x, y, out=torch.empty_like(x, dtype=dtype))  # One launch multiplies and rounds to the dtype.


def _remember_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    found = LossWithGradients(*output)
    ctx.mark_non_differentiable(found.metrics, found.gradients)
    _remember(ctx, inputs[0], inputs[6], found)


def _operator_backward(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    first, second = _scaled(ctx, d_loss)
    return (first, *[None] * 5, second, *[None] * 6)


torch.library.register_autograd(
    "maestro_fast::triton_policy_loss", _operator_backward, setup_context=_remember_operator, lib=library
)
