"""TRL's own code, executed: cut out of the installed trainers and compiled with a stand-in for ``self``.

The blocks sit in the middle of methods that also generate, so they cannot be called. They are read from the
source files, since importing trl imports transformers, which takes longer than all the tests of the ops.
"""

from __future__ import annotations

import ast
import importlib.util
import math
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


@cache
def _module(name: str) -> ast.Module:
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("trl is not installed")
    return ast.parse(Path(spec.submodule_search_locations[0], "trainer", f"{name}.py").read_text())


def _function(module: str, name: str) -> ast.FunctionDef:
    found = [x for x in ast.walk(_module(module)) if isinstance(x, ast.FunctionDef) and x.name == name]
    assert len(found) == 1, f"trl.trainer.{module} has {len(found)} functions {name}, expected 1: has TRL changed?"
    return found[0]


def _assigns(statement: ast.stmt, name: str, call: str) -> bool:
    """Whether the statement reads ``name = torch.<call>...``."""
    return (
        isinstance(statement, ast.Assign)
        and ast.unparse(statement.targets[0]) == name
        and ast.unparse(statement.value).startswith(f"torch.{call}(")
    )


@cache
def _advantage_block(module: str) -> CodeType:
    """From ``unscorable_mask = torch.isnan(...)`` to ``advantages = torch.nan_to_num(...)``, both included."""
    body = _function(module, "_generate_and_score_completions").body
    first = [i for i, x in enumerate(body) if _assigns(x, "unscorable_mask", "isnan")]
    last = [i for i, x in enumerate(body) if _assigns(x, "advantages", "nan_to_num")]
    assert len(first) == len(last) == 1, f"no advantage block in trl.trainer.{module}: has TRL changed?"
    assert first < last
    block = ast.Module(body[first[0] : last[0] + 1], type_ignores=[])
    return compile(block, f"trl.trainer.{module}", "exec")


@cache
def _namespace() -> dict[str, Any]:
    """The helpers that the blocks call."""
    namespace: dict[str, Any] = {"torch": torch}
    helpers = ast.Module([_function("utils", name) for name in ("nanstd", "nanmin", "nanmax")], type_ignores=[])
    exec(compile(helpers, "trl.trainer.utils", "exec"), namespace)
    return namespace


def _run(module: str, rewards_BK: Tensor, weights_K: Tensor, group_size: int, **options: Any) -> Tensor:
    stand_in = SimpleNamespace(reward_weights=weights_K, reward_funcs=[None] * rewards_BK.shape[1], **options)
    variables = {
        **_namespace(),
        "self": stand_in,
        "rewards_per_func": rewards_BK.clone(),
        "num_generations": group_size,
        "device": rewards_BK.device,
    }
    exec(_advantage_block(module), variables)
    return variables["advantages"]


# What TRL's GRPOTrainer is configured with where a profile names it: (multi_objective_aggregation, scale_rewards).
GRPO_OPTIONS = {
    "grpo": ("sum_then_normalize", "group"),
    "dr_grpo": ("sum_then_normalize", "none"),
    "grpo_batch": ("sum_then_normalize", "batch"),
    "gdpo": ("normalize_then_sum", "group"),
}


def trl_advantages(profile: str, rewards_BK: Tensor, weights_K: Tensor, group_size: int) -> Tensor:
    """Advantages [B] of GRPOTrainer, or of RLOOTrainer for ``rloo``, in the dtype of the rewards."""
    if profile == "rloo":
        options: dict[str, Any] = {"reward_clip_range": None, "beta": 0.0, "normalize_advantages": False}
        return _run("rloo_trainer", rewards_BK, weights_K, group_size, **options)
    aggregation, scale = GRPO_OPTIONS[profile]
    options = {"multi_objective_aggregation": aggregation, "scale_rewards": scale}
    return _run("grpo_trainer", rewards_BK, weights_K, group_size, **options)


