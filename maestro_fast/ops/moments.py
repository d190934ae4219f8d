"""Means and standard deviations over groups, the batch or its tokens: what the advantage ops are made of.

Everything runs over the padded [N, G_max, ...] layout of ``Groups``; dims behind the second are independent columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from maestro_fast.ops.groups import Groups
from maestro_fast.specs import AdvantageProfile, Center, ScoreCenter, ScoreScale, Singleton

Scope = ScoreCenter | ScoreScale


@dataclass(frozen=True)
class Members:
    """Who is compared with whom.

    Attributes:
        live_NG: bool [N, G_max, ...], which elements count.
        singleton: what stands for the moments of a group with one live element, see ``AdvantageProfile``.
        lengths_NG: [N, G_max, ...], how often an element counts in the scope ``tokens``, and in no other.
    """

    live_NG: Tensor
    singleton: Singleton = "zero"
    lengths_NG: Tensor | None = None

    def centred(self, x_NG: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
        """x minus its scope's mean, and that mean, both [N, G_max, ...]."""
        if scope == "none":
            return x_NG, torch.zeros_like(x_NG)
        shifted, top = self._shifted(x_NG, scope)
        total, count = self._sum(shifted, scope), self._count(scope)
        if scope == "leave_one_out":
            mean = (total - shifted) / (count - self.live_NG.long()).clamp(min=1)  # the others that are live
        else:
            mean = (total / count.clamp(min=1)).expand_as(x_NG)
        if self.singleton == "raw" and scope in ("group", "leave_one_out"):
            raw_NG = self.alone_N1.expand_as(x_NG)
            return torch.where(raw_NG, x_NG, shifted - mean), torch.where(raw_NG, 0.0, mean + top)
        return shifted - mean, mean + top

    def deviation(self, x_NG: Tensor, scope: Scope, ddof: int) -> Tensor:
        """Standard deviation over the scope, [N, G_max, ...]; 0 for fewer than two live elements."""
        shifted, _ = self._shifted(x_NG, scope)
        count = self._count(scope)
        mean = self._sum(shifted, scope) / count.clamp(min=1)
        squares = self._sum(torch.where(self.live_NG, (shifted - mean) ** 2, 0.0), scope)
        variance = squares / (count - ddof).clamp(min=1)
        positive = variance > 0  # sqrt has no finite derivative at 0
        std = torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)
        if self.singleton == "raw" and scope == "group":
            std = torch.where(self.alone_N1, 1.0, std)
        return std.expand_as(x_NG)

    def flat(self, x_NG: Tensor) -> Tensor:
        """bool [N, 1, ...]: groups without spread; one live element or none have none, NaN is one."""
        x_NG = x_NG.detach()
        top = torch.where(self.live_NG, x_NG, float("-inf")).amax(1, keepdim=True)
        low = torch.where(self.live_NG, x_NG, float("inf")).amin(1, keepdim=True)
        return top <= low

    @property
    def alone_N1(self) -> Tensor:
        """bool [N, 1, ...]: groups with one live element."""
        return self.live_NG.sum(1, keepdim=True) == 1

    def _shifted(self, x_NG: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
        """x minus the scope's live maximum (0 where not live), and that maximum."""
        top = torch.where(self.live_NG, x_NG.detach(), float("-inf")).amax(dims(scope), keepdim=True)
        top = torch.where(top == float("-inf"), 0.0, top)
        return torch.where(self.live_NG, x_NG - top, 0.0), top

    def _sum(self, x_NG: Tensor, scope: Scope) -> Tensor:
        """The scope's sum of x, which is 0 where not live."""
        if scope == "tokens":
            assert self.lengths_NG is not None
            x_NG = x_NG * self.lengths_NG
        return x_NG.sum(dims(scope), keepdim=True)

    def _count(self, scope: Scope) -> Tensor:
        counted = self.live_NG
        if scope == "tokens":
            assert self.lengths_NG is not None
            counted = torch.where(self.live_NG, self.lengths_NG, 0.0)
        return counted.sum(dims(scope), keepdim=True)


class Standardised(NamedTuple):
    """Scores compared with those of their scopes, all [N, G_max, ...]; see ``GroupAdvantages``."""

    advantages_NG: Tensor
    mean_NG: Tensor
    std_NG: Tensor
    degenerate_NG: Tensor


def standardise_scores(raw_NG: Tensor, scores_NG: Tensor, members: Members, profile: AdvantageProfile) -> Standardised:
    """Advantages from scores; ``raw_NG`` are the scores before the KL, of which spread is judged."""
    centred_NG, mean_NG = members.centred(scores_NG, profile.score_center)
    spread: Scope = "group" if profile.score_scale == "none" else profile.score_scale
    std_NG = members.deviation(scores_NG, spread, profile.ddof)
    if profile.score_scale != "none":
        inside = profile.score_eps_in == "variance"
        divisor_NG = (std_NG**2 + profile.score_eps).sqrt() if inside else std_NG + profile.score_eps
        centred_NG = over(centred_NG, divisor_NG)
    flat_N1 = members.flat(raw_NG)
    zero_N1 = flat_N1 & ~members.alone_N1 if profile.singleton == "raw" else flat_N1
    advantages_NG = torch.where(zero_N1 | ~members.live_NG, 0.0, centred_NG)
    return Standardised(advantages_NG, mean_NG, std_NG, flat_N1.expand_as(members.live_NG))


def normalize_rewards(rewards_BK: Tensor, live_BK: Tensor, groups: Groups, profile: AdvantageProfile) -> Tensor:
    """[B, K], each reward over the profile's scopes; 0 where not live, and without another live one in its scope."""
    if profile.reward_center == "none" and profile.reward_scale == "none":
        return rewards_BK
    x_NGK, live_NGK = groups.gather(rewards_BK, 0.0), groups.gather(live_BK, False)
    members = Members(live_NGK, profile.singleton)
    out_NGK, _ = members.centred(x_NGK, profile.reward_center)
    scope: Center = profile.reward_center
    if profile.reward_scale != "none":
        scope = profile.reward_scale
        out_NGK = over(out_NGK, members.deviation(x_NGK, scope, profile.ddof) + profile.reward_eps)
    if profile.singleton == "zero" or scope == "batch":
        alone = live_NGK.sum(dims(scope), keepdim=True) < 2  # one value has no place among others
        out_NGK = torch.where(alone, 0.0, out_NGK)
    return torch.where(live_BK, groups.scatter(out_NGK), 0.0)


def live_weights(weights: Tensor, live: Tensor, profile: AdvantageProfile) -> tuple[Tensor, Tensor]:
    """Weights [..., K] with 0 for abstained rewards, and which responses [...] count at all."""
    masked = torch.where(live, weights, 0.0)
    scorable = live.any(-1)
    if profile.missing == "zero":
        return masked, scorable
    whole, rest = sum_over_rewards(weights), sum_over_rewards(masked)
    partial = ~live.all(-1)
    scorable = scorable & ~(partial & (rest == 0))  # all weight on abstained rewards: nothing to scale up
    factor = torch.where(partial & scorable, whole / torch.where(rest == 0, 1.0, rest), 1.0)
    return masked * factor[..., None], scorable


def sum_over_rewards(x: Tensor) -> Tensor:
    """[...], added in the order of K. The order of torch.sum depends on strides and row, so equal rows could differ."""
    total = x[..., 0]
    for k in range(1, x.shape[-1]):
        total = total + x[..., k]
    return total


def over(x: Tensor, divisor: Tensor) -> Tensor:
    """x / divisor, 0 where the divisor is 0: without an epsilon, what has no spread is 0 as with one."""
    return torch.where(divisor == 0, 0.0, x / torch.where(divisor == 0, 1.0, divisor))


def dims(scope: Scope) -> tuple[int, ...]:
    return (0, 1) if scope in ("batch", "tokens") else (1,)
