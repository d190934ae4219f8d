"""What the benchmarks of the head pass share: shapes, inputs, peers, the truth in float64, memory.

The peers are called as their trainers call them, with their own defaults. Liger's op of scaled cross entropy takes its
CuTe kernel on sm_90, which needs nvidia-cutlass-dsl. **Not run yet**, since they need a CUDA device, so written from
their sources alone: verl 0.9.1, cut-cross-entropy 25.1.1, that CuTe kernel.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu_gate import gate, wide
from bench.gpu_race import DEVICE, DRY, Contender, wait
from maestro_fast.ops.head_chunks import chunk_rows

DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16  # the interpreter is wrong in bfloat16
ROUNDING = 1e-5 if DTYPE is torch.float32 else 2e-3  # of a gradient, beside its largest element
GATED = 64  # rows, and tokens of the vocabulary, at which gradients are compared
TRL, VERL, CCE = "TRL's chunked op", "verl's Triton kernel", "cut-cross-entropy"
LIGER, LIGER_CHUNKED = "Liger's scaled cross entropy", "Liger's chunked log-probs"
_SLICE = 180  # seconds of the clock for all races of a run, of the 470 that it may take


class Shape(NamedTuple):
    d: int
    V: int
    T: int

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @staticmethod
    def parse(text: str) -> Shape:
        """
        Raises:
            ValueError: not of the form dxVxT.
        """
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
            raise ValueError(f"shape of a head: {text!r}, expected dxVxT, e.g. 4096x151936x16384")
        return Shape(*map(int, text.split("x")))


SHAPES = [Shape(16, 70, 9)] if DRY else [Shape(4096, 151936, 16384), Shape(1024, 151936, 16384)]


def clock(request: Any) -> float:
    """Seconds for a race: the run's tests share what there is, so that a slice ends."""
    return min(25.0, _SLICE / len(request.session.items))


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, d], head [V, d], targets [T]: logits of a standard deviation of about 1."""
    torch.manual_seed(0)
    hidden, head = (torch.randn(n, shape.d, device=DEVICE, dtype=DTYPE) for n in (shape.T, shape.V))
    targets = torch.randint(0, shape.V, (shape.T,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return hidden, head / shape.d**0.5, targets


class Truth(NamedTuple):
    """float64 [T]."""

    logprobs: Tensor
    entropies: Tensor
    log_z: Tensor


@cache
def truth(shape: Shape) -> Truth:
    """Of ``inputs``, in chunks of rows that fit."""
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
    """dL/dhidden and dL/dhead in float64 from dL/dlog p [T], where ``picked`` looks."""
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
    """The last rows, and the tokens that are their targets, so that a gradient is not all noise."""
    return [dhidden[-GATED:], *([] if dhead is None else [dhead[targets[-GATED:]]])]


def gate_gradients(ours: list[Tensor], plain: list[Tensor], true: list[Tensor], what: str) -> None:
    """See ``gate``; as shares of the largest element."""
    for name, *values in zip(("dhidden", "dhead"), ours, plain, true, strict=False):
        scale = values[-1].abs().max()
        gate(*(x.double() / scale for x in values), epsilon=ROUNDING, what=f"{what}, {name}")


def worst(found: list[Tensor], true: list[Tensor]) -> float:
    """The largest error, beside the largest element of each where that is a gradient."""
    return max(
        ((x.double() - y).abs().max() / (y.abs().max() if y.ndim == 2 else 1)).item()
        for x, y in zip(found, true, strict=True)
    )


def products(shape: Shape, kinds: str) -> Contender:
    """The limit: torch.mm of the shapes of the head's products, by chunks of as many rows as ours, into float32.

    Args:
        kinds: a letter for each, "x" logits, "h" gradient of the states, "w" of the head.
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
    """Beyond what is there before the call, and what it returns."""
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
    """Error and memory of each by name; a peer that fails has none, and the race says why."""
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


Logprobs = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Peer:
    """``load`` imports it, and gives what computes (log-probs, entropies) of (hidden, head, targets, entropy)."""

    name: str
    package: str
    load: Callable[[], Logprobs]
    entropy: bool
    cuda_only: bool


def available(peer: Peer) -> str | None:
    """Why it cannot take part, or None."""
    if find_spec(peer.package) is None:
        return f"{peer.package} is not installed"
    if peer.cuda_only and DEVICE.type == "cpu":
        return "it needs a CUDA device"
    try:
        peer.load()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def peers(*, entropy: bool = False) -> tuple[dict[str, Logprobs], list[str]]:
    """Those that are here, by name, and a line for each that is not."""
    reasons = {p: "it has no entropy" if entropy and not p.entropy else available(p) for p in PEERS}
    here = {p.name: p.load() for p, reason in reasons.items() if reason is None}
    return here, [f"{p.name}: skipped, {reason}" for p, reason in reasons.items() if reason is not None]


def _trl() -> Logprobs:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def run(hidden: Tensor, head: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        wanted = ("entropy",) if entropy else ()
        given = hidden, head, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, wanted
        logprobs, entropies, *_ = ChunkedLogProbFunction.apply(*given)
        return logprobs, entropies

    return run


def _verl() -> Logprobs:
    """Its packages' own __init__ import Ray and tensordict, which its kernel does without."""
    spec = find_spec("verl")
    assert spec is not None and spec.submodule_search_locations
    for name in ("verl", "verl.utils"):
        if name not in sys.modules:
            package = ModuleType(name)
            package.__path__ = [str(Path(spec.submodule_search_locations[0], *name.split(".")[1:]))]
            sys.modules[name] = package
    op = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return lambda hidden, head, targets, entropy: tuple(op(hidden, head, targets, 1.0, "none"))


def _liger() -> Logprobs:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as op

    def run(hidden: Tensor, head: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        found = op.apply(hidden, head, targets, return_entropy=entropy)
        return (-found[0], found[1]) if entropy else (-found, None)

    return run


def _liger_chunked() -> Logprobs:
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase as op

    return lambda hidden, head, targets, entropy: (op.chunk_forward(hidden[None], head, targets[None])[0], None)


def _cce() -> Logprobs:
    from cut_cross_entropy import linear_cross_entropy as op

    return lambda hidden, head, targets, entropy: (-op(hidden, head, targets, reduction="none"), None)


PEERS = [
    Peer(TRL, "trl", _trl, entropy=True, cuda_only=False),
    Peer(VERL, "verl", _verl, entropy=True, cuda_only=True),
    Peer(LIGER, "liger_kernel", _liger, entropy=True, cuda_only=False),
    Peer(LIGER_CHUNKED, "liger_kernel", _liger_chunked, entropy=False, cuda_only=False),
    Peer(CCE, "cut_cross_entropy", _cce, entropy=False, cuda_only=True),
]
