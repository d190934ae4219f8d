"""The policy-gradient loss of GRPO and its relatives, over packed completion tokens.

    rho_t  = exp(log pi - log pi_old)          (1 with its gradient where old_logprobs is None: on-policy)
    rho_t  = exp(mean over the response of log pi - log pi_old)                      with ratio="sequence" (GSPO)
    l_t    = -min(min(rho_t, clip_max) A, clip(rho_t, 1 - clip_low, 1 + clip_high) A)    objective="clip"
    l_t    = -sg(min(rho_t, clip_max)) A log pi                                          objective="cispo"
    w_t    = pi_old / pi_sampler, capped or zeroed past sampler_cap                      sampler_correction
    k3_t   = exp(log pi_ref - log pi) - (log pi_ref - log pi) - 1       (Schulman's k3 estimator of KL(pi || pi_ref))
    loss   = sum_t c_t (w_t l_t + kl_coef k3_t) - entropy_coef * mean_t H_t

    normalization   c_t                        normalizer stands for (default)
    grpo            1 / (tokens of the response * normalizer)     responses of the optimiser step (those given)
    bnpo            1 / normalizer                                tokens of the batch (those given)
    dapo            1 / normalizer                                tokens of the optimiser step (must be given)
    dr_grpo         1 / (max_completion_length * normalizer)      responses of the optimiser step (those given)

Sources: GRPO arXiv 2402.03300, Dr. GRPO 2503.20783, DAPO 2503.14476, GSPO 2507.18071, CISPO 2506.13585; names and
values as in TRL's ``loss_type``, ``importance_sampling_level``, ``delta`` and ``vllm_importance_sampling_mode``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from maestro_fast.ops import gpu
from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.tensors import is_integer, readable, wide
from maestro_fast.specs import PolicyLossConfig, as_fields, from_fields

if TYPE_CHECKING:
    from maestro_fast.kernels.policy_loss import Loss

Divisor = float | Tensor | None  # normalizer, entropy_normalizer


class PolicyLoss(NamedTuple):
    """Scalar loss, and metrics as 0-dim tensors: means over the live tokens. Float32 (float64 for float64 input).

    ``clip_low`` and ``clip_high`` are the shares of tokens clipped on either side, ``ratio`` the mean of rho, ``kl``
    the mean of k3 (only with a reference), ``sampler_ratio`` the mean of w before it is capped (only with sampling
    log-probs).
    """

    loss: Tensor
    metrics: dict[str, Tensor]


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
    config: PolicyLossConfig,
    backend: Backend | None = None,
) -> PolicyLoss:
    """The loss of B responses with T completion tokens in all.

    Args:
        logprobs: [T], log pi of the sampled tokens in nats; differentiable.
        advantages: [B].
        cu_seqlens: int [B + 1], response b is ``[cu_seqlens[b], cu_seqlens[b + 1])``.
        old_logprobs: [T] of the policy that the ratio refers to; None: the current one.
        ref_logprobs: [T] of the reference; required when ``config.kl_coef`` > 0.
        sampling_logprobs: [T] of the sampler, required by ``config.sampler_correction``; NaN where it gave none, which
            counts as a ratio of 1.
        entropies: [T], differentiable, required when ``config.entropy_coef`` > 0.
        token_mask: [T], zero leaves a token out of loss, lengths and metrics.
        normalizer: the divisor of the whole optimiser step, see the module.
        entropy_normalizer: what the summed entropies are divided by; the live tokens given if None.
        config: variant and coefficients.
        backend: "triton", "torch", or None: Triton on a CUDA device unless there is float64. Triton's gradient comes
            with the loss; it cannot be differentiated again.

    Raises:
        ValueError: shapes, devices, or an input that ``config`` needs is missing.
        TypeError: dtypes.
    """
    tokenwise = {
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "sampling_logprobs": sampling_logprobs,
        "entropies": entropies,
        "token_mask": token_mask,
    }
    check_loss_inputs(logprobs, advantages, cu_seqlens, tokenwise, normalizer, config)
    chosen = resolve("policy_loss", backend, logprobs, advantages, *tokenwise.values())
    if chosen == "triton" and (name := _wants_a_gradient(advantages, tokenwise)):
        if backend is not None:
            raise ValueError(
                f"backend: 'triton' cannot serve policy_loss here: {name} wants a gradient, which only log-probs and "
                "entropies get"
            )
        chosen = "torch"
    if chosen == "triton":
        arguments = _arguments(logprobs, advantages, cu_seqlens, tokenwise, normalizer, entropy_normalizer, config)
        return _loss_by_triton(logprobs, entropies if config.entropy_coef > 0 else None, arguments, config)
    segments = _Segments.of(cu_seqlens, logprobs.shape[0], token_mask)
    live_T = segments.live_T
    advantages_T = wide(advantages)[segments.sequence_T]
    logprobs = wide(logprobs)
    old = logprobs.detach() if old_logprobs is None else wide(old_logprobs)
    # a masked token may hold anything: it must not reach an exp, whose inf would become NaN in the gradient
    log_ratio = torch.where(live_T, logprobs - old, 0.0)
    if config.ratio == "sequence":
        log_ratio = segments.sums(log_ratio) / segments.lengths
    ratio = log_ratio.exp()
    token_loss = _objective(ratio, torch.where(live_T, logprobs, 0.0), advantages_T, config)
    metrics = _metrics(ratio.detach(), advantages_T, segments, config)
    if sampling_logprobs is not None:
        gap = old.detach() - wide(sampling_logprobs)
        token_loss, sampler_ratio = _sampler_corrected(token_loss, gap, segments, config)
        metrics["sampler_ratio"] = segments.mean(sampler_ratio)
    if ref_logprobs is not None:
        gap = torch.where(live_T, wide(ref_logprobs) - logprobs, 0.0)
        k3 = torch.expm1(gap) - gap
        metrics["kl"] = segments.mean(k3.detach())
        if config.kl_coef > 0:  # for the metric alone, an infinite k3 must not become 0 * inf in the loss
            token_loss = token_loss + config.kl_coef * k3
    coefficient_T = _coefficients(segments, advantages.shape[0], normalizer, config)
    loss = torch.where(live_T, token_loss * coefficient_T.to(token_loss.dtype), 0.0).sum()
    if config.entropy_coef > 0:
        assert entropies is not None
        loss = loss - config.entropy_coef * segments.mean(wide(entropies), entropy_normalizer)
    return PolicyLoss(loss, metrics)


def check_loss_inputs(
    logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    tokenwise: dict[str, Tensor | None],
    normalizer: float | Tensor | None,
    config: PolicyLossConfig,
) -> None:
    if logprobs.ndim != 1 or not logprobs.is_floating_point():
        raise ValueError(f"logprobs: {logprobs.dtype} {tuple(logprobs.shape)}, expected floating [T]")
    if advantages.ndim != 1 or cu_seqlens.shape != (advantages.shape[0] + 1,):
        raise ValueError(
            f"advantages, cu_seqlens: shapes {tuple(advantages.shape)} and {tuple(cu_seqlens.shape)}, "
            "expected [B] and [B + 1]"
        )
    if not is_integer(cu_seqlens):
        raise TypeError(f"cu_seqlens: dtype {cu_seqlens.dtype}, expected an integer dtype")
    for name, tensor in tokenwise.items():
        if tensor is not None and tensor.shape != logprobs.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(logprobs.shape)}")
    for name, tensor in {**tokenwise, "advantages": advantages, "cu_seqlens": cu_seqlens}.items():
        if tensor is None:
            continue
        if tensor.device != logprobs.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {logprobs.device} as logprobs")
        if name not in ("token_mask", "cu_seqlens") and not tensor.is_floating_point():
            raise TypeError(f"{name}: dtype {tensor.dtype}, expected a floating dtype")
    for name, needed in (
        ("ref_logprobs", f"kl_coef={config.kl_coef}" if config.kl_coef > 0 else ""),
        ("entropies", f"entropy_coef={config.entropy_coef}" if config.entropy_coef > 0 else ""),
        ("sampling_logprobs", config.sampler_correction if config.sampler_correction != "none" else ""),
    ):
        if needed and tokenwise[name] is None:
            raise ValueError(f"{name}: missing, expected [T] with {needed}")
    if config.normalization == "dapo" and normalizer is None:
        raise ValueError("normalizer: missing, expected the token count of the optimiser step with 'dapo'")
    check_bounds(cu_seqlens, logprobs.shape[0])


def check_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    if readable(cu_seqlens):
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != tokens or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(f"cu_seqlens: from {first} to {last}, expected non-decreasing from 0 to T = {tokens}")


# --- PyTorch, the reference ---


class _Segments(NamedTuple):
    """Which response a token belongs to, and which tokens count."""

    sequence_T: Tensor
    live_T: Tensor
    bounds: Tensor

    @staticmethod
    def of(cu_seqlens: Tensor, tokens: int, token_mask: Tensor | None) -> _Segments:
        position_T = torch.arange(tokens, device=cu_seqlens.device)
        bounds = cu_seqlens.to(torch.int64)
        sequence_T = torch.bucketize(position_T, bounds[1:], right=True)
        live_T = torch.ones_like(position_T, dtype=torch.bool) if token_mask is None else token_mask != 0
        return _Segments(sequence_T, live_T, bounds)

    def sums(self, x_T: Tensor) -> Tensor:
        """Each token's sum over its response, [T]; no atomics. What is not live has to be 0 already."""
        if self.bounds.shape[0] == 1:
            return x_T
        return torch.segment_reduce(x_T, "sum", offsets=self.bounds, axis=0, initial=0)[self.sequence_T]

    @property
    def lengths(self) -> Tensor:
        """int64 [T], live tokens of each token's response, at least 1."""
        lengths_B = torch.zeros(self.bounds.shape[0] - 1, dtype=torch.int64, device=self.live_T.device)
        lengths_B = lengths_B.index_add(0, self.sequence_T, self.live_T.long())  # integers: any order, the same sum
        return lengths_B[self.sequence_T].clamp(min=1)

    def mean(self, x_T: Tensor, count: float | Tensor | None = None) -> Tensor:
        """Sum over the live tokens by their number, or by ``count``."""
        total = torch.where(self.live_T, x_T, 0.0).sum()
        return total / (self.live_T.sum().clamp(min=1) if count is None else count)


