"""The anchored Conductor, which learns weights from known utilities."""

from maestro_fast.weighting.anchored.anchored import Anchored, AnchoredConfig

__all__ = ["Anchored", "AnchoredConfig"]
