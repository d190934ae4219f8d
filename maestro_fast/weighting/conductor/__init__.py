"""The Conductor of MAESTRO (arXiv 2601.07208)."""

from maestro_fast.weighting.conductor.conductor import Conductor, ConductorConfig

__all__ = ["Conductor", "ConductorConfig"]
