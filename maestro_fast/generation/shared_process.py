"""Keeps vLLM and the trainer, which share a process, from changing each other's global settings.

vLLM seeds every random generator when it starts, and on the CPU it samples with torch's default one. On CUDA devices it
also sets torch to one thread and the precision of float32 products to "highest". The trainer would then collate, judge
and save on one core, and ``trainer.tf32`` would do nothing. vLLM in turn compiles its model under its own settings, and
torch compiles it again where others hold. So each of the two finds its own settings whenever it runs.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch


class TorchSettings(NamedTuple):
    """Torch's number of threads and the precision of float32 matrix products.

    Attributes:
        threads: the number of threads of one operation on the CPU.
        precision: what ``torch.set_float32_matmul_precision`` sets; None where the settings of the backends contradict
            each other, so that there is no one precision.
        cuda, mkldnn: the precision in these backends, as ``torch.backends.cuda.matmul.fp32_precision`` has it.
    """

    threads: int
    precision: str | None
    cuda: str
    mkldnn: str

    @staticmethod
    def now() -> TorchSettings:
        try:
            precision = torch.get_float32_matmul_precision()
        except RuntimeError:
            precision = None
        backends: Any = torch.backends
        return TorchSettings(
            torch.get_num_threads(),
            precision,
            backends.cuda.matmul.fp32_precision,
            backends.mkldnn.matmul.fp32_precision,
        )

    def apply(self) -> None:
        if self == TorchSettings.now():
            return
        torch.set_num_threads(self.threads)
        if self.precision is not None:  # This sets the backends too, so theirs come after it.
            torch.set_float32_matmul_precision(self.precision)
        backends: Any = torch.backends
        backends.cuda.matmul.fp32_precision = self.cuda
        backends.mkldnn.matmul.fp32_precision = self.mkldnn


class SharedProcess:
    """Gives vLLM its own settings for as long as one of its calls lasts, and then the trainer its own."""

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: the device of this process's policy, whose random generator is kept, too.
        """
        self._cuda = [device] if device.type == "cuda" else []
        self._vllms: TorchSettings | None = None  # as its last call left them

    @contextlib.contextmanager
    def of_vllm(self) -> Iterator[None]:
        """Runs the body with vLLM's settings; random generators and settings are afterwards as they were before.

        In its first call vLLM finds the trainer's settings. On the CPU it replaces ``torch.set_num_threads`` by a
        function that does nothing, so that function is put back as well.
        """
        own, set_num_threads = TorchSettings.now(), torch.set_num_threads
        python, numpy = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=self._cuda):
                if self._vllms is not None:
                    self._vllms.apply()
                yield
        finally:
            torch.set_num_threads = set_num_threads
            self._vllms = TorchSettings.now()
            own.apply()
            random.setstate(python)
            np.random.set_state(numpy)
