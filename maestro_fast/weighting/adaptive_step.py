"""From the contexts and rewards of a batch to its weights, and from these to its advantages.

Trainers come through here. The weights of a Conductor and the advantages under them are one op,
``ops.maestro_advantages``, wherever the Conductor can say what it does in the terms of that op; every other policy
gives its weights first, and ``ops.group_advantages`` compares the scores afterwards. The numbers are the same.
"""

from __future__ import annotations

from maestro_fast.ops.group_advantages import GroupAdvantages, group_advantages
from maestro_fast.weighting.conductor import Conductor
from maestro_fast.weighting.policy import Comparison, WeightContext, WeightPolicy, Weights
from maestro_fast.weighting.utilities import scored


def weigh(
    policy: WeightPolicy, context: WeightContext, comparison: Comparison
) -> tuple[Weights, GroupAdvantages | None]:
    """The weights of a batch, and the advantages under them where one op gave both; else None: ``compare`` gives them.

    It stands in the place of ``policy.weights``: a batch needs one of the two calls.
    """
    both = policy.adaptive_step(context, comparison) if isinstance(policy, Conductor) else None
    return (policy.weights(context), None) if both is None else both


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


def weigh_and_compare(
    policy: WeightPolicy, context: WeightContext, comparison: Comparison
) -> tuple[Weights, GroupAdvantages]:
    """The weights of a batch and the advantages under them."""
    weights, advantages = weigh(policy, context, comparison)
    return weights, compare(context, weights, comparison) if advantages is None else advantages
