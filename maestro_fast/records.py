"""The named records that the stages of a step hand to each other.

Axis suffixes: B responses, K rewards, C completion tokens (of all responses, one after the other), d hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

# A message has a "role", and mostly a "content": text, a list of {"type": "text", "text"} parts, or None. It may have
# fields that only the chat template reads, such as "tool_calls".
Message = dict[str, Any]
Text = str | list[Message]  # plain text, or a conversation
Prompt = Text | list[int]  # a prompt, or its token ids

# Of a line of timings: the tokens that the forwards of a batch computed, and those that its sequences have with a
# prompt each. The first are fewer where responses share their prompts.
TOKEN_COUNTS = ("tokens/computed", "tokens/of_sequences")


@dataclass(frozen=True)
class Prompts:
    """Prompts ready for generation, one entry for each response or for each group.

    Attributes:
        texts: the prompts as in the data set, each a string or a list of messages, with the system prompt of the run.
        token_ids: what the policy reads, after the chat template was applied.
        columns: every other column of the data set, by name.
        families: the task family of each prompt, "" where the data names none. Only logs and reports read it.
        prefills: the part of each reply that stands in the prompt already, such as ``<think>``, see
            ``model.chat.prefilled``; an empty list stands for none.
    """

    texts: list[Text]
    token_ids: list[list[int]]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    families: list[str] = field(default_factory=list)
    prefills: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def repeat(self, times: int) -> Prompts:
        """Repeats each prompt ``times`` times in a row, so that the entries of a group stand side by side."""

        def each(values: list[Any]) -> list[Any]:
            return [value for value in values for _ in range(times)]

        return Prompts(
            each(self.texts),
            each(self.token_ids),
            {k: each(v) for k, v in self.columns.items()},
            each(self.families),
            each(self.prefills),
        )

    def split(self, parts: int) -> list[Prompts]:
        """Cuts the prompts into ``parts`` runs of equal length; ``parts`` has to divide their number."""
        size = len(self) // parts
        return [self.select(range(first, first + size)) for first in range(0, len(self), size)]

    def select(self, rows: Sequence[int]) -> Prompts:
        """Makes the record of these entries, in this order."""

        def each(values: list[Any]) -> list[Any]:
            return [values[row] for row in rows] if values else []

        columns = {name: each(values) for name, values in self.columns.items()}
        return Prompts(each(self.texts), each(self.token_ids), columns, each(self.families), each(self.prefills))

    @staticmethod
    def joined(parts: Sequence[Prompts]) -> Prompts:
        """Joins prompts of one data set, one after another."""

        def all_of(lists: Iterable[list[Any]]) -> list[Any]:
            return [value for values in lists for value in values]

        return Prompts(
            all_of(part.texts for part in parts),
            all_of(part.token_ids for part in parts),
            {name: all_of(part.columns[name] for part in parts) for name in parts[0].columns},
            all_of(part.families for part in parts),
            all_of(part.prefills for part in parts),
        )


@dataclass(frozen=True)
class Rollouts:
    """B sampled responses, with the prompts that they answer.

    Attributes:
        prompts: B entries; a group's prompt stands once for each of its responses.
        completion_ids: the sampled token ids, with the end-of-sequence token where one was sampled.
        completions: the text of the sampled tokens, see ``sampling.skip_special_tokens``; a list with one assistant
            message where the prompt is a list of messages. What the prompt has of the reply is not part of it.
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
        """Joins the responses to the parts of ``prompts.split``; of each figure it keeps the largest."""
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

    def select(self, rows: Sequence[int]) -> Rollouts:
        """Makes the record of these responses, in this order; the figures of the generation stay as they are."""
        logprobs_C = self.sampling_logprobs_C
        return replace(
            self,
            prompts=self.prompts.select(rows),
            completion_ids=[self.completion_ids[row] for row in rows],
            completions=[self.completions[row] for row in rows],
            truncated_B=self.truncated_B[list(rows)],
            sampling_logprobs_C=None if logprobs_C is None else take_responses(logprobs_C, self, rows),
        )

    @property
    def completion_lengths_B(self) -> Tensor:
        """The number of tokens of each completion, int64 [B] on the CPU."""
        return torch.tensor([len(ids) for ids in self.completion_ids], dtype=torch.int64)


