"""The anchored Conductor: learns weights under which scores order the responses of a group as their utility does.

Utilities are known for some prompts (``WeightContext.utilities_B``, NaN elsewhere): a judge, a verifier, people. The
weights it learns there go to every prompt, by the prompt's own context. Each labelled group is kept for good (see
``replay``) and learnt from again after every batch; what is kept of it, context, standardised rewards and utilities,
does not depend on the policy that sampled it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_fast.ops.group_advantages import group_advantages
from maestro_fast.weighting.anchored.config import AnchoredConfig
from maestro_fast.weighting.anchored.objective import (
    AnchoredParams,
    correlation,
    entropy,
    first_order,
    standardised,
)
from maestro_fast.weighting.anchored.replay import Replay
from maestro_fast.weighting.conductor.conductor import self_flattery
from maestro_fast.weighting.conductor.experience import RunningStatistics, policy_contexts
from maestro_fast.weighting.conductor.network import load_moments, moments
from maestro_fast.weighting.policy import ContextKind, Outcome, WeightContext, Weights
from maestro_fast.weighting.utilities import labelled_groups, standardised_utilities

STANDARD_EPS = 4e-4  # of the contexts' variance: dimensions that hardly vary stay small


class Anchored:
    """Equal weights until the first labelled group. It runs on the CPU, with the same bits on every process."""

    name = "anchored"
    needs_context = True
    needs_columns: tuple[str, ...] = ()
    needs_group_scores = False
    should_stop = False

    def __init__(self, config: AnchoredConfig, reward_names: tuple[str, ...], context_size: int) -> None:
        self.config = config
        self.reward_names = reward_names
        self.context_kind: ContextKind = config.context
        self.params = AnchoredParams.start(context_size, len(reward_names), config.hidden, config.seed)
        self.statistics = RunningStatistics(context_size)
        self._optimizer = torch.optim.Adam(
            list(self.params.named().values()), lr=config.learning_rate, betas=(0.9, 0.99)
        )
        self.replay = Replay(context_size, len(reward_names))
        self._metrics: dict[str, float] = {}

    @property
    def labelled(self) -> int:
        """Labelled groups so far."""
        return len(self.replay)

    def weights(self, context: WeightContext) -> Weights:
        x_Nd = self._contexts(context)
        with torch.no_grad():
            weights_NK = self.weights_of(x_Nd)
        self._metrics = {
            "conductor/entropy": entropy(weights_NK).mean().item(),
            "conductor/labelled_groups": float(self.labelled),
        }
        weights_BK = weights_NK.repeat_interleave(context.group_size, 0).to(context.rewards_BK.device)
        direct_B = None
        if self.config.hybrid:
            direct_B = labelled_groups(context).repeat_interleave(context.group_size).to(weights_BK.device)
        return Weights(weights_BK, weights_BK, direct_B=direct_B)

    def weights_of(self, x_Nd: Tensor) -> Tensor:
        """[N, K] of contexts as they are read."""
        return self.params.weights(standardised(x_Nd, *self.statistics.standardisation(STANDARD_EPS)))

    def _contexts(self, context: WeightContext) -> Tensor:
        """float32 [N, d], one per group."""
        size = self.statistics.mean.numel()
        return policy_contexts(context, self.config.context, size, self.config.seed, torch.device("cpu"))[
            :: context.group_size
        ]

    def observe(self, outcome: Outcome) -> None:
        self._metrics["conductor/self_flattery"] = self_flattery(outcome)
        context = outcome.context
        x_Nd = self._contexts(context)
        self.statistics.update(x_Nd)
        self._remember(context, x_Nd)
        if self.labelled and self.config.learning_rate > 0:
            self._learn()

    def _remember(self, context: WeightContext, x_Nd: Tensor) -> None:
        labelled_N = labelled_groups(context)
        shape = (-1, context.group_size)
        rewards_BK = group_advantages(context.rewards_BK, None, context.group_size).normalized_rewards
        rewards_NGK = rewards_BK.float().cpu().view(*shape, rewards_BK.shape[1])
        utilities_NG = standardised_utilities(context).view(shape)
        self.replay.add(x_Nd[labelled_N], rewards_NGK[labelled_N], utilities_NG[labelled_N])

    def _learn(self) -> None:
        """``steps`` Adam steps on J over everything that is kept."""
        config, replay = self.config, self.replay
        x_Pd = standardised(replay.contexts, *self.statistics.standardisation(STANDARD_EPS))
        surrogate = correlation if config.surrogate == "correlation" else first_order
        for _ in range(config.steps):
            weights_NK = self.params.weights(x_Pd)[replay.index]
            value = surrogate(weights_NK, replay.rewards, replay.utilities).mean()
            penalty = config.l2 * self.params.weight.square().sum() / len(self.reward_names)
            objective = value + config.entropy_coef * entropy(weights_NK).mean() - penalty
            self._optimizer.zero_grad()
            (-objective).backward()
            self._optimizer.step()
        norms = [p.grad.norm() for p in self.params.named().values() if p.grad is not None]
        self._metrics |= {
            "conductor/objective": objective.item(),
            "conductor/correlation": value.item(),
            "conductor/grad_norm": torch.stack(norms).norm().item(),
        }

    def metrics(self) -> dict[str, float]:
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            **{name: tensor.detach().clone() for name, tensor in self.params.named().items()},
            **self.statistics.state_dict("statistics."),
            **moments(self._optimizer, self.params.named()),
            **self.replay.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over a ``state_dict``.

        Raises:
            ValueError: a tensor that is missing or has another shape; nothing has been changed then.
        """
        expected = {**self.params.named(), **self.statistics.state_dict("statistics.")}
        for name, tensor in expected.items():
            if name not in state or state[name].shape != tensor.shape:
                came = f"shape {tuple(state[name].shape)}" if name in state else "missing"
                raise ValueError(f"state.{name}: {came}, expected shape {tuple(tensor.shape)}")
        self.replay.check(state)
        for name, parameter in self.params.named().items():
            parameter.data.copy_(state[name])
        load_moments(self._optimizer, self.params.named(), state)
        self.statistics.load_state_dict(state, "statistics.")
        self.replay.load_state_dict(state)
