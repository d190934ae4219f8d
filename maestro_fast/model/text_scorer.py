"""Log-probs of any text under the policy, for rewards that ask how likely a text is (perplexity, preference).

A reward has texts, but the policy reads token ids. ``text_scorer`` returns the function that rewards find as
``RewardBatch.score_texts``. Where it gets a prompt's token ids it takes them, and ``model.chat`` makes those of others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from maestro_fast.model.chat import encode_prompt
from maestro_fast.model.rows import Sequences
from maestro_fast.records import PolicyOutputs, Prompt, Prompts, Text, plain_text


def encode_known(
    tokenizer: PreTrainedTokenizerBase, prompts: Prompts | None, template_kwargs: Mapping[str, Any], text: Text
) -> list[int]:
    """The token ids of a prompt. One of ``prompts`` has those that the policy read there, with the tools of its row.

    Args:
        tokenizer: the policy's tokenizer.
        prompts: the prompts of the batch; None knows none.
        template_kwargs: what the chat template gets for any other prompt that is a conversation.
        text: the prompt.

    Raises:
        ValueError: ``prompts`` has it with several sets of tools or template options.
    """
    known = [] if prompts is None else zip(prompts.texts, prompts.token_ids, strict=True)
    ids = [own for other, own in known if other == text]
    if any(own != ids[0] for own in ids):
        raise ValueError(
            f"score_texts: the prompt {plain_text(text)[:40]!r} stands in the batch with several sets of tools or "
            "template options, expected its entry of batch.prompt_ids"
        )
    return ids[0] if ids else encode_prompt(tokenizer, text, None, template_kwargs)


def text_scorer(
    tokenizer: PreTrainedTokenizerBase,
    forward: Callable[[Sequences], PolicyOutputs],
    gather: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    encode_text: Callable[[Text], list[int]] | None = None,
    vocabulary: int | None = None,
) -> Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], list[Tensor]]:
    """Makes the function ``score_texts(prompts, prefixes, texts)`` that rewards call.

    Args:
        tokenizer: the policy's tokenizer.
        forward: gives the policy's log-probs of completions at temperature 1, for example by ``forward.score``.
        gather: joins a tensor on ``device`` over all processes. All processes call ``score_texts`` together, each with
            its own texts, of which it may have none.
        device: the device of this process.
        encode_text: gives the token ids of a prompt that is text or messages; None takes ``encode_prompt``.
        vocabulary: the number of rows of the policy's embedding; None checks no token.

    Returns:
        A function that returns for each text the log-probs of its tokens, float32 on the CPU in nats. The text
        continues the prompt and then the ``prefix``, the beginning of the assistant's reply. It raises ValueError if a
        prompt, prefix or text cannot be encoded, or has a token that the policy does not know.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def prompt_ids(prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
            return list(prompt)  # type: ignore[arg-type]
        return encode_prompt(tokenizer, prompt) if encode_text is None else encode_text(prompt)  # type: ignore[arg-type]

    def score_texts(prompts: Sequence[Prompt], prefixes: Sequence[str], texts: Sequence[str]) -> list[Tensor]:
        contexts = [prompt_ids(prompt) + encode(prefix) for prompt, prefix in zip(prompts, prefixes, strict=True)]
        texts_ids = [encode(text) for text in texts]
        for i, ids in enumerate(zip(contexts, texts_ids, strict=True)):
            if vocabulary is not None and max(map(max, filter(None, ids)), default=0) >= vocabulary:
                raise ValueError(
                    f"score_texts: text {i}, {texts[i][:40]!r}, has a token beyond the policy's {vocabulary}"
                )
        # A sharded model needs the same number of forwards on every process, so a process with fewer texts adds rows
        # of one token.
        rows = int(gather(torch.tensor([len(contexts)], device=device)).max())
        if not rows:
            return []
        padding = [[0]] * (rows - len(contexts))
        sequences = Sequences(contexts + padding, texts_ids + padding)
        parts = forward(sequences).logprobs_C.cpu().split([len(ids) for ids in sequences.completion_ids])
        return list(parts[: len(contexts)])

    return score_texts
