"""The named carriers between the stages of a step. Axis suffixes: B responses, K rewards, C completion tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Message = dict[str, str]
Text = str | list[Message]  # plain text, or a conversation of {"role", "content"} messages


@dataclass(frozen=True)
class Prompts:
    """Prompts ready for generation, one entry per response or per group.

    Attributes:
        texts: as in the data set: a string, or a list of messages.
        token_ids: what the policy reads, chat template applied.
        columns: every other column of the data set, by name.
        families: the task family of each prompt, "" where the data names none. Only logs and reports read it.
    """

    texts: list[Text]
    token_ids: list[list[int]]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    families: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def repeat(self, times: int) -> Prompts:
        """Each prompt ``times`` times, consecutively: the rows of a group stand side by side."""

        def each(values: list[Any]) -> list[Any]:
            return [value for value in values for _ in range(times)]

        return Prompts(
            each(self.texts),
            each(self.token_ids),
            {k: each(v) for k, v in self.columns.items()},
            each(self.families),
        )

    def split(self, parts: int) -> list[Prompts]:
        """``parts`` prompts of one size, consecutive ones side by side; ``parts`` divides their number."""
        size = len(self) // parts
        bounds = [slice(first, first + size) for first in range(0, len(self), size)]
        return [
            Prompts(self.texts[b], self.token_ids[b], {k: v[b] for k, v in self.columns.items()}, self.families[b])
            for b in bounds
        ]


@dataclass(frozen=True)
class Rollouts:
    """B sampled responses.

    Attributes:
        prompts: B entries (each group's prompt repeated).
        completion_ids: sampled token ids, the end-of-sequence token included where one was sampled.
        completions: decoded, without special tokens; a list with one assistant message where the prompt is a list.
        truncated_B: bool [B], True where the token limit ended the response.
        sampling_logprobs_C: float32 [C], log-probs in nats under the distribution that was sampled from, or None.
        metrics: figures of the generation for the log, by name.
    """

    prompts: Prompts
    completion_ids: list[list[int]]
    completions: list[Text]
    truncated_B: Tensor
    sampling_logprobs_C: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def joined(prompts: Prompts, parts: Sequence[Rollouts]) -> Rollouts:
        """The responses to ``prompts`` from those to the parts of ``prompts.split``; of each figure the largest."""
        logprobs = [part.sampling_logprobs_C for part in parts]
        return Rollouts(
            prompts,
            [ids for part in parts for ids in part.completion_ids],
            [text for part in parts for text in part.completions],
            torch.cat([part.truncated_B for part in parts]),
            None if any(x is None for x in logprobs) else torch.cat([x for x in logprobs if x is not None]),
            {name: max(p.metrics[name] for p in parts if name in p.metrics) for part in parts for name in part.metrics},
        )

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def completion_lengths_B(self) -> Tensor:
        """int64 [B] on the CPU, tokens."""
        return torch.tensor([len(ids) for ids in self.completion_ids], dtype=torch.int64)

    @property
    def cu_seqlens(self) -> Tensor:
        """int64 [B + 1] on the CPU: bounds of the responses in every ``_C`` tensor."""
        return cumulative(self.completion_lengths_B)


@dataclass(frozen=True)
class PolicyOutputs:
    """What one scoring forward of the policy gives: float32 [C] log-probs and entropies in nats, contexts [B, d]."""

    logprobs_C: Tensor
    entropies_C: Tensor | None
    context_Bd: Tensor | None


@dataclass(frozen=True)
class RewardBatch:
    """What a reward may read.

    Attributes:
        prompts, completions, completion_ids: B entries each.
        columns: data set columns, B entries each.
        mean_entropies_B: float32 [B] on the CPU, mean token entropy of the policy on the response in nats; None if no
            reward asked for it.
        score_texts: ``score_texts(prompts, prefixes, continuations)``, three sequences of one length, 0 too -> for
            each triple a float32 CPU tensor of the policy's log-probs in nats, one per token of the continuation,
            after the prompt (as in the data; the chat template is applied for it) and the beginning of an
            assistant's reply. May be a collective over processes: call it once per batch. None outside training.
        device: where this process trains its policy; None outside training.
        mean_logprobs_B: float32 [B] on the CPU, mean log-prob of the response's tokens under the policy in nats, at the
            sampling temperature; there where mean_entropies_B is.
        step: number of the generation batch, from 0, negative in evaluations; None outside training.
    """

    prompts: list[Text]
    completions: list[Text]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    mean_entropies_B: Tensor | None = None
    score_texts: Callable[[Sequence[Text], Sequence[str], Sequence[str]], list[Tensor]] | None = None
    device: torch.device | None = None
    mean_logprobs_B: Tensor | None = None
    step: int | None = None

    def select(self, rows: Sequence[int]) -> RewardBatch:
        """Some of its rows, in that order."""

        def each(values: list[Any]) -> list[Any]:
            return [values[row] for row in rows]

        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[list(rows)]

        return replace(
            self,
            prompts=each(self.prompts),
            completions=each(self.completions),
            completion_ids=each(self.completion_ids),
            columns={name: each(values) for name, values in self.columns.items()},
            mean_entropies_B=some(self.mean_entropies_B),
            mean_logprobs_B=some(self.mean_logprobs_B),
        )

    def __len__(self) -> int:
        return len(self.completions)


@dataclass(frozen=True)
class StepRecord:
    """Everything one generation batch produced, over all processes; handed to observers, CPU tensors.

    Attributes:
        step: optimiser steps done before it.
        reward_names: K names.
        families, prompts, completions: B entries each.
        rewards_BK: NaN where a reward abstained.
        weights_BK: the weights that were used; expected_weights_BK: their expectation over the policy's own sampling.
        advantages_B, scores_B, degenerate_B, lengths_B (tokens), truncated_B.
        utilities_B: known utilities, NaN where none is known; None without an anchor.
    """

    step: int
    reward_names: tuple[str, ...]
    families: list[str]
    prompts: list[Text]
    completions: list[Text]
    rewards_BK: Tensor
    weights_BK: Tensor
    expected_weights_BK: Tensor
    advantages_B: Tensor
    scores_B: Tensor
    degenerate_B: Tensor
    lengths_B: Tensor
    truncated_B: Tensor
    utilities_B: Tensor | None = None


def cumulative(lengths_B: Tensor) -> Tensor:
    """[B] lengths -> int64 [B + 1] bounds."""
    bounds = torch.zeros(lengths_B.numel() + 1, dtype=torch.int64)
    torch.cumsum(lengths_B, 0, out=bounds[1:])
    return bounds


def plain_text(text: Text) -> str:
    """The words of a completion or prompt: a string as it is, of a conversation the contents, one a line."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)
