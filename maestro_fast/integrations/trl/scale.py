"""Advantages under f times a policy's weights, from those weights: TRL's sum to the number of rewards, ours to 1.

Scores are linear in the weights, and so are the mean and the standard deviation of scores. With s, m and std under the
policy's own weights,

    (f s - f m) / (f std + eps)  =  (s - m) / (std + eps / f)          the score's deviation divides
     f s - f m                   =  f (s - m)                          it does not

and an epsilon in the variance takes 1 / f^2. So the op that makes weights and advantages at once serves TRL, too: with
a smaller epsilon, and scores that are multiplied afterwards. This is exact but for rounding, and to the bit where f is
a power of two.
"""

from __future__ import annotations

from dataclasses import replace

from maestro_fast.ops import AdvantageProfile, GroupAdvantages
from maestro_fast.weighting import Comparison, WeightContext, WeightPolicy, Weights, weigh


def scales(profile: AdvantageProfile) -> bool:
    """Whether its advantages follow from those under smaller weights.

    A singleton that keeps its raw score counts as having a standard deviation of 1 under any weights.
    """
    return profile.singleton != "raw"


def weigh_scaled(
    policy: WeightPolicy, context: WeightContext, profile: AdvantageProfile, factor: float
) -> tuple[Weights, GroupAdvantages | None]:
    """As ``weigh``: the policy's weights, but the advantages under ``factor`` times them.

    ``profile`` is one that ``scales``. Lengths are not needed: what is compared over tokens is compared afterwards.
    """
    inside = profile.score_eps_in == "variance"
    smaller = replace(profile, score_eps=profile.score_eps / (factor**2 if inside else factor))
    weights, found = weigh(policy, context, Comparison(smaller))
    if found is None:
        return weights, None
    larger = found._replace(scores=found.scores * factor, mean=found.mean * factor, std=found.std * factor)
    if profile.score_scale == "none":
        larger = larger._replace(advantages=found.advantages * factor)
    return weights, larger
