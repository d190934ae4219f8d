"""The anchored Conductor, which learns weights from known utilities."""

from maestro_fast.weighting.anchored.anchored import Anchored
from maestro_fast.weighting.anchored.config import AnchoredConfig

__all__ = ["Anchored", "AnchoredConfig"]
