"""Looks at the first batches of a run for rewards that teach nothing, and says why that may be.

A reward teaches something where it tells two responses of a group apart. One that never does over the first batches is
more often a mistake than a hard task: a tag that the chat template has opened already, completions that are cut off, a
function that looks for what is not there. Such a reward is reported once, with what it gave, the likely reason and the
beginning of a completion.

A reward may know its own reasons: its method ``why_silent`` takes a ``Look`` and returns a sentence without its full
stop, or "" where it has nothing to say.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maestro_fast.records import StepRecord, plain_text

logger = logging.getLogger(__name__)

BEGINNING = 100  # characters of the completion that a message shows


@dataclass(frozen=True)
class Look:
    """What a reward that tells no responses apart may look at: its rows in the last of the first batches.

    Attributes:
        value: the one value that it gave in all of the batches; None if it always abstained, or gave several.
        abstained: whether it abstained from every response of the batches.
        completions: the texts that it judged; all of the batch where it abstained from every one.
        lengths: their numbers of tokens.
        written: the first of them with its special tokens, as the policy wrote it.
        prompt_end: the end of the first one's prompt, as the policy read it.
    """

    value: float | None
    abstained: bool
    completions: list[str]
    lengths: list[int]
    written: str
    prompt_end: str


class FirstBatches:
    """Watches the rewards of a run over its first generation batches.

    Args:
        rewards: the K rewards.
        batches: the number of generation batches that are waited for.
    """

    def __init__(self, rewards: Sequence[Any], batches: int = 3) -> None:
        self.rewards, self.batches = tuple(rewards), batches
        self._seen = self._responses = 0
        K = len(self.rewards)
        self._tells_K = torch.zeros(K, dtype=torch.bool)  # whether a reward told two responses of a group apart
        self._low_K, self._high_K = torch.full((K,), float("inf")), torch.full((K,), float("-inf"))
        self._cut, self._same = True, True  # all completions so far are cut off; those of each group are one text

    def see(self, record: StepRecord, group_size: int, tokens_of: Callable[[int], tuple[str, str]]) -> None:
        """Takes in a generation batch, and after the last of the first ones reports the rewards that taught nothing.

        Args:
            record: the batch over all processes.
            group_size: the number of responses to each prompt.
            tokens_of: gives, for a row of the batch, ``written`` and ``prompt_end`` of ``Look``.
        """
        if self._seen >= self.batches:
            return
        self._seen += 1
        self._responses += len(record.completions)
        low_NK, high_NK = _extremes(record.rewards_BK.view(-1, group_size, len(self.rewards)), 1)
        self._tells_K |= (high_NK > low_NK).any(0)
        self._low_K = torch.minimum(self._low_K, low_NK.amin(0))
        self._high_K = torch.maximum(self._high_K, high_NK.amax(0))
        texts = [plain_text(text) for text in record.completions]
        groups = [set(texts[i : i + group_size]) for i in range(0, len(texts), group_size)]
        self._cut &= bool(record.truncated_B.all())
        self._same &= all(len(group) == 1 for group in groups)
        if self._seen == self.batches:
            for k in (~self._tells_K).nonzero()[:, 0].tolist():
                logger.warning(self._report(k, record, texts, tokens_of))

    def _report(self, k: int, record: StepRecord, texts: list[str], tokens_of: Callable[[int], tuple[str, str]]) -> str:
        low, high, reward = self._low_K[k].item(), self._high_K[k].item(), self.rewards[k]
        live = [row for row, value in enumerate(record.rewards_BK[:, k].tolist()) if value == value]
        rows = live or list(range(len(texts)))
        look = Look(
            low if low == high else None,
            low > high,
            [texts[row] for row in rows],
            [int(record.lengths_B[row]) for row in rows],
            *tokens_of(rows[0]),
        )
        if low > high:
            gave = "abstained from all"
        elif low == high:
            gave = f"gave {low:g} to all" if len(live) == len(texts) else f"gave {low:g} or abstained for all"
        else:
            gave = "told no two responses of a prompt apart among all"
        reasons = [own_reason(reward, look), *self._general_reasons(look)]
        likely = "; ".join(reason for reason in reasons if reason)
        return (
            f"reward {reward.name!r} {gave} {self._responses} completions of the first {self.batches} generation "
            f"batches, so nothing was learnt from it{': ' + likely if likely else ''}. "
            f"A completion begins {look.completions[0][:BEGINNING]!r}. This is said once."
        )

    def _general_reasons(self, look: Look) -> list[str]:
        """Reasons that do not depend on the reward."""
        reasons = []
        if not any(text.strip() for text in look.completions):
            reasons.append("the completions hold no text")
        elif self._same:
            reasons.append("all responses to a prompt are the same text, is sampling.temperature too low?")
        if self._cut:
            reasons.append(f"every completion was cut off at sampling.max_new_tokens, here {max(look.lengths)} tokens")
        return reasons


def own_reason(reward: Any, look: Look) -> str:
    """What the reward itself says of why it taught nothing, "" if it has nothing to say."""
    explain = getattr(reward, "why_silent", None)
    return "" if explain is None else str(explain(look))


def _extremes(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest value along ``dim`` that is not NaN, on the CPU; inf and -inf where all are NaN."""
    values = values.float().cpu()
    live = ~values.isnan()
    low = torch.where(live, values, float("inf")).amin(dim)
    return low, torch.where(live, values, float("-inf")).amax(dim)
