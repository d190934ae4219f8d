"""Shared prompts under what wraps a model: checkpointed activations, torch.compile, DDP and FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.model.rows import Sequences
from tests.model.shared_cases import SHARED, batch, found, model_of, with_lora
from tests.model.shared_processes import CASES, part

ROOT = Path(__file__).resolve().parents[2]


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal to rounding, relative to the largest value."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name], expected, rtol=0, atol=2e-5 * max(1e-3, expected.abs().max().item()), msg=name
        )


@pytest.mark.parametrize("name", ["qwen3, mixed", "gemma2", "gpt2", "lora"])
def test_activations_may_be_checkpointed(name: str) -> None:
    """The backward computes each layer again, from the same mask."""
    models = [with_lora(model_of("qwen3")) if name == "lora" else model_of(name) for _ in range(2)]
    for model in models:
        model.train()
    models[1].activation_checkpointing_enable()
    calls: list[int] = []
    attention = next(module for module in models[1].modules() if type(module).__name__.endswith("Attention"))
    attention.register_forward_pre_hook(lambda *_: calls.append(1))

    assert_equal(found(models[1], batch(), SHARED), found(models[0], batch(), "padded"))
    assert len(calls) == 2


def test_a_compiled_model_shares_prompts() -> None:
    """The second forward has its own hook on the backbone, and other tokens in rows of the same shape."""
    model: Any = model_of("qwen3, mixed")
    model.model.layers = model.model.layers[:1]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    other = Sequences(batch().prompt_ids, [ids[::-1] for ids in batch().completion_ids])
    for sequences in (batch(), other):
        ours = found(compiled, sequences, SHARED)
        assert_equal({k.replace("_orig_mod.", ""): v for k, v in ours.items()}, found(model, sequences, "padded"))


def test_two_processes_with_ddp_and_fsdp2_share_prompts(tmp_path: Path) -> None:
    """Their gradients are the means of those of padded rows in models without a wrapper."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    program = [sys.executable, "-m", "tests.model.shared_processes", str(tmp_path)]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]

    for wrapper, name in CASES:
        parts = [found(model_of(name), part(rank), "padded") for rank in range(2)]
        for rank in range(2):
            ours = torch.load(tmp_path / f"{wrapper} {name} {rank}.pt", weights_only=True)
            mean = {
                key: (a + b) / 2
                for (key, a), b in zip(parts[0].items(), parts[1].values(), strict=True)
                if "grad" in key
            }
            assert_equal(ours, parts[rank] | mean)
