"""A batch from a few completions, for all tests of rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from maestro_fast.records import RewardBatch, Text

MakeBatch = Callable[..., RewardBatch]


def as_chat(text: str, role: str) -> Text:
    return [{"role": role, "content": text}]


@pytest.fixture
def make_batch() -> MakeBatch:
    """make_batch(completions, chat=False, **fields): one token per word, one prompt for all, unless given."""

    def make(completions: list[str], *, chat: bool = False, **given: Any) -> RewardBatch:
        prompts = given.pop("prompts", ["Why?"] * len(completions))
        ids = given.pop("completion_ids", [list(range(len(text.split()))) for text in completions])
        if chat:
            prompts = [as_chat(prompt, "user") for prompt in prompts]
            return RewardBatch(prompts, [as_chat(text, "assistant") for text in completions], ids, **given)
        return RewardBatch(prompts, list(completions), ids, **given)

    return make