@cache
def _compute_loss() -> Any:
    namespace = dict(_namespace())
    module = ast.Module([_function("grpo_trainer", "_compute_loss")], type_ignores=[])
    exec(compile(module, "trl.trainer.grpo_trainer", "exec"), namespace)
    return namespace["_compute_loss"]


def trl_policy_loss(
    logprobs_BT: Tensor,
    mask_BT: Tensor,
    advantages_B: Tensor,
    *,
    loss_type: str,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    beta: float = 0.0,
    old_logprobs_BT: Tensor | None = None,
    ref_logprobs_BT: Tensor | None = None,
    max_completion_length: int = 1,
    num_items: int | None = None,
    accumulation_steps: int = 1,
    level: str = "token",
    delta: float | None = None,
    entropies_BT: Tensor | None = None,
    entropy_coef: float = 0.0,
    importance_sampling_ratio: Tensor | None = None,
    bias_correction_kl: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics of ``GRPOTrainer._compute_loss`` for given log-probs, padded [B, T].

    ``num_items`` is the token count of all ``accumulation_steps`` micro-batches, one step per generation.
    """
    entropies_BT = torch.zeros_like(logprobs_BT) if entropies_BT is None else entropies_BT
    metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs_BT, entropies_BT, None),
        _entropy_bonus_enabled=entropy_coef > 0,
        entropy_coef=entropy_coef,
        use_adaptive_entropy=False,
        _entropy_window_stats=None,
        _metrics=metrics,
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=False, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(
            use_bias_correction_kl=bias_correction_kl, delta=delta, steps_per_generation=accumulation_steps
        ),
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=accumulation_steps,
        epsilon_high=epsilon_high,
        epsilon_low=epsilon_low,
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=max_completion_length,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=importance_sampling_ratio is not None,
        vllm_importance_sampling_correction=importance_sampling_ratio is not None,
    )
    prompt_mask = torch.ones(mask_BT.shape[0], 1, dtype=mask_BT.dtype, device=mask_BT.device)
    inputs = {
        "prompt_ids": prompt_mask.long(),
        "prompt_mask": prompt_mask,
        "completion_ids": mask_BT.long(),
        "completion_mask": mask_BT,
        "advantages": advantages_B,
        "old_per_token_logps": old_logprobs_BT,
        "ref_per_token_logps": ref_logprobs_BT,
        "importance_sampling_ratio": importance_sampling_ratio,
        "num_items_in_batch": torch.tensor(float(mask_BT.sum() if num_items is None else num_items)),
    }
    loss = _compute_loss()(trainer, None, inputs)
    return loss, {name: values[0] for name, values in metrics["train"].items()}


@cache
def _sampler_block() -> CodeType:
    """The statements under the second ``if self.use_vllm and self.vllm_importance_sampling_correction``."""
    test = "self.use_vllm and self.vllm_importance_sampling_correction"
    body = _function("grpo_trainer", "_generate_and_score_completions")
    found = [
        x
        for x in ast.walk(body)
        if isinstance(x, ast.If) and ast.unparse(x.test) == test and "per_token_logps_diff" in ast.unparse(x)
    ]
    assert len(found) == 1, "no sampler correction in trl.trainer.grpo_trainer: has TRL changed?"
    return compile(ast.Module(found[0].body, type_ignores=[]), "trl.trainer.grpo_trainer", "exec")


def trl_sampler_ratio(old_BT: Tensor, sampling_BT: Tensor, mask_BT: Tensor, mode: str, cap: float) -> Tensor:
    """The importance-sampling ratio that GRPOTrainer multiplies its token losses with, [B, T] or [B, 1]."""
    variables = {
        "torch": torch,
        "math": math,
        "self": SimpleNamespace(
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_max=cap,
            vllm_importance_sampling_clip_min=None,
        ),
        "completion_mask": mask_BT,
        "tool_mask": None,
        "old_per_token_logps": old_BT,
        "sampling_per_token_logps": sampling_BT,
    }
    exec(_sampler_block(), variables)
    return variables["vllm_importance_sampling_ratio"]
