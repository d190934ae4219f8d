"""The Conductor: a small network that reads a response's hidden state and sets the weight of each reward."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional

from maestro_fast.functions import load_function
from maestro_fast.ops.conductor_params import ConductorParams
from maestro_fast.ops.conductor_weights import action_probs, conductor_weights
from maestro_fast.ops.group_advantages import group_advantages
from maestro_fast.ops.profiles import AdvantageProfile
from maestro_fast.weighting.conductor.buffer import Buffer
from maestro_fast.weighting.conductor.config import ConductorConfig
from maestro_fast.weighting.conductor.contexts import group_mean, policy_contexts
from maestro_fast.weighting.conductor.estimators import WEAKNESS, all_actions, pathwise, reinforce
from maestro_fast.weighting.conductor.head import Head
from maestro_fast.weighting.conductor.meta_rewards import meta_batch
from maestro_fast.weighting.conductor.state import check_state, load_moments, moments
from maestro_fast.weighting.conductor.statistics import RunningStatistics
from maestro_fast.weighting.policy import ContextKind, Outcome, WeightContext, Weights

logger = logging.getLogger(__name__)
MAX_RATIO = 2.0  # importance ratios beyond it would let one old response rule an update


class Conductor:
    """Learns its head from a buffer of past batches, every ``period`` batches.

    It runs on the CPU: a head of d x K costs microseconds there, and every process holds the same bits.
    """

    name = "conductor"
    needs_context = True
    needs_columns: tuple[str, ...] = ()
    should_stop = False

    def __init__(self, config: ConductorConfig, reward_names: tuple[str, ...], context_size: int) -> None:
        self.config = config
        self.reward_names = reward_names
        self.context_kind: ContextKind = "response" if config.context == "shuffled" else config.context
        self.needs_group_scores = config.needs_group_scores
        self.head = Head(context_size, len(reward_names), config.hidden, config.seed)
        self.statistics = RunningStatistics(context_size)
        self.buffer = Buffer(config.period, config.capacity, config.staleness)
        self._optimizer = torch.optim.AdamW(self.head.groups(config.weight_decay), lr=config.learning_rate)
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
            return self.head.params(torch.zeros(size), torch.ones(size))
        return self.head.params(*self.statistics.standardisation())

    def weights(self, context: WeightContext) -> Weights:
        config, h = self.config, self._context(context)
        per_group = config.mode == "group"
        sample = conductor_weights(
            group_mean(h, context.group_size) if per_group else h,
            self.params,
            tau=config.tau,
            min_prob=config.min_prob,
            alpha=config.alpha,
            mode="soft" if config.mode == "soft" else "sample",
            seed=config.seed,
            step=context.step,
        )
        self._metrics = {"conductor/entropy": sample.entropy.mean().item()}
        used, expected, actions = sample.weights.detach(), self.expected(sample.probs), sample.actions
        if per_group:
            used, expected, actions = (x.repeat_interleave(context.group_size, 0) for x in (used, expected, actions))
        device = context.rewards_BK.device
        return Weights(used.to(device), expected.to(device), actions.to(device))

    def expected(self, probs_BK: Tensor) -> Tensor:
        """Expected weights [B, K] under probabilities [B, K]."""
        probs_BK = probs_BK.detach()
        if self.config.mode == "soft":
            return probs_BK
        return (1.0 - self.config.alpha) / len(self.reward_names) + self.config.alpha * probs_BK

    def _context(self, context: WeightContext) -> Tensor:
        h = policy_contexts(context, self.config.context, self.statistics.mean.numel(), self.config.seed)
        return functional.layer_norm(h, h.shape[-1:]) if self.config.standardise == "layer_norm" else h

    def probs(self, h_Bd: Tensor) -> Tensor:
        """p [B, K] of contexts as they are read, before standardisation; differentiable."""
        return action_probs(self.params.logits(h_Bd), self.config.tau, self.config.min_prob)

    def observe(self, outcome: Outcome) -> None:
        self._metrics["conductor/self_flattery"] = self_flattery(outcome)
        config, step = self.config, outcome.context.step
        if config.learning_rate == 0 or (config.freeze_at is not None and step >= config.freeze_at):
            return
        h = self._context(outcome.context)
        if config.mode == "group":
            h = group_mean(h, outcome.context.group_size).repeat_interleave(outcome.context.group_size, 0)
        self.buffer.add(step, meta_batch(config, outcome, h, self.probs(h).detach(), self._meta_reward))
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
        objective = self._objective(batches, profile)
        self._metrics |= self._signal(batches, profile)
        self._optimizer.zero_grad()
        (-objective).backward()
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in self.head.named().values()]))  # type: ignore[union-attr]
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate(step)
        self._optimizer.step()
        for batch in batches:
            batch["used"] = torch.tensor(True)
        self._metrics |= {"conductor/objective": objective.item(), "conductor/grad_norm": norm.item()}

    def _signal(self, batches: list[dict[str, Tensor]], profile: str | AdvantageProfile) -> dict[str, float]:
        """Signal to noise of the meta-gradient, from one gradient a batch: |mean|^2 / variance of the mean - 1.

        The expectation of |mean|^2 is |signal|^2 plus that variance, so pure noise gives about 0.
        """
        if len(batches) < 2:
            return {}
        parameters = list(self.head.named().values())
        gradients = [torch.autograd.grad(self._objective([batch], profile), parameters) for batch in batches]
        stacked = torch.stack([torch.cat([g.flatten() for g in parts]) for parts in gradients])
        noise = stacked.var(0).sum() / len(batches)
        snr = stacked.mean(0).square().sum() / noise - 1 if noise > 0 else noise.new_zeros(())
        return {"conductor/gradient_snr": max(0.0, snr.item())}

    def _learning_rate(self, step: int) -> float:
        config = self.config
        return config.learning_rate * (1.0 if config.half_life is None else 2.0 ** (-step / config.half_life))

    def _objective(self, batches: list[dict[str, Tensor]], profile: str | AdvantageProfile) -> Tensor:
        """J over these batches, each response counting once."""
        config = self.config
        if config.estimator == "pathwise":
            parts = [self._pathwise(batch, profile) * batch["h"].shape[0] for batch in batches]
            return torch.stack(parts).sum() / sum(batch["h"].shape[0] for batch in batches)
        names = [name for name in batches[0] if name not in ("step", "used")]
        joined = {name: torch.cat([batch[name] for batch in batches]) for name in names}
        logits = self.params.logits(joined["h"])
        shared = (config.tau, config.min_prob, config.entropy_coef)
        if config.estimator == "all_actions":
            return all_actions(logits, joined["meta"], *shared)
        ratios = None
        if config.capacity is not None:
            now = action_probs(logits.detach(), config.tau, config.min_prob).gather(1, joined["actions"][:, None])[:, 0]
            ratios = (now / joined["drawn_probs"]).clamp(max=MAX_RATIO)
        return reinforce(logits, joined["actions"], joined["meta"], *shared, ratios)

    def _pathwise(self, batch: dict[str, Tensor], profile: str | AdvantageProfile) -> Tensor:
        return pathwise(
            self.params.logits(batch["h"]),
            batch["meta"],
            batch["rewards"],
            int(batch["group_size"]),
            self.config.tau,
            self.config.min_prob,
            self.config.entropy_coef,
            profile=profile,
            kl_B=batch.get("kl_penalty"),
            beta=float("kl_penalty" in batch),
        )

    def metrics(self) -> dict[str, float]:
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            **{name: tensor.detach().clone() for name, tensor in self.head.named().items()},
            **self.statistics.state_dict("statistics."),
            **moments(self._optimizer, self.head.named()),
            **self.buffer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over a ``state_dict``.

        Raises:
            ValueError: a tensor that is missing or has another shape; nothing has been changed then.
        """
        check_state(state, self.head.named(), self.statistics.mean.numel())
        for name, parameter in self.head.named().items():
            parameter.data.copy_(state[name])
        load_moments(self._optimizer, self.head.named(), state)
        self.statistics.load_state_dict(state, "statistics.")
        self.buffer.load_state_dict(state)


def self_flattery(outcome: Outcome) -> float:
    """Mean of w . r', r' normalised within its group: 0 for weights that do not depend on the response.

    Positive: a response gets weight where it already looks good. Healthy within +-0.05.
    """
    context = outcome.context
    normalized_BK = group_advantages(context.rewards_BK, None, context.group_size).normalized_rewards
    return (outcome.weights.weights_BK * normalized_BK).sum(-1).mean().item()
