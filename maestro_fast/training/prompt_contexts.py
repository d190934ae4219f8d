"""One vector per prompt: the mean of the frozen reference model's hidden states over the prompt, computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from maestro_fast.training.forward import prompt_mean

if TYPE_CHECKING:
    from maestro_fast.training.pipeline import Pipeline


class PromptContexts:
    """Remembers the vectors for good, on the CPU: 4 d bytes a prompt. The reference never changes."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, pipeline: Pipeline, reference: nn.Module, prompt_ids: list[list[int]]) -> Tensor:
        """float32 [B, d] on the training device, for B prompts, of which equal ones share a vector."""
        missing = [ids for ids in dict.fromkeys(map(tuple, prompt_ids)) if ids not in self._known]
        device = pipeline.accelerator.device
        # sharded models need the same number of forwards on every process
        rounds = int(pipeline.gather(torch.tensor([len(missing)], device=device)).max())
        for i in range(rounds):
            ids = missing[i] if i < len(missing) else tuple(prompt_ids[0])
            self._known[ids] = prompt_mean(reference, list(ids), pipeline.layout)
        return torch.stack([self._known[tuple(ids)] for ids in prompt_ids]).to(device)
