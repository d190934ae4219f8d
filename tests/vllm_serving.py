"""A real vLLM server on 127.0.0.1, on the CPU, with a tiny model."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from maestro_fast.generation.http import HttpClient, ServerGone
from maestro_fast.generation.weight_transfer import WORKER
from tests.tiny import tiny_checkpoint

START_SECONDS = 400  # one that imports vLLM three times, on a busy machine; 40 on an idle one
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # else the first log-probs wait a minute for a compiler
}


class Serving:
    """
    Attributes:
        model: the checkpoint it serves, tied, the case that vLLM on the CPU has trouble with.
        url: of the server.
    """

    def __init__(self, folder: Path) -> None:
        self.model = tiny_checkpoint(folder / "model", tied=True, head_dim=32)
        self._log = folder / "log.txt"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Serving:
        self.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.kill()

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        # vllm serve, in the form that vllm-cpu 0.32 can run: its command looks for a package of the name vllm
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256"]
        command += ["--block-size", "32", "--max-num-seqs", "64", "--enforce-eager"]
        command += ["--logprobs-mode", "processed_logprobs", "--worker-extension-cls", WORKER]
        with self._log.open("wb") as log:
            environment = os.environ | ENVIRONMENT
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self._wait()

    def _wait(self) -> None:
        client, end = HttpClient(self.url, timeout=5, retries=0), time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.runs:
            try:
                client.get("/health")
                return
            except ServerGone:
                time.sleep(0.5)
        self.kill()
        raise RuntimeError(f"the vLLM server did not start:\n{self._log.read_text(errors='replace')[-5000:]}")

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """Ends it and every process it started, at once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
