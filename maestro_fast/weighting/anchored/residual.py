"""A small regression from a prompt's context and a response's rewards to its utility.

It is learnt by least squares from every labelled group that is kept:

    f(x, r') = v . tanh(W_x x + W_r r' + c) + b
    L        = mean over labelled groups of the mean over responses of (f - z(U))^2  +  l2 * (sum of all squares)

x is the prompt's standardised context, r' are the response's rewards standardised in the group, and z(U) is its utility
standardised in the group. A reward that abstained counts as 0, the mean of r'. A response from which every reward
abstains has no part in the mean.

``anchored`` adds f to its weighted rewards as a residual: weights have few degrees of freedom and learn from a handful
of labels, f has many and corrects them where there are more. ``reward_model`` scores responses by f alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from maestro_fast.weighting.anchored.adam import NamedAdam
from maestro_fast.weighting.anchored.replay import Replay


@dataclass(frozen=True)
class RegressionParams:
    """The network: W_x [hidden, d], W_r [hidden, K], c [hidden], v [hidden] and b [], in float32 (or float64)."""

    context_weight: Tensor
    reward_weight: Tensor
    hidden_bias: Tensor
    weight: Tensor
    bias: Tensor

    @staticmethod
    def start(size: int, rewards: int, hidden: int, seed: int) -> RegressionParams:
        """The tensors before learning: uniform within +-1 / sqrt(number of inputs of their layer)."""
        generator = torch.Generator().manual_seed(seed % 2**63)

        def uniform(*shape: int, inputs: int) -> Tensor:
            values: Tensor = (torch.rand(shape, generator=generator) * 2 - 1) * float(inputs) ** -0.5
            return values.requires_grad_()

        return RegressionParams(
            uniform(hidden, size, inputs=size + rewards),
            uniform(hidden, rewards, inputs=size + rewards),
            uniform(hidden, inputs=size + rewards),
            uniform(hidden, inputs=hidden),
            uniform(inputs=hidden),
        )

    def named(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return dict(vars(self))

    def units(self, x_Pd: Tensor, index_N: Tensor, rewards_NGK: Tensor) -> Tensor:
        """The tanh units [N, G, hidden] of N groups whose contexts are the rows ``index_N`` of ``x_Pd``.

        A context's product with W_x serves all groups that share the context, and all responses of these.
        """
        from_context_N1H = (x_Pd @ self.context_weight.T + self.hidden_bias)[index_N][:, None]
        return torch.tanh(from_context_N1H + rewards_NGK @ self.reward_weight.T)


def shares(rewards_NGK: Tensor) -> Tensor:
    """How much each response counts, [N, G]: 1 / (N * its group's responses with a reward), and 0 without a reward."""
    present_NG = (~rewards_NGK.isnan().all(-1)).to(rewards_NGK.dtype)
    return present_NG / (present_NG.sum(1, keepdim=True).clamp(min=1) * len(present_NG))


def error_and_gradient(
    params: RegressionParams,
    x_Pd: Tensor,
    index_N: Tensor,
    rewards_NGK: Tensor,
    utilities_NG: Tensor,
    share_NG: Tensor,
    l2: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean squared error, a scalar, and the gradient of L by the name of the parameter.

    The gradient is written out, which takes about half the time of autograd on networks this small.
    ``rewards_NGK`` holds no NaN, and ``share_NG`` is what ``shares`` returned.
    """
    units_NGH = params.units(x_Pd, index_N, rewards_NGK)
    error_NG = units_NGH @ params.weight + params.bias - utilities_NG
    by_f_NG = 2.0 * share_NG * error_NG
    before_tanh_NGH = by_f_NG[..., None] * params.weight * (1.0 - units_NGH.square())
    by_context_PH = x_Pd.new_zeros(len(x_Pd), len(params.weight))
    by_context_PH.index_add_(0, index_N, before_tanh_NGH.sum(1))
    gradient = {
        "context_weight": by_context_PH.T @ x_Pd,
        "reward_weight": before_tanh_NGH.flatten(0, 1).T @ rewards_NGK.flatten(0, 1),
        "hidden_bias": by_context_PH.sum(0),
        "weight": units_NGH.flatten(0, 1).T @ by_f_NG.flatten(),
        "bias": by_f_NG.sum(),
    }
    for name, tensor in params.named().items():
        gradient[name] += 2.0 * l2 * tensor
    return (share_NG * error_NG.square()).sum(), gradient


class Regression:
    """f and its training. It runs on the CPU, so every process computes the same bits.

    Args:
        size: d, the width of contexts; 0 for none.
        rewards: K, the number of rewards.
        hidden: the number of tanh units.
        learning_rate: the learning rate of Adam.
        l2: the factor of the penalty.
        seed: the seed of the first values.
    """

    def __init__(
        self, size: int, rewards: int, *, hidden: int = 32, learning_rate: float = 0.03, l2: float = 0.01, seed: int = 0
    ) -> None:
        self.l2 = l2
        self.params = RegressionParams.start(size, rewards, hidden, seed)
        self._adam = NamedAdam(self.params.named(), learning_rate)

    @property
    def learnt(self) -> bool:
        """Whether it has learnt from labels yet. Before that, f is arbitrary."""
        return self._adam.stepped

    def predict(self, x_Nd: Tensor, rewards_NGK: Tensor) -> Tensor:
        """f [N, G]; NaN for responses from which every reward abstains.

        Args:
            x_Nd: [N, d], standardised contexts.
            rewards_NGK: [N, G, K], standardised within their group, NaN where a reward abstained.
        """
        with torch.no_grad():
            units_NGH = self.params.units(x_Nd, torch.arange(len(x_Nd)), rewards_NGK.nan_to_num(0.0))
            found_NG = units_NGH @ self.params.weight + self.params.bias
        return torch.where(rewards_NGK.isnan().all(-1), float("nan"), found_NG)

    def learn(self, x_Pd: Tensor, replay: Replay, steps: int) -> float:
        """Takes ``steps`` Adam steps on L over the whole replay, whose standardised contexts are ``x_Pd``.

        Returns:
            The mean squared error before the last step. It is about 1 where f knows nothing.
        """
        rewards_NGK, share_NG = replay.rewards.nan_to_num(0.0), shares(replay.rewards)
        with torch.no_grad():
            for _ in range(steps):
                error, gradient = error_and_gradient(
                    self.params, x_Pd, replay.index, rewards_NGK, replay.utilities, share_NG, self.l2
                )
                self._adam.descend(gradient)
        return error.item()

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        """The parameters and Adam's moments."""
        return self._adam.state_dict(prefix)

    def saved_shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """The shapes that ``load_state_dict`` expects, by name."""
        return self._adam.saved_shapes(prefix)

    def load_state_dict(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Takes over a ``state_dict`` whose shapes were checked."""
        self._adam.load_state_dict(state, prefix)
