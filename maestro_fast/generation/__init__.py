"""Samples responses with transformers, with vLLM in this process, or with a vLLM server."""

from maestro_fast.generation.build import Served, build_engine, check_generation
from maestro_fast.generation.config import (
    ColocateConfig,
    GenerationConfig,
    ProbeConfig,
    ServerConfig,
    TransformersConfig,
    generation_config,
)
from maestro_fast.generation.sampling import AheadGenerator, Engine, Generator, SamplingConfig
from maestro_fast.generation.transformers import TransformersGenerator
from maestro_fast.generation.vllm import VllmEngine
from maestro_fast.generation.vllm_server import VllmServer

__all__ = [
    "AheadGenerator",
    "ColocateConfig",
    "Engine",
    "GenerationConfig",
    "Generator",
    "ProbeConfig",
    "SamplingConfig",
    "Served",
    "ServerConfig",
    "TransformersConfig",
    "TransformersGenerator",
    "VllmEngine",
    "VllmServer",
    "build_engine",
    "check_generation",
    "generation_config",
]
