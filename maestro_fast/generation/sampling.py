"""How responses are sampled: the options, and what a generator and an inference engine offer to the trainer.

A ``Generator`` is what the training step calls. An ``Engine`` is an inference engine with its own copy of the policy's
weights, in this process or behind a server; the trainer wraps it into a generator that synchronises the weights first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from maestro_fast.records import Prompts, Rollouts, Text

_MOST = 2**31 - 1  # Engines count tokens and responses in 32 bits.


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled.

    Attributes:
        group_size: G, the number of responses to each prompt. It is at least 2, because an advantage compares a
            response with its group.
        max_new_tokens: The largest number of tokens in a response.
        temperature: The number by which logits are divided, in sampling and in every log-prob of the loss.
        top_p: The probability kept by nucleus truncation; 1.0 turns it off. With truncation, the sampling distribution
            differs from the policy whose log-probs the loss uses, so ``loss.sampler_correction`` is refused and
            the ``sampling/`` metrics are left out.
        top_k: The number of tokens kept by top-k truncation; 0 turns it off. The remark on ``top_p`` holds here too.
        stop: The strings that end a response, which keeps the first of them in its text. Only the response is searched,
            so a string that begins in the prompt does not count.
        skip_special_tokens: Whether the text of a response, which the rewards read, leaves out the tokenizer's special
            tokens. False keeps them, all but those that end the response; tags that are special tokens need this.
    """

    group_size: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = field(default_factory=list)
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("group_size", "max_new_tokens"):
            if getattr(self, name) > _MOST:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at most {_MOST}")
        if self.group_size < 2:
            raise ValueError(
                f"group_size: {self.group_size}, expected at least 2: an advantage is relative to the response's group"
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens}, expected at least 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: {self.temperature}, expected a finite positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p}, expected 0 < top_p <= 1")
        if self.top_k < 0:
            raise ValueError(f"top_k: {self.top_k}, expected at least 0 (0: off)")
        if "" in self.stop:
            raise ValueError("stop: holds an empty string, which would end every response at once")

    @property
    def truncation(self) -> str | None:
        """The settings that leave improbable tokens out, as in a config; None if every token can be sampled."""
        named = {"top_p": (self.top_p, self.top_p < 1), "top_k": (self.top_k, self.top_k > 0)}
        return " and ".join(f"sampling.{name}: {value}" for name, (value, cuts) in named.items() if cuts) or None


class Generator(Protocol):
    """Samples one response for each prompt of a batch in which every prompt already stands G times.

    Attributes:
        concurrent_parts: 0 means that the generator works in this process, on the policy's devices. A positive number
            means that a batch is divided into this many parts of whole groups, and that ``generate`` is called for all
            of them at once, each in its own thread.

    A generator that can sample the next batch while the policy is trained is an ``AheadGenerator``.
    """

    concurrent_parts: int = 0

    def generate(self, model: nn.Module, prompts: Prompts, *, seed: int) -> Rollouts:
        """Samples with the current weights of ``model``; the same seed, prompts and weights give the same responses."""
        ...


class AheadGenerator(Generator, Protocol):
    """A generator that goes on sampling with the weights that the policy had when the batch was begun.

    Attributes:
        ahead: How many generation batches are sampled while an earlier one is trained on, 0 or 1.
    """

    ahead: int

    def renewed(self, model: nn.Module) -> Generator:
        """Takes the weights of ``model`` now, on all processes together.

        Returns:
            A generator whose ``generate`` is called once and does not look at its model, which may have changed by
            then.
        """
        ...


class Engine(Protocol):
    """A copy of the policy that samples fast. Every update of the policy makes it out of date.

    ``training.weight_sync`` sends it the new weights, and compares its log-probs with the trainer's to prove that they
    arrived.

    Attributes:
        dtype: The dtype that the engine computes in, and in which it takes weights.
        max_tokens: The largest number of tokens in a sequence, prompt and response together.
        concurrent_parts: The same as for a ``Generator``. If it is positive, the methods may be called from several
            threads at once.
        ahead: How many generation batches it samples while an earlier one is trained on, 0 or 1. Only an engine on
            devices of its own can, so ``concurrent_parts`` is 1 then.
        cache_block: The number of tokens in a block of the prefix cache, which reuses whole blocks only; 0 means that
            there is no prefix cache.
    """

    dtype: torch.dtype
    max_tokens: int
    cache_block: int
    concurrent_parts: int
    ahead: int

    def sample(self, prompts: Prompts, *, seed: int) -> Rollouts:
        """Samples one response to each entry of ``prompts``.

        The same seed, prompts and weights give the same responses. ``Rollouts.sampling_logprobs_C`` holds log-probs of
        the distribution that was sampled from, after temperature and truncation.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the weights. Names and shapes are those of the policy's checkpoint (``save_pretrained``)."""
        ...

    def reset_prefix_cache(self) -> None:
        """Forgets the attention states of earlier prompts, which were computed with earlier weights."""
        ...

    def prompt_logprobs(self, token_ids: list[list[int]]) -> list[Tensor]:
        """Scores whole sequences at temperature 1.

        Args:
            token_ids: sequences of n tokens each, with 2 <= n < ``max_tokens``.

        Returns:
            For each sequence float32 [n - 1] on the CPU: the log-prob of every token but the first, given the tokens
            before it. Blocks in the prefix cache are read just as ``sample`` reads them, so that a stale cache shows.
        """
        ...

    def sleep(self) -> bool:
        """Frees as much memory as it can until the next call, which wakes the engine.

        Returns:
            Whether the engine still has its weights.
        """
        ...

    def close(self) -> None:
        """Frees everything that the engine holds. It may be called twice."""
        ...


def completion_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    completion_ids: list[list[int]],
    *,
    skip_special_tokens: bool = True,
    stop_ids: Collection[int] = (),
) -> list[Text]:
    """The text of the sampled tokens.

    If a prompt is a conversation, its completion is a list that holds one assistant message.

    Args:
        tokenizer: The tokenizer that decodes them.
        prompts: The prompts, one for each completion.
        completion_ids: The sampled tokens.
        skip_special_tokens: Whether special tokens are left out. If not, the tokens at the end that end a response or
            pad it are left out all the same.
        stop_ids: The token ids that end a response, beside the tokenizer's own.
    """
    if not skip_special_tokens:
        ends = {*stop_ids, tokenizer.eos_token_id, tokenizer.pad_token_id}
        completion_ids = [_without_end(ids, ends) for ids in completion_ids]
    decoded = tokenizer.batch_decode(completion_ids, skip_special_tokens=skip_special_tokens)
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts.texts, decoded, strict=True)
    ]


def _without_end(ids: list[int], ends: Collection[int | None]) -> list[int]:
    length = len(ids)
    while length and ids[length - 1] in ends:
        length -= 1
    return ids[:length]