@dataclass(frozen=True)
class PolicyOutputs:
    """What one forward of the policy gives.

    Attributes:
        logprobs_C: float32 [C], log-probs of the completion tokens in nats.
        entropies_C: float32 [C], the entropy in nats of the distribution over each of these tokens, or None.
        context_Bd: [B, d], the hidden state of each response that a weight policy reads, or None.
    """

    logprobs_C: Tensor
    entropies_C: Tensor | None
    context_Bd: Tensor | None


@dataclass(frozen=True)
class RewardBatch:
    """What a reward may read.

    Attributes:
        prompts, completions, completion_ids: B entries each, as in ``Rollouts``.
        columns: data set columns, B entries each.
        mean_entropies_B: float32 [B] on the CPU, the mean token entropy of the policy on each response in nats; None
            if no reward asked for it.
        score_texts: ``score_texts(prompts, prefixes, continuations)`` takes three sequences of one length, which may be
            0. For each triple it returns a float32 CPU tensor with the policy's log-probs in nats of the continuation's
            tokens, after the prompt and the beginning of an assistant's reply. A prompt is token ids, such as those of
            ``prompt_ids``, or text or messages, to which the chat template is applied. All processes may have to take
            part, so call it exactly once per batch. None outside training.
        device: where this process trains its policy; None outside training.
        mean_logprobs_B: float32 [B] on the CPU, the mean log-prob in nats of each response's tokens under the policy,
            at the sampling temperature; None where mean_entropies_B is None.
        step: the number of the generation batch, which counts from 0 and is negative in evaluations; None outside
            training.
        prompt_ids: B entries, the token ids that the policy read; an empty list outside training.
        prefills: B entries, the part of each reply that stands in the prompt already, as in ``Prompts``; an empty list
            stands for none.
        place: what messages call the batch, such as "step 3"; "" outside training.
    """

    prompts: list[Text]
    completions: list[Text]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    mean_entropies_B: Tensor | None = None
    score_texts: Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], list[Tensor]] | None = None
    device: torch.device | None = None
    mean_logprobs_B: Tensor | None = None
    step: int | None = None
    prompt_ids: list[list[int]] = field(default_factory=list)
    prefills: list[str] = field(default_factory=list)
    place: str = ""

    @staticmethod
    def of(rollouts: Rollouts, step: int) -> RewardBatch:
        """The batch of some rollouts, without what only the policy can give."""
        prompts = rollouts.prompts
        return RewardBatch(
            prompts.texts,
            rollouts.completions,
            rollouts.completion_ids,
            prompts.columns,
            step=step,
            prompt_ids=prompts.token_ids,
            prefills=prompts.prefills,
        )

    @property
    def replies(self) -> list[str]:
        """The assistant's replies, B entries: what the prompt has of each, and then what the policy wrote."""
        texts = [plain_text(completion) for completion in self.completions]
        return [a + b for a, b in zip(self.prefills, texts, strict=True)] if self.prefills else texts

    def select(self, rows: Sequence[int]) -> RewardBatch:
        """Makes the batch that holds these rows, in this order."""

        def each(values: list[Any]) -> list[Any]:
            return [values[row] for row in rows] if values else []

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
            prompt_ids=each(self.prompt_ids),
            prefills=each(self.prefills),
        )

    def copied(self) -> RewardBatch:
        """Makes the same batch with lists, dicts and tensors of its own, so a reward may change whatever it is given.

        The responses to one prompt share its messages until here; in the copy each has its own.
        """
        return replace(self, **{item.name: own_copy(getattr(self, item.name)) for item in fields(self)})

    def __len__(self) -> int:
        return len(self.completions)


