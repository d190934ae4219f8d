"""The Conductor: a small network that reads a response's hidden state and sets the weight of each reward."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from maestro_fast.ops.conductor_params import ConductorParams
from maestro_fast.ops.conductor_weights import conductor_weights
from maestro_fast.ops.group_advantages import group_advantages
from maestro_fast.weighting.conductor.config import ConductorConfig
from maestro_fast.weighting.conductor.objective import WEAKNESS, reinforce
from maestro_fast.weighting.conductor.statistics import RunningStatistics
from maestro_fast.weighting.policy import Outcome, WeightContext, Weights

logger = logging.getLogger(__name__)


class Conductor:
    """A linear head on the terminal hidden state, trained with REINFORCE every ``period`` batches.

    It runs on the CPU: a head of d x K costs microseconds there, and every process holds the same bits.
    """

    name = "conductor"
    needs_context = True

    def __init__(self, config: ConductorConfig, reward_names: tuple[str, ...], context_size: int) -> None:
        self.config = config
        self.reward_names = reward_names
        self.weight = torch.zeros(len(reward_names), context_size, requires_grad=True)
        self.bias = torch.zeros(len(reward_names), requires_grad=True)
        self.statistics = RunningStatistics(context_size)
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [self.weight], "weight_decay": config.weight_decay},
                {"params": [self.bias], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
        )
        self._buffer: list[tuple[Tensor, Tensor, Tensor]] = []  # (h, actions, advantages) of each batch
        self._metrics: dict[str, float] = {}
        self._warned = False

    @property
    def params(self) -> ConductorParams:
        mean, rstd = self.statistics.standardisation()
        return ConductorParams(mean, rstd, self.weight, self.bias)

    def weights(self, context: WeightContext) -> Weights:
        h = self._context(context)
        sample = conductor_weights(
            h,
            self.params,
            tau=self.config.tau,
            min_prob=self.config.min_prob,
            alpha=self.config.alpha,
            mode=self.config.mode,
            seed=self.config.seed,
            step=context.step,
        )
        self._metrics = {"conductor/entropy": sample.entropy.mean().item()}
        device = context.rewards_BK.device
        return Weights(
            sample.weights.detach().to(device),
            self.expected(sample.probs).to(device),
            sample.actions.to(device),
        )

    def expected(self, probs_BK: Tensor) -> Tensor:
        """Expected weights [B, K] under probabilities [B, K]."""
        probs_BK = probs_BK.detach()
        if self.config.mode == "soft":
            return probs_BK
        return (1.0 - self.config.alpha) / len(self.reward_names) + self.config.alpha * probs_BK

    def _context(self, context: WeightContext) -> Tensor:
        if context.context_Bd is None:
            raise ValueError("context_Bd: missing, the Conductor reads the hidden state of each response")
        expected = (context.rewards_BK.shape[0], self.weight.shape[1])
        if context.context_Bd.shape != expected:
            raise ValueError(f"context_Bd: shape {tuple(context.context_Bd.shape)}, expected {expected}")
        h = context.context_Bd.detach().float().cpu()
        if self.config.context == "response":
            return h
        generator = torch.Generator().manual_seed((self.config.seed + context.step) % 2**63)
        order = torch.randperm(h.shape[0], generator=generator)
        shuffled = torch.empty_like(h)
        shuffled[order] = h[order.roll(1)]  # one random cycle: a plain permutation may leave a response its own state
        return shuffled

    def observe(self, outcome: Outcome) -> None:
        advantages = outcome.advantages
        self._metrics["conductor/self_flattery"] = self_flattery(outcome)
        if self.config.learning_rate == 0:
            return
        assert outcome.weights.actions_B is not None
        live = ~advantages.degenerate.cpu()  # a group without spread says nothing about any action
        self._buffer.append(
            (
                self._context(outcome.context)[live],
                outcome.weights.actions_B.cpu()[live],
                advantages.advantages.float().cpu()[live],
            )
        )
        if len(self._buffer) >= self.config.period:  # more, if a state was loaded that a longer period had filled
            self._update()

    def _update(self) -> None:
        h, actions, advantages = (torch.cat(parts) for parts in zip(*self._buffer, strict=True))
        self._buffer.clear()
        if h.shape[0] == 0:
            return
        if not self._warned:
            logger.warning(WEAKNESS)
            self._warned = True
        self.statistics.update(h)
        config = self.config
        objective = reinforce(
            self.params.logits(h), actions, advantages, config.tau, config.min_prob, config.entropy_coef
        )
        self._optimizer.zero_grad()
        (-objective).backward()
        assert self.weight.grad is not None and self.bias.grad is not None
        norm = torch.linalg.vector_norm(torch.cat([self.weight.grad.flatten(), self.bias.grad]))
        self._optimizer.step()
        self._metrics |= {"conductor/objective": objective.item(), "conductor/grad_norm": norm.item()}

    def metrics(self) -> dict[str, float]:
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Tensor]:
        state = {
            "weight": self.weight.detach().clone(),
            "bias": self.bias.detach().clone(),
            "statistics.count": self.statistics.count.clone(),
            "statistics.mean": self.statistics.mean.clone(),
            "statistics.m2": self.statistics.m2.clone(),
        }
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            for key, value in self._optimizer.state.get(parameter, {}).items():
                state[f"optimizer.{name}.{key}"] = value.detach().clone()
        for i, batch in enumerate(self._buffer):
            for key, value in zip(("h", "actions", "advantages"), batch, strict=True):
                state[f"buffer.{i}.{key}"] = value.clone()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over a ``state_dict``.

        Raises:
            ValueError: a tensor that is missing or has another shape; nothing has been changed then.
        """
        self._check(state)
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            parameter.data.copy_(state[name])
            prefix = f"optimizer.{name}."
            moments = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
            self._optimizer.state.pop(parameter, None)
            if moments:
                self._optimizer.state[parameter] = {key: value.clone() for key, value in moments.items()}
        for name in ("count", "mean", "m2"):
            setattr(self.statistics, name, state[f"statistics.{name}"].clone())
        batches = len({key.split(".")[1] for key in state if key.startswith("buffer.")})
        self._buffer = [
            (state[f"buffer.{i}.h"], state[f"buffer.{i}.actions"], state[f"buffer.{i}.advantages"])
            for i in range(batches)
        ]

    def _check(self, state: dict[str, Tensor]) -> None:
        actions, size = self.weight.shape
        expected: dict[str, tuple[int, ...]] = {
            "weight": (actions, size),
            "bias": (actions,),
            "statistics.count": (),
            "statistics.mean": (size,),
            "statistics.m2": (size,),
        }
        for name in (name for name in state if name.startswith(("optimizer.weight.exp", "optimizer.bias.exp"))):
            expected[name] = expected[name.split(".")[1]]
        for name in (name for name in state if name.startswith("buffer.")):
            batch = state[name].shape[:1]
            expected[name] = (*batch, size) if name.endswith(".h") else (*batch,)
        for name, shape in expected.items():
            if name not in state or state[name].shape != shape:
                came = f"shape {tuple(state[name].shape)}" if name in state else "missing"
                raise ValueError(f"state.{name}: {came}, expected shape {shape}")


def self_flattery(outcome: Outcome) -> float:
    """Mean of w . r', r' normalised within its group: 0 for weights that do not depend on the response.

    Positive: a response gets weight where it already looks good. Healthy within +-0.05.
    """
    context = outcome.context
    normalized_BK = group_advantages(context.rewards_BK, None, context.group_size).normalized_rewards
    return (outcome.weights.weights_BK * normalized_BK).sum(-1).mean().item()
