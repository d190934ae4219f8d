"""Times pool_hidden by Triton on packed bfloat16 states beside PyTorch and a copy of as many bytes.

The states are several times as large as the L2. The limit here is a copy. Half of a copy is writing, so its bandwidth
may be a little below that of reading alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.gpu_gate import gate, normal, wide
from bench.gpu_race import DEVICE, DRY, MARKS, Contender, compiled, copy_of, race, report
from maestro_fast.ops import pool_hidden

pytestmark = MARKS
B, T, D = (4, 40, 24) if DRY else (128, 65_536, 4096)
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16  # the interpreter is wrong in bfloat16


@pytest.mark.parametrize("mode", [pytest.param("mean", marks=pytest.mark.headline), "last"])
def test_pool_hidden(capsys: Any, mode: Any) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(T, D, device=DEVICE, dtype=DTYPE)
    share_B = normal(B, seed=1).abs().cpu() + 0.2
    bounds = torch.cat([torch.zeros(1), (share_B.cumsum(0) / share_B.sum() * T).round()]).to(DEVICE, torch.int64)

    def run(backend: Any) -> Any:
        return pool_hidden(hidden, cu_seqlens=bounds, mode=mode, backend=backend)

    truth = pool_hidden(wide(hidden), cu_seqlens=bounds, mode=mode, backend="torch")
    gate(run("triton"), run("torch"), truth, epsilon=2e-6, what=mode)
    del truth

    read = T if mode == "mean" else B
    moved = read * D * hidden.element_size() + 4 * B * D
    contenders = [
        Contender("triton", lambda: run("triton"), peer=False),
        Contender("torch reference", lambda: run("torch")),
        *compiled(lambda: run("torch")),
        copy_of(moved),
    ]
    case = f"{mode}, B = {B}, T = {T}, d = {D}, {DTYPE}, {DEVICE}"
    report(capsys, "pool_hidden", case, race(contenders), moved)
