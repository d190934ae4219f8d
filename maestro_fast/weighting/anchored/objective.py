"""What the anchored Conductor climbs, and the network that climbs it.

    w(x) = softmax(b + V tanh(H x + c) / sqrt(hidden))                    x: standardised context of the prompt
    J    = mean over labelled groups of  rho(w(x) . r', U)  +  entropy_coef * H(w)  -  l2 * sum(V^2) / K

r' are the rewards standardised in their group and rho the correlation over the group's responses, as the mean of the
product of the two standardised values. b and V start at 0, so weights start equal. The advantage of GRPO is the
standardised score: rho is how well advantages under w order the responses of a group as the utility does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCORE_EPS = 1e-2  # in standard deviations of a score: groups whose weighted score hardly differs say little
CLIP = 4.0


@dataclass(frozen=True)
class AnchoredParams:
    """float32 (float64 for a reference): H [hidden, d], c [hidden], V [K, hidden], b [K]."""

    hidden_weight: Tensor
    hidden_bias: Tensor
    weight: Tensor
    bias: Tensor

    @staticmethod
    def start(size: int, actions: int, hidden: int, seed: int) -> AnchoredParams:
        """H and c uniform within +-1 / sqrt(d), V and b zero."""
        generator = torch.Generator().manual_seed(seed % 2**63)
        bound = size**-0.5
        uniform = (torch.rand(hidden, size + 1, generator=generator) * 2 - 1) * bound
        first, offset = uniform[:, :-1].clone(), uniform[:, -1].clone()
        parts = (first, offset, torch.zeros(actions, hidden), torch.zeros(actions))
        return AnchoredParams(*(part.requires_grad_() for part in parts))

    def named(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def weights(self, x_Nd: Tensor) -> Tensor:
        """[N, K] of standardised, clipped contexts."""
        hidden = torch.tanh(x_Nd @ self.hidden_weight.T + self.hidden_bias)
        logits_NK: Tensor = self.bias + hidden @ self.weight.T / float(self.weight.shape[1]) ** 0.5
        return logits_NK.softmax(-1)


def standardised(x_Nd: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """(x - mean) * rstd, clipped at +-4: a prompt unlike all before does not run away with its weights."""
    return ((x_Nd - mean) * rstd).clamp(-CLIP, CLIP)


def correlation(weights_NK: Tensor, rewards_NGK: Tensor, utilities_NG: Tensor) -> Tensor:
    """[N]: mean over the group of z(w . r') z(U); ``utilities_NG`` come standardised."""
    scores_NG = (weights_NK[:, None] * rewards_NGK).sum(-1)
    return (_z(scores_NG) * utilities_NG).mean(1)


def first_order(weights_NK: Tensor, rewards_NGK: Tensor, utilities_NG: Tensor) -> Tensor:
    """[N]: sum_k w_k times the mean of r'_k z(U), linear in w."""
    return (weights_NK * (rewards_NGK * utilities_NG[..., None]).mean(1)).sum(-1)


def entropy(weights_NK: Tensor) -> Tensor:
    """[N] in nats."""
    return -(weights_NK * weights_NK.clamp(min=1e-30).log()).sum(-1)


def _z(x_NG: Tensor) -> Tensor:
    centred = x_NG - x_NG.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / max(1, x_NG.shape[1] - 1)
    positive = variance > 0  # sqrt has no finite derivative at 0
    std = torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)
    return centred / (std + SCORE_EPS)
