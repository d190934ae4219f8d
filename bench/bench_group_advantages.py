"""Times group_advantages on the CPU beside TRL's own advantage block, verl's functions and the PyTorch reference.

The target on an idle core for B = 4096, K = 8, G = 16 is 23 us with grpo and 35 us with gdpo, at least 8
and 12 times as fast as TRL, and at least 1000 times as fast as verl's loop.

verl pins packages that the others do not work with, so it is a peer only where it can be imported. For instance, run
with PYTHONPATH=DIR after pip install --target DIR --no-deps verl==0.9.1 and the packages that its module of algorithms
imports. Where it cannot be imported, its test is skipped and says so.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
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


def test_beside_verl(benchmark: Any, capsys: Any) -> None:
    """verl takes a score for each token. Here a response has one token, and the call makes its weighted sum."""
    reason = "verl cannot be imported; see the docstring of this file"
    verl = pytest.importorskip("verl.trainer.ppo.core_algos", reason=reason, exc_type=ImportError)
    B, K = 4096, 8
    generator = torch.Generator().manual_seed(0)
    rewards_BK, weights_K = torch.randn(B, K, generator=generator), torch.rand(K, generator=generator)
    ids, mask_B1 = np.arange(B) // G, torch.ones(B, 1)

    def ours() -> Any:
        return group_advantages(rewards_BK, weights_K, G, profile="verl_grpo", backend="cpp")

    def theirs(function: Any) -> Any:
        return lambda: function((rewards_BK * weights_K).sum(1, keepdim=True), mask_B1, ids)[0][:, 0]

    loop = theirs(verl.compute_grpo_outcome_advantage)
    vectorised = theirs(verl.compute_grpo_vectorized_outcome_advantage)
    truth = group_advantages(rewards_BK.double(), weights_K.double(), G, profile="verl_grpo").advantages
    assert_as_accurate(ours().advantages, loop(), truth, epsilon=1e-6)
    assert_as_accurate(vectorised(), loop(), truth, epsilon=1e-5)
    contenders = [Contender("cpp", ours, calls=10), Contender("verl's loop", loop), Contender("vectorised", vectorised)]
    times = race(contenders, rounds=20)
    moved = 4 * (2 * B * K + K + 4 * B) + B
    title = f"group_advantages on the CPU beside verl {version('verl')}"
    report(benchmark, capsys, title, f"verl_grpo, B = {B}, K = {K}, G = {G}", times, moved)
    benchmark.pedantic(ours, rounds=20, iterations=10, warmup_rounds=3)
