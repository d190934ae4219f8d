"""What the weights of a batch do, whatever the policy: figures for the log, with the ranges they should stay in.

r' are the rewards as the advantages used them, w the weights, s = w . r' the scores, A the advantages. Means are over
responses.

    diagnostics/self_flattery      mean of w . r' with r' standardised in the group; 0 if w ignores the response
    diagnostics/argmax_agreement   how often the reward of greatest weight is the response's own best; 1 / K by chance
    diagnostics/entropy            mean entropy of the expected weights, divided by ln K
    diagnostics/between_prompts    share of the variance of the expected weights that lies between prompts
    diagnostics/pareto_inversions  share of inverted pairs, among the pairs of a group of which one is better in every
                                   reward; a pair is inverted if the better response has the lower score
    diagnostics/abstained_weight   mean share of a response's expected weight that lies on rewards that abstain from it
    diagnostics/abstained_excess   that share beyond what equal weights put there, in the prompt where it is greatest
    diagnostics/flat_groups        share of the groups without spread, among those that the policy has scored
    advantage_share/<name>         sum of w_k r'_k A divided by that of s A: what a reward contributes; they add up to 1
                                   less the share of a learnt reward beside the named ones
    rewards_correlation/mean, min  mean and least correlation of two rewards within groups

    conductor/residual_share       what a learnt reward beside the named ones contributes, see ``residual_share``

Responses that are scored by their utility count neither in self_flattery nor in advantage_share. A learnt reward beside
the named ones counts in advantage_share and flat_groups alone. The policy has not scored a group to which it gives
neither weights nor a learnt reward nor its utility: it is to teach nothing. A figure that is not defined for a batch is
left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maestro_fast.ops.group_advantages import group_advantages
from maestro_fast.weighting.policy import Outcome, WeightContext, entropy
from maestro_fast.weighting.scored_rewards import residual_share, scored

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Range:
    """The range in which a figure is healthy, and what a user can do if it is outside."""

    low: float
    high: float
    remedy: str


_ABSTAINED = (
    "on some prompts the weights favour a reward that abstains there. Its weight goes to the other rewards of the "
    "response (profile maestro) or is lost (profiles of TRL and verl); compare families/<family>/weights/<reward> with "
    "rewards/<reward>/abstained, then mend the reward or its `where`, or give it less weight there"
)


def healthy_ranges(reward_names: tuple[str, ...]) -> dict[str, Range]:
    """The ranges by the name of the figure. They are rules of thumb; the module's docstring defines the figures."""
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
        "diagnostics/abstained_excess": Range(0.0, 0.15, _ABSTAINED),
        "conductor/abstained_weight": Range(0.0, 1 / K + 0.15, _ABSTAINED),
        "diagnostics/flat_groups": Range(
            0.0, 0.6, "most groups have no spread, so nothing is learnt from them; use harder prompts or larger groups"
        ),
        "rewards_correlation/min": Range(
            -0.9,
            1.0,
            "two rewards are opposites: with equal weights they cancel each other; weigh them by prompt (the policy "
            "'anchored', or the setting `where` of a reward), or leave one out",
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
    """The figures of a batch. They are computed on its device and read with one transfer."""
    context, K = outcome.context, outcome.context.rewards_BK.shape[1]
    used_B = torch.ones_like(context.rewards_BK[:, 0], dtype=torch.bool)
    if outcome.weights.direct_B is not None:
        used_B = ~outcome.weights.direct_B
    standard_BK = _standardised_rewards(context)
    w_BK, expected_BK = outcome.weights.weights_BK, outcome.weights.expected_BK
    figures = {"diagnostics/self_flattery": _flattery(w_BK, standard_BK)[used_B].mean()}
    if K > 1:
        figures |= _agreement(w_BK, standard_BK) | _spread(expected_BK, context.group_size)
        figures |= _correlations(standard_BK) | abstained_weight(
            context.rewards_BK.isnan(), expected_BK, context.group_size
        )
    figures |= _inversions(context.rewards_BK, w_BK, outcome)
    figures |= _shares(outcome, used_B) | {"diagnostics/flat_groups": _flat(outcome)}
    if (share := residual_share(outcome)) is not None:
        figures["conductor/residual_share"] = share
    values = torch.stack([value.double() for value in figures.values()]).tolist()
    return {name: value for name, value in zip(figures, values, strict=True) if math.isfinite(value)}


def self_flattery(outcome: Outcome) -> float:
    """The mean of w . r' over all responses, where r' are the rewards standardised within their group.

    It is 0 for weights that do not depend on the response. It is positive if a response gets weight where it looks good
    already; -0.05 to 0.05 is healthy.
    """
    return _flattery(outcome.weights.weights_BK, _standardised_rewards(outcome.context)).mean().item()


def _standardised_rewards(context: WeightContext) -> Tensor:
    """[B, K]: (r - mean) / std within each group."""
    return group_advantages(context.rewards_BK, None, context.group_size).normalized_rewards


def _flattery(w_BK: Tensor, standard_BK: Tensor) -> Tensor:
    """[B]: w . r' of each response."""
    return (w_BK * standard_BK).sum(-1)


def _agreement(w_BK: Tensor, standard_BK: Tensor) -> dict[str, Tensor]:
    """How often the greatest weight is on the best reward, over the responses where neither is tied."""
    clear_B = _one_top(w_BK) & _one_top(standard_BK)
    same_B = (w_BK.argmax(1) == standard_BK.argmax(1)) & clear_B
    return {"diagnostics/argmax_agreement": same_B.sum() / clear_B.sum()}


def _one_top(x_BK: Tensor) -> Tensor:
    """bool [B]: whether the greatest value of a row stands alone."""
    top = x_BK.topk(2, 1).values
    # Rewards that are tied differ by up to 1e-4 once standardised, because of the eps beside the std.
    return top[:, 0] - top[:, 1] > 1e-3


def _spread(expected_BK: Tensor, group_size: int) -> dict[str, Tensor]:
    """The entropy of the expected weights, and the share of their variance that lies between prompts."""
    size_BK = expected_BK.abs()
    q_BK = size_BK[size_BK.sum(1) > 0]  # Weights that are all 0 have no entropy.
    share_of_ln_k = entropy(q_BK / q_BK.sum(1, keepdim=True)).mean() / math.log(expected_BK.shape[1])
    share_of_ln_k = share_of_ln_k.clamp(max=1.0)  # rounding may lift the entropy of equal weights above ln K
    x_NGK = expected_BK.view(-1, group_size, expected_BK.shape[1])
    mean_N1K = x_NGK.mean(1, keepdim=True)
    within = (x_NGK - mean_N1K).square().mean((0, 1)).sum()
    between = (mean_N1K - mean_N1K.mean(0, keepdim=True)).square().mean((0, 1)).sum()
    share = torch.where(within + between > 1e-12, between / (within + between), float("nan"))
    return {"diagnostics/entropy": share_of_ln_k, "diagnostics/between_prompts": share}


def abstained_weight(absent_BK: Tensor, expected_BK: Tensor, group_size: int) -> dict[str, Tensor]:
    """The weight on rewards that abstain, and how far it is beyond the share of rewards that abstain.

    A response from which every reward abstains has no other place for its weight and does not count in the second.
    """
    size_BK = expected_BK.abs()
    share_B = torch.where(absent_BK, size_BK, 0.0).sum(1) / size_BK.sum(1).clamp(min=1e-30)
    excess_B = torch.where(absent_BK.all(1), 0.0, share_B - absent_BK.float().mean(1))
    return {
        "diagnostics/abstained_weight": share_B.mean(),
        "diagnostics/abstained_excess": excess_B.view(-1, group_size).mean(1).amax().clamp(min=0.0),
    }


def _correlations(standard_BK: Tensor) -> dict[str, Tensor]:
    """Correlations of pairs of rewards. The values are centred in their groups already.

    A reward without any spread has no correlation.
    """
    norm_K = standard_BK.square().sum(0).sqrt()
    correlation_KK = standard_BK.T @ standard_BK / (norm_K[:, None] * norm_K)
    K = len(norm_K)
    upper = torch.ones(K, K, dtype=torch.bool, device=norm_K.device).triu(1)
    pairs = correlation_KK[upper]
    known = pairs.isfinite()
    low = torch.where(known, pairs, float("inf")).amin()
    return {"rewards_correlation/mean": pairs.nanmean(), "rewards_correlation/min": low}


def _inversions(rewards_BK: Tensor, w_BK: Tensor, outcome: Outcome) -> dict[str, Tensor]:
    """The share of inverted pairs. Rewards are compared as they are, since normalising keeps their order."""
    shape = (-1, outcome.context.group_size)
    K = rewards_BK.shape[1]
    r_NGK = rewards_BK.view(*shape, K)
    s_NG = (w_BK * outcome.advantages.normalized_rewards[:, :K]).sum(-1).view(shape)
    better_NGG = (r_NGK[:, :, None] > r_NGK[:, None]).all(-1)  # False if a reward abstained from one of the two
    inverted_NGG = better_NGG & (s_NG[:, :, None] < s_NG[:, None])
    return {"diagnostics/pareto_inversions": inverted_NGG.sum() / better_NGG.sum()}


def _flat(outcome: Outcome) -> Tensor:
    """The share of the groups whose responses all score the same; NaN if the policy has scored none."""
    weights, shape = outcome.weights, (-1, outcome.context.group_size)
    scored_B = (weights.weights_BK != 0).any(1)
    if weights.direct_B is not None:
        scored_B = scored_B | weights.direct_B
    if weights.residual_B is not None:
        scored_B = scored_B | ~weights.residual_B.isnan()
    scored_N = scored_B.view(shape).any(1)
    flat_N = outcome.advantages.degenerate.view(shape).all(1)
    return (flat_N & scored_N).sum() / scored_N.sum()


def _shares(outcome: Outcome, used_B: Tensor) -> dict[str, Tensor]:
    """What each reward contributes to the advantages of the responses ``used_B``."""
    names, weights = outcome.context.reward_names, outcome.weights.weights_BK
    if outcome.weights.residual_B is not None:  # Its column comes behind those of the named rewards.
        weights = scored(outcome.context, outcome.weights, outcome.profile)[1][:, : len(names) + 1]
    parts = weights * outcome.advantages.normalized_rewards[:, : weights.shape[1]]
    parts_K = (parts * outcome.advantages.advantages[:, None])[used_B].sum(0)
    return {f"advantage_share/{name}": parts_K[k] / parts_K.sum() for k, name in enumerate(names)}


@dataclass
class Watch:
    """Warns when a figure has been outside its range for ``patience`` batches in a row, once for each figure."""

    ranges: Mapping[str, Range]
    patience: int = 5
    _outside: dict[str, int] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)

    def see(self, metrics: Mapping[str, float]) -> None:
        """Looks at the figures of one batch. Figures that it lacks keep their count."""
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
