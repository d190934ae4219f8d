"""What an inference engine offers that holds a copy of the policy's weights, in this process or behind a server."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from maestro_fast.records import Prompts, Rollouts


class Engine(Protocol):
    """A copy of the policy that samples fast, and that goes stale with every update of the policy.

    ``training.weight_sync`` brings it up to date, and asks it for log-probs to see that it is.

    Attributes:
        dtype: that the copy computes in; weights are handed over in it.
        max_tokens: tokens of the longest sequence, prompt and response together.
        concurrent_parts: as of a ``Generator``; if not 0, its methods may be called from several threads at once.
        cache_block: tokens that the prefix cache keeps together: it reuses whole blocks only. 0: there is no cache.
    """

    dtype: torch.dtype
    max_tokens: int
    cache_block: int
    concurrent_parts: int

    def sample(self, prompts: Prompts, *, seed: int) -> Rollouts:
        """One response to each entry of ``prompts``; the same seed, prompts and weights give the same responses.

        ``Rollouts.sampling_logprobs_C`` is of the distribution that was sampled from.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the weights; names and shapes are those of the policy's checkpoint (``save_pretrained``)."""
        ...

    def reset_prefix_cache(self) -> None:
        """Forgets the attention states of earlier prompts, which were computed with earlier weights."""
        ...

    def prompt_logprobs(self, token_ids: list[list[int]]) -> list[Tensor]:
        """For each sequence of n tokens, 2 <= n < ``max_tokens``, float32 [n - 1] on the CPU: the log-prob of every
        token but the first, at temperature 1, given those before it. What the prefix cache holds of a sequence is used
        as ``sample`` uses it."""
        ...

    def sleep(self) -> bool:
        """Gives back what memory it can until the next call, which wakes it. Returns whether it keeps the weights."""
        ...

    def close(self) -> None:
        """Frees what the engine holds. May be called twice."""
        ...
