"""Writes verl_0.9.1.json: inputs of verl's own advantage functions, and what they return.

verl cannot live beside the packages that the tests run with (it pins older transformers and tensordict), so its
functions are called once, in an environment of their own, and their results are committed:

    python -m venv verl-venv
    verl-venv/bin/pip install torch==2.13.0
    verl-venv/bin/pip install verl==0.9.1 --no-deps
    verl-venv/bin/pip install "transformers<5.11" "tensordict<=0.10" numpy omegaconf codetiming ray hydra-core
    verl-venv/bin/python tests/ops/goldens/make_verl_goldens.py

verl_grpo and verl_dr_grpo are ``compute_grpo_outcome_advantage`` with and without ``norm_adv_by_std_in_grpo``, given
the weighted sum of the rewards as one float64 score. verl_gdpo is ``compute_gdpo_outcome_advantage``, which casts every
reward to float32. Rewards and weights are float32 numbers, so that nothing is rounded on the way in.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import compute_gdpo_outcome_advantage, compute_grpo_outcome_advantage

OUT = Path(__file__).with_name("verl_0.9.1.json")
PROMPT_TOKENS = 2


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randint(low: int, high: int, size: int, seed: int) -> list[int]:
    return torch.randint(low, high, (size,), generator=torch.Generator().manual_seed(seed)).tolist()


def cases() -> dict[str, dict[str, Any]]:
    """Rewards [B, K] and weights [K] in float32, group ids [B], completion lengths [B] in tokens."""
    ragged = [7, 3, 3, 9, 7, 7, 1, 3, 9, 7, 4, 3, 3]  # two groups of one, in no order
    passed = torch.tensor(randint(0, 2, 36, seed=6)).view(18, 2).float()
    passed[:4], passed[4:8, 0] = 1.0, 0.0  # groups in which every response passes, or fails one test
    constant = torch.cat(
        [torch.tensor([[0.1, 0.3], [1e4 + 0.1, -7.7e-3]]).repeat_interleave(3, 0), randn(3, 2, seed=7)]
    )
    nearly = 8.0 + randn(12, 2, seed=8)
    tiny = randn(10, 3, seed=9) * torch.tensor([1e-3, 1.0, 50.0])
    return {
        "equal groups": case(randn(12, 3, seed=0), [0.7, -0.3, 1.9], [b // 4 for b in range(12)], randint(1, 9, 12, 1)),
        "one reward": case(randn(10, 1, seed=2), [1.0], [b // 5 for b in range(10)], [4] * 10),
        "ragged groups": case(randn(13, 2, seed=3), [0.5, 2.0], ragged, randint(1, 12, 13, 4)),
        "singletons alone": case(randn(5, 2, seed=5), [1.0, 0.25], [4, 3, 2, 1, 0], [1, 2, 3, 4, 5]),
        "passed or failed": case(passed, [1.0, 0.5], [b // 4 for b in range(16)] + [9, 9], randint(1, 20, 18, 6)),
        "constant groups": case(constant, [0.3, 0.9], [b // 3 for b in range(9)], randint(1, 5, 9, 7)),
        "beside an offset": case(nearly, [1.0, 1.0], [b % 3 for b in range(12)], randint(1, 7, 12, 8)),
        "small weights": case(randn(8, 2, seed=10), [1e-3, 3e-4], [b // 4 for b in range(8)], randint(1, 7, 8, 9)),
        "unlike scales": case(tiny, [1.0, 0.1, 0.02], [0, 1, 0, 1, 0, 1, 0, 1, 2, 2], randint(1, 30, 10, 10)),
        "an empty completion": case(
            randn(8, 2, seed=11), [1.0, 1.0], [b // 4 for b in range(8)], [3, 0, 2, 5, 1, 1, 4, 2]
        ),
    }


def case(rewards_BK: Tensor, weights: list[float], groups: list[int], lengths: list[int]) -> dict[str, Any]:
    weights_K = torch.tensor(weights).float()
    inputs = {"rewards": rewards_BK.tolist(), "weights": weights_K.tolist(), "groups": groups, "lengths": lengths}
    mask_BT = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    outputs = {
        "verl_grpo": grpo(rewards_BK, weights_K, groups, mask_BT, norm_adv_by_std_in_grpo=True),
        "verl_dr_grpo": grpo(rewards_BK, weights_K, groups, mask_BT, norm_adv_by_std_in_grpo=False),
        "verl_gdpo": gdpo(rewards_BK, weights_K, groups, mask_BT),
    }
    return {**inputs, "advantages": outputs}


def grpo(rewards_BK: Tensor, weights_K: Tensor, groups: list[int], mask_BT: Tensor, **options: bool) -> list[Any]:
    scores_BT = torch.zeros(mask_BT.shape, dtype=torch.float64)
    scores_BT[:, -1] = (rewards_BK.double() * weights_K.double()).sum(-1)  # verl sums over all columns
    advantages_BT, _ = compute_grpo_outcome_advantage(scores_BT, mask_BT, np.array(groups), **options)
    return per_response(advantages_BT, mask_BT)


def gdpo(rewards_BK: Tensor, weights_K: Tensor, groups: list[int], mask_BT: Tensor) -> list[Any]:
    keys = [f"reward_{k}" for k in range(len(weights_K))]
    prompts = torch.zeros(len(groups), PROMPT_TOKENS, dtype=torch.long)
    advantages_BT, _ = compute_gdpo_outcome_advantage(
        torch.zeros(mask_BT.shape),
        mask_BT,
        np.array(groups),
        config=AlgoConfig(gdpo_reward_keys=keys, gdpo_reward_weights=weights_K.tolist()),
        non_tensor_batch=dict(zip(keys, rewards_BK.T.numpy(), strict=True)),
        batch={"prompts": prompts, "attention_mask": torch.cat([torch.ones_like(prompts), mask_BT], 1)},
    )
    return per_response(advantages_BT, mask_BT)


def per_response(advantages_BT: Tensor, mask_BT: Tensor) -> list[Any]:
    """[B], what every token of a response has; None for a response without tokens."""
    assert torch.equal(advantages_BT, advantages_BT[:, :1] * mask_BT)
    return [row[0].item() if live else None for row, live in zip(advantages_BT, mask_BT.any(1), strict=True)]


def main() -> None:
    versions = {"python": platform.python_version(), **{name: version(name) for name in ("verl", "torch", "numpy")}}
    OUT.write_text(json.dumps({"versions": versions, "cases": cases()}, indent=1) + "\n")
    print(f"{OUT}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
