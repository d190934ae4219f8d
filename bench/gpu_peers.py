"""The peers of the head pass: each computes log-probs, and some entropies too, from hidden states and the LM head.

Each peer is called as its own trainer calls it, with its own defaults. Liger's scaled cross entropy uses its CuTe
kernel on sm_90, which needs nvidia-cutlass-dsl. The calls of verl 0.9.1, of cut-cross-entropy 25.1.1 and of that CuTe
kernel need a CUDA device. They were written from the sources alone and have **not been run yet**.
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
    """One op of another package.

    Attributes:
        name: The peer's name in the tables.
        package: The package that has to be installed.
        load: A function that imports the op. It returns a function of (hidden, head, targets, entropy) that gives
            (log-probs, entropies).
        entropy: Whether the op computes entropies.
        cuda_only: Whether the op needs a CUDA device.
    """

    name: str
    package: str
    load: Callable[[], Logprobs]
    entropy: bool
    cuda_only: bool


def available(peer: Peer) -> str | None:
    """The reason why the peer cannot take part, or None if it can."""
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
    """The peers that can take part, by name, and a line for each of the others with the reason."""
    reasons = {p: "it has no entropy" if entropy and not p.entropy else available(p) for p in PEERS}
    here = {p.name: p.load() for p, reason in reasons.items() if reason is None}
    return here, [f"{p.name}: skipped, {reason}" for p, reason in reasons.items() if reason is not None]


@contextmanager
def _stand_ins(*names: str) -> Iterator[None]:
    """Puts empty modules in the place of packages that are not installed, while a peer is imported.

    Peers import them at the top of a file, and the op that is called does not use them.
    """
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
    """Answers ``from package import name`` with a class, for every name that is not special."""
    if name.startswith("__"):
        raise AttributeError(name)
    return object


def _trl() -> Logprobs:
    import accelerate  # noqa: F401  # imported before the stand-ins: both look for datasets and pandas themselves
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
    """Imports verl's kernel without running the ``__init__`` of its packages.

    They import Ray and tensordict, which the kernel does not use.
    """
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
