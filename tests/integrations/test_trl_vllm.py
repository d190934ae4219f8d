"""Our TRL trainer on TRL's own vLLM generation, colocated, with a real vLLM on the CPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import tiny_checkpoint

# TRL 1.16 warns about a vLLM that is newer than 0.31.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def vllm_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes vLLM run on a CPU: without compilation, and with weights where TRL's sync writes. TRL cannot set these."""
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "MASTER_ADDR": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    import vllm._custom_ops
    import vllm.model_executor.layers.utils
    from trl.generation import vllm_generation

    monkeypatch.setattr(vllm._custom_ops, "_supports_onednn", False)
    monkeypatch.setattr(vllm.model_executor.layers.utils, "check_cpu_sgl_kernel", lambda *sizes: False)
    eager = functools.partial(vllm_generation.LLM, enforce_eager=True, dtype="float32")
    monkeypatch.setattr(vllm_generation, "LLM", eager)


def test_hidden_states_cost_nothing_beside_trls_correction_for_vllm(
    settings: Callable[..., Any],
    ingredients: Callable[[], dict[str, Any]],
    tmp_path: Path,
    vllm_on_the_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are read off the forward that TRL makes for its importance-sampling correction."""
    from maestro_fast.integrations.trl.context import scores_old_logprobs
    from tests.integrations.test_trl_context import Keeping, Spy, expected_states

    class Checked(Keeping):
        """Compares the states with those of the same policy, before it is updated."""

        batches = 0

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            out = super()._generate_and_score_completions(inputs)
            assert self.calls == 1, "TRL's own forward"
            expected: Tensor = expected_states(self.model, self.prompt_ids, self.completion_ids)
            torch.testing.assert_close(self.weight_policy.seen[-1], expected, rtol=1e-4, atol=1e-5)
            self.batches += 1
            self.model.train()
            return out

    path = tiny_checkpoint(tmp_path / "model", head_dim=32)
    parts = ingredients() | {
        "model": AutoModelForCausalLM.from_pretrained(path),
        "processing_class": AutoTokenizer.from_pretrained(path),
    }
    args = settings(
        use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.1, vllm_max_model_length=128, max_steps=3
    )
    before = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    try:
        trainer = Checked(args=args, weights=Spy(), **parts)
        assert scores_old_logprobs(trainer)
        trainer.train()
    finally:  # TRL sets these variables for vLLM.
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    steps = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3] and trainer.batches == 3
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-3 for line in steps), "vLLM has the policy's weights"
    assert all(line["grad_norm"] > 0 for line in steps)
