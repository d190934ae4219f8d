"""Sampling of responses behind one small protocol."""

from maestro_fast.generation.generator import Generator, SamplingConfig
from maestro_fast.generation.transformers import TransformersGenerator

__all__ = ["Generator", "SamplingConfig", "TransformersGenerator"]
