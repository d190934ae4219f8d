"""Samples responses in one call, and computes the log-probs that a generator should have recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from maestro_fast.generation import SamplingConfig, TransformersGenerator
from maestro_fast.records import Prompts, Rollouts, Text
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()  # Tests that change it make their own.
EOS, PAD = 0, 1


def peaked_model(family: str = "qwen3") -> PreTrainedModel:
    """The tiny model with its logits spread wide, since a freshly made one is close to uniform."""
    model = tiny_model(family)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(12)
    return model


def prompts(*texts: Text, times: int = 1) -> Prompts:
    ids = [
        TOKENIZER(text)["input_ids"] if isinstance(text, str) else TOKENIZER(str(text))["input_ids"] for text in texts
    ]
    return Prompts(list(texts), ids).repeat(times)


def generate(
    model: PreTrainedModel, asked: Prompts, *, seed: int = 0, tokenizer: Any = TOKENIZER, **sampling: Any
) -> Rollouts:
    config = SamplingConfig(**{"max_new_tokens": 12, **sampling})
    return TransformersGenerator(tokenizer, config).generate(model, asked, seed=seed)


def same(ours: Rollouts, theirs: Rollouts) -> bool:
    assert ours.sampling_logprobs_C is not None and theirs.sampling_logprobs_C is not None
    return ours.completion_ids == theirs.completion_ids and torch.equal(
        ours.sampling_logprobs_C, theirs.sampling_logprobs_C
    )


@torch.no_grad()
def distributions(
    model: PreTrainedModel,
    prompt: list[int],
    completion: list[int],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """The log-probs [len(completion), V] that each token was sampled from, by one forward without padding or cache."""
    was_training = model.training
    model.eval()
    z_LV = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double() / temperature
    model.train(was_training)
    if top_k:
        z_LV = torch.where(z_LV >= z_LV.topk(top_k).values[:, -1:], z_LV, -torch.inf)
    if top_p < 1:
        p_LV, order_LV = z_LV.softmax(-1).sort(descending=True)
        outside_LV = p_LV.cumsum(-1) - p_LV >= top_p  # The tokens before it have this mass already.
        z_LV = z_LV.masked_fill(torch.zeros_like(outside_LV).scatter(1, order_LV, outside_LV), -torch.inf)
    return z_LV.log_softmax(-1)


def recomputed(model: PreTrainedModel, rollouts: Rollouts, **sampling: Any) -> Tensor:
    """The log-probs [C] of the sampled tokens."""
    rows = []
    for prompt, completion in zip(rollouts.prompts.token_ids, rollouts.completion_ids, strict=True):
        rows.append(distributions(model, prompt, completion, **sampling).gather(1, torch.tensor(completion)[:, None]))
    return torch.cat(rows)[:, 0].float()
