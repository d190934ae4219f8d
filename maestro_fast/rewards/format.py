"""The reward that says whether a completion has the wanted form: tags in order, or a pattern.

By default the form is

    <think> the reasoning </think> <answer> the answer </answer>
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from maestro_fast.records import RewardBatch
from maestro_fast.rewards.first_batches import Look

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FormatReward:
    """Whether a completion has the wanted form: 1 if it has, else 0 or partial credit.

    A completion has the form if every tag of ``tags`` is opened once and closed once, in this order, with nothing but
    whitespace outside. With ``partial`` a completion that lacks the form gets 0.5 * w / T, where w of the T tags are
    well-formed: opened once, then closed once. So well-formed tags share half of the reward, whatever their order and
    surroundings. The tag counts of open-r1 and the soft format rewards in wide use are of this kind, and like them this
    one never needs the answer to be right.

    What the prompt has of the reply counts: where a chat template ends in ``<think>``, the completion closes that tag.

    Attributes:
        tags: the names of the tags, without brackets.
        partial: whether a completion without the form gets partial credit.
        pattern: a regular expression in place of tags, which has to match the whole reply (a dot also matches a line
            break).
        name: the reward's name.

    Raises:
        ValueError: there are no tags, a tag occurs twice or has odd characters, the pattern is invalid, or ``partial``
            is set beside a pattern.
    """

    tags: Sequence[str] = ("think", "answer")
    partial: bool = False
    pattern: str | None = None
    name: str = "format"

    needs_entropy: ClassVar[bool] = False
    needs_policy: ClassVar[bool] = False
    reads_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_tags(self.tags)
        if self.pattern is None:
            return
        if self.partial:
            raise ValueError("partial: True beside a pattern, expected False: a pattern matches or does not")
        try:
            re.compile(self.pattern, re.DOTALL)
        except (re.error, TypeError) as error:
            raise ValueError(f"pattern: {self.pattern!r} is not a regular expression: {error}") from error

    def __call__(self, batch: RewardBatch) -> list[float]:
        return [self._score(reply) for reply in batch.replies]

    def _score(self, text: str) -> float:
        if self.pattern is not None:
            return float(re.fullmatch(self.pattern, text, re.DOTALL) is not None)
        if match_tags(text, self.tags) is not None:
            return 1.0
        if not self.partial:
            return 0.0
        return 0.5 * sum(_well_formed(text, tag) for tag in self.tags) / len(self.tags)

    def why_silent(self, look: Look) -> str:
        """The likely reason why no completion has the form, see ``first_batches``."""
        if look.value == 1.0:
            return "every completion has the wanted form already"
        if self.pattern is not None:
            return f"no completion as a whole matches the pattern {self.pattern!r}"
        return why_without_form(self.tags, look)


def split_tags(text: str, tags: Sequence[str] = ("think", "answer")) -> dict[str, str] | None:
    """What stands in each tag, without the whitespace around it, or None if ``text`` does not have the form."""
    match = match_tags(text, tags)
    return None if match is None else {tag: match[i].strip() for i, tag in enumerate(tags, start=1)}


def match_tags(text: str, tags: Sequence[str]) -> re.Match[str] | None:
    """A match of the whole ``text`` whose group i is the content of the i-th tag, or None if it lacks the form."""
    if not all(_well_formed(text, tag) for tag in tags):
        return None
    blocks = [rf"\s*<{re.escape(tag)}>(.*?)</{re.escape(tag)}>\s*" for tag in tags]
    return re.fullmatch("".join(blocks), text, re.DOTALL)


def why_without_form(tags: Sequence[str], look: Look) -> str:
    """The likely reason why no completion has the form."""
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    end = look.prompt_end.rstrip()
    opened = next((mark for mark in marks if end.endswith(mark)), "")
    if opened and any(match_tags(opened + text, tags) is not None for text in look.completions):
        return f"the chat template ends the prompt with {opened}, so the completions lack it"
    missing = [mark for mark in marks if mark != opened and not any(mark in text for text in look.completions)]
    if not missing:
        return "no completion has every tag opened and closed once, in order and with nothing outside"
    special = [mark for mark in missing if mark in look.written]
    if special:
        return f"{', '.join(special)} is a special token, which is left out of the text that rewards read"
    return f"no completion has {', '.join(missing)}"


def check_tags(tags: Sequence[str]) -> None:
    """Raises ValueError unless ``tags`` are distinct names."""
    if not isinstance(tags, Sequence) or isinstance(tags, str) or not tags:
        raise ValueError(f"tags: {tags!r}, expected a list of names")
    for tag in tags:
        if not isinstance(tag, str) or not re.fullmatch(r"[\w:.|-]+", tag):
            raise ValueError(f"tags: {tag!r}, expected a name without brackets, such as 'think'")
    if len(set(tags)) < len(tags):
        raise ValueError(f"tags: {tags!r}, expected distinct names")


def check_tags_are_seen(rewards: Sequence[Any], tokenizer: Any, skip_special_tokens: bool) -> None:
    """Checks that the tags which rewards look for can stand in the text of a completion.

    Args:
        rewards: the rewards, also behind gates and masks, whose attributes ``reward`` and ``on`` are looked into. Those
            with ``tags`` or a ``pattern`` are checked.
        tokenizer: the policy's tokenizer.
        skip_special_tokens: whether the text of a completion leaves out special tokens, see ``SamplingConfig``.

    Raises:
        ValueError: a tag is a special token that is left out, so that no completion can have it. Where a pattern names
            such a token there is a warning only, since a pattern may not need it.
    """
    remedy = "expected sampling.skip_special_tokens: false"
    for reward in _all_rewards(rewards) if skip_special_tokens else ():
        name, pattern = getattr(reward, "name", "?"), getattr(reward, "pattern", None)
        if isinstance(pattern, str):
            special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
            named = sorted(token for token in special if token in pattern or re.escape(token) in pattern)
            if named:
                logger.warning(
                    "rewards: the pattern of %r names %s, a special token of the tokenizer, which the text of a "
                    "completion leaves out; %s",
                    name,
                    ", ".join(named),
                    remedy,
                )
            continue
        for tag in getattr(reward, "tags", ()):
            for text in (f"<{tag}>", f"</{tag}>"):
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                if text in tokenizer.decode(ids) and text not in tokenizer.decode(ids, skip_special_tokens=True):
                    raise ValueError(
                        f"rewards: {name!r} looks for {text}, a special token of the tokenizer, which the text of a "
                        f"completion leaves out, {remedy}"
                    )


def _all_rewards(rewards: Sequence[Any]) -> list[Any]:
    """The rewards and those inside them."""
    inner = [getattr(reward, name) for reward in rewards for name in ("reward", "on") if hasattr(reward, name)]
    return [*rewards, *(_all_rewards(inner) if inner else ())]


def _well_formed(text: str, tag: str) -> bool:
    opening, closing = f"<{tag}>", f"</{tag}>"
    return text.count(opening) == 1 and text.count(closing) == 1 and text.index(opening) < text.index(closing)
