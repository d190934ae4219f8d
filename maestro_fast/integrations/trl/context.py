"""Hidden states of the responses that TRL has just sampled, without a forward of our own wherever TRL makes one.

TRL scores the log-probs of the sampling policy if a batch serves several updates, or if it corrects for vLLM. A hook on
the backbone reads the terminal states during that forward. Otherwise one forward is made for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from maestro_fast.model.forward import Sequences
from maestro_fast.model.head import backbone_of
from maestro_fast.ops import GroupAdvantages, pool_hidden
from maestro_fast.weighting import WeightContext, Weights


@dataclass
class GenerationBatch:
    """What is known of the batch that TRL is making, of this process unless noted.

    Attributes:
        prompt_ids, completion_ids: token ids of its B responses.
        states: terminal hidden states [b, d], micro-batch after micro-batch.
        weighed: what was asked of the weight policy and what it answered, over all processes; advantages as well
            where one op gave them with the weights.
    """

    prompt_ids: Sequence[Sequence[int]] = ()
    completion_ids: Sequence[Sequence[int]] = ()
    states: list[Tensor] = field(default_factory=list)
    weighed: tuple[WeightContext, Weights, GroupAdvantages | None] | None = None

    @property
    def sequences(self) -> Sequences:
        return Sequences(_integers(self.prompt_ids), _integers(self.completion_ids))

    def attention_mask(self, input_ids: Tensor, completion_width: int) -> Tensor:
        """int64 [B, L] of TRL's layout: prompts padded on the left, completions on the right, nothing left out.

        TRL's own mask hides the completions that ``mask_truncated_completions`` leaves out of the loss; their last
        state would be one that has not seen them.
        """
        start = input_ids.shape[1] - completion_width
        prompts, completions = (
            torch.tensor([len(ids) for ids in rows], device=input_ids.device)[:, None]
            for rows in (self.prompt_ids, self.completion_ids)
        )
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        return ((position >= start - prompts) & (position < start + completions)).long()


def _integers(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[int(token) for token in row] for row in rows]


@contextlib.contextmanager
def reading_terminal_states(model: nn.Module, mask_BL: Tensor, states: list[Tensor]) -> Iterator[None]:
    """While open, forwards of ``model`` over consecutive rows of the mask append their terminal states to ``states``.

    Raises:
        RuntimeError: the hidden states do not have the shape of the mask, so nobody knows which is the last one.
    """
    done = 0

    def read(_module: nn.Module, _args: Any, out: Any) -> None:
        nonlocal done
        hidden = out.last_hidden_state
        mask = mask_BL[done : done + hidden.shape[0]]
        done += hidden.shape[0]
        if hidden.shape[:2] != mask.shape:
            raise RuntimeError(f"hidden states of shape {tuple(hidden.shape)}, expected {tuple(mask.shape)} and d")
        states.append(pool_hidden(hidden.detach(), mask=mask, mode="last"))

    handle = backbone_of(model).register_forward_hook(read)
    try:
        yield
    finally:
        handle.remove()


def is_reference_pass(model: nn.Module) -> bool:
    """Whether a PEFT model now stands for the reference: its adapters are off, or the active one is TRL's ``ref``."""
    if not is_peft_model(model):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return any(layer.disable_adapters or "ref" in layer.active_adapters for layer in layers)


def scores_old_logprobs(trainer: Any) -> bool:
    """Whether TRL makes a forward over each generation batch before it asks for the rewards (its own condition)."""
    generate_every = trainer.args.steps_per_generation * trainer.num_iterations
    corrects = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    return trainer.args.gradient_accumulation_steps % generate_every != 0 or bool(corrects)
