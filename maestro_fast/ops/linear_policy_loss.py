"""The policy loss from hidden states: language-model head, loss and their gradients in one sweep over the rows.

The sweep (``ops.sweep``) takes three matrix products of 2 T V d operations. ``token_logprobs`` and ``policy_loss`` one
after the other need four, because their backward pass computes the logits a second time. So here the gradient is
computed with the loss, and backward() only scales it. Chunks and the maths of a row are the same as in
``token_logprobs``, and so are the bits of log-probs. On a CUDA device, the products of the gradient of a 16-bit head
take twice as many rows as a chunk, see ``ops.head``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from maestro_fast.ops.backend import Backend
from maestro_fast.ops.head import Head, head_backend
from maestro_fast.ops.loss_function import wants_entropies
from maestro_fast.ops.policy_loss import check_bounds, check_loss_inputs
from maestro_fast.ops.sweep import IGNORED, Known, Step, Sweep, empty_logprobs, keeps_every_gradient, sweep_steps
from maestro_fast.ops.tensors import check_tensors, readable
from maestro_fast.ops.token_logprobs import check_head_inputs
from maestro_fast.specs import (
    EntropyMode,
    HeadSpec,
    LinearPolicyLoss,
    LossFunction,
    LossInputs,
    PolicyLossConfig,
)


def linear_policy_loss(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    token_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    active: Tensor | None = None,
    mean_entropy: bool = False,
    config: PolicyLossConfig | LossFunction,
    backend: Backend | None = None,
) -> LinearPolicyLoss:
    """``policy_loss`` of ``token_logprobs``, with the same loss, metrics and gradients of hidden, lm_head and bias.

    A row is a token. Rows without a gradient skip the two products of the gradient if the host knows them, but for a
    few that fill up a product; otherwise they take part as zeros. The host knows masked tokens and, with neither a KL
    nor an entropy bonus, responses whose advantage is 0, provided that it can read the tensors. So ``advantages``,
    ``cu_seqlens``, ``token_mask`` and ``active`` may stay on the CPU while the hidden states are on a GPU. Masked rows
    skip the forward, too. Rows of advantage 0 do not, because the metrics are means over all live tokens, unless
    ``active`` leaves them out.

    The gradient of some losses needs the log-probs of whole responses. That is so for ``ratio="sequence"`` with old
    log-probs, and for a sampler correction by sequences without old log-probs. Then responses that are longer than a
    chunk go through the head twice, and so do all responses if ``cu_seqlens`` is on a GPU. A loss of your own is taken
    to need the log-probs of the whole batch, so that every row goes through the head twice, unless
    ``ops.loss_function`` marks it as row-wise. A chunk has 4,096 rows on a GPU, or 2,048 with a 16-bit head, and fewer
    with a vocabulary beyond 163,840. On a CPU its logits take at most 128 MiB, or are those of 256 rows.

    Args:
        hidden, lm_head, targets, bias, logit_scale, softcap, temperature: see ``token_logprobs``. A target of -100 is
            a masked token.
        advantages, cu_seqlens, old_logprobs, ref_logprobs, sampling_logprobs, token_mask, normalizer,
            entropy_normalizer: see ``policy_loss``. Lengths and normalizers count responses that are not active, too.
        active: bool [B]. False leaves a response out of every pass and of the metrics. Its advantage has to be 0, so
            that it would add nothing to loss and gradient.
        mean_entropy: whether ``metrics["entropy"]``, the mean entropy of the live tokens in nats, is wanted.
        config: see ``policy_loss``. A loss of your own gets log-probs and, if it is marked with
            ``ops.loss_function(entropies=True)``, entropies, both on the device of ``hidden``. Its ``token_mask`` is
            bool and leaves out targets of -100, too. Autograd computes its gradient by log-probs and entropies, which
            then goes through the head; the logits of all rows never exist at once. A row-wise loss is called for every
            chunk and once at the end. Log-probs that are not known yet are ``old_logprobs`` or 0.
        backend: "cpp", "triton", "torch", or None. None means C++ on the CPU and Triton on a CUDA device, unless
            ``hidden`` is float64. C++ computes the rows of logits, Triton also the loss of a ``PolicyLossConfig``; the
            matrix products are PyTorch's.

    Returns:
        A ``LinearPolicyLoss``. Its gradient cannot be differentiated again. The gradient stays in memory until
        backward(): [T, d] in the dtype of ``hidden``, and float32 [V, d] if ``lm_head`` requires a gradient.

    Raises:
        ValueError: ``token_logprobs`` or ``policy_loss`` would raise one; an input other than hidden, lm_head and bias
            requires a gradient; ``active`` is given with a KL, an entropy bonus or a loss of your own, where every
            response may have a gradient; ``active`` is False where the advantage is not 0 (checked on the CPU only); a
            tensor is on the CPU while a CUDA graph is captured.
        TypeError: a dtype is wrong.
    """
    check_tensors(
        5, hidden=hidden, lm_head=lm_head, targets=targets, advantages=advantages, cu_seqlens=cu_seqlens, bias=bias,
        old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, sampling_logprobs=sampling_logprobs,
        token_mask=token_mask, active=active,
    )  # fmt: skip
    reads_entropies = wants_entropies(config)
    entropy: EntropyMode = "grad" if reads_entropies else "value" if mean_entropy else "none"
    spec = HeadSpec(logit_scale, softcap, temperature, IGNORED, entropy)
    check_head_inputs(hidden, lm_head, targets, bias, spec)
    given = LossInputs(
        empty_logprobs(hidden), advantages, cu_seqlens, old_logprobs, ref_logprobs, sampling_logprobs,
        empty_logprobs(hidden) if reads_entropies else None, token_mask, normalizer, entropy_normalizer,
    )  # fmt: skip
    served = head_backend("linear_policy_loss", backend, hidden, lm_head, bias=bias, others=[targets, *given])
    _check_no_gradient({**given._asdict(), "active": active})
    inputs, active_B = _uploaded_inputs(given, active, hidden.device)
    check_loss_inputs(inputs, config)
    check_bounds(cu_seqlens, hidden.shape[0])
    _check_active(active, advantages, config)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, lm_head, bias)]
    with torch.no_grad():
        inputs, rows, worked_T = _without_left_out(inputs, targets, active_B)
        head = Head.of(lm_head.detach(), None if bias is None else bias.detach(), spec, served)
        loss_backend: Backend | None = None if backend == "cpp" else backend  # C++ has the rows of logits alone.
        sweep = Sweep(head, hidden.detach(), rows, inputs, config, loss_backend)
        if any(wanted):
            sweep.want(*wanted)
        known = Known.by_the_host(given, targets, active, config)
        steps = sweep_steps(hidden.shape[0], head, known, gradient=any(wanted), scope=sweep.scope)
        for step in _uploaded_steps(steps, hidden.device):
            sweep.step(*step)
        sweep.sums.finish()
        loss, metrics = sweep.result(None if active is None else worked_T)
        if mean_entropy:
            assert sweep.entropies is not None
            live = torch.where(worked_T, sweep.entropies, 0.0)
            metrics["entropy"] = live.sum() / worked_T.sum().clamp(min=1)
    if any(wanted):
        sums = sweep.sums
        loss = _WithGradients.apply(loss, hidden, lm_head, bias, sums.hidden, sums.weight, sums.bias)  # type: ignore[no-untyped-call]
    return LinearPolicyLoss(loss, metrics, inputs.logprobs)


class _WithGradients(torch.autograd.Function):
    """The loss as a function of hidden, lm_head and bias, whose gradients are known already."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *gradients: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient of a head is large. It is scaled in place, unless the caller keeps the graph for a second call.
        kept = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()

        def scaled(x: Tensor, dtype: torch.dtype) -> Tensor:
            in_place = not kept and x.dtype is dtype
            return torch.mul(x, dloss, out=x if in_place else x.new_empty(x.shape, dtype=dtype))

        gradients = (
            None if x is None else scaled(x, dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return None, *gradients, None, None, None


def _without_left_out(
    inputs: LossInputs, targets: Tensor, active_B: Tensor | None
) -> tuple[LossInputs, Tensor, Tensor]:
    """The inputs with all masked tokens in ``token_mask``, targets that are -100 in the rows to skip, and bool [T],
    which rows are swept."""
    live_T = targets != IGNORED
    if inputs.token_mask is not None:
        live_T = live_T & (inputs.token_mask != 0)
    worked_T, advantages = live_T, inputs.advantages
    if active_B is not None:
        position_T = torch.arange(targets.shape[0], device=targets.device)
        response_T = torch.bucketize(position_T, inputs.cu_seqlens[1:], right=True)
        worked_T = live_T & active_B[response_T]
        advantages = torch.where(active_B, advantages, 0.0)
    inputs = inputs._replace(advantages=advantages, token_mask=live_T)
    return inputs, torch.where(worked_T, targets, IGNORED), worked_T


# --- checks ---


def _check_no_gradient(inputs: dict[str, Any]) -> None:
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires a gradient, which only hidden, lm_head and bias get; expected none")


def _check_active(active: Tensor | None, advantages: Tensor, config: PolicyLossConfig | LossFunction) -> None:
    if active is None:
        return
    if active.shape != advantages.shape:
        raise ValueError(f"active: shape {tuple(active.shape)}, expected {tuple(advantages.shape)}")
    if active.dtype is not torch.bool:
        raise TypeError(f"active: dtype {active.dtype}, expected torch.bool")
    if not isinstance(config, PolicyLossConfig):
        raise ValueError("active: given with a loss function, which may give every response a gradient; expected None")
    if keeps_every_gradient(config):
        raise ValueError(
            f"active: given with kl_coef={config.kl_coef} and entropy_coef={config.entropy_coef}, which give every "
            "response a gradient; expected None"
        )
    if readable(active) and readable(advantages):
        wrong = ~active & (advantages != 0)
        if bool(wrong.any()):
            response = int(wrong.nonzero()[0])
            advantage = float(advantages[response])
            raise ValueError(f"active: False for response {response} with advantage {advantage:g}, expected 0")


# --- from the host to the device ---


def _uploaded_inputs(
    inputs: LossInputs, active: Tensor | None, device: torch.device
) -> tuple[LossInputs, Tensor | None]:
    """The inputs and ``active`` on the device.

    Raises:
        ValueError: an input is neither on the CPU nor on the device; or see ``upload``.
    """
    moved = {}
    for name in ("advantages", "cu_seqlens", "token_mask"):  # these may be on the CPU, where the host reads them
        x = getattr(inputs, name)
        if x is not None:
            moved[name] = _from_the_host(name, x, device)
    for name in ("normalizer", "entropy_normalizer"):  # uploaded here once, not again with every chunk
        x = getattr(inputs, name)
        if isinstance(x, Tensor):
            moved[name] = upload(name, x, device)
    return inputs._replace(**moved), None if active is None else _from_the_host("active", active, device)


def _from_the_host(name: str, x: Tensor, device: torch.device) -> Tensor:
    if x.device.type != "cpu" and x.device != device:
        raise ValueError(f"{name}: on {x.device}, expected {device} as hidden, or the CPU")
    return upload(name, x, device)


def _uploaded_steps(steps: list[Step], device: torch.device) -> list[Step]:
    """The same steps with the indices of their rows on the device. One copy uploads all of them."""
    indices = [step.rows for step in steps if isinstance(step.rows, Tensor)]
    if not indices or device.type == "cpu":
        return steps
    parts = iter(upload("cu_seqlens", torch.cat(indices), device).split([len(rows) for rows in indices]))
    return [step._replace(rows=next(parts)) if isinstance(step.rows, Tensor) else step for step in steps]


def upload(name: str, x: Tensor, device: torch.device) -> Tensor:
    """``x`` on the device. From the CPU it is copied through pinned memory, because a copy from pageable memory would
    make the host wait until the device has done all its work.

    Raises:
        ValueError: a CUDA graph is being captured. Its replays would read memory that has been freed by then.
    """
    if device.type == "cpu" or x.device.type != "cpu":
        return x.to(device)
    if torch.compiler.is_compiling():
        return x.to(device, non_blocking=True)
    if _captures(device):
        raise ValueError(f"{name}: on the CPU while a CUDA graph is captured, expected {device}")
    return _pinned(x).to(device, non_blocking=True)


def _captures(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _pinned(x: Tensor) -> Tensor:
    return x.pin_memory()