_SHARED = {str, int, float, bool, type(None)}


def own_copy(value: Any) -> Any:
    """An equal value whose lists, dicts, sets, tensors and arrays belong to the caller alone.

    A list that stands at several places becomes as many lists. (``copy.deepcopy`` would keep it one, which the
    responses to a prompt would go on sharing.) Text and numbers, which nobody can change, and objects of other classes
    are shared.
    """
    kind = type(value)
    if kind is list:
        if set(map(type, value)) <= _SHARED:  # this is the quick way for token ids
            return value.copy()
        return [own_copy(item) for item in value]
    if kind is dict:
        return {key: own_copy(item) for key, item in value.items()}
    if kind is tuple:
        return tuple(own_copy(item) for item in value)
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list | dict | set | bytearray) or kind.__module__ == "numpy":
        return deepcopy(value)
    return value


@dataclass(frozen=True)
class StepRecord:
    """Everything that one generation batch produced, over all processes. Observers get it; its tensors are on the CPU.

    Attributes:
        step: the number of the first optimiser step that trains on the batch. Steps count from 1, as in the log, where
            the line of this step has the means of the batch.
        reward_names: the names of the K rewards.
        families, prompts, completions: B entries each.
        rewards_BK: the rewards, NaN where one abstained.
        weights_BK: the weights that were used.
        expected_weights_BK: the mean of these weights over the weight policy's own random draws.
        advantages_B, scores_B, degenerate_B: as in ``ops.GroupAdvantages``.
        lengths_B: the number of tokens of each completion.
        truncated_B: True where the token limit ended the response.
        utilities_B: the known utilities, NaN where none is known; None without an anchor.
        residuals_B: a learnt reward beside the named ones, in a unit of its own; NaN where a response has none, and
            None where the weight policy has none. It enters the score, see ``weighting.scored_rewards``.
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
    residuals_B: Tensor | None = None


def cumulative(lengths_B: Tensor) -> Tensor:
    """Turns lengths [B] of packed sequences into bounds, int64 [B + 1]: where each begins, and where the last ends."""
    bounds = torch.zeros(lengths_B.numel() + 1, dtype=torch.int64)
    torch.cumsum(lengths_B, 0, out=bounds[1:])
    return bounds


def content_text(message: Message) -> str:
    """The text of a message: its content, the joined text of its parts, or "" where it has none."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else str(part.get("text") or "") for part in content)
    if content is None or isinstance(content, str):
        return content or ""
    return json.dumps(content, ensure_ascii=False, default=str)


def plain_text(text: Text) -> str:
    """Returns a string as it is, and of a list of messages what they say, each on a line of its own.

    A message that calls tools has the calls behind its content, each as JSON on a line of its own.
    """
    if isinstance(text, str):
        return text
    lines = []
    for message in text:
        calls = [json.dumps(call, ensure_ascii=False, default=str) for call in message.get("tool_calls") or ()]
        content = content_text(message)
        lines += [content, *calls] if content or not calls else calls
    return "\n".join(lines)


def take_responses(values_C: Tensor, rollouts: Rollouts, rows: Sequence[int]) -> Tensor:
    """The values of some responses' tokens, in the order of ``rows``, from values [C] of the tokens of all."""
    parts = values_C.split(rollouts.completion_lengths_B.tolist())
    return torch.cat([parts[row] for row in rows]) if rows else values_C[:0]


def response_means(values_C: Tensor, rollouts: Rollouts) -> Tensor:
    """Averages values [C] over the tokens of each response, to [B]; a response without tokens gets 0."""
    parts = values_C.split(rollouts.completion_lengths_B.tolist())
    return torch.stack([part.mean() if part.numel() else part.new_zeros(()) for part in parts])
