"""What runs inside vLLM's workers: loading weights from a shared folder, and a repair for vLLM 0.32 on the CPU.

``vllm serve --worker-extension-cls maestro_fast.generation.vllm_worker.MaestroWorker`` imports this file by its name in
the server's processes, so neither the file nor the class can be renamed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


class MaestroWorker:
    """vLLM adds this class to the bases of its own worker.

    The trainer then calls the methods over HTTP, by the server's route ``/collective_rpc``.
    """

    device: Any
    model_runner: Any
    reload_weights: Callable[..., None]

    def maestro_reads(self, path: str) -> dict[str, bool]:
        """Whether this worker finds the file ``path``."""
        return {"reads": Path(path).is_file()}

    def maestro_load(self, folder: str) -> None:
        """Replaces the weights by those of the safetensors files in ``folder``."""
        self.reload_weights(weights_path=folder)
        if self.device.type == "cpu":
            repack_tied_head(self.model_runner.get_model())


def repack_tied_head(model: Any) -> None:
    """Makes a tied head use the new weights, on the CPU.

    There vLLM computes with a packed copy of every layer's weights, and renews the copy when it loads that layer. A
    tied head loads no weights of its own, so without this call it would keep the copy that it made at the start.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
