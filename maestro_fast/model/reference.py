"""The reference policy of the KL, and the hidden states of it that the Conductor may read.

The reference is the policy that a run starts from. It is a frozen copy, which shares with the policy every parameter
that is not trained. So the reference of adapters that go on training costs a copy of the adapters alone. LoRA that
starts anew needs no copy: it adds exact zeros, so the policy with its adapters off is the reference.

Since the reference never changes, its mean hidden state over a prompt never changes either. ``PromptContexts`` computes
that vector once for each prompt, as a context for the Conductor.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from maestro_fast.model.forward import prompt_mean
from maestro_fast.model.head import LanguageHead, head_of
from maestro_fast.model.layouts import Layouts
from maestro_fast.model.sharding import is_sharded, shard_frozen, sharded_again

_LORA_A, _LORA_B = re.compile(r"\.lora_(embedding_)?A\."), re.compile(r"\.lora_(embedding_)?B\.")

# ``with reference() as (model, head):`` gives the reference model and its head.
Reference = Callable[[], contextlib.AbstractContextManager[tuple[nn.Module, LanguageHead]]]


def frozen_copy(model: nn.Module, *, share: bool = True) -> nn.Module:
    """Copies and freezes the model, in evaluation mode.

    Args:
        model: a model, with or without adapters.
        share: whether the copy holds the same parameters as the model wherever the model does not train them. They must
            not be sharded afterwards.
    """
    shared = {id(parameter): parameter for parameter in model.parameters() if share and not parameter.requires_grad}
    frozen: nn.Module = copy.deepcopy(model, shared).requires_grad_(False).eval()
    return frozen


def reference_policy(model: Any, accelerator: Accelerator) -> Reference:
    """Makes the context manager that gives the reference model and its head.

    Args:
        model: the policy before it is trained. If its adapters are new LoRA, they are off while the reference is open.
        accelerator: puts the copy on the device, or shards it as the policy is sharded.
    """
    if not (hasattr(model, "disable_adapter") and _adds_nothing(model)):
        if is_sharded(accelerator):
            return _sharded_reference(frozen_copy(model, share=False), accelerator)
        share = accelerator.distributed_type != DistributedType.DEEPSPEED
        frozen = frozen_copy(model, share=share).to(accelerator.device)
        prepared = accelerator.prepare_model(frozen, evaluation_mode=True)
        opened = (prepared, head_of(prepared))
        return lambda: contextlib.nullcontext(opened)

    @contextlib.contextmanager
    def without_adapter() -> Iterator[tuple[nn.Module, LanguageHead]]:
        with model.disable_adapter():
            yield model, head_of(model)

    return without_adapter


def _sharded_reference(frozen: nn.Module, accelerator: Accelerator) -> Reference:
    model = shard_frozen(frozen, accelerator)
    head = head_of(model)

    @contextlib.contextmanager
    def opened() -> Iterator[tuple[nn.Module, LanguageHead]]:
        with sharded_again(model):
            yield model, head

    return opened


def _adds_nothing(model: nn.Module) -> bool:
    """Whether all that trains is LoRA, and B is 0 in all adapters, so that the model is the same without them.

    That is not so of adapters that were trained already, whether or not they go on training, nor of kinds of LoRA that
    change the base model when they start, such as PiSSA.
    """
    parameters = [*model.named_parameters()]
    is_lora = all(_LORA_A.search(name) or _LORA_B.search(name) for name, p in parameters if p.requires_grad)
    return is_lora and not any(bool(p.any()) for name, p in parameters if _LORA_B.search(name))


class PromptContexts:
    """The mean hidden state of the reference over each prompt.

    Every vector is computed once and kept on the CPU for the rest of the run: 4 d bytes a prompt.

    Args:
        layouts: gives how the attention of the reference takes its rows.
        gather: joins a tensor over all processes, in the order of the processes.
        device: the device on which the vectors are returned.
    """

    def __init__(
        self, layouts: Callable[[], Layouts], gather: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        self._layouts, self._gather, self._device = layouts, gather, device
        self._known: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, reference: nn.Module, prompt_ids: list[list[int]]) -> Tensor:
        """The vectors of B prompts, float32 [B, d]; equal prompts have the same vector."""
        missing = [ids for ids in dict.fromkeys(map(tuple, prompt_ids)) if ids not in self._known]
        # A sharded model needs the same number of forwards on every process, so a process that knows more repeats one.
        rounds = int(self._gather(torch.tensor([len(missing)], device=self._device)).max())
        for i in range(rounds):
            ids = missing[i] if i < len(missing) else tuple(prompt_ids[0])
            self._known[ids] = prompt_mean(reference, list(ids), self._layouts())
        return torch.stack([self._known[tuple(ids)] for ids in prompt_ids]).to(self._device)
