"""Log-probs of any texts under the policy, for the rewards that ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from maestro_fast.model.forward import Sequences
from maestro_fast.records import PolicyOutputs, Text


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    """Token ids that the policy reads: a string as it is, messages through the chat template."""
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
    """What ``RewardBatch.score_texts`` is.

    Args:
        tokenizer: of the policy.
        forward: the policy's log-probs of completions, at temperature 1.
        gather: joins a tensor on ``device`` over all processes.
    """

    def score_texts(prompts: Sequence[Text], prefixes: Sequence[str], texts: Sequence[str]) -> list[Tensor]:
        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

        contexts = [
            encode_prompt(tokenizer, prompt) + encode(prefix) for prompt, prefix in zip(prompts, prefixes, strict=True)
        ]
        # A sharded model needs the same number of forwards on every process, so shorter lists are padded with rows of
        # one token.
        rows = int(gather(torch.tensor([len(contexts)], device=device)).max())
        if not rows:
            return []
        padding = [[0]] * (rows - len(contexts))
        sequences = Sequences(contexts + padding, [encode(text) for text in texts] + padding)
        parts = forward(sequences).logprobs_C.cpu().split([len(ids) for ids in sequences.completion_ids])
        return list(parts[: len(contexts)])

    return score_texts
