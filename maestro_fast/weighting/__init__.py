"""Weight policies: who decides how much each reward counts."""

from maestro_fast.weighting.anchored import Anchored, AnchoredConfig
from maestro_fast.weighting.build import POLICIES, build_weight_policy
from maestro_fast.weighting.conductor import Conductor, ConductorConfig
from maestro_fast.weighting.equal import Equal
from maestro_fast.weighting.guard import GuardConfig, Guarded
from maestro_fast.weighting.policy import ContextKind, Outcome, WeightContext, WeightPolicy, Weights, check_profile
from maestro_fast.weighting.random import Random
from maestro_fast.weighting.static import Static
from maestro_fast.weighting.utilities import scored

__all__ = [
    "POLICIES",
    "Anchored",
    "AnchoredConfig",
    "Conductor",
    "ConductorConfig",
    "ContextKind",
    "Equal",
    "GuardConfig",
    "Guarded",
    "Outcome",
    "Random",
    "Static",
    "WeightContext",
    "WeightPolicy",
    "Weights",
    "build_weight_policy",
    "check_profile",
    "scored",
]
