"""What the weights of a batch do, whatever the policy: figures with the ranges they should stay in.

r' are the rewards as the advantages used them, w the weights, s = w . r', A the advantages; means over responses.

    diagnostics/self_flattery      mean of w . r', r' standardised in the group; 0 if w does not look at the response
    diagnostics/argmax_agreement   how often the heaviest reward is the response's own best one; 1 / K by chance
    diagnostics/entropy            mean entropy of the expected weights, over ln K
    diagnostics/between_prompts    share of the variance of the expected weights that lies between prompts
    diagnostics/pareto_inversions  of the pairs in a group of which one is better in every reward, scored otherwise
    advantage_share/<name>         sum of w_k r'_k A over that of s A: what a reward contributes; adds up to 1
    rewards_correlation/mean, min  of the rewards, pair by pair, within groups

Figures that are not defined for a batch are left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maestro_fast.ops.group_advantages import group_advantages
from maestro_fast.weighting.policy import Outcome

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Range:
    """Where a figure is healthy, and what to do where it is not."""

    low: float
    high: float
    remedy: str


def healthy_ranges(reward_names: tuple[str, ...]) -> dict[str, Range]:
    """By the name of the figure, for K rewards. They are rules of thumb; see the module for what each figure is."""
    K = len(reward_names)
    ranges = {
        "diagnostics/self_flattery": Range(
            -0.05,
            0.05,
            "the weights favour what each response already does well; use a context of the prompt (context: "
            "prompt_mean), the policy 'anchored', or 'equal'",
        ),
        "diagnostics/argmax_agreement": Range(
            0.0,
            1 / K + 0.15,
            "as for self_flattery: the weights follow the response; use a context of the prompt",
        ),
        "diagnostics/entropy": Range(
            0.25, 1.0, "one reward has nearly all the weight; raise entropy_coef, tau or min_prob, or lower alpha"
        ),
        "diagnostics/pareto_inversions": Range(
            0.0,
            0.05,
            "responses that are better in every reward score lower; lower alpha, or use mode 'soft' or one weighting "
            "per prompt",
        ),
        "frac_reward_zero_std": Range(
            0.0, 0.6, "most groups have no spread, so nothing is learnt from them; use harder prompts or larger groups"
        ),
        "rewards_correlation/min": Range(
            -0.9,
            1.0,
            "two rewards are opposites: with equal weights they cancel each other; weigh them by prompt (policy "
            "'anchored', or where in the config), or leave one out",
        ),
        "conductor/gradient_snr": Range(
            0.3, math.inf, "the meta-gradient is mostly noise; use estimator 'all_actions', or a longer period"
        ),
    }
    share = Range(
        -0.2,
        0.85,
        "above: this reward makes nearly all of the advantage, lower its weight or check its scale; below: it is "
        "outvoted, raise its weight or leave it out",
    )
    return ranges | ({f"advantage_share/{name}": share for name in reward_names} if K > 1 else {})


def diagnose(outcome: Outcome) -> dict[str, float]:
    """The figures of a batch; formed on its device, read in one go."""
    context, K = outcome.context, outcome.context.rewards_BK.shape[1]
    used_B = torch.ones_like(context.rewards_BK[:, 0], dtype=torch.bool)
    if outcome.weights.direct_B is not None:
        used_B = ~outcome.weights.direct_B
    standard_BK = group_advantages(context.rewards_BK, None, context.group_size).normalized_rewards
    w_BK, expected_BK = outcome.weights.weights_BK, outcome.weights.expected_BK
    figures = {"diagnostics/self_flattery": (w_BK * standard_BK).sum(-1)[used_B].mean()}
    if K > 1:
        figures |= _agreement(w_BK, standard_BK) | _spread(expected_BK, context.group_size)
        figures |= _correlations(standard_BK)
    figures |= _inversions(context.rewards_BK, w_BK, outcome)
    figures |= _shares(outcome, used_B)
    values = torch.stack([value.double() for value in figures.values()]).tolist()
    return {name: value for name, value in zip(figures, values, strict=True) if math.isfinite(value)}


def _agreement(w_BK: Tensor, standard_BK: Tensor) -> dict[str, Tensor]:
    """Over the responses with one heaviest weight and one best reward."""
    clear_B = _one_top(w_BK) & _one_top(standard_BK)
    same_B = (w_BK.argmax(1) == standard_BK.argmax(1)) & clear_B
    return {"diagnostics/argmax_agreement": same_B.sum() / clear_B.sum()}


def _one_top(x_BK: Tensor) -> Tensor:
    top = x_BK.topk(2, 1).values
    return top[:, 0] - top[:, 1] > 1e-3  # the eps beside a std tells ties apart by 1e-4


def _spread(expected_BK: Tensor, group_size: int) -> dict[str, Tensor]:
    total_B1 = expected_BK.abs().sum(1, keepdim=True)
    q_BK = expected_BK.abs() / torch.where(total_B1 > 0, total_B1, 1.0)
    entropy = -(q_BK * q_BK.clamp(min=1e-30).log()).sum(1).mean() / math.log(expected_BK.shape[1])
    entropy = entropy.clamp(max=1.0)  # rounding puts that of equal weights beyond
    x_NGK = expected_BK.view(-1, group_size, expected_BK.shape[1])
    mean_N1K = x_NGK.mean(1, keepdim=True)
    within = (x_NGK - mean_N1K).square().mean((0, 1)).sum()
    between = (mean_N1K - mean_N1K.mean(0, keepdim=True)).square().mean((0, 1)).sum()
    share = torch.where(within + between > 1e-12, between / (within + between), float("nan"))
    return {"diagnostics/entropy": entropy, "diagnostics/between_prompts": share}


def _correlations(standard_BK: Tensor) -> dict[str, Tensor]:
    """Of values that are centred in their groups already; rewards without any spread have none."""
    norm_K = standard_BK.square().sum(0).sqrt()
    correlation_KK = standard_BK.T @ standard_BK / (norm_K[:, None] * norm_K)
    K = len(norm_K)
    upper = torch.ones(K, K, dtype=torch.bool, device=norm_K.device).triu(1)
    pairs = correlation_KK[upper]
    known = pairs.isfinite()
    low = torch.where(known, pairs, float("inf")).amin()
    return {"rewards_correlation/mean": pairs.nanmean(), "rewards_correlation/min": low}


def _inversions(rewards_BK: Tensor, w_BK: Tensor, outcome: Outcome) -> dict[str, Tensor]:
    """Pairs are formed in the rewards' own values: normalising keeps their order."""
    shape = (-1, outcome.context.group_size)
    K = rewards_BK.shape[1]
    r_NGK = rewards_BK.view(*shape, K)
    s_NG = (w_BK * outcome.advantages.normalized_rewards[:, :K]).sum(-1).view(shape)
    better_NGG = (r_NGK[:, :, None] > r_NGK[:, None]).all(-1)  # False where one abstained
    inverted_NGG = better_NGG & (s_NG[:, :, None] < s_NG[:, None])
    return {"diagnostics/pareto_inversions": inverted_NGG.sum() / better_NGG.sum()}


def _shares(outcome: Outcome, used_B: Tensor) -> dict[str, Tensor]:
    names = outcome.context.reward_names
    parts_BK = outcome.weights.weights_BK * outcome.advantages.normalized_rewards[:, : len(names)]
    parts_K = (parts_BK * outcome.advantages.advantages[:, None])[used_B].sum(0)
    return {f"advantage_share/{name}": parts_K[k] / parts_K.sum() for k, name in enumerate(names)}


@dataclass
class Watch:
    """Warns, once for each figure, when it has left its range for ``patience`` batches in a row."""

    ranges: Mapping[str, Range]
    patience: int = 5
    _outside: dict[str, int] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)

    def see(self, metrics: Mapping[str, float]) -> None:
        for name, healthy in self.ranges.items():
            if name not in metrics:
                continue
            inside = healthy.low <= metrics[name] <= healthy.high
            self._outside[name] = 0 if inside else self._outside.get(name, 0) + 1
            if self._outside[name] >= self.patience and name not in self.warned:
                self.warned.add(name)
                logger.warning(
                    "%s is %.3g, for %d batches outside its healthy range of %g to %g: %s",
                    name,
                    metrics[name],
                    self.patience,
                    healthy.low,
                    healthy.high,
                    healthy.remedy,
                )
