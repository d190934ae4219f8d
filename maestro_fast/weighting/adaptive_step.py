"""The adaptive step of a batch: from its contexts and rewards to weights, and from these to advantages.

Trainers come through here with any weight policy. A Conductor's weights and the advantages under them are one op,
``ops.maestro_advantages``, wherever that op has the case. Every other policy gives its weights first, and
``ops.group_advantages`` compares the scores afterwards. Both ways give the same bits.
"""

from __future__ import annotations

import torch

from maestro_fast.ops.group_advantages import GroupAdvantages, group_advantages
from maestro_fast.ops.maestro_advantages import maestro_advantages
from maestro_fast.specs import resolve_profile
from maestro_fast.weighting.conductor import Conductor
from maestro_fast.weighting.policy import Comparison, WeightContext, WeightPolicy, Weights
from maestro_fast.weighting.utilities import scored


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
    return group_advantages(
        *scored(context, weights),
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
