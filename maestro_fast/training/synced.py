"""An engine in place of transformers' generation: what a trainer can be served with, and how the two are joined."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maestro_fast.generation import Engine, Generator, ProbeConfig, SamplingConfig
from maestro_fast.model.forward import Sequences, score
from maestro_fast.settings import SettingsError
from maestro_fast.training.pipeline import Pipeline
from maestro_fast.training.sync_probe import build_probe
from maestro_fast.training.weight_sync import SyncedGenerator, check_syncable


def check_engine(engine: Engine, generator: Generator | None, model: nn.Module) -> None:
    """
    Raises:
        ValueError: two samplers, or weights that cannot be sent.
    """
    if generator is not None:
        raise ValueError(f"engine: {type(engine).__name__} beside a generator, expected one of the two")
    check_syncable(model)


def check_room(engine: Engine, longest_prompt: int, sampling: SamplingConfig) -> None:
    """
    Raises:
        SettingsError: the engine would end a response before its token limit.
    """
    if longest_prompt + sampling.max_new_tokens > engine.max_tokens:
        raise SettingsError(
            f"sampling.max_new_tokens: {sampling.max_new_tokens} after the longest prompt of {longest_prompt} tokens, "
            f"expected at most {engine.max_tokens} together, the engine's longest sequence (generation.max_tokens)"
        )


def synced(pipeline: Pipeline, engine: Engine, config: ProbeConfig) -> SyncedGenerator:
    """The generator that samples with ``engine`` for this pipeline, probed on the first prompts of its data.

    Raises:
        ValueError: a way of sharding that weights cannot be gathered from.
    """
    state = pipeline.accelerator.state
    if getattr(state, "deepspeed_plugin", None) is not None:
        raise ValueError("trainer.deepspeed: its weights cannot be sent to an engine, expected DDP or fsdp")
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version < 2:
        raise ValueError("trainer.fsdp_config.version: 1, its weights cannot be sent to an engine, expected 2")
    dataset = pipeline.dataset
    rows = [dataset[i] for i in range(min(len(dataset), max(8, config.sequences)))]

    def policy_logprobs(model: nn.Module, token_ids: list[list[int]]) -> list[Tensor]:
        sequences = Sequences([ids[:1] for ids in token_ids], [ids[1:] for ids in token_ids])
        outputs = score(
            model, sequences, pipeline.head, layout=pipeline.layout, micro_batch=len(token_ids), temperature=1.0
        )
        return list(torch.split(outputs.logprobs_C, [len(ids) - 1 for ids in token_ids]))

    prompt_ids = dataset.prompts(rows, pipeline.tokenizer).token_ids
    return SyncedGenerator(engine, build_probe(config, engine, prompt_ids, policy_logprobs), pipeline.clock)
