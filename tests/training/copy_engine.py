"""An engine that is a second transformers model, with a prefix cache of whole sequences."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from maestro_fast.generation import SamplingConfig, TransformersGenerator
from maestro_fast.records import Prompts, Rollouts
from tests.tiny import tiny_tokenizer


class CopyEngine:
    """``calls`` holds the names of the called methods, in order; ``keeps_weights`` is what ``sleep`` returns."""

    dtype, max_tokens, cache_block, concurrent_parts = torch.float32, 256, 16, 0

    def __init__(self, model: PreTrainedModel, sampling: SamplingConfig | None = None) -> None:
        self.model = copy.deepcopy(model).eval()
        self.calls: list[str] = []
        self.keeps_weights = True
        self._generator = TransformersGenerator(tiny_tokenizer(), sampling or SamplingConfig(max_new_tokens=4))
        self._cache: dict[tuple[int, ...], Tensor] = {}

    def sample(self, prompts: Prompts, *, seed: int) -> Rollouts:
        self.calls.append("sample")
        return self._generator.generate(self.model, prompts, seed=seed)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.calls.append("load_weights")
        own = self.model.state_dict()
        for name, tensor in weights:
            assert tensor.dtype == self.dtype and tensor.shape == own[name].shape
            own.pop(name).copy_(tensor)
        tied = {"lm_head.weight"} if self.model.config.tie_word_embeddings else set()
        assert set(own) == tied, "weights that were not sent"

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")
        self._cache.clear()

    @torch.no_grad()
    def prompt_logprobs(self, token_ids: list[list[int]]) -> list[Tensor]:
        self.calls.append("prompt_logprobs")
        for ids in token_ids:
            if tuple(ids) not in self._cache:
                logprobs_LV = self.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                self._cache[tuple(ids)] = logprobs_LV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        return [self._cache[tuple(ids)] for ids in token_ids]

    def sleep(self) -> bool:
        self.calls.append("sleep")
        return self.keeps_weights

    def close(self) -> None:
        self.calls.append("close")
