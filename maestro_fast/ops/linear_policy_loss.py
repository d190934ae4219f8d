"""The policy loss from hidden states: language-model head, loss and their gradients in one sweep over the rows.

    x = h @ W.T -> log p, H -> dL/dlog p, dL/dH (``ops.policy_loss``) -> dL/dx -> dL/dh, dL/dW

Three GEMMs of 2 T V d operations, where ``token_logprobs`` and ``policy_loss`` one after the other need four: that
backward pass computes the logits a second time. So the gradient comes with the loss, and backward() only multiplies it.
Chunks and row maths are those of ``token_logprobs``, whose log-probs are bitwise the same. On a CUDA device a chunk of
a 16-bit head is half of the rows that the gradient's two GEMMs take, see ``ops.head_gradients``.

The loss of a chunk's rows is taken from ``policy_loss`` over the whole batch, with what log-probs there are: a row's
gradient depends on its own, with ratios of sequences on those of its response, which ``ops.sweep`` then keeps together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.head_chunks import Head, Rows
from maestro_fast.ops.head_gradients import GradientSums, float16_unit
from maestro_fast.ops.linear_policy_loss_inputs import IGNORED, LossInputs, loss_inputs, upload
from maestro_fast.ops.sweep import Known, Step, sweep_steps
from maestro_fast.ops.tensors import wide
from maestro_fast.ops.token_logprobs import check_head_inputs
from maestro_fast.specs import EntropyMode, HeadSpec, PolicyLossConfig


class LinearPolicyLoss(NamedTuple):
    """``PolicyLoss``, and the log-probs [T] that it was taken from, without a graph. In rows that were not worked they
    are those given as ``old_logprobs``, or 0."""

    loss: Tensor
    metrics: dict[str, Tensor]
    logprobs: Tensor


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
    config: PolicyLossConfig,
    backend: Backend | None = None,
) -> LinearPolicyLoss:
    """``policy_loss`` of ``token_logprobs``: the same loss, metrics and gradients of hidden, lm_head and bias.

    Rows without a gradient leave the gradient's two GEMMs if the host knows them, and are 0 in them if not. It knows
    tokens that are masked, and with neither a KL nor an entropy bonus the responses whose advantage is 0, from tensors
    on the CPU: ``advantages``, ``cu_seqlens``, ``token_mask`` and ``active`` may stay there beside hidden states on a
    GPU. Masked rows leave the forward too; those of advantage 0 do not, since the metrics are means over all live
    tokens, unless ``active`` leaves them out.

    Where a gradient needs whole responses (``ratio="sequence"`` with old log-probs, a sampler correction by sequences
    without), those longer than a chunk go through the head twice, and all of them if ``cu_seqlens`` is on a GPU. On a
    GPU a chunk has 4,096 rows, with a 16-bit head 2,048, and fewer with a vocabulary beyond 163,840.

    Args:
        hidden, lm_head, targets, bias, logit_scale, softcap, temperature: see ``token_logprobs``; a target of -100 is
            a masked token.
        advantages, cu_seqlens, old_logprobs, ref_logprobs, sampling_logprobs, token_mask, normalizer,
            entropy_normalizer, config: see ``policy_loss``. Lengths and normalizers count what is not active, too.
        active: bool [B], False leaves a response out of every pass and of the metrics: its advantage is 0, so that it
            adds nothing to loss or gradient.
        mean_entropy: whether ``metrics["entropy"]``, the mean entropy of the live tokens in nats, is wanted.
        backend: "triton", "torch", or None: Triton on a CUDA device unless there is float64. Triton has the rows of
            logits and the loss; the GEMMs are PyTorch's.

    Returns:
        ``LinearPolicyLoss``. The gradient cannot be differentiated again. It is held from here to backward(): [T, d] in
        the dtype of ``hidden``, and float32 [V, d] if ``lm_head`` has one.

    Raises:
        ValueError: as ``token_logprobs`` and ``policy_loss``; an input other than the three requires a gradient;
            ``active`` with a KL or an entropy bonus, whose gradient needs every response, or False where the advantage
            is not 0 (looked at on the CPU only); a tensor on the CPU while a CUDA graph is captured.
        TypeError: dtypes.
    """
    entropy: EntropyMode = "grad" if config.entropy_coef > 0 else "value" if mean_entropy else "none"
    resolve("linear_policy_loss", backend, hidden, lm_head, bias)
    spec = HeadSpec(logit_scale, softcap, temperature, IGNORED, entropy)
    check_head_inputs(hidden, lm_head, targets, bias, spec)
    given = LossInputs(
        advantages, cu_seqlens, old_logprobs, ref_logprobs, sampling_logprobs, token_mask, active, normalizer,
        entropy_normalizer,
    )  # fmt: skip
    inputs = loss_inputs(given, hidden, config)
    plan = _Plan(
        spec,
        config,
        gradient=torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, lm_head, bias)),
        whole=given.needs_whole_responses(config),
        known=given.known(targets, config),
        mean_entropy=mean_entropy,
        backend=backend,
    )
    loss, values, logprobs = _LinearPolicyLoss.apply(hidden, lm_head, bias, targets, plan, *inputs)  # type: ignore[no-untyped-call]
    return LinearPolicyLoss(loss, dict(zip(_metric_names(inputs, plan), values.unbind(), strict=True)), logprobs)


@dataclass(frozen=True)
class _Plan:
    spec: HeadSpec
    config: PolicyLossConfig
    gradient: bool
    whole: bool
    known: Known
    mean_entropy: bool
    backend: Backend | None

    def steps(self, tokens: int, chunk: int) -> list[Step]:
        return sweep_steps(tokens, chunk, self.known, gradient=self.gradient, whole=self.whole)


def _uploaded(steps: list[Step], device: torch.device) -> list[Step]:
    """The same steps with their indices on the device, all by one copy."""
    indices = [rows for rows, _ in steps if isinstance(rows, Tensor)]
    if not indices or device.type == "cpu":
        return steps
    parts = iter(upload("cu_seqlens", torch.cat(indices), device).split([len(rows) for rows in indices]))
    return [Step(next(parts), kind) if isinstance(rows, Tensor) else Step(rows, kind) for rows, kind in steps]


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, plan: _Plan, *given: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs, targets, worked_T = _without_left_out(LossInputs(*given), targets)
        sweep = _Sweep(hidden, targets, inputs, Head.of(weight, bias, plan.spec, plan.backend), plan)
        if plan.gradient:
            sweep.want(*ctx.needs_input_grad[:3])
        for rows, gradient in _uploaded(plan.steps(hidden.shape[0], sweep.head.chunk), hidden.device):
            sweep.step(rows, gradient)
        sweep.sums.finish()
        ctx.save_for_backward(sweep.sums.hidden, sweep.sums.weight, sweep.sums.bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        loss, values = _loss_and_metrics(sweep, worked_T, plan)
        ctx.mark_non_differentiable(values, sweep.logprobs)
        return loss, values, sweep.logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            None if x is None else torch.mul(x, dloss, out=torch.empty_like(x, dtype=dtype))
            for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, *[None] * (2 + len(LossInputs._fields)))


class _Sweep:
    """What is known of the batch so far: log-probs and entropies [T], and the sums of the gradients."""

    def __init__(self, hidden: Tensor, targets: Tensor, inputs: LossInputs, head: Head, plan: _Plan) -> None:
        self.hidden, self.targets, self.inputs, self.head, self.plan = hidden, targets, inputs, head, plan
        dtype, tokens = wide(hidden[:0]).dtype, hidden.shape[0]
        self.logprobs = hidden.new_zeros(tokens, dtype=dtype)
        if inputs.old_logprobs is not None:  # a ratio of 1 where none is taken: an infinite one times 0 is NaN
            assert inputs.token_mask is not None
            self.logprobs.copy_(torch.where(inputs.token_mask, inputs.old_logprobs, 0.0))
        self.entropies = None if head.spec.entropy == "none" else torch.zeros_like(self.logprobs)
        self.sums = GradientSums(head, None, None, None, None)

    def want(self, hidden: bool, weight: bool, bias: bool) -> None:
        """Float16 would round a token's share of the loss to 0 before the loss is scaled up."""
        dtype, head, states = self.logprobs.dtype, self.head, self.hidden
        narrow = dtype if states.dtype is torch.float16 else states.dtype
        self.sums = GradientSums(
            head,
            torch.zeros_like(states, dtype=narrow) if hidden else None,
            torch.zeros_like(head.weight, dtype=dtype) if weight else None,
            torch.zeros_like(head.bias) if bias and head.bias is not None else None,
            float16_unit(head, *self.foreseen_slopes()) if head.scales else None,
        )

    def foreseen_slopes(self) -> tuple[Tensor, Tensor | None]:
        """About as large as dL/dlog p and dL/dH [T] will be: all ratios are 1, and no term cancels another."""
        given, config = self.inputs, self.plan.config
        logprobs = self.logprobs  # the old ones
        if given.old_logprobs is None and given.sampling_logprobs is not None:
            assert given.token_mask is not None
            logprobs = torch.where(given.token_mask, given.sampling_logprobs, 0.0)
        given = given._replace(advantages=given.advantages.abs() + config.kl_coef, ref_logprobs=None)
        return given.gradient(logprobs, self.entropies, replace(config, kl_coef=0.0), self.plan.backend)

    def step(self, rows: Rows, gradient: bool) -> None:
        """One chunk; its logits end with it."""
        chunk = self.head.chunk_of(self.hidden, self.targets, rows)
        x = chunk.logits()
        stats = chunk.statistics(x)
        worked = chunk.targets[: chunk.rows] != IGNORED
        self.logprobs[rows] = torch.where(worked, stats.logprobs[: chunk.rows], self.logprobs[rows])
        if self.entropies is not None and stats.entropies is not None:
            self.entropies[rows] = stats.entropies[: chunk.rows]
        if gradient:
            slopes = self.inputs.gradient(self.logprobs, self.entropies, self.plan.config, self.plan.backend)
            dlogprobs, dentropies = (None if slope is None else slope[rows] for slope in slopes)
            assert dlogprobs is not None
            self.sums.add(chunk, rows, x, stats, dlogprobs, dentropies)


