"""Exp3: a bandit without context. Each batch it draws one reward to emphasise, and it favours what made rewards rise.

    p_k  = (1 - gamma) softmax(s)_k + gamma / K        a ~ p, one draw for the whole batch
    w    = (1 - alpha) / K + alpha onehot(a)
    d    = mean over rewards of (mean_k(next batch) - mean_k(this batch)) / std_k(this batch)
    x    = 1 / (1 + exp(-sharpness d))  in (0, 1)       the gain of a, known once the next batch is there
    s_a <- s_a + gamma x / (K p_a)                      unless reward a abstained from the whole batch

Auer, Cesa-Bianchi, Freund and Schapire, The nonstochastic multiarmed bandit problem (SIAM J. Comput. 2002). The paper
leaves open what a gain is; x is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maestro_fast.ops.philox import uniform
from maestro_fast.weighting.policy import (
    Outcome,
    WeightContext,
    Weights,
    WithoutContext,
    check_shapes,
    live_mean_and_std,
)


@dataclass(frozen=True)
class Exp3Config:
    """A bandit without context draws one reward per batch to emphasise, and favours what made rewards rise.

    Attributes:
        gamma: The share of the draws that explores, in (0, 1]. It is the step size of the scores too.
        alpha: How far an emphasis moves the weights from equal towards one-hot, in (0, 1].
        sharpness: The factor of improvements before they are squashed into (0, 1). Improvements from batch to batch are
            small against the spread of a batch.
        seed: The seed of the draws.
    """

    gamma: float = 0.1
    alpha: float = 0.3
    sharpness: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("gamma", "alpha"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected 0 < {name} <= 1")
        if not self.sharpness > 0:
            raise ValueError(f"sharpness: {self.sharpness}, expected a positive number")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: {self.seed}, expected 0 <= seed < 2**64")

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Exp3:
        """The policy for these rewards."""
        del context_size
        return Exp3(self, reward_names)


class Exp3(WithoutContext):
    """Draws an arm, the reward to emphasise, for every batch. The batch after it shows the gain of that arm."""

    name = "exp3"

    def __init__(self, config: Exp3Config, reward_names: tuple[str, ...]) -> None:
        self.config, self.reward_names = config, reward_names
        K = len(reward_names)
        # Beside the scores s, the state describes the last batch: the mean and deviation of each reward, the arm drawn
        # (-1 before the first batch) and the probability of that arm.
        self._state = {
            "scores": torch.zeros(K, dtype=torch.float64),
            "mean": torch.full((K,), float("nan"), dtype=torch.float64),
            "std": torch.full((K,), float("nan"), dtype=torch.float64),
            "arm": torch.tensor(-1),
            "chance": torch.tensor(1.0, dtype=torch.float64),
        }

    def probs(self) -> Tensor:
        """p [K], float64."""
        gamma = self.config.gamma
        return (1 - gamma) * self._state["scores"].softmax(0) + gamma / len(self.reward_names)

    def arm(self, step: int) -> int:
        """The index of the reward that this step emphasises."""
        u = uniform(self.config.seed, step, 0, 1, torch.device("cpu")).double()
        return int((u >= self.probs().cumsum(0)[:-1]).sum())

    def weights(self, context: WeightContext) -> Weights:
        """The weights of the drawn arm, for every response, and their expectation over the draw."""
        arm = self.arm(context.step)
        probs_K, K, alpha = self.probs(), len(self.reward_names), self.config.alpha
        used_K, expected_K = (
            ((1 - alpha) / K + alpha * row_K).to(context.rewards_BK)
            for row_K in (torch.nn.functional.one_hot(torch.tensor(arm), K), probs_K)
        )
        like = context.rewards_BK
        actions_B = torch.full((like.shape[0],), arm, device=like.device)
        return Weights(used_K.expand_as(like), expected_K.expand_as(like), actions_B)

    def observe(self, outcome: Outcome) -> None:
        """Credits the arm of the batch before with the gain that this batch shows, and remembers this batch's arm."""
        state = self._state
        mean_K, std_K = live_mean_and_std(outcome.context.rewards_BK.double().cpu(), 0, correction=0)
        gain_K = (mean_K - state["mean"]) / state["std"]
        scores = state["scores"].clone()
        drawn = int(state["arm"])
        # An arm whose reward abstained throughout changed nothing, so it gets no credit.
        if drawn >= 0 and not state["mean"][drawn].isnan() and (comparable := gain_K.isfinite()).any():
            x = torch.sigmoid(self.config.sharpness * gain_K[comparable].mean())
            scores[drawn] += self.config.gamma * x / (len(scores) * state["chance"])
        assert outcome.weights.actions_B is not None
        arm = int(outcome.weights.actions_B[0])
        self._state = {
            "scores": scores,
            "mean": mean_K,
            "std": std_K,
            "arm": torch.tensor(arm),
            "chance": self.probs()[arm],  # of the scores that the arm was drawn with: the new ones are not stored yet
        }

    def metrics(self) -> dict[str, float]:
        """The probability of each reward."""
        return {f"exp3/prob/{name}": p for name, p in zip(self.reward_names, self.probs().tolist(), strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        """``scores``, ``mean`` and ``std`` [K], ``arm`` and ``chance``."""
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over a ``state_dict``. A ValueError names a tensor that is missing or has another shape."""
        check_shapes(state, {name: tuple(tensor.shape) for name, tensor in self._state.items()})
        self._state = {name: state[name].clone() for name in self._state}
