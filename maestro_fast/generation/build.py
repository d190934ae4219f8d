"""From the config of a generator to the engine that serves it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from maestro_fast.generation.config import ColocateConfig, GenerationConfig, ServerConfig, TransformersConfig
from maestro_fast.generation.http import HttpClient
from maestro_fast.generation.nccl_transfer import NcclTransfer
from maestro_fast.generation.sampling import Engine, SamplingConfig
from maestro_fast.generation.vllm import VllmEngine, check_colocate
from maestro_fast.generation.vllm_server import VllmServer
from maestro_fast.generation.weight_transfer import FolderTransfer, WeightTransfer
from maestro_fast.settings import SettingsError

# Tokens for two blocks of the prefix cache, which have 16 tokens on CUDA devices and 128 on the CPU, and some more.
PROBE_ROOM = 512


@dataclass(frozen=True)
class Served:
    """The policy that an engine serves, and how it samples.

    Attributes:
        path: the policy's checkpoint, a local directory or a hub name, where the engine reads the model's sizes.
        tokenizer: the policy's tokenizer.
        sampling: how responses are sampled.
        stop_ids: every token id that ends a response.
        dtype: the dtype that the trainer computes in.
        device: the device of this process's policy.
        processes: the number of processes of the run.
        longest_prompt: the number of tokens of the longest prompt; None where that is not known.
        positions: the number of positions that the policy has; None where it names none.
    """

    path: str
    tokenizer: PreTrainedTokenizerBase
    sampling: SamplingConfig
    stop_ids: frozenset[int]
    dtype: torch.dtype
    device: torch.device
    processes: int = 1
    longest_prompt: int | None = None
    positions: int | None = None


def check_generation(config: GenerationConfig, device: torch.device, processes: int) -> None:
    """Refuses a config that cannot be served here, before a model is loaded.

    Raises:
        SettingsError: NCCL is to send weights that are not on a GPU, or ``check_colocate`` raised it.
        ImportError: vLLM is missing or broken.
    """
    if isinstance(config, ServerConfig):
        if config.weights == "nccl" and device.type != "cuda":
            raise SettingsError(f"generation.weights: nccl, but the policy is on {device.type}, expected folder")
    elif not isinstance(config, TransformersConfig):
        check_colocate(config, device, processes)


def build_engine(config: GenerationConfig, served: Served) -> Engine | None:
    """Starts the engine with the weights of the checkpoint. Returns None if the policy samples for itself."""
    if isinstance(config, TransformersConfig):
        return None
    if isinstance(config, ServerConfig):
        return _server(config, served)
    return VllmEngine(
        served.path,
        served.tokenizer,
        served.sampling,
        replace(config, max_tokens=longest_sequence(config, served)),
        stop_ids=served.stop_ids,
        dtype=served.dtype,
        device=served.device,
        processes=served.processes,
    )


def longest_sequence(config: ColocateConfig, served: Served) -> int | None:
    """The largest number of tokens in a sequence that vLLM has to have room for; None leaves it to vLLM.

    vLLM starts only if its KV cache holds one sequence of this length. By default that would be a sequence as long as
    the model has positions, which takes 16 GiB for an 8B model with 131,072 of them. A run needs its longest prompt and
    response, and the sequences of the probe need two blocks of the prefix cache.
    """
    if config.max_tokens is not None or served.longest_prompt is None:
        return config.max_tokens
    longest = served.longest_prompt + served.sampling.max_new_tokens
    if served.positions is not None and longest > served.positions:
        return None  # The run then ends with a sentence about what vLLM has room for.
    wanted = max(longest, config.probe.tokens + 1, PROBE_ROOM)
    return wanted if served.positions is None else min(wanted, served.positions)


def _server(config: ServerConfig, served: Served) -> VllmServer:
    client = HttpClient(config.url, timeout=config.timeout, retries=config.retries)
    transfer: WeightTransfer
    if config.folder is not None:
        transfer = FolderTransfer(client, Path(config.folder))
    else:
        transfer = NcclTransfer(client, config.address, config.port)
    return VllmServer(
        client,
        transfer,
        served.tokenizer,
        served.sampling,
        served.stop_ids,
        processes=served.processes,
        start_timeout=config.start_timeout,
        concurrent_parts=config.parts,
        ahead=config.ahead,
    )
