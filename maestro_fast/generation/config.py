"""The config of what samples the responses: ``transformers``, or vLLM in the training process or behind a server.

generation: vllm
generation: {type: vllm, tensor_parallel: 2}
generation: {type: vllm_server, url: "http://host:8000"}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from maestro_fast.settings import Choice, SettingsError, rename_key, say_once

EngineDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ProbeConfig:
    """The comparison of log-probs between engine and trainer that follows every weight sync.

    Attributes:
        threshold: the largest difference in nats, on any token, that does not end the run; null chooses it by the
            engine's dtype: 0.002 for float32, 0.3 for float16 and for TF32, 2 for bfloat16.
        mean_threshold: the same for the mean over all tokens, which says more, since rounding is seldom large on many
            tokens at once; null chooses it by the engine's dtype: 0.0002, 0.03 and 0.15.
        sequences: the number of sequences that are compared, made of the first prompts of the data.
        tokens: the least number of tokens in a sequence; sequences get longer if the blocks of the prefix cache need
            that.
    """

    threshold: float | None = None
    mean_threshold: float | None = None
    sequences: int = 2
    tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("threshold", "mean_threshold"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: {value}, expected a positive number of nats")
        if self.sequences < 1:
            raise ValueError(f"sequences: {self.sequences}, expected at least 1")
        if self.tokens < 2:
            raise ValueError(f"tokens: {self.tokens}, expected at least 2")


@dataclass(frozen=True)
class TransformersConfig:
    """The policy itself samples, by the ``generate`` of transformers."""


@dataclass(frozen=True)
class ColocateConfig:
    """vLLM in the training process, with a copy of the policy on the same device.

    Attributes:
        tensor_parallel: the number of processes, each with its device, that share one copy; it divides the number of
            processes of the run.
        gpu_memory_share: the share of the device's memory (on the CPU: of the host's) that vLLM takes for weights and
            KV cache.
        kv_cache_gib: the size of the KV cache in GiB; null takes what ``gpu_memory_share`` leaves for it.
        sleep: the memory that vLLM gives back while the policy is trained, on CUDA devices only. 0 gives back nothing.
            1 drops the KV cache and moves the weights to host memory, where every process pins a copy. 2 drops both,
            and the weights are sent again; take 2, since a step sends new weights anyway.
        dtype: the dtype that vLLM computes in; "auto" takes the policy's, or that of the trainer's mixed precision.
        max_tokens: the largest number of tokens in a sequence, prompt and response together; null takes the longest
            prompt and ``sampling.max_new_tokens``, or 512 if that is more. vLLM refuses to start if its KV cache does
            not hold one such sequence.
        enforce_eager: turns compilation and CUDA graphs off, so that vLLM starts sooner and samples slower.
        probe: the comparison of log-probs that follows every weight sync.
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
        url: the address of the server, ``http://HOST:PORT``.
        weights: how weights reach the server: "nccl" sends them from GPU to GPU, and "folder" through files.
        folder: the folder for ``weights: folder``. Trainer and server see it under the same path, and no other run uses
            it.
        address: the address at which the server's workers reach the machine of the training's first process, for
            "nccl".
        port: the port of that address.
        timeout: the number of seconds that one call may take.
        retries: how often a call that was lost is repeated, after 1, 2, 4, ... seconds.
        start_timeout: the number of seconds to wait for a server that is starting.
        parts: the number of parts of a batch, which are all requested at once; it divides the number of prompts of a
            process. With more than one part, rewards see one part at a time, and judge it while the others are sampled.
        ahead: the number of generation batches that are sampled while an earlier one is judged and trained on, 0 or 1.
            With 1 a batch is sampled by the policy before the ``updates_per_batch`` steps of the batch before it, so
            ``loss.sampler_correction`` has to be on. A loss function of your own corrects for itself.
        probe: the comparison of log-probs that follows every weight sync.
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
    ahead: Literal[0, 1] = 0
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
        if self.ahead and self.parts > 1:
            raise ValueError(
                f"parts: {self.parts} with ahead: 1, expected 1: the rewards judge a batch while the next is sampled"
            )
        if self.start_timeout < 0:
            raise ValueError(f"start_timeout: {self.start_timeout}, expected at least 0 seconds")


GenerationConfig = TransformersConfig | ColocateConfig | ServerConfig


def _modernise(entry: dict[str, Any], path: str) -> None:
    """In release 0.1 ``type`` was called ``engine``, and vLLM's server was a ``mode`` of the engine vllm.

    Raises:
        SettingsError: the old mode is unknown, or a generator that shares the policy's devices is to sample ahead.
    """
    rename_key(entry, "engine", "type", path)
    if "mode" in entry and entry.get("type") == "vllm":
        types = {"colocate": "vllm", "server": "vllm_server"}
        mode = entry.pop("mode")
        if not isinstance(mode, str) or mode not in types:
            raise SettingsError(f"{path}.mode: {mode!r}, expected one of {', '.join(types)}")
        entry["type"] = types[mode]
        say_once(
            f"{path}.mode: is part of the type now: write `type: {types[mode]}` in place of `mode: {mode}`. "
            "The old key is read in this release and refused in the next."
        )
    own = entry.get("type", "transformers")
    if own in ("transformers", "vllm") and (ahead := entry.pop("ahead", 0)) != 0:
        raise SettingsError(
            f"{path}.ahead: {ahead!r} with type: {own}, which samples on the devices that train the policy, so neither "
            "can go on while the other works, expected type: vllm_server, or 0"
        )


GENERATION = Choice(
    {"transformers": TransformersConfig, "vllm": ColocateConfig, "vllm_server": ServerConfig},
    default="transformers",
    what="generator",
    modernise=_modernise,
)


def generation_config(entry: str | Mapping[str, Any] | GenerationConfig, path: str = "generation") -> GenerationConfig:
    """The config of a generator from its entry.

    Args:
        entry: "transformers", "vllm" or "vllm_server", or a mapping with that name under ``type`` and the generator's
            options.
        path: the dotted name of ``entry``, for messages.

    Raises:
        SettingsError: an unknown type or option.
    """
    found: GenerationConfig = GENERATION.build(entry, path)
    return found
