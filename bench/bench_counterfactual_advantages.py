"""Times counterfactual_advantages on the CPU beside the PyTorch reference, which forms [N, G, G, A] scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.race import Contender, race, report
from maestro_fast.ops import counterfactual_advantages
from tests.ops.helpers import assert_as_accurate


@pytest.mark.parametrize("profile", ["maestro", "grpo"])
@pytest.mark.parametrize(("B", "K", "G"), [(512, 4, 8), (4096, 8, 16)])
def test_counterfactual_advantages(benchmark: Any, capsys: Any, B: int, K: int, G: int, profile: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards_BK, weights_BK = torch.randn(B, K, generator=generator), torch.rand(B, K, generator=generator)
    actions_AK = 0.7 / K + 0.3 * torch.eye(K)

    def run(backend: Any) -> Any:
        return counterfactual_advantages(rewards_BK, weights_BK, actions_AK, G, profile=profile, backend=backend)

    wide = rewards_BK.double(), weights_BK.double(), actions_AK.double()
    assert_as_accurate(
        run("cpp"), run("torch"), counterfactual_advantages(*wide, G, profile=profile), epsilon=1e-6
    )  # nothing wrong is timed

    times = race([Contender("cpp", lambda: run("cpp")), Contender("torch reference", lambda: run("torch"))], rounds=15)
    moved = 4 * (2 * B * K + K * K + B * K)
    case = f"{profile}, B = {B}, K = A = {K}, G = {G}"
    report(benchmark, capsys, "counterfactual_advantages on the CPU", case, times, moved)
    benchmark.pedantic(lambda: run("cpp"), rounds=20, iterations=2, warmup_rounds=2)
