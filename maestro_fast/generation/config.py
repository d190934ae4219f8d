"""Which generator samples the responses: ``vllm``, or ``{engine: vllm, mode: colocate, tensor_parallel: 2, ...}``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from maestro_fast.settings import SettingsError, build

EngineDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ProbeConfig:
    """The comparison of log-probs between engine and trainer that follows every weight sync.

    Attributes:
        threshold: in nats; a larger difference on any token ends the run. None: by the engine's dtype, see
            ``training.weight_sync``.
        sequences: that are compared, made of the first prompts of the data.
        tokens: of each, at least; more where the prefix cache keeps larger blocks.
    """

    threshold: float | None = None
    sequences: int = 2
    tokens: int = 64

    def __post_init__(self) -> None:
        if self.threshold is not None and not self.threshold > 0:
            raise ValueError(f"threshold: {self.threshold}, expected a positive number of nats")
        if self.sequences < 1:
            raise ValueError(f"sequences: {self.sequences}, expected at least 1")
        if self.tokens < 2:
            raise ValueError(f"tokens: {self.tokens}, expected at least 2")


@dataclass(frozen=True)
class TransformersConfig:
    """transformers' own ``generate``, with the policy itself."""


@dataclass(frozen=True)
class ColocateConfig:
    """vLLM in the training process, with a copy of the policy on the same device.

    Attributes:
        tensor_parallel: processes, each with its device, that share one copy; divides the number of processes.
        gpu_memory_share: of the device's memory (on the CPU: of the host's) that vLLM takes for weights and KV cache.
        kv_cache_gib: size of the KV cache, in place of what that share leaves for it.
        sleep: what vLLM gives back while the policy is trained: 0 nothing, 1 the KV cache and the weights, which wait
            in host memory, 2 the KV cache and the weights, which are sent again. CUDA devices only.
        dtype: that vLLM computes in; "auto": the policy's, or that of the trainer's mixed precision.
        max_tokens: of a sequence, prompt and response together; None: the model's positions.
        enforce_eager: no compilation and no CUDA graphs: starts sooner, samples slower.
        probe: see ``ProbeConfig``.
    """

    tensor_parallel: int = 1
    gpu_memory_share: float = 0.4
    kv_cache_gib: float | None = None
    sleep: Literal[0, 1, 2] = 0
    dtype: EngineDtype = "auto"
    max_tokens: int | None = None
    enforce_eager: bool = False
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1:
            raise ValueError(f"tensor_parallel: {self.tensor_parallel}, expected at least 1")
        if not 0 < self.gpu_memory_share < 1:
            raise ValueError(f"gpu_memory_share: {self.gpu_memory_share}, expected a share between 0 and 1")
        if self.kv_cache_gib is not None and not self.kv_cache_gib > 0:
            raise ValueError(f"kv_cache_gib: {self.kv_cache_gib}, expected a positive number")
        if self.max_tokens is not None and self.max_tokens < 3:
            raise ValueError(f"max_tokens: {self.max_tokens}, expected at least 3")


@dataclass(frozen=True)
class ServerConfig:
    """A vLLM server that is running, on other devices or machines than the training.

    Attributes:
        url: of the server, ``http://HOST:PORT``.
        weights: the way of the weights: "nccl" from GPU to GPU, "folder" through files.
        folder: for "folder": shared by trainer and server under one path, and used by this run alone.
        address, port: for "nccl": where the server's workers reach the machine of the training's first process.
        timeout: seconds that one call may take.
        retries: how often a call is repeated that was lost, after 1, 2, 4, ... seconds.
        start_timeout: seconds to wait for a server that is starting.
        parts: that a batch is asked for in, all at once; a divisor of the prompts of a process. With more than one, the
            rewards judge those that have come in while the others are sampled, and see one part at a time.
        probe: see ``ProbeConfig``.
    """

    url: str
    weights: Literal["nccl", "folder"] = "nccl"
    folder: str | None = None
    address: str = "127.0.0.1"
    port: int = 29600
    timeout: float = 600.0
    retries: int = 4
    start_timeout: float = 600.0
    parts: int = 1
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self) -> None:
        if (self.weights == "folder") != (self.folder is not None):
            raise ValueError(f"folder: {self.folder!r} with weights: {self.weights}, expected one for folder alone")
        if not self.timeout > 0:
            raise ValueError(f"timeout: {self.timeout}, expected a positive number of seconds")
        if self.retries < 0:
            raise ValueError(f"retries: {self.retries}, expected at least 0")
        if self.parts < 1:
            raise ValueError(f"parts: {self.parts}, expected at least 1")
        if self.start_timeout < 0:
            raise ValueError(f"start_timeout: {self.start_timeout}, expected at least 0 seconds")


GenerationConfig = TransformersConfig | ColocateConfig | ServerConfig
MODES: dict[str, type[ColocateConfig | ServerConfig]] = {"colocate": ColocateConfig, "server": ServerConfig}


def generation_config(entry: str | Mapping[str, Any], path: str = "generation") -> GenerationConfig:
    """The config of a generator by its engine's name, and for vLLM its mode.

    Args:
        entry: ``transformers`` or ``vllm``, or a mapping with that name under ``engine`` and the engine's options.
        path: dotted name of ``entry``, for messages.

    Raises:
        SettingsError: an unknown engine, mode or option.
    """
    if not isinstance(entry, str | Mapping):
        raise SettingsError(
            f"{path}: got {entry!r}, expected the name of an engine or a mapping with it under 'engine'"
        )
    options = {"engine": entry} if isinstance(entry, str) else dict(entry)
    engine = options.pop("engine", "transformers")
    if engine == "transformers":
        return build(TransformersConfig, options, path)
    if engine != "vllm":
        raise SettingsError(f"{path}.engine: {engine!r}, expected one of transformers, vllm")
    mode = options.pop("mode", "colocate")
    if not isinstance(mode, str) or mode not in MODES:
        raise SettingsError(f"{path}.mode: {mode!r}, expected one of {', '.join(MODES)}")
    config: GenerationConfig = build(MODES[mode], options, path)
    return config
