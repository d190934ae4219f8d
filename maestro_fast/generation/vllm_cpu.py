"""What vLLM 0.32 needs on the CPU, and only there, to serve a policy that is being trained in the same process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def threads_kept() -> Iterator[None]:
    """vLLM's worker replaces ``torch.set_num_threads`` by a function that does nothing; the trainer keeps its own."""
    own = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = own


def repack_tied_head(model: Any) -> None:
    """Makes a tied head see new weights: vLLM keeps a packed copy of them for its matrix product.

    Reloading renews the copies of every layer whose weights it loads. A tied head loads none, so it would go on with
    those of the first load.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
