"""What a worker of ``vllm serve`` learns through ``--worker-extension-cls``: to load weights from a shared folder.

Imported by vLLM, in the server's processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from maestro_fast.generation.vllm_cpu import repack_tied_head


class MaestroWorker:
    """vLLM adds this class to the bases of its own worker."""

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
