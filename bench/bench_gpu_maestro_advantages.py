"""Times the adaptive step by Triton beside the single ops in PyTorch and torch.compile of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.gpu_gate import clear_seed, gate, head, normal, wide
from bench.gpu_race import DEVICE, DRY, MARKS, Contender, compiled, copy_of, race, report
from maestro_fast.ops import Groups, conductor_weights, maestro_advantages, pool_hidden

pytestmark = MARKS
HEADLINE = pytest.mark.headline
B, T, D, K, H, G = (16, 48, 40, 3, 8, 4) if DRY else (512, 16_384, 4096, 8, 256, 16)
EPSILON = 1e-5  # three TF32 products stand for one of float32, over d = 4096 terms
CASES = {"contexts, linear": HEADLINE, "last, MLP": HEADLINE, "mean, linear": ()}


def contexts(source: str) -> dict[str, Any]:
    if source == "contexts":
        return {"h": normal(B, D, seed=9)}
    bounds = torch.arange(B + 1, device=DEVICE) * (T // B)
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16  # the interpreter is wrong in bfloat16
    return {"hidden": normal(T, D, seed=9).to(dtype), "cu_seqlens": bounds, "pool": source}


def bytes_moved(given: dict[str, Any], params: Any) -> int:
    x = given.get("h", given.get("hidden"))
    rows = T if given.get("pool") == "mean" else B
    parameters = sum(y.numel() for y in params.tensors if y is not None)
    return int(rows * D * x.element_size() + 4 * (parameters + 4 * B * K + 6 * B) + 9 * B)


@pytest.mark.parametrize("case", [pytest.param(x, marks=marks) for x, marks in CASES.items()])
def test_maestro_advantages(capsys: Any, case: str) -> None:
    source, kind = case.split(", ")
    given, params, rewards_BK = contexts(source), head(K, D, H if kind == "MLP" else None), normal(B, K, seed=0)
    true = {name: wide(value) for name, value in given.items()}
    groups = Groups.of(G, B)
    h = true["h"] if "h" in true else pool_hidden(true["hidden"], cu_seqlens=true["cu_seqlens"], mode=true["pool"])
    seed = clear_seed(lambda: conductor_weights(h, wide(params), backend="torch").probs)

    def run(backend: Any) -> Any:
        return maestro_advantages(rewards_BK, params, groups, **given, seed=seed, backend=backend)

    truth = maestro_advantages(wide(rewards_BK), wide(params), groups, **true, seed=seed, backend="torch")
    for ours, plain, expected in zip(run("triton"), run("torch"), truth, strict=True):
        gate(ours, plain, expected, epsilon=EPSILON, what=case)
    del true, truth

    moved = bytes_moved(given, params)
    contenders = [
        Contender("triton", lambda: run("triton"), peer=False),
        Contender("torch reference", lambda: run("torch")),
        *compiled(lambda: run("torch")),
        copy_of(moved),
    ]
    title = f"{case}, B = {B}, d = {D}, K = {K}, G = {G}, {DEVICE}"
    report(capsys, "maestro_advantages", title, race(contenders), moved)
