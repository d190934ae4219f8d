"""vLLM over a tiny model, for the tests that are marked so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from maestro_fast.generation import ColocateConfig, ProbeConfig, SamplingConfig, VllmEngine
from tests.tiny import tiny_model, tiny_tokenizer

HEAD_DIM = 32  # the smallest that its attention has on the CPU
COLOCATE: dict[str, Any] = {"kv_cache_gib": 0.06, "enforce_eager": True}


def served_model(*, tied: bool = False) -> PreTrainedModel:
    """With a wide spread of logits: as made, it is close to uniform."""
    model = tiny_model(tied=tied, head_dim=HEAD_DIM).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(12)
    return model


@contextmanager
def engine(folder: Path, model: PreTrainedModel, **sampling: Any) -> Iterator[VllmEngine]:
    """An engine with the weights of ``model``."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    tokenizer = tiny_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = VllmEngine(
        str(folder),
        tokenizer,
        SamplingConfig(**{"max_new_tokens": 12, **sampling}),
        ColocateConfig(**COLOCATE, probe=ProbeConfig()),
        stop_ids=[0],
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    try:
        yield made
    finally:
        made.close()
