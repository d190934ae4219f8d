"""vLLM with a tiny model, for the tests that are marked ``vllm``."""

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

os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}  # vLLM opens process groups.
HEAD_DIM = 32  # the smallest head dimension of vLLM's attention on the CPU
COLOCATE: dict[str, Any] = {"kv_cache_gib": 0.06, "enforce_eager": True}


def served_model(*, tied: bool = False) -> PreTrainedModel:
    """Its logits are spread wide, since a freshly made model is close to uniform."""
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
