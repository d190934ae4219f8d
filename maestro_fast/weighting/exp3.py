"""Exp3: a bandit without context draws which reward to emphasise, batch by batch, and keeps what made rewards rise.

    p_k  = (1 - gamma) softmax(s)_k + gamma / K        a ~ p, one draw for the whole batch
    w    = (1 - alpha) / K + alpha onehot(a)
    d    = mean over rewards of (mean_k(next batch) - mean_k(this batch)) / std_k(this batch)
    x    = 1 / (1 + exp(-sharpness d))  in (0, 1)       the gain that the next batch shows
    s_a <- s_a + gamma x / (K p_a)

Auer, Cesa-Bianchi, Freund and Schapire, The nonstochastic multiarmed bandit problem (SIAM J. Comput. 2002); what counts
as the gain of an emphasis is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maestro_fast.ops.philox import uniform
from maestro_fast.weighting.policy import Outcome, WeightContext, Weights, WithoutContext


@dataclass(frozen=True)
class Exp3Config:
    """Options of ``exp3``.

    Attributes:
        gamma: share of the draws that explores, in (0, 1], and the step size.
        alpha: how far an emphasis moves the weights from equal to one-hot, in (0, 1].
        sharpness: of the squashing of improvements; they are small against the spread of a batch.
        seed: key of the draws.
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
        del context_size
        return Exp3(self, reward_names)


class Exp3(WithoutContext):
    """The gain of a batch's emphasis is known, and credited, with the batch after it."""

    name = "exp3"

    def __init__(self, config: Exp3Config, reward_names: tuple[str, ...]) -> None:
        self.config, self.reward_names = config, reward_names
        K = len(reward_names)
        # of the last batch: mean and std of each reward, the arm drawn (-1: none yet) and its probability
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
        u = uniform(self.config.seed, step, 0, 1, torch.device("cpu")).double()
        return int((u >= self.probs().cumsum(0)[:-1]).sum())

    def weights(self, context: WeightContext) -> Weights:
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
        state = self._state
        rewards_BK = outcome.context.rewards_BK.double().cpu()
        mean_K = rewards_BK.nanmean(0)
        squares_BK = (rewards_BK - mean_K).square()
        gain_K = (mean_K - state["mean"]) / state["std"]
        scores = state["scores"].clone()
        if int(state["arm"]) >= 0 and (comparable := gain_K.isfinite()).any():
            x = torch.sigmoid(self.config.sharpness * gain_K[comparable].mean())
            scores[int(state["arm"])] += self.config.gamma * x / (len(scores) * state["chance"])
        assert outcome.weights.actions_B is not None
        arm = int(outcome.weights.actions_B[0])
        chance = self.probs()[arm]
        self._state = {
            "scores": scores,
            "mean": mean_K,
            "std": squares_BK.nanmean(0).sqrt(),
            "arm": torch.tensor(arm),
            "chance": chance,
        }

    def metrics(self) -> dict[str, float]:
        return {f"exp3/prob/{name}": p for name, p in zip(self.reward_names, self.probs().tolist(), strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self._state.items():
            if name not in state or state[name].shape != tensor.shape:
                came = f"shape {tuple(state[name].shape)}" if name in state else "missing"
                raise ValueError(f"state.{name}: {came}, expected shape {tuple(tensor.shape)}")
        self._state = {name: state[name].clone() for name in self._state}
