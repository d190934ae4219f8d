"""Weight policies decide how much each reward counts."""

from maestro_fast.weighting.adaptive_step import (
    compare,
    compare_scaled,
    scales,
    weigh,
    weigh_and_compare,
    weigh_scaled,
)
from maestro_fast.weighting.anchored import Anchored, AnchoredConfig
from maestro_fast.weighting.build import POLICIES, WeightsConfig, build_weight_policy
from maestro_fast.weighting.conductor import Conductor, ConductorConfig
from maestro_fast.weighting.dvao import Dvao
from maestro_fast.weighting.exp3 import Exp3
from maestro_fast.weighting.fixed import Equal, FunctionPolicy, Random, Router, Schedule, Static
from maestro_fast.weighting.guard import GuardConfig, Guarded
from maestro_fast.weighting.policy import (
    Comparison,
    ContextKind,
    Outcome,
    WeightContext,
    WeightPolicy,
    Weights,
    check_profile,
)
from maestro_fast.weighting.reward_model import RewardModel
from maestro_fast.weighting.saved import from_pretrained, save_pretrained
from maestro_fast.weighting.saw import Saw
from maestro_fast.weighting.scored_rewards import scored
from maestro_fast.weighting.utility import Utility
from maestro_fast.weighting.weakest_first import WeakestFirst

__all__ = [
    "POLICIES",
    "Anchored",
    "AnchoredConfig",
    "Comparison",
    "Conductor",
    "ConductorConfig",
    "ContextKind",
    "Dvao",
    "Equal",
    "Exp3",
    "FunctionPolicy",
    "GuardConfig",
    "Guarded",
    "Outcome",
    "Random",
    "RewardModel",
    "Router",
    "Saw",
    "Schedule",
    "Static",
    "Utility",
    "WeakestFirst",
    "WeightContext",
    "WeightPolicy",
    "Weights",
    "WeightsConfig",
    "build_weight_policy",
    "check_profile",
    "compare",
    "compare_scaled",
    "from_pretrained",
    "save_pretrained",
    "scales",
    "scored",
    "weigh",
    "weigh_and_compare",
    "weigh_scaled",
]
