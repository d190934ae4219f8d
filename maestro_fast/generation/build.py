"""From a config to the inference engine that it names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from maestro_fast.generation.config import GenerationConfig, TransformersConfig
from maestro_fast.generation.engine import Engine
from maestro_fast.generation.generator import SamplingConfig
from maestro_fast.generation.vllm import VllmEngine, check_colocate


@dataclass(frozen=True)
class Served:
    """What an engine is to sample from, and how.

    Attributes:
        path: of the policy's checkpoint, a local directory or a hub name; the engine reads its sizes there.
        stop_ids: every token id that ends a response.
        dtype: that the trainer computes in.
        device: of this process's policy.
        processes: of the run.
    """

    path: str
    tokenizer: PreTrainedTokenizerBase
    sampling: SamplingConfig
    stop_ids: frozenset[int]
    dtype: torch.dtype
    device: torch.device
    processes: int = 1


def check_generation(config: GenerationConfig, device: torch.device, processes: int) -> None:
    """Refuses what cannot be served, before a model is loaded.

    Raises:
        SettingsError, ImportError: see ``check_colocate``.
    """
    if not isinstance(config, TransformersConfig):
        check_colocate(config, device, processes)


def build_engine(config: GenerationConfig, served: Served) -> Engine | None:
    """The engine, its weights those of the checkpoint; None where the policy samples for itself."""
    if isinstance(config, TransformersConfig):
        return None
    return VllmEngine(
        served.path,
        served.tokenizer,
        served.sampling,
        config,
        stop_ids=served.stop_ids,
        dtype=served.dtype,
        device=served.device,
        processes=served.processes,
    )
