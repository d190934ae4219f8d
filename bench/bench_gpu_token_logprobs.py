"""token_logprobs by Triton in bfloat16, forward, and forward with backward: beside torch.mm, TRL and PyTorch.

The limit is one torch.mm of the same shape, into float32, in chunks of as many rows as ours; a forward with backward
has four such products, or three with a frozen head. BENCH_HEAD="d V T" picks another point than the default one,
which fits the time of a slice.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu_gate import gate, normal, wide
from bench.gpu_race import DEVICE, DRY, MARKS, Contender, Target, race, ratio, report, wait
from maestro_fast.ops import TokenLogprobs, token_logprobs
from maestro_fast.ops.head_chunks import chunk_rows

pytestmark = MARKS
D, V, T = (16, 70, 9) if DRY else map(int, os.environ.get("BENCH_HEAD", "4096 151936 4096").split())
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16  # the interpreter is wrong in bfloat16
GATED = min(T, 64)  # rows whose float64 logits fit
LIMIT, TRL = "torch.mm, the limit", "TRL's chunked op"


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, head = (torch.randn(n, D, device=DEVICE, dtype=DTYPE) for n in (T, V))
    targets = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return hidden, head / D**0.5, targets


def check(hidden: Tensor, head: Tensor, targets: Tensor, strategy: Any) -> None:
    """The last rows against float64 and PyTorch in float32 logits, in slices that fit."""
    rows = slice(T - GATED, T)
    given = hidden[rows], head, targets[rows]
    ours = token_logprobs(*given, entropy="value", strategy=strategy, backend="triton")
    plain = token_logprobs(*given, entropy="value", backend="torch")
    truth = [
        torch.cat([x[i] for x in (_true(hidden[r : r + 8], head, targets[r : r + 8]) for r in range(T - GATED, T, 8))])
        for i in range(2)
    ]
    gate(ours, plain, TokenLogprobs(*truth), epsilon=2e-6, what=strategy)
    whole = token_logprobs(hidden, head, targets, entropy="value", strategy=strategy, backend="triton")
    assert all(torch.equal(x[rows], y) for x, y in zip(whole, ours, strict=True)), "a row depends on its batch"


def _true(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.cat([wide(hidden) @ wide(part).T for part in head.split(8192)], 1)
    logp = z.log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def product(hidden: Tensor, head: Tensor, times: int) -> Contender:
    """``times`` products of T x d with d x V, by chunks."""
    rows = chunk_rows(V, DEVICE)
    out = torch.empty(min(T, rows), V, device=DEVICE)
    wider = {} if DTYPE is torch.float32 else {"out_dtype": torch.float32}

    def run() -> None:
        for _ in range(times):
            for part in hidden.split(rows):
                torch.mm(part, head.T, out=out[: len(part)], **wider)

    return Contender(LIMIT, run)


def trl(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """TRL's own op, which gives the log-probs alone here; its default chunk of the vocabulary."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    logprobs: Tensor = ChunkedLogProbFunction.apply(
        hidden, head, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
    )[0]
    return logprobs


def peak_bytes(run: Any) -> int | None:
    """Beyond what is there before the call."""
    if DEVICE.type == "cpu":
        return None
    wait()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    wait()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("work", ["forward", "forward and backward", "forward and backward, frozen head"])
def test_token_logprobs(benchmark: Any, capsys: Any, work: str) -> None:
    backward, frozen = work != "forward", "frozen" in work
    hidden, head, targets = inputs()
    hidden.requires_grad_(backward), head.requires_grad_(backward and not frozen)
    slopes = normal(T, seed=2)
    with torch.no_grad():
        for strategy in ("chunked", "fused"):
            check(hidden, head, targets, strategy)

    def call(strategy: Any, backend: Any = "triton") -> Any:
        return finished(token_logprobs(hidden, head, targets, strategy=strategy, backend=backend).logprobs)

    def finished(logprobs: Tensor) -> Any:
        if not backward:
            return logprobs
        return torch.autograd.grad(logprobs, [x for x in (hidden, head) if x.requires_grad], slopes)

    contenders = [
        Contender("triton, chunked", lambda: call("chunked"), peer=False),
        Contender("triton, fused", lambda: call("fused"), peer=False),
        Contender("torch reference", lambda: call("chunked", "torch")),
        product(hidden.detach(), head.detach(), 1 if not backward else 3 if frozen else 4),
    ]
    missing = [f"{TRL}: left out, trl is not installed"] if find_spec("trl") is None else []
    if not missing:
        contenders.append(Contender(TRL, lambda: finished(trl(hidden, head, targets))))
    raced = race(contenders)
    figures = raced[0]
    notes = missing + [
        f"{c.name}: {used / 1e9:.2f} GB beyond the inputs" for c in contenders[:2] if (used := peak_bytes(c.run))
    ]
    goals = [Target("times as fast as TRL's, wall", ratio(figures, TRL, "wall"), 1.0, at_least=True)]
    goals.append(Target("of torch.mm, wall", ratio(figures, LIMIT, "wall"), 0.85, at_least=True))
    size = hidden.element_size()
    moved = size * (T + V) * D * (2 if backward else 1) + 12 * T
    case = f"{work}, d = {D}, V = {V}, T = {T}, {DTYPE}, {DEVICE}"
    report(benchmark, capsys, "token_logprobs", case, raced, moved, [] if backward else goals, notes)
    benchmark.pedantic(contenders[0].run, rounds=1 if DRY else 5, iterations=1)
