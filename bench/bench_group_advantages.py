"""group_advantages on the CPU, beside TRL's own advantage block and the PyTorch reference.

Target on an idle core (DESIGN.md): B = 4096, K = 8, G = 16 in 23 us for grpo and 35 us for gdpo, and at least 8 and 12
times as fast as TRL.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.race import Contender, race, report
from maestro_fast.ops import group_advantages
from tests.ops.helpers import assert_as_accurate
from tests.ops.trl_oracle import trl_advantages

G = 16


@pytest.mark.parametrize("abstained", [0.0, 0.2])
@pytest.mark.parametrize("profile", ["grpo", "dr_grpo", "grpo_batch", "gdpo", "rloo"])
@pytest.mark.parametrize(("B", "K"), [(512, 4), (4096, 8)])
def test_group_advantages(benchmark: Any, capsys: Any, B: int, K: int, profile: str, abstained: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards_BK = torch.randn(B, K, generator=generator)
    rewards_BK[torch.rand(B, K, generator=generator) < abstained] = float("nan")
    weights_K = torch.rand(K, generator=generator)

    def ours() -> Any:
        return group_advantages(rewards_BK, weights_K, G, profile=profile, backend="cpp")

    def trl() -> Any:
        return trl_advantages(profile, rewards_BK, weights_K, G)

    truth = group_advantages(rewards_BK.double(), weights_K.double(), G, profile=profile).advantages
    assert_as_accurate(ours().advantages, trl(), truth, epsilon=1e-6)  # nothing wrong is timed

    times = race(
        [
            Contender("cpp", ours, calls=10),
            Contender("TRL's block", trl, calls=2),
            Contender(
                "torch reference", lambda: group_advantages(rewards_BK, weights_K, G, profile=profile, backend="torch")
            ),
        ]
    )
    moved = 4 * (2 * B * K + K + 4 * B) + B
    case = f"{profile}, B = {B}, K = {K}, G = {G}, {abstained:.0%} abstained"
    report(benchmark, capsys, "group_advantages on the CPU", case, times, moved)
    benchmark.pedantic(ours, rounds=50, iterations=10, warmup_rounds=3)
