"""Times counterfactual_advantages by Triton beside the PyTorch reference, which forms [N, G, G, A] scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.gpu_gate import gate, normal, wide
from bench.gpu_race import DEVICE, DRY, MARKS, Contender, compiled, copy_of, race, report
from maestro_fast.ops import Groups, counterfactual_advantages

pytestmark = MARKS
SIZES = [(16, 3, 4)] if DRY else [(512, 4, 8), (4096, 8, 16)]


@pytest.mark.parametrize("profile", ["maestro", "grpo"])
@pytest.mark.parametrize(("B", "K", "G"), SIZES)
def test_counterfactual_advantages(capsys: Any, B: int, K: int, G: int, profile: str) -> None:
    rewards_BK, weights_BK = normal(B, K, seed=0), normal(B, K, seed=1).abs()
    actions_AK = (0.7 / K + 0.3 * torch.eye(K)).to(DEVICE)
    groups = Groups.of(G, B)

    def run(backend: Any) -> Any:
        return counterfactual_advantages(rewards_BK, weights_BK, actions_AK, groups, profile=profile, backend=backend)

    given = wide(rewards_BK), wide(weights_BK), wide(actions_AK), groups
    truth = counterfactual_advantages(*given, profile=profile, backend="torch")
    gate(run("triton"), run("torch"), truth, epsilon=2e-6, what=profile)

    moved = 4 * (2 * B * K + K * K + B * K)
    contenders = [
        Contender("triton", lambda: run("triton"), peer=False),
        Contender("torch reference", lambda: run("torch")),
        *compiled(lambda: run("torch")),
        copy_of(moved),
    ]
    case = f"{profile}, B = {B}, K = A = {K}, G = {G}, {DEVICE}"
    report(capsys, "counterfactual_advantages", case, race(contenders), moved)
