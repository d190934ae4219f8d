"""What an inference engine offers that holds a copy of the policy's weights, in this process or behind a server."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from maestro_fast.records import Prompts, Rollouts


class Engine(Protocol):
    """A copy of the policy that samples fast, and that goes stale with every update of the policy.

    ``training.weight_sync`` brings it up to date, and asks it for log-probs to see that it is.
    """

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
        """For each sequence of n >= 2 tokens, float32 [n - 1]: the log-prob of every token but the first, at
        temperature 1, given those before it. The prefix cache is used as ``sample`` uses it."""
        ...

    def close(self) -> None:
        """Frees what the engine holds. May be called twice."""
        ...
