"""The adaptive step of a batch: from its contexts and rewards to weights, and from these to advantages.

Trainers come through here with any weight policy. A Conductor's weights and the advantages under them are one op,
``ops.maestro_advantages``, wherever that op has the case. Every other policy gives its weights first, and
``ops.group_advantages`` compares the scores afterwards. Both ways give the same bits.

In TRL and verl the weights of K rewards sum to K, those of a policy sum to 1. ``weigh_scaled`` serves both: it gives
the advantages under f times the policy's weights. Scores are linear in the weights, and so are the mean and the
standard deviation of scores. With s, m and std under the policy's own weights, the advantages are

    (f s - f m) / (f std + eps)  =  (s - m) / (std + eps / f)          where the score's standard deviation divides
     f s - f m                   =  f (s - m)                          where it does not

and an epsilon in the variance becomes eps / f^2. A learnt reward has its weight relative to the scores' standard
deviation, so its part of the score is f times as large, too. So the op that makes weights and advantages at once needs
a smaller epsilon, and its scores are multiplied afterwards. The result is exact but for rounding, and exact to the last
bit if f is a power of two.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from maestro_fast.ops.group_advantages import GroupAdvantages, group_advantages
from maestro_fast.ops.maestro_advantages import maestro_advantages
from maestro_fast.specs import AdvantageProfile, resolve_profile
from maestro_fast.weighting.conductor import Conductor
from maestro_fast.weighting.policy import Comparison, WeightContext, WeightPolicy, Weights
from maestro_fast.weighting.scored_rewards import scored


def weigh_and_compare(
    policy: WeightPolicy, context: WeightContext, comparison: Comparison
) -> tuple[Weights, GroupAdvantages]:
    """The weights of a batch, and the advantages under them."""
    weights, advantages = weigh(policy, context, comparison)
    return weights, compare(context, weights, comparison) if advantages is None else advantages


def weigh(
    policy: WeightPolicy, context: WeightContext, comparison: Comparison
) -> tuple[Weights, GroupAdvantages | None]:
    """The weights of a batch and, where one op gives both, the advantages under them.

    Where the advantages are None, ``compare`` gives them. Call this in the place of ``policy.weights``: a batch needs
    one of the two calls, not both.
    """
    if isinstance(policy, Conductor) and is_one_op(policy, context, comparison):
        return _by_one_op(policy, context, comparison)
    return policy.weights(context), None


def compare(context: WeightContext, weights: Weights, comparison: Comparison) -> GroupAdvantages:
    """The advantages of a batch under weights that are known."""
    return _compare(context, *scored(context, weights, comparison.profile), comparison)


def _compare(
    context: WeightContext, rewards: torch.Tensor, weights: torch.Tensor, comparison: Comparison
) -> GroupAdvantages:
    """The advantages from what ``scored`` returned."""
    return group_advantages(
        rewards,
        weights,
        context.group_size,
        kl=comparison.kl_B,
        beta=comparison.beta,
        lengths=comparison.lengths_B,
        profile=comparison.profile,
    )


def is_one_op(conductor: Conductor, context: WeightContext, comparison: Comparison) -> bool:
    """Whether ``maestro_advantages`` gives the bits that the single ops would give.

    The op takes one context for each response, and computes everything on one device with one backend. Float64 and
    gradients change the backend of the advantages, and must not change that of the weights. Under a profile that
    compares over the batch, one op would save no launch. A subclass of ``Conductor`` may give weights of its own, which
    the op does not know.
    """
    rewards_BK, profile = context.rewards_BK, resolve_profile(comparison.profile)
    scopes = {profile.reward_center, profile.reward_scale, profile.score_center, profile.score_scale}
    return (
        getattr(conductor.weights, "__func__", None) is Conductor.weights
        and conductor.config.mode != "group"
        and scopes.isdisjoint(("batch", "tokens"))
        and rewards_BK.device == conductor.weight.device
        and not any(
            x is not None and (x.dtype == torch.float64 or x.requires_grad)
            for x in (rewards_BK, comparison.kl_B, comparison.lengths_B)
        )
    )


def _by_one_op(conductor: Conductor, context: WeightContext, comparison: Comparison) -> tuple[Weights, GroupAdvantages]:
    sample, advantages = maestro_advantages(
        context.rewards_BK,
        conductor.params,
        context.group_size,
        h=conductor.contexts(context),
        kl=comparison.kl_B,
        beta=comparison.beta,
        lengths=comparison.lengths_B,
        profile=comparison.profile,
        **conductor.choice(context),
    )
    return conductor.as_weights(context, sample), advantages


# --- under a multiple of the policy's weights ---


def scales(profile: AdvantageProfile) -> bool:
    """Whether the advantages under f times some weights follow from those under the weights themselves.

    They do not if a singleton keeps its raw score: its standard deviation counts as 1 under any weights.
    """
    return profile.singleton != "raw"


def weigh_scaled(
    policy: WeightPolicy, context: WeightContext, comparison: Comparison, factor: float
) -> tuple[Weights, GroupAdvantages | None]:
    """The policy's weights, as from ``weigh``, but with the advantages under ``factor`` times these weights.

    Args:
        policy: the weight policy.
        context: the batch.
        comparison: how scores become advantages. ``scales`` has to be true of its profile. Without lengths, the
            advantages of a profile that needs them are left to a later op, as ``weigh`` does.
        factor: f, above 0.
    """
    profile = resolve_profile(comparison.profile)
    weights, found = weigh(policy, context, _under_smaller(comparison, profile, factor))
    return weights, None if found is None else _larger(found, profile, factor)


def compare_scaled(context: WeightContext, weights: Weights, comparison: Comparison, factor: float) -> GroupAdvantages:
    """The advantages of a batch under ``factor`` times weights that are known."""
    profile = resolve_profile(comparison.profile)
    if scales(profile):
        return _larger(compare(context, weights, _under_smaller(comparison, profile, factor)), profile, factor)
    return _compare(context, *scored(context, weights, profile, factor), comparison)


def _under_smaller(comparison: Comparison, profile: AdvantageProfile, factor: float) -> Comparison:
    """The comparison whose advantages are those under ``factor`` times the weights, but for ``_larger``."""
    in_variance = profile.score_eps_in == "variance"
    smaller = replace(profile, score_eps=profile.score_eps / (factor**2 if in_variance else factor))
    return replace(comparison, profile=smaller, beta=comparison.beta / factor)


def _larger(found: GroupAdvantages, profile: AdvantageProfile, factor: float) -> GroupAdvantages:
    """The results with scores that are ``factor`` times as large."""
    larger = found._replace(scores=found.scores * factor, mean=found.mean * factor, std=found.std * factor)
    return larger._replace(advantages=found.advantages * factor) if profile.score_scale == "none" else larger
