"""Log-probs of any texts under the policy, for the rewards that ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from maestro_fast.records import Text
from maestro_fast.training.data import encode_prompt
from maestro_fast.training.forward import Sequences

if TYPE_CHECKING:
    from maestro_fast.training.pipeline import Pipeline


def text_scorer(
    pipeline: Pipeline, model: nn.Module
) -> Callable[[Sequence[Text], Sequence[str], Sequence[str]], list[Tensor]]:
    """What ``RewardBatch.score_texts`` is."""

    def score_texts(prompts: Sequence[Text], prefixes: Sequence[str], texts: Sequence[str]) -> list[Tensor]:
        def encode(text: str) -> list[int]:
            return list(pipeline.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

        contexts = [
            encode_prompt(pipeline.tokenizer, prompt) + encode(prefix)
            for prompt, prefix in zip(prompts, prefixes, strict=True)
        ]
        # sharded models need the same number of forwards on every process: short of the longest list, one token
        rows = int(pipeline.gather(torch.tensor([len(contexts)], device=pipeline.accelerator.device)).max())
        if not rows:
            return []
        padding = [[0]] * (rows - len(contexts))
        sequences = Sequences(contexts + padding, [encode(text) for text in texts] + padding)
        out = pipeline.forward(model, sequences, temperature=1.0)
        parts = out.logprobs_C.cpu().split([len(ids) for ids in sequences.completion_ids])
        return list(parts[: len(contexts)])

    return score_texts
