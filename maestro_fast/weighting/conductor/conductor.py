"""The Conductor: a small network that reads a response's hidden state and sets the weight of each reward."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from maestro_fast.functions import load_function
from maestro_fast.ops.conductor_update import conductor_update, meta_gradient
from maestro_fast.ops.conductor_weights import ConductorSample, action_probs, conductor_weights
from maestro_fast.ops.group_advantages import GroupAdvantages
from maestro_fast.ops.maestro_advantages import maestro_advantages
from maestro_fast.specs import (
    AdvantageProfile,
    ConductorBatch,
    ConductorParams,
    ConductorState,
    ConductorUpdateConfig,
    resolve_profile,
)
from maestro_fast.weighting.conductor.buffer import Buffer
from maestro_fast.weighting.conductor.config import ConductorConfig
from maestro_fast.weighting.conductor.contexts import group_mean, policy_contexts
from maestro_fast.weighting.conductor.estimators import WEAKNESS, pathwise_slopes
from maestro_fast.weighting.conductor.head import Head
from maestro_fast.weighting.conductor.meta_rewards import meta_batch
from maestro_fast.weighting.conductor.state import adamw_moments, check_state, with_moments
from maestro_fast.weighting.conductor.statistics import RunningStatistics
from maestro_fast.weighting.diagnostics import self_flattery
from maestro_fast.weighting.policy import Comparison, ContextKind, Outcome, WeightContext, Weights

logger = logging.getLogger(__name__)


class Conductor:
    """Learns its head from a buffer of past batches, every ``period`` batches."""

    name = "conductor"
    needs_context = True
    needs_columns: tuple[str, ...] = ()
    should_stop = False

    def __init__(self, config: ConductorConfig, reward_names: tuple[str, ...], context_size: int) -> None:
        self.config = config
        self.reward_names = reward_names
        self.context_kind: ContextKind = "response" if config.context == "shuffled" else config.context
        self.needs_group_scores = config.needs_group_scores
        self.device = torch.device(config.chosen_device)
        self.head = Head(context_size, len(reward_names), config.hidden, config.seed, self.device)
        self.statistics = RunningStatistics(context_size, self.device)
        self.buffer = Buffer(config.period, config.capacity, config.staleness)
        self._state = ConductorState.start(self.params)
        hook = config.meta_reward
        self._meta_reward = load_function(hook, field="meta_reward") if isinstance(hook, str) else hook
        self._metrics: dict[str, float] = {}
        self._warned = False

    @property
    def weight(self) -> Tensor:
        return self.head.weight

    @property
    def bias(self) -> Tensor:
        return self.head.bias

    @property
    def params(self) -> ConductorParams:
        if self.config.standardise == "layer_norm":  # contexts come normalised
            size = self.statistics.mean.numel()
            return self.head.params(torch.zeros(size, device=self.device), torch.ones(size, device=self.device))
        return self.head.params(*self.statistics.standardisation())

    def weights(self, context: WeightContext) -> Weights:
        h = self._context(context)
        if self.config.mode == "group":
            h = group_mean(h, context.group_size)
        return self._weights(context, conductor_weights(h, self.params, **self._choice(context)))

    def adaptive_step(self, context: WeightContext, comparison: Comparison) -> tuple[Weights, GroupAdvantages] | None:
        """What ``weights`` gives and the advantages under it, by one op; None where that op has no such case.

        Then nothing has been done, and ``weights`` serves the batch.
        """
        if not self._is_one_op(context, comparison):
            return None
        sample, advantages = maestro_advantages(
            context.rewards_BK,
            self.params,
            context.group_size,
            h=self._context(context),
            kl=comparison.kl_B,
            beta=comparison.beta,
            lengths=comparison.lengths_B,
            profile=comparison.profile,
            **self._choice(context),
        )
        return self._weights(context, sample), advantages

    def _is_one_op(self, context: WeightContext, comparison: Comparison) -> bool:
        """Whether ``maestro_advantages`` gives the bits of the single ops.

        It has one context for each response, one device and one backend for all tensors. Float64 and gradients change
        the backend of the advantages, and must not change that of the weights. What is compared over the batch saves
        no launch by being one op.
        """
        rewards_BK, profile = context.rewards_BK, resolve_profile(comparison.profile)
        scopes = {profile.reward_center, profile.reward_scale, profile.score_center, profile.score_scale}
        return (
            getattr(self.weights, "__func__", None) is Conductor.weights  # a subclass may give weights of its own
            and self.config.mode != "group"
            and scopes.isdisjoint(("batch", "tokens"))
            and rewards_BK.device == self.weight.device
            and not any(
                x is not None and (x.dtype == torch.float64 or x.requires_grad)
                for x in (rewards_BK, comparison.kl_B, comparison.lengths_B)
            )
        )

    def _choice(self, context: WeightContext) -> dict[str, Any]:
        """How an action is chosen, as the ops take it."""
        config = self.config
        return {
            "tau": config.tau,
            "min_prob": config.min_prob,
            "alpha": config.alpha,
            "mode": "soft" if config.mode == "soft" else "sample",
            "seed": config.seed,
            "step": context.step,
        }

    def _weights(self, context: WeightContext, sample: ConductorSample) -> Weights:
        """Every response's weights, on the device of the rewards; in mode "group" the sample has one row per group."""
        self._metrics = {"conductor/entropy": sample.entropy.mean().item()}
        used, expected, actions = sample.weights, self.expected(sample.probs), sample.actions
        if self.config.mode == "group":
            used, expected, actions = (x.repeat_interleave(context.group_size, 0) for x in (used, expected, actions))
        device = context.rewards_BK.device
        return Weights(used.to(device), expected.to(device), actions.to(device))

    def expected(self, probs_BK: Tensor) -> Tensor:
        """Expected weights [B, K] under probabilities [B, K]."""
        if self.config.mode == "soft":
            return probs_BK
        return (1.0 - self.config.alpha) / len(self.reward_names) + self.config.alpha * probs_BK

    def _context(self, context: WeightContext) -> Tensor:
        size = self.statistics.mean.numel()
        h = policy_contexts(context, self.config.context, size, self.config.seed, self.device)
        return functional.layer_norm(h, h.shape[-1:]) if self.config.standardise == "layer_norm" else h

    def probs(self, h_Bd: Tensor) -> Tensor:
        """p [B, K] of contexts as they are read, before standardisation."""
        return action_probs(self.params.logits(h_Bd), self.config.tau, self.config.min_prob)

    def observe(self, outcome: Outcome) -> None:
        self._metrics["conductor/self_flattery"] = self_flattery(outcome)
        config, step = self.config, outcome.context.step
        if config.learning_rate == 0 or (config.freeze_at is not None and step >= config.freeze_at):
            return
        h = self._context(outcome.context)
        if config.mode == "group":
            h = group_mean(h, outcome.context.group_size).repeat_interleave(outcome.context.group_size, 0)
        self.buffer.add(step, meta_batch(config, outcome, h, self.probs(h), self._meta_reward))
        if self.buffer.due:
            self._update(step, outcome.profile)

    def _update(self, step: int, profile: str | AdvantageProfile) -> None:
        batches = [batch for batch in self.buffer.take(step) if batch["h"].shape[0]]
        if not batches:
            return
        if self.config.objective == "advantage" and not self._warned:
            logger.warning(WEAKNESS)
            self._warned = True
        new = [batch["h"] for batch in batches if "used" not in batch]
        self.statistics.update(torch.cat(new or [batches[0]["h"][:0]]))
        self._metrics |= self._signal(batches, profile)
        given, rest = self._experience(batches, profile)
        self._state, found = conductor_update(replace(self._state, params=self.params), given, self._options(step))
        for batch in batches:
            batch["used"] = torch.tensor(True)
        objective = found["objective"].item() + rest
        self._metrics |= {"conductor/objective": objective, "conductor/grad_norm": found["grad_norm"].item()}

    def _signal(self, batches: list[dict[str, Tensor]], profile: str | AdvantageProfile) -> dict[str, float]:
        """Signal to noise of the meta-gradient, from one gradient a batch: |mean|^2 / variance of the mean - 1.

        The expectation of |mean|^2 is |signal|^2 plus that variance, so pure noise gives about 0.
        """
        if len(batches) < 2:
            return {}
        options, params = self._options(0), self.params
        gradients = [meta_gradient(params, self._experience([batch], profile)[0], options)[1] for batch in batches]
        stacked = torch.stack([torch.cat([g.flatten() for g in parts.values()]) for parts in gradients])
        noise = stacked.var(0).sum() / len(batches)
        snr = stacked.mean(0).square().sum() / noise - 1 if noise > 0 else noise.new_zeros(())
        return {"conductor/gradient_snr": max(0.0, snr.item())}

    def _options(self, step: int) -> ConductorUpdateConfig:
        config = self.config
        rate = config.learning_rate * (1.0 if config.half_life is None else 2.0 ** (-step / config.half_life))
        return ConductorUpdateConfig(config.tau, config.min_prob, config.entropy_coef, rate, config.weight_decay)

    def _experience(
        self, batches: list[dict[str, Tensor]], profile: str | AdvantageProfile
    ) -> tuple[ConductorBatch, float]:
        """What an update takes of these batches, each response counting once; and what its objective lacks of J."""
        h = torch.cat([batch["h"] for batch in batches])
        if self.config.estimator == "pathwise":
            found = [self._pathwise(batch, profile) for batch in batches]
            values, slopes = (torch.cat(parts) for parts in zip(*found, strict=True))
            return ConductorBatch(h, slopes), (values - (self.probs(h) * slopes).sum(-1)).mean().item()
        names = ("meta", "actions", "drawn_probs")
        joined = {name: torch.cat([batch[name] for batch in batches]) for name in names if name in batches[0]}
        if self.config.estimator == "all_actions":
            return ConductorBatch(h, joined["meta"]), 0.0
        return ConductorBatch(h, **joined), 0.0

    def _pathwise(self, batch: dict[str, Tensor], profile: str | AdvantageProfile) -> tuple[Tensor, Tensor]:
        return pathwise_slopes(
            self.probs(batch["h"]),
            batch["meta"],
            batch["rewards"],
            int(batch["group_size"]),
            profile=profile,
            kl_B=batch.get("kl_penalty"),
            beta=float("kl_penalty" in batch),
        )

    def metrics(self) -> dict[str, float]:
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Tensor]:
        """On the CPU, whatever the device."""
        learnt = {
            **self.params.learned,
            **self.statistics.state_dict("statistics."),
            **adamw_moments(self._state),
            **self.buffer.state_dict(),
        }
        return {name: tensor.detach().cpu().clone() for name, tensor in learnt.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over a ``state_dict``.

        Raises:
            ValueError: a tensor that is missing or has another shape; nothing has been changed then.
        """
        learned = self.params.learned
        check_state(state, learned, self.statistics.mean.numel())
        for name, parameter in learned.items():
            parameter.copy_(state[name])
        self._state = with_moments(self.params, state)
        self.statistics.load_state_dict(state, "statistics.")
        self.buffer.load_state_dict(state, self.device)
