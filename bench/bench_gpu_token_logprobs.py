"""Times token_logprobs by Triton in bfloat16, forward alone and with backward, beside its peers.

The limit is torch.mm of the same shapes into float32, in chunks of as many rows as ours. A forward takes one product, a
forward with backward four (the logits are computed twice), or three if the head is frozen. ``--head
1024x32768x2048,...`` or ``make gpu-bench ARGS=token_logprobs:1024x32768x2048`` takes other shapes.

The column of errors holds the largest error against float64, in nats; the error of a gradient is a share of its largest
element. Our errors must pass a gate; those of peers are only printed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu_gate import gate, normal
from bench.gpu_head import (
    DTYPE,
    GATED,
    RACE,
    Shape,
    gate_gradients,
    inputs,
    measured,
    picked,
    products,
    true_gradients,
    truth,
    worst,
)
from bench.gpu_peers import Logprobs, peers
from bench.gpu_race import DEVICE, MARKS, Contender, faults, race, report
from maestro_fast.ops import TokenLogprobs, token_logprobs

pytestmark = MARKS
WORK = {  # backward, frozen head, entropy
    "forward": (False, False, False),
    "forward, entropy": (False, False, True),
    "forward and backward": (True, False, False),
    "forward and backward, entropy": (True, False, True),
    "forward and backward, frozen head": (True, True, False),
}
HEADLINE, HEADLINES = pytest.mark.headline, ("forward", "forward and backward")


def ours(strategy: Any, backend: Any) -> Logprobs:
    def run(hidden: Tensor, head: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        mode: Any = "value" if entropy else "none"
        return token_logprobs(hidden, head, targets, entropy=mode, strategy=strategy, backend=backend)

    return run


def check(shape: Shape, strategy: Any) -> None:
    """Compares the last rows with float64 and PyTorch. They must have the same bits with and without the others."""
    hidden, head, targets = inputs(shape)
    rows = slice(-GATED, None)
    whole = ours(strategy, "triton")(hidden, head, targets, True)
    alone = ours(strategy, "triton")(hidden[rows], head, targets[rows], True)
    plain = ours("chunked", "torch")(hidden[rows], head, targets[rows], True)
    true = truth(shape)
    gate(alone, plain, TokenLogprobs(true.logprobs[rows], true.entropies[rows]), epsilon=2e-6, what=strategy)
    if not all(torch.equal(x[rows], y) for x, y in zip(whole, alone, strict=True)):  # type: ignore[index]
        faults.append(f"{strategy}: a row depends on its batch")


@pytest.mark.parametrize("work", [pytest.param(x, marks=HEADLINE if x in HEADLINES else ()) for x in WORK])
def test_token_logprobs(capsys: Any, shape: Shape, work: str) -> None:
    backward, frozen, entropy = WORK[work]
    hidden, head, targets = inputs(shape)
    hidden.requires_grad_(backward), head.requires_grad_(backward and not frozen)
    leaves = [x for x in (hidden, head) if x.requires_grad]
    slopes = normal(shape.T, seed=2)
    mine = {f"triton, {name}": ours(name, "triton") for name in ("chunked", "fused")}
    with torch.no_grad():
        for strategy in ("chunked", "fused"):
            check(shape, strategy)
        if backward:
            exact = list(true_gradients(shape, slopes.double()))[: len(leaves)]
        else:
            exact = list(truth(shape)[: 1 + entropy])

    def contender(name: str, op: Logprobs, peer: bool = True) -> Contender:
        def run() -> list[Tensor]:
            logprobs, entropies = op(hidden, head, targets, entropy)
            if backward:
                return list(torch.autograd.grad(logprobs, leaves, slopes))
            return [logprobs] if entropies is None or not entropy else [logprobs, entropies]

        return Contender(name, run, peer)

    def of(found: list[Tensor]) -> list[Tensor]:
        return picked(targets, found[0], found[1] if len(found) > 1 else None) if backward else found

    theirs, missing = peers(entropy=entropy)
    reference = contender("torch reference", ours("chunked", "torch"))
    contenders = [contender(name, op, peer=False) for name, op in mine.items()]
    if backward:
        plain = of(reference.run())
        for c in contenders:
            gate_gradients(of(c.run()), plain, exact, c.name)
    contenders += [reference, *(contender(name, op) for name, op in theirs.items())]
    columns = measured(contenders, lambda found: worst(of(found), exact))
    limit = products(shape, "x" if not backward else "xxh" if frozen else "xxhw")
    raced = race([*contenders, limit], seconds=RACE)
    moved = hidden.element_size() * (shape.T + shape.V) * shape.d * (2 if backward else 1) + 12 * shape.T
    case = f"{work}, d = {shape.d}, V = {shape.V}, T = {shape.T}, {DTYPE}, {DEVICE}"
    report(capsys, "token_logprobs", case, raced, moved, missing, columns)
