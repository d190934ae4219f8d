"""What a worker of ``vllm serve`` learns through ``--worker-extension-cls``: to load weights from a shared folder.

Imported by vLLM, in the server's processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


class MaestroWorker:
    """vLLM adds this class to the bases of its own worker."""

    model_runner: Any
    reload_weights: Callable[..., None]

    def maestro_reads(self, path: str) -> dict[str, bool]:
        """Whether this worker finds the file ``path``."""
        return {"reads": Path(path).is_file()}

    def maestro_load(self, folder: str) -> None:
        """Replaces the weights by those of the safetensors files in ``folder``."""
        self.reload_weights(weights_path=folder)
        repack_tied_head(self.model_runner.get_model())


def repack_tied_head(model: Any) -> None:
    """On the CPU vLLM multiplies with a packed copy of the head. A tied head is not loaded again, so it keeps the
    copy of the old weights."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and module.weight.device.type == "cpu":
            module.quant_method.process_weights_after_loading(module)
