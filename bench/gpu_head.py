"""What the benchmarks of the head share: shapes, inputs, the truth in float64, errors and memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu_gate import gate, wide
from bench.gpu_race import DEVICE, DRY, Contender, wait
from maestro_fast.ops.head import chunk_rows

DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16  # the interpreter is wrong in bfloat16
ROUNDING = 1e-5 if DTYPE is torch.float32 else 2e-3  # the rounding of a gradient, as a share of its largest element
GATED = 64  # rows, and tokens of the vocabulary, at which gradients are compared
RACE = 10.0  # seconds that one race takes


class Shape(NamedTuple):
    """The sizes of a head pass: the hidden size, the vocabulary and the number of tokens."""

    d: int
    V: int
    T: int

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @staticmethod
    def parse(text: str) -> Shape:
        """Reads a shape such as 4096x151936x16384.

        Raises:
            ValueError: the text does not have the form dxVxT.
        """
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
            raise ValueError(f"shape of a head: {text!r}, expected dxVxT, e.g. 4096x151936x16384")
        return Shape(*map(int, text.split("x")))


SHAPES = [Shape(16, 70, 9)] if DRY else [Shape(4096, 151936, 16384), Shape(1024, 151936, 16384)]


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, d], head [V, d] and targets [T], whose logits have a standard deviation of about 1."""
    torch.manual_seed(0)
    hidden, head = (torch.randn(n, shape.d, device=DEVICE, dtype=DTYPE) for n in (shape.T, shape.V))
    targets = torch.randint(0, shape.V, (shape.T,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return hidden, head / shape.d**0.5, targets


class Truth(NamedTuple):
    """Log-probs, entropies and logsumexp of every row, float64 [T]."""

    logprobs: Tensor
    entropies: Tensor
    log_z: Tensor


@cache
def truth(shape: Shape) -> Truth:
    """The truth for ``inputs``, computed in chunks of rows that fit into memory."""
    hidden, head, targets = inputs(shape)
    parts = [_true_rows(*case) for case in _chunks(hidden, targets, wide(head))]
    return Truth(*(torch.cat(x) for x in zip(*parts, strict=True)))


def _chunks(hidden: Tensor, targets: Tensor, head: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for states, ids in zip(hidden.split(1024), targets.split(1024), strict=True):
        yield wide(states), ids, head


def _true_rows(hidden: Tensor, targets: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = hidden @ head.T
    log_z = z.logsumexp(-1)
    picked = z.gather(1, targets[:, None])[:, 0]
    entropies = log_z - ((z - log_z[:, None]).exp_() * z).sum(-1)
    return picked - log_z, entropies, log_z


def true_gradients(shape: Shape, dlogprobs: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of dL/dhidden and dL/dhead that ``picked`` selects, in float64, from dL/dlog p [T]."""
    hidden, head, targets = inputs(shape)
    log_z, some = truth(shape).log_z, slice(-GATED, None)

    def dlogits(rows: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        p = (wide(hidden[rows]) @ weight.T - log_z[rows, None]).exp()
        return dlogprobs[rows, None] * ((targets[rows, None] == tokens).double() - p)

    weight = wide(head)
    dhidden = dlogits(some, torch.arange(shape.V, device=DEVICE), weight) @ weight
    tokens = targets[some]
    every = slice(None)
    return dhidden, dlogits(every, tokens, weight[tokens]).T @ wide(hidden)


def picked(targets: Tensor, dhidden: Tensor, dhead: Tensor | None) -> list[Tensor]:
    """Selects the last rows of dhidden, and the rows of dhead that belong to their targets.

    The gradients of other rows of the head are little more than noise.
    """
    return [dhidden[-GATED:], *([] if dhead is None else [dhead[targets[-GATED:]]])]


def gate_gradients(ours: list[Tensor], plain: list[Tensor], true: list[Tensor], what: str) -> None:
    """Checks gradients with ``gate``, as shares of their largest element."""
    for name, *values in zip(("dhidden", "dhead"), ours, plain, true, strict=False):
        scale = values[-1].abs().max()
        gate(*(x.double() / scale for x in values), epsilon=ROUNDING, what=f"{what}, {name}")


def worst(found: list[Tensor], true: list[Tensor]) -> float:
    """The largest error. The error of a gradient is a share of its largest element."""
    return max(
        ((x.double() - y).abs().max() / (y.abs().max() if y.ndim == 2 else 1)).item()
        for x, y in zip(found, true, strict=True)
    )


def products(shape: Shape, kinds: str) -> Contender:
    """The limit: torch.mm into float32 of the shapes of the head's products, in chunks of as many rows as ours.

    Args:
        shape: the sizes.
        kinds: a letter for each product: "x" is the logits, "h" the gradient of the states, "w" that of the head.
    """
    hidden, head, _ = inputs(shape)
    rows = min(shape.T, chunk_rows(shape.V, DEVICE))
    x, h = (torch.empty(rows, n, device=DEVICE) for n in (shape.V, shape.d))
    w, dlogits = torch.empty(shape.V, shape.d, device=DEVICE), torch.ones(rows, shape.V, device=DEVICE, dtype=DTYPE)
    wider = {} if DTYPE is torch.float32 else {"out_dtype": torch.float32}

    def run() -> None:
        for part in hidden.split(rows):
            n = len(part)
            for kind in kinds:
                a, b, out = {
                    "x": (part, head.T, x[:n]),
                    "h": (dlogits[:n], head, h[:n]),
                    "w": (dlogits[:n].T, part, w),
                }[kind]
                torch.mm(a, b, out=out, **wider)

    return Contender(f"{len(kinds)} torch.mm, the limit", run)


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """The memory that a call takes beyond what was there before and what it returns."""
    if DEVICE.type == "cpu":
        return None
    wait()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    returned = run()
    wait()
    mine = sum(x.numel() * x.element_size() for x in returned if isinstance(x, Tensor)) if returned is not None else 0
    return torch.cuda.max_memory_allocated() - before - mine


def measured(contenders: list[Contender], errors: Callable[[Any], float]) -> dict[str, dict[str, Any]]:
    """Error and memory of each contender, by name. A peer that fails has none, and the race says why."""
    found: dict[str, dict[str, Any]] = {"error": {}, "GB": {}}
    for c in contenders:
        try:
            found["error"][c.name] = f"{errors(c.run()):.1e}"
            used = peak_bytes(c.run)
        except Exception:
            if not c.peer:
                raise
        else:
            found["GB"][c.name] = "-" if used is None else f"{used / 1e9:.2f}"
    return found
