"""Times conductor_weights by Triton beside the PyTorch reference and torch.compile of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.gpu_gate import clear_seed, gate, head, normal, wide
from bench.gpu_race import DEVICE, DRY, MARKS, Contender, compiled, copy_of, race, report
from maestro_fast.ops import conductor_weights

pytestmark = MARKS
B, D, K, H = (20, 40, 3, 8) if DRY else (512, 4096, 8, 256)
EPSILON = 1e-5  # three TF32 products stand for one of float32, over d = 4096 terms


@pytest.mark.parametrize("units", [None, H], ids=["linear", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conductor_weights(capsys: Any, dtype: torch.dtype, units: int | None) -> None:
    if DEVICE.type == "cpu" and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter is wrong in bfloat16")
    h, params = normal(B, D, seed=9).to(dtype), head(K, D, units)
    seed = clear_seed(lambda: conductor_weights(wide(h), wide(params), backend="torch").probs)

    def run(backend: Any) -> Any:
        return conductor_weights(h, params, seed=seed, backend=backend)

    truth = conductor_weights(wide(h), wide(params), seed=seed, backend="torch")
    gate(run("triton"), run("torch"), truth, epsilon=EPSILON, what=f"{dtype}, {units}")

    parameters = sum(x.numel() for x in params.tensors if x is not None)
    moved = h.numel() * h.element_size() + 4 * (parameters + 2 * B * K + 2 * B) + 8 * B
    contenders = [
        Contender("triton", lambda: run("triton"), peer=False),
        Contender("torch reference", lambda: run("torch")),
        *compiled(lambda: run("torch")),
        copy_of(moved),
    ]
    case = f"{'linear' if units is None else f'MLP {units}'}, B = {B}, d = {D}, K = {K}, {dtype}, {DEVICE}"
    report(capsys, "conductor_weights", case, race(contenders), moved)
