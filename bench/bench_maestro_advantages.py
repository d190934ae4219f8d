"""Times the adaptive step with a linear network on the CPU, beside the bare product of contexts and its weights.

The target for B = 512, d = 2048, K = 8 is at most 1.2 times torch.mm(h, W.T), which reads the contexts and no more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.race import Contender, race, report
from maestro_fast.ops import ConductorParams, maestro_advantages
from tests.ops.helpers import assert_as_accurate

B, K, G = 512, 8, 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [1024, 2048, 4096])
def test_maestro_advantages(benchmark: Any, capsys: Any, d: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(B, d, generator=generator).to(dtype)
    weight = torch.randn(K, d, generator=generator) / d**0.5
    head = ConductorParams(h.float().mean(0), 1 / h.float().std(0), weight, torch.zeros(K))
    rewards_BK = torch.randn(B, K, generator=generator)

    def run(backend: Any) -> Any:
        return maestro_advantages(rewards_BK, head, G, h=h, seed=1, backend=backend)

    wide = ConductorParams(head.mean.double(), head.rstd.double(), weight.double(), head.bias.double())
    truth, ours, plain = (
        maestro_advantages(rewards_BK.double(), wide, G, h=h.double(), seed=1),
        run("cpp"),
        run("torch"),
    )
    assert torch.equal(ours[0].actions, truth[0].actions)  # nothing wrong is timed
    assert_as_accurate(ours[0].probs, plain[0].probs, truth[0].probs, epsilon=1e-6)
    assert_as_accurate(ours[1].advantages, plain[1].advantages, truth[1].advantages, epsilon=1e-6)

    transposed = weight.to(dtype).T
    times = race(
        [
            Contender("cpp", lambda: run("cpp"), calls=2),
            Contender("torch.mm(h, W.T) alone", lambda: torch.mm(h, transposed), calls=2),
            Contender("torch reference", lambda: run("torch")),
        ]
    )
    moved = h.numel() * h.element_size() + 4 * (K * d + 2 * d + 4 * B * K)
    case = f"B = {B}, d = {d}, K = {K}, {dtype}"
    report(benchmark, capsys, "maestro_advantages on the CPU", case, times, moved)
    benchmark.pedantic(lambda: run("cpp"), rounds=20, iterations=2, warmup_rounds=2)
