"""Times group_advantages by Triton beside TRL's own advantage block, the PyTorch reference and torch.compile of it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from bench.gpu_gate import gate, normal, wide
from bench.gpu_race import DEVICE, DRY, MARKS, Contender, compiled, copy_of, race, report
from maestro_fast.ops import Groups, group_advantages
from tests.ops.trl_oracle import GRPO_OPTIONS, trl_advantages

pytestmark = MARKS
G = 4 if DRY else 16
SIZES = [(16, 3)] if DRY else [(512, 4), (4096, 8)]
CASES = [
    pytest.param(*size, profile, marks=pytest.mark.headline if size == SIZES[-1] and profile != "gdpo" else ())
    for size in SIZES
    for profile in ("grpo", "maestro", "gdpo")
]


@pytest.mark.parametrize(("B", "K", "profile"), CASES)
def test_group_advantages(capsys: Any, B: int, K: int, profile: str) -> None:
    rewards_BK, weights_K = normal(B, K, seed=0), normal(K, seed=1).abs()
    rewards_BK[normal(B, K, seed=2) > 1] = torch.nan  # one in six abstains
    groups = Groups.of(G, B)

    def run(backend: Any) -> Any:
        return group_advantages(rewards_BK, weights_K, groups, profile=profile, backend=backend)

    truth = group_advantages(wide(rewards_BK), wide(weights_K), groups, profile=profile, backend="torch")
    gate(run("triton"), run("torch"), truth, epsilon=2e-6, what=profile)

    moved = 4 * (2 * B * K + K + 4 * B) + B
    contenders = [
        Contender("triton", lambda: run("triton"), peer=False),
        Contender("torch reference", lambda: run("torch")),
        *compiled(lambda: run("torch")),
        copy_of(moved),
    ]
    notes = []
    if profile not in GRPO_OPTIONS:
        notes.append("TRL has no such profile")
    elif find_spec("trl") is None:
        notes.append("TRL's block: left out, trl is not installed")
    else:
        contenders.append(Contender("TRL's block", lambda: trl_advantages(profile, rewards_BK, weights_K, G)))
    case = f"{profile}, B = {B}, K = {K}, G = {G}, {DEVICE}"
    report(capsys, "group_advantages", case, race(contenders), moved, notes)
