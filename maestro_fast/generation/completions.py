"""The text of sampled tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from maestro_fast.records import Prompts, Text


def completion_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: Prompts, completion_ids: list[list[int]]
) -> list[Text]:
    """Decoded without special tokens; a list with one assistant message where the prompt is a conversation."""
    decoded = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts.texts, decoded, strict=True)
    ]