def _objective(ratio: Tensor, logprobs: Tensor, advantages_T: Tensor, config: PolicyLossConfig) -> Tensor:
    capped = ratio if config.clip_max is None else ratio.clamp(max=config.clip_max)
    if config.objective == "cispo":
        return -capped.detach() * advantages_T * logprobs
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return -torch.minimum(capped * advantages_T, clipped * advantages_T)


def _sampler_corrected(
    token_loss: Tensor, gap: Tensor, segments: _Segments, config: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """The token losses times their weight, and pi_old / pi_sampler [T] before the cap, from the log of it."""
    gap = torch.where(segments.live_T & ~gap.isnan(), gap, 0.0)
    if config.sampler_correction.startswith("sequence"):
        gap = segments.sums(gap)
    ratio = gap.exp()
    if config.sampler_correction == "none":
        return token_loss, ratio
    if config.sampler_correction.endswith("truncate"):
        return token_loss * ratio.clamp(max=config.sampler_cap), ratio
    return token_loss * torch.where(ratio > config.sampler_cap, 0.0, ratio), ratio


def _coefficients(
    segments: _Segments, batch: int, normalizer: float | Tensor | None, config: PolicyLossConfig
) -> Tensor:
    """c_t [T], or a scalar where it is the same for all tokens; float64, so that no count is rounded."""
    live_T = segments.live_T
    if normalizer is None:
        normalizer = batch if config.normalization in ("grpo", "dr_grpo") else live_T.sum()
    if isinstance(normalizer, Tensor):
        divisor = normalizer.to(live_T.device, torch.float64)
    else:
        divisor = torch.full((), normalizer, dtype=torch.float64, device=live_T.device)
    if config.normalization == "dr_grpo":
        assert config.max_completion_length is not None
        divisor = divisor * config.max_completion_length
    if config.normalization == "grpo":
        divisor = divisor * segments.lengths
    return 1.0 / divisor.clamp(min=1e-30)


def _metrics(ratio: Tensor, advantages_T: Tensor, segments: _Segments, config: PolicyLossConfig) -> dict[str, Tensor]:
    if config.objective == "cispo":
        low = torch.zeros_like(ratio)
        assert config.clip_max is not None
        high = (ratio > config.clip_max) & (advantages_T > 0)
    else:
        low = (ratio < 1 - config.clip_low) & (advantages_T < 0)
        high = (ratio > 1 + config.clip_high) & (advantages_T > 0)
    return {
        "clip_low": segments.mean(low.to(ratio.dtype)),
        "clip_high": segments.mean(high.to(ratio.dtype)),
        "ratio": segments.mean(ratio),
    }


def _wants_a_gradient(advantages: Tensor, tokenwise: Mapping[str, Tensor | None]) -> str | None:
    """The name of an input whose gradient the Triton kernels do not compute, if one is wanted."""
    if torch.is_grad_enabled():
        for name in ("old_logprobs", "ref_logprobs", "sampling_logprobs"):
            x = tokenwise[name]
            if x is not None and x.requires_grad:
                return name
        if advantages.requires_grad:
            return "advantages"
    return None


def policy_gradient(
    logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    tokenwise: dict[str, Tensor | None],
    normalizer: float | Tensor | None,
    entropy_normalizer: float | Tensor | None,
    config: PolicyLossConfig,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``policy_loss`` [T], of the log-probs and (None without a bonus) of the entropies, as values.

    Args:
        tokenwise: the [T] arguments of ``policy_loss`` by their names. All are checked already.
    """
    if resolve("policy_loss", backend, logprobs, advantages, *tokenwise.values()) == "triton":
        arguments = _arguments(logprobs, advantages, cu_seqlens, tokenwise, normalizer, entropy_normalizer, config)
        rows = (
            _operator(arguments, config)[2] if torch.compiler.is_compiling() else _launch(arguments, config).gradients
        )
        return rows[0], rows[1] if config.entropy_coef > 0 else None

    def loss(logprobs: Tensor, entropies: Tensor | None) -> Tensor:
        given = {**tokenwise, "entropies": entropies}
        options: dict[str, Any] = {"normalizer": normalizer, "entropy_normalizer": entropy_normalizer}
        return policy_loss(logprobs, advantages, cu_seqlens, **given, **options, config=config, backend="torch").loss

    entropies = tokenwise["entropies"]
    if config.entropy_coef > 0:
        gradients: tuple[Tensor, Tensor] = torch.func.grad(loss, argnums=(0, 1))(logprobs, entropies)
        return gradients
    gradient: Tensor = torch.func.grad(loss)(logprobs, entropies)
    return gradient, None


# --- Triton ---

_TOKENWISE = ("old_logprobs", "ref_logprobs", "sampling_logprobs", "entropies", "token_mask")


def _arguments(
    logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    tokenwise: Mapping[str, Tensor | None],
    normalizer: Divisor,
    entropy_normalizer: Divisor,
    config: PolicyLossConfig,
) -> list[Any]:
    """The arguments as the kernel takes them, in its order: contiguous, and divisors as numbers or on the device."""
    arguments: list[Any] = [logprobs.contiguous(), advantages.contiguous(), cu_seqlens.contiguous()]
    for name in _TOKENWISE:
        x = tokenwise[name]
        if name == "entropies" and config.entropy_coef == 0:
            x = None  # nothing reads them
        arguments.append(None if x is None else x.contiguous())
    for divisor in (normalizer, entropy_normalizer):
        if isinstance(divisor, Tensor) and divisor.device != logprobs.device:
            divisor = float(divisor) if readable(divisor) else divisor.to(logprobs.device)
        arguments.append(divisor.detach() if isinstance(divisor, Tensor) else divisor)
    return arguments


def _loss_by_triton(
    logprobs: Tensor, entropies: Tensor | None, arguments: list[Any], config: PolicyLossConfig
) -> PolicyLoss:
    from maestro_fast.kernels.policy_loss import METRICS

    if torch.compiler.is_compiling():
        loss, values, _ = _operator(arguments, config)
    elif torch.is_grad_enabled() and (logprobs.requires_grad or (entropies is not None and entropies.requires_grad)):
        launched = _TritonLoss.apply(logprobs, entropies, lambda: _launch(arguments, config))  # type: ignore[no-untyped-call]
        loss, values, _ = launched
    else:
        loss, values, _ = _launch(arguments, config)
    wanted = {"kl": arguments[4] is not None, "sampler_ratio": arguments[5] is not None}
    return PolicyLoss(loss, {name: values[at] for name, at in METRICS.items() if wanted.get(name, True)})


@gpu.on_its_device
def _launch(arguments: list[Any], config: PolicyLossConfig) -> Loss:
    from maestro_fast.kernels import policy_loss as kernel

    logprobs, advantages, cu_seqlens, old, ref, sampling, entropies, mask, normalizer, entropy_normalizer = arguments
    return kernel.policy_loss(
        logprobs,
        advantages,
        cu_seqlens,
        old_logprobs=old,
        ref_logprobs=ref,
        sampling_logprobs=sampling,
        entropies=entropies,
        token_mask=mask,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
        config=config,
    )


class _TritonLoss(torch.autograd.Function):
    """The loss, with the gradients that its launch has already computed: backward only scales them.

    It has no ``setup_context``, for which torch would inspect a signature at each call, longer than a launch takes.
    """

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, entropies: Tensor | None, launch: Callable[[], Loss]) -> Loss:
        output = launch()
        _remember(ctx, logprobs, entropies, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx, d_loss), None


def _remember(ctx: Any, logprobs: Tensor, entropies: Tensor | None, output: tuple[Tensor, ...]) -> None:
    _, values, gradients = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(values, gradients)
    ctx.save_for_backward(gradients)
    ctx.dtypes = logprobs.dtype, None if entropies is None else entropies.dtype


def _scaled(ctx: Any, d_loss: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of log-probs and entropies, in one launch where both have float32."""
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
    return torch.mul(x, y, out=torch.empty_like(x, dtype=dtype))  # rounded in the same launch


# torch.compile does not look into the launch: it sees this operator.


def _operator(arguments: list[Any], config: PolicyLossConfig) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, one, two = arguments
    divisors = [x if isinstance(x, Tensor) else None for x in (one, two)]
    numbers = [None if x is None or isinstance(x, Tensor) else float(x) for x in (one, two)]
    registered: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.maestro_fast.triton_policy_loss
    return registered(*tensors, *divisors, *numbers, *as_fields(config))


def _launch_operator(*given: Any) -> tuple[Tensor, ...]:
    tensors, divisors, numbers, fields = given[:8], given[8:10], given[10:12], given[12:]
    chosen = [number if tensor is None else tensor for tensor, number in zip(divisors, numbers, strict=True)]
    return tuple(_launch([*tensors, *chosen], from_fields(*fields)))


def _operator_shapes(logprobs: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = 2 if rest[-3][-1] > 0 else 1
    new = logprobs.new_empty
    return new((), dtype=torch.float32), new(8, dtype=torch.float32), new((rows, len(logprobs)), dtype=torch.float32)


gpu.define(
    "triton_policy_loss(Tensor logprobs, Tensor advantages, Tensor cu_seqlens, Tensor? old, Tensor? ref,"
    " Tensor? sampling, Tensor? entropies, Tensor? mask, Tensor? normalizer, Tensor? entropy_normalizer,"
    " float? number, float? entropy_number, str[] names, float[] numbers, float? clip_max, int? longest)"
    " -> (Tensor loss, Tensor values, Tensor gradients)",
    _launch_operator,
    _operator_shapes,
)


def _operator_backward(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    first, second = _scaled(ctx, d_loss)
    return (first, *[None] * 5, second, *[None] * 9)


torch.library.register_autograd(
    "maestro_fast::triton_policy_loss",
    _operator_backward,
    setup_context=lambda ctx, inputs, output: _remember(ctx, inputs[0], inputs[6], output),
    lib=gpu.library,
)
