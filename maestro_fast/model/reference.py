"""The reference policy of the KL: a frozen copy of the model, or the model with its adapters off.

It also gives the Conductor a vector per prompt: the mean of its hidden states over the prompt, computed once.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from maestro_fast.model.attention import Layout
from maestro_fast.model.forward import prompt_mean
from maestro_fast.model.head import LanguageHead, head_of

Reference = Callable[[], contextlib.AbstractContextManager[tuple[nn.Module, LanguageHead]]]


def frozen_copy(model: Any) -> nn.Module | None:
    """A copy as the model is now; None where adapters can be switched off instead."""
    if hasattr(model, "disable_adapter"):
        return None
    frozen: nn.Module = copy.deepcopy(model).requires_grad_(False).eval()
    return frozen


def reference_policy(model: Any, frozen: nn.Module | None, accelerator: Accelerator) -> Reference:
    """Opens to the reference model and its head."""
    if frozen is not None:
        prepared = accelerator.prepare_model(frozen.to(accelerator.device), evaluation_mode=True)
        opened = (prepared, head_of(prepared))
        return lambda: contextlib.nullcontext(opened)

    @contextlib.contextmanager
    def without_adapter() -> Iterator[tuple[nn.Module, LanguageHead]]:
        with model.disable_adapter():
            yield model, head_of(model)

    return without_adapter


class PromptContexts:
    """Remembers a vector per prompt for good, on the CPU: 4 d bytes a prompt. The reference never changes.

    Args:
        layout: how the reference's attention takes its rows.
        gather: joins a tensor over all processes, in their order.
        device: where the vectors are wanted.
    """

    def __init__(self, layout: Layout, gather: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._layout, self._gather, self._device = layout, gather, device
        self._known: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, reference: nn.Module, prompt_ids: list[list[int]]) -> Tensor:
        """float32 [B, d] on the training device, for B prompts, of which equal ones share a vector."""
        missing = [ids for ids in dict.fromkeys(map(tuple, prompt_ids)) if ids not in self._known]
        # A sharded model needs the same number of forwards on every process.
        rounds = int(self._gather(torch.tensor([len(missing)], device=self._device)).max())
        for i in range(rounds):
            ids = missing[i] if i < len(missing) else tuple(prompt_ids[0])
            self._known[ids] = prompt_mean(reference, list(ids), self._layout)
        return torch.stack([self._known[tuple(ids)] for ids in prompt_ids]).to(self._device)
