"""Hidden states of the responses that TRL has just sampled, for weight policies that read them.

TRL scores the log-probs of the sampling policy if a batch serves several updates, or if it corrects for vLLM. During
that forward a hook on the backbone reads the states, so they cost nothing. Otherwise the trainer makes one forward for
them (``model.response_contexts``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from maestro_fast.model import Sequences, backbone_of
from maestro_fast.model.hidden_states import ContextMode
from maestro_fast.ops import GroupAdvantages, pool_hidden
from maestro_fast.weighting import ContextKind, WeightContext, Weights


class Weighed(NamedTuple):
    """What the weight policy was asked, what it answered, and what follows from that, over all processes.

    Attributes:
        context: what the policy was asked.
        weights: what the policy answered.
        row_weights_BK: the weights [B, K] that TRL multiplies the rewards by.
        factor_K: the factors [K] by which the policy's weights were multiplied to give these.
        advantages: the advantages, if one op gave them together with the weights.
    """

    context: WeightContext
    weights: Weights
    row_weights_BK: Tensor
    factor_K: Tensor
    advantages: GroupAdvantages | None


@dataclass
class GenerationBatch:
    """What is known so far of the batch that TRL is making, in this process.

    Attributes:
        prompt_ids, completion_ids: the token ids of its b responses.
        states: the contexts of its responses, a tensor [., d] for each micro-batch of TRL's forward.
        weighed: the weights of all processes, once the rewards are known.
    """

    prompt_ids: Sequence[Sequence[int]] = ()
    completion_ids: Sequence[Sequence[int]] = ()
    states: list[Tensor] = field(default_factory=list)
    weighed: Weighed | None = None

    @property
    def sequences(self) -> Sequences:
        return Sequences(_integers(self.prompt_ids), _integers(self.completion_ids))

    def attention_mask(self, input_ids: Tensor, completion_width: int) -> Tensor:
        """int64 [b, L], 1 for every token of TRL's input: prompts are padded on the left, completions on the right.

        TRL's own mask hides the completions that ``mask_truncated_completions`` keeps out of the loss. A terminal state
        under that mask would not have seen the completion.
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


# The context kinds that are served, by what ``model.response_contexts`` calls them. Those of the reference and of the
# first layer would need hooks of their own.
MODES: dict[ContextKind, ContextMode] = {
    "response": "last",
    "response_mean": "response_mean",
    "prompt_last": "prompt_last",
    "prompt_mean": "prompt_mean",
}


@contextlib.contextmanager
def reading_contexts(
    model: nn.Module, mask_BL: Tensor, completion_width: int, kind: ContextKind, states: list[Tensor]
) -> Iterator[None]:
    """While this is open, each forward of ``model`` appends the contexts of its rows to ``states``.

    Args:
        mask_BL: the attention mask of all rows; consecutive forwards take consecutive rows of it.
        completion_width: how many columns of it, the last ones, are those of the completions.
        kind: the context, a key of ``MODES``.

    Raises:
        RuntimeError: hidden states and mask differ in shape, so it is unknown which states are those of a response.
    """
    done, start = 0, mask_BL.shape[1] - completion_width
    if kind != "response":  # Its terminal state is the last one of the prompt if the completion is empty.
        inside = torch.arange(mask_BL.shape[1], device=mask_BL.device) >= start
        mask_BL = mask_BL * (inside if kind == "response_mean" else ~inside)

    def read(_module: nn.Module, _args: Any, out: Any) -> None:
        nonlocal done
        hidden = out.last_hidden_state
        mask = mask_BL[done : done + hidden.shape[0]]
        done += hidden.shape[0]
        if hidden.shape[:2] != mask.shape:
            raise RuntimeError(f"hidden states of shape {tuple(hidden.shape)}, expected {tuple(mask.shape)} and d")
        states.append(pool_hidden(hidden.detach(), mask=mask, mode="mean" if kind.endswith("mean") else "last"))

    handle = backbone_of(model).register_forward_hook(read)
    try:
        yield
    finally:
        handle.remove()


def is_reference_pass(model: nn.Module) -> bool:
    """Whether a PEFT model stands for the reference now: its adapters are off, or TRL's adapter ``ref`` is active."""
    if not is_peft_model(model):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return any(layer.disable_adapters or "ref" in layer.active_adapters for layer in layers)


def scores_old_logprobs(trainer: Any) -> bool:
    """Whether TRL makes a forward over each generation batch before it asks for the rewards; the condition is TRL's."""
    generate_every = trainer.args.steps_per_generation * trainer.num_iterations
    corrects = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    return trainer.args.gradient_accumulation_steps % generate_every != 0 or bool(corrects)
