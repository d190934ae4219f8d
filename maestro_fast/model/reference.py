"""The reference policy of the KL, and the hidden states of it that the Conductor may read.

The reference is a frozen copy of the model as it was at the start. A model with adapters needs no copy: with its
adapters off it is the reference. Since the reference never changes, its mean hidden state over a prompt never changes
either. ``PromptContexts`` computes that vector once for each prompt, as a context for the Conductor.
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

# ``with reference() as (model, head):`` gives the reference model and its head.
Reference = Callable[[], contextlib.AbstractContextManager[tuple[nn.Module, LanguageHead]]]


def frozen_copy(model: Any) -> nn.Module | None:
    """Copies and freezes the model, in evaluation mode; returns None if its adapters can be switched off instead."""
    if hasattr(model, "disable_adapter"):
        return None
    frozen: nn.Module = copy.deepcopy(model).requires_grad_(False).eval()
    return frozen


def reference_policy(model: Any, frozen: nn.Module | None, accelerator: Accelerator) -> Reference:
    """Makes the context manager that gives the reference model and its head.

    Args:
        model: the policy. If ``frozen`` is None, its adapters are off while the reference is open.
        frozen: the result of ``frozen_copy``, before the policy was trained.
        accelerator: puts the copy on the device, or shards it as the policy is sharded.
    """
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
    """The mean hidden state of the reference over each prompt.

    Every vector is computed once and kept on the CPU for the rest of the run: 4 d bytes a prompt.

    Args:
        layout: how the attention of the reference takes its rows.
        gather: joins a tensor over all processes, in the order of the processes.
        device: the device on which the vectors are returned.
    """

    def __init__(self, layout: Layout, gather: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._layout, self._gather, self._device = layout, gather, device
        self._known: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, reference: nn.Module, prompt_ids: list[list[int]]) -> Tensor:
        """The vectors of B prompts, float32 [B, d]; equal prompts have the same vector."""
        missing = [ids for ids in dict.fromkeys(map(tuple, prompt_ids)) if ids not in self._known]
        # A sharded model needs the same number of forwards on every process, so a process that knows more repeats one.
        rounds = int(self._gather(torch.tensor([len(missing)], device=self._device)).max())
        for i in range(rounds):
            ids = missing[i] if i < len(missing) else tuple(prompt_ids[0])
            self._known[ids] = prompt_mean(reference, list(ids), self._layout)
        return torch.stack([self._known[tuple(ids)] for ids in prompt_ids]).to(self._device)
