"""Samples with a vLLM server over HTTP. ``vllm serve`` runs on other GPUs or other machines than the training."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from maestro_fast.generation.http import HttpClient, ServerGone, ServerRefused
from maestro_fast.generation.sampling import SamplingConfig, completion_texts
from maestro_fast.generation.weight_transfer import WeightTransfer, serve_command
from maestro_fast.records import Prompts, Rollouts

logger = logging.getLogger(__name__)
MOST_STOPS = 4  # The API that vLLM serves takes at most this many stop strings in a request.
PARALLEL_CALLS = 128  # Each call waits for the responses to one group; the server batches all that it has received.


class VllmServer:
    """An ``Engine`` behind HTTP.

    Prompts and responses travel as token ids together with their log-probs, so nothing is tokenised twice. A call that
    fails is retried where that is safe. When the server is gone for good, the error says what was tried. The run can
    then be resumed with a new server, which first gets the current weights.
    """

    def __init__(
        self,
        client: HttpClient,
        transfer: WeightTransfer,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig,
        stop_ids: Iterable[int],
        *,
        processes: int = 1,
        start_timeout: float = 600.0,
        concurrent_parts: int = 1,
        ahead: int = 0,
    ) -> None:
        """
        Args:
            client: The client that calls the server.
            transfer: The way in which weights are sent to the server.
            tokenizer: The tokenizer that decodes the sampled tokens.
            sampling: The sampling options.
            stop_ids: The token ids that end a response, see ``generation.transformers.stop_ids``.
            processes: The number of processes of the run. Each has an engine and samples for itself; the first one
                sends the weights.
            start_timeout: The number of seconds to wait for a server that is starting.
            concurrent_parts, ahead: See ``Engine``.

        Raises:
            ServerGone: No server answers.
            ValueError: There are too many stop strings, or the server was started without an option that is needed; the
                message shows the right command.
        """
        if len(sampling.stop) > MOST_STOPS:
            raise ValueError(f"sampling.stop: {len(sampling.stop)} strings, a vLLM server takes {MOST_STOPS} at most")
        self.client, self.transfer = client, transfer
        self.tokenizer, self.sampling = tokenizer, sampling
        self._stop_ids = sorted(stop_ids)
        self._version: str | None = None  # the name of the weights that were loaded last
        self._processes = processes
        self.concurrent_parts, self.ahead = concurrent_parts, ahead
        _wait(client, start_timeout)
        self._model = client.get("/v1/models")["data"][0]["id"]
        self.dtype, self.max_tokens, self.cache_block = _sizes(client)
        self._check_logprobs_mode()
        transfer.check()

    def sample(self, prompts: Prompts, *, seed: int) -> Rollouts:
        """See ``Engine.sample``.

        Raises:
            ValueError: A prompt is too long for the server's ``--max-model-len``.
            ServerGone: The server does not answer, or no longer holds the weights that were loaded.
        """
        groups = [(ids, len(list(same))) for ids, same in groupby(prompts.token_ids)]
        self._check_lengths(ids for ids, _ in groups)
        bodies = [self._group_body(ids, n, _group_seed(seed, i)) for i, (ids, n) in enumerate(groups)]
        answers = [self._response(choice) for choices in self._parallel(bodies) for choice in choices]
        self._check_version()
        completion_ids = [answer.token_ids for answer in answers]
        completions = completion_texts(
            self.tokenizer,
            prompts,
            completion_ids,
            skip_special_tokens=self.sampling.skip_special_tokens,
            stop_ids=self._stop_ids,
        )
        truncated_B = torch.tensor([answer.truncated for answer in answers])
        logprobs_C = torch.tensor([value for answer in answers for value in answer.logprobs], dtype=torch.float32)
        return Rollouts(prompts, completion_ids, completions, truncated_B, logprobs_C)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See ``Engine.load_weights``. A failure may leave the server without usable weights until they are sent again.

        Raises:
            ServerGone, ServerRefused: The server did not take the weights.
        """
        self._version = None
        self._from_first(None)  # waits until the requests of all processes have been answered
        if self._is_first:
            self.transfer.send(weights)
            version = f"maestro_fast-{uuid.uuid4().hex}"
            self.client.post("/update_weight_version", {"new_version": version}, repeat=True)
        else:
            version = ""
            for _ in weights:  # All processes must iterate, because each step may gather a sharded weight.
                pass
        self._version = self._from_first(version)

    def reset_prefix_cache(self) -> None:
        """See ``Engine.reset_prefix_cache``."""
        if self._is_first:
            self.client.post("/reset_prefix_cache", repeat=True, accept=_reset)
        self._from_first(None)

    @property
    def _is_first(self) -> bool:
        return self._processes == 1 or torch.distributed.get_rank() == 0

    def _from_first(self, value: Any) -> Any:
        """Returns the first process's ``value`` in all processes, and waits until all of them are here."""
        if self._processes == 1:
            return value
        held = [value]
        torch.distributed.broadcast_object_list(held, src=0)
        torch.distributed.barrier()
        return held[0]

    def prompt_logprobs(self, token_ids: list[list[int]]) -> list[Tensor]:
        """See ``Engine.prompt_logprobs``.

        A request for prompt log-probs does not read the prefix cache. So every token that follows the cached blocks is
        scored by a request of its own, which reads the cache and asks for the log-prob of this one next token.
        """
        whole = self._parallel([self._body(ids, max_tokens=1, prompt_logprobs=0) for ids in token_ids])
        firsts = [self._first_behind_cache(ids) for ids in token_ids]
        bodies = [
            self._body(ids[:i], max_tokens=1, logprob_token_ids=[ids[i]], return_tokens_as_token_ids=True)
            for ids, first in zip(token_ids, firsts, strict=True)
            for i in range(first, len(ids))
        ]
        read = iter(
            choice["logprobs"]["top_logprobs"][0][f"token_id:{body['logprob_token_ids'][0]}"]
            for body, (choice,) in zip(bodies, self._parallel(bodies), strict=True)
        )
        scores = []
        for ids, first, (choice,) in zip(token_ids, firsts, whole, strict=True):
            past = zip(ids[1:first], choice["prompt_logprobs"][1:first], strict=True)
            values = [entry[str(token)]["logprob"] for token, entry in past] + [next(read) for _ in ids[first:]]
            scores.append(torch.tensor(values, dtype=torch.float32))
        return scores

    def _first_behind_cache(self, ids: list[int]) -> int:
        """The position of the first token whose own request reads all whole blocks of the sequence from the cache.

        It is ``len(ids)`` if the sequence is too short for a block. A request always computes its last token, even if
        the cache holds it.
        """
        blocks = (len(ids) - 2) // self.cache_block if self.cache_block else 0
        return blocks * self.cache_block + 1 if blocks else len(ids)

    def sleep(self) -> bool:
        """See ``Engine.sleep``. The server has its own memory, so there is nothing to free."""
        return True

    def close(self) -> None:
        """See ``Engine.close``. The server keeps running."""
        if self._is_first:
            self.transfer.close()

    def _body(self, prompt: list[int], **settings: Any) -> dict[str, Any]:
        """The body of a request. It names every option, since the server's defaults come from its checkpoint."""
        return {
            "model": self._model,
            "prompt": [prompt],
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logprobs": 0,
            "return_token_ids": True,
            **settings,
        }

    def _group_body(self, prompt: list[int], n: int, seed: int) -> dict[str, Any]:
        sampling = self.sampling
        return self._body(
            prompt,
            n=n,
            seed=seed,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop=sampling.stop,
            skip_special_tokens=False,  # A stop string may be a special token.
            ignore_eos=True,  # The ids that end a response are all in stop_token_ids.
            stop_token_ids=self._stop_ids,
        )

    def _parallel(self, bodies: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Sends all requests at once, and returns the choices of each in the order of the requests."""
        with ThreadPoolExecutor(max(1, min(len(bodies), PARALLEL_CALLS))) as pool:
            return list(pool.map(self._choices, bodies))

    def _choices(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        answer = self.client.post("/v1/completions", body, repeat=True, accept=_unfinished)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != body.get("n", 1):
            raise ServerRefused(f"vLLM server {self.client.url}: {len(choices)} responses for {body.get('n', 1)}", 200)
        return choices

    def _response(self, choice: dict[str, Any]) -> _Response:
        ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not ids or logprobs is None or len(ids) != len(logprobs):
            raise ValueError(
                f"vLLM server {self.client.url}: a response with {len(ids or [])} token ids and "
                f"{len(logprobs or [])} log-probs, expected one of each per token; its vLLM must be 0.32 or newer"
            )
        return _Response(ids, logprobs, choice["finish_reason"] == "length")

    def _check_lengths(self, prompts: Iterable[list[int]]) -> None:
        longest = max(map(len, prompts))
        if longest + self.sampling.max_new_tokens > self.max_tokens:
            raise ValueError(
                f"sampling.max_new_tokens: {self.sampling.max_new_tokens} behind a prompt of {longest} tokens, but the "
                f"vLLM server {self.client.url} was started with --max-model-len {self.max_tokens}"
            )

    def _check_logprobs_mode(self) -> None:
        """Checks that the server's log-probs are those of the distribution that it samples from.

        Two requests allow one token each. In the distribution that is sampled from, both log-probs are then 0. In the
        model's own distribution, two different tokens cannot both have log-prob 0.
        """
        bodies = [self._body([1], max_tokens=1, allowed_token_ids=[token], ignore_eos=True) for token in (1, 2)]
        logprobs = [self._response(choice).logprobs[0] for (choice,) in self._parallel(bodies)]
        if any(value < -1e-3 for value in logprobs):
            raise ValueError(
                f"vLLM server {self.client.url}: its log-probs are not those of the distribution that it samples from; "
                f"start it with --logprobs-mode processed_logprobs, for example\n{serve_command(self.transfer)}"
            )

    def _check_version(self) -> None:
        """Detects a server that was restarted, and now samples with the weights of its checkpoint without saying so."""
        if self._version is None:
            return
        held = self.client.get("/weight_info")["weight_version"]
        if held != self._version:
            raise ServerGone(
                f"vLLM server {self.client.url}: holds the weights {held!r}, expected {self._version!r}, which were "
                f"loaded last: it was restarted, or another run uses it"
            )


@dataclass(frozen=True)
class _Response:
    """One sampled response; ``truncated`` says that the token limit ended it."""

    token_ids: list[int]
    logprobs: list[float]
    truncated: bool


def _wait(client: HttpClient, seconds: float) -> None:
    """Waits until the server says that it is healthy, for at most this many seconds."""
    start = time.monotonic()
    while True:
        try:
            client.get("/health", retries=0)
            return
        except ServerGone as gone:
            waited = time.monotonic() - start
            if waited >= seconds:
                raise ServerGone(f"{gone}; waited {waited:.0f} s for it to start") from None
            logger.info("waiting for the vLLM server %s", client.url)
            time.sleep(min(2.0, seconds - waited))


def _sizes(client: HttpClient) -> tuple[torch.dtype, int, int]:
    """Reads ``dtype``, ``max_tokens`` and ``cache_block`` of an ``Engine`` off the server."""
    try:
        config = client.get("/server_info?config_format=json")["vllm_config"]
    except ServerRefused as refused:
        raise ValueError(f"{refused}\nStart it with VLLM_SERVER_DEV_MODE=1 in its environment") from None
    model, cache = config["model_config"], config["cache_config"]
    dtype = getattr(torch, model["dtype"].removeprefix("torch."))
    return dtype, int(model["max_model_len"]), int(cache["block_size"]) if cache["enable_prefix_caching"] else 0


def _group_seed(seed: int, group: int) -> int:
    """A random seed for each group.

    vLLM adds the number of the response to a request's seed, so neighbouring seeds would repeat responses.
    """
    return int(np.random.SeedSequence([seed, group]).generate_state(1, np.uint64)[0] >> 1)


def _unfinished(answer: Any) -> str | None:
    """Rejects responses that ended for another reason, since a server that is shutting down sends unfinished ones."""
    reasons = {choice["finish_reason"] for choice in answer["choices"]} - {"stop", "length"}
    return f"a response ended by {', '.join(map(str, reasons))}" if reasons else None


def _reset(answer: Any) -> str | None:
    return None if answer["success"] else "the prefix cache is in use"