def _without_left_out(inputs: LossInputs, targets: Tensor) -> tuple[LossInputs, Tensor, Tensor]:
    """The inputs with all that is masked in ``token_mask``, targets that name the rows to work, and those [T]."""
    live_T = targets != IGNORED
    if inputs.token_mask is not None:
        live_T = live_T & (inputs.token_mask != 0)
    worked_T, advantages = live_T, inputs.advantages
    if inputs.active is not None:
        position_T = torch.arange(targets.shape[0], device=targets.device)
        response_T = torch.bucketize(position_T, inputs.cu_seqlens[1:], right=True)
        worked_T = live_T & inputs.active[response_T]
        advantages = torch.where(inputs.active, advantages, 0.0)
    inputs = inputs._replace(advantages=advantages, token_mask=live_T)
    return inputs, torch.where(worked_T, targets, IGNORED), worked_T


def _loss_and_metrics(sweep: _Sweep, worked_T: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    known = sweep.logprobs, sweep.entropies, plan.config, plan.backend
    loss, metrics = sweep.inputs.loss(*known)
    if sweep.inputs.active is not None:
        metrics = sweep.inputs._replace(token_mask=worked_T).loss(*known).metrics
    if plan.mean_entropy:
        assert sweep.entropies is not None
        metrics["entropy"] = torch.where(worked_T, sweep.entropies, 0.0).sum() / worked_T.sum().clamp(min=1)
    return loss, torch.stack([metrics[name] for name in _metric_names(sweep.inputs, plan)])


def _metric_names(inputs: LossInputs, plan: _Plan) -> list[str]:
    wanted = {
        "sampler_ratio": inputs.sampling_logprobs is not None,
        "kl": inputs.ref_logprobs is not None,
        "entropy": plan.mean_entropy,
    }
    return ["clip_low", "clip_high", "ratio", *(name for name, given in wanted.items() if given)]
