"""The peers of the head pass: log-probs, and entropies, from hidden states and a head, each by its own code.

They are called as their trainers call them, with their own defaults. Liger's op of scaled cross entropy takes its CuTe
kernel on sm_90, which needs nvidia-cutlass-dsl. **Not run yet**, since they need a CUDA device, so written from their
sources alone: verl 0.9.1, cut-cross-entropy 25.1.1, that CuTe kernel.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from torch import Tensor

from bench.gpu_race import DEVICE, HEAD_PEERS

TRL, VERL, CCE = "TRL's chunked op", "verl's Triton kernel", "cut-cross-entropy"
LIGER, LIGER_CHUNKED = "Liger's scaled cross entropy", "Liger's chunked log-probs"

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
    if not HEAD_PEERS:
        return "none are wanted"
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


@contextmanager
def _stand_ins(*names: str) -> Iterator[None]:
    """Empty modules for those that are not installed, where an import asks for more than what is called needs."""
    missing = [name for name in names if find_spec(name) is None]
    for name in missing:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__["__getattr__"] = _any_class
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def _any_class(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return object


def _trl() -> Logprobs:
    import accelerate  # noqa: F401  # these look for datasets and pandas themselves
    import transformers  # noqa: F401

    with _stand_ins("datasets", "pandas"):
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
