"""Log-probs of any text under the policy, for rewards that ask how likely a text is (perplexity, preference).

A reward has texts, but the policy reads token ids. ``encode_prompt`` turns a prompt into ids as training does, and
``text_scorer`` returns the function that rewards find as ``RewardBatch.score_texts``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from maestro_fast.model.rows import Sequences
from maestro_fast.records import PolicyOutputs, Text


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    """The token ids that the policy reads: a string is encoded as it is, messages go through the chat template."""
    if isinstance(text, str):
        return list(tokenizer(text)["input_ids"])
    ids = tokenizer.apply_chat_template(text, add_generation_prompt=True, tokenize=True, return_dict=False)
    return list(ids)


def text_scorer(
    tokenizer: PreTrainedTokenizerBase,
    forward: Callable[[Sequences], PolicyOutputs],
    gather: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Callable[[Sequence[Text], Sequence[str], Sequence[str]], list[Tensor]]:
    """Makes the function ``score_texts(prompts, prefixes, texts)`` that rewards call.

    Args:
        tokenizer: the policy's tokenizer.
        forward: gives the policy's log-probs of completions at temperature 1, for example by ``forward.score``.
        gather: joins a tensor on ``device`` over all processes. All processes call ``score_texts`` together, each with
            its own texts, of which it may have none.
        device: the device of this process.

    Returns:
        A function that returns for each text the log-probs of its tokens, float32 on the CPU in nats. The text
        continues the prompt and then the ``prefix``, the beginning of the assistant's reply.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def score_texts(prompts: Sequence[Text], prefixes: Sequence[str], texts: Sequence[str]) -> list[Tensor]:
        contexts = [
            encode_prompt(tokenizer, prompt) + encode(prefix) for prompt, prefix in zip(prompts, prefixes, strict=True)
        ]
        # A sharded model needs the same number of forwards on every process, so a process with fewer texts adds rows
        # of one token.
        rows = int(gather(torch.tensor([len(contexts)], device=device)).max())
        if not rows:
            return []
        padding = [[0]] * (rows - len(contexts))
        sequences = Sequences(contexts + padding, [encode(text) for text in texts] + padding)
        parts = forward(sequences).logprobs_C.cpu().split([len(ids) for ids in sequences.completion_ids])
        return list(parts[: len(contexts)])

    return score_texts
