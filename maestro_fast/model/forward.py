"""Forward passes of the policy: last hidden states of many sequences, and what is read off them.

The model itself is called, and a hook on its backbone takes the hidden states. So DDP, FSDP, PEFT, gradient
checkpointing and torch.compile see an ordinary forward. The model's own head runs on one position of each row only;
log-probs come from ``ops.token_logprobs``, which never forms the logits of all tokens.

Axis suffixes: B responses, T tokens of prompts and completions, C completion tokens, d hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from maestro_fast.model.attention import Layout, layout_of
from maestro_fast.model.head import LanguageHead, backbone_of, causal_lm, first_layer_of, product_dtype
from maestro_fast.model.hidden_states import ContextMode, HiddenStates
from maestro_fast.model.layouts import Layouts
from maestro_fast.model.prefix_tree import prompt_families
from maestro_fast.model.rows import Rows, Sequences
from maestro_fast.model.shared_attention import shared_inputs
from maestro_fast.ops import token_logprobs
from maestro_fast.ops.token_logprobs import Strategy
from maestro_fast.records import PolicyOutputs
from maestro_fast.specs import EntropyMode

__all__ = [
    "completion_logprobs",
    "implementation_of",
    "last_hidden",
    "policy_outputs",
    "prompt_mean",
    "response_contexts",
    "score",
]


# --- hidden states ---


def last_hidden(
    model: nn.Module, sequences: Sequences, layout: Layout | Layouts, context: ContextMode | None = None
) -> HiddenStates:
    """The last hidden states of all tokens of B sequences; differentiable if grad is on.

    Args:
        layout: a layout, or the layouts between which the batch decides.
        context: what contexts will be read; with "response_first_layer" these states are kept, too.

    Raises:
        ValueError: the layout is ``flash`` or ``varlen``, and the model has another attention implementation; or the
            first layer was not found.
    """
    layouts = Layouts(layout, "always" if layout == "shared" else "never") if isinstance(layout, str) else layout
    implementation = implementation_of(model)
    if layouts.plain in ("flash", "varlen") and layout_of(implementation) != layouts.plain:
        raise ValueError(f"layout: {layouts.plain}, but the model's attention implementation is {implementation}")
    rows = layouts.rows_of(sequences)
    weight = next(model.parameters())
    inputs = rows.model_input(weight.device)
    config = causal_lm(model).config.get_text_config()
    if getattr(config, "output_router_logits", False):  # Nothing reads them, and their loss knows no mask of four axes.
        inputs["output_router_logits"] = False
    if rows.trees is not None:
        inputs |= shared_inputs(
            rows.trees, config, implementation, product_dtype(weight), weight.device, kernel=layouts.kernel
        )
    captured: list[Tensor] = []
    with contextlib.ExitStack() as hooks:
        keep = backbone_of(model).register_forward_hook(lambda _m, _a, out: captured.append(out.last_hidden_state))
        hooks.callback(keep.remove)
        first = hooks.enter_context(_first_layer(model, rows, sequences)) if context == "response_first_layer" else []
        model(**inputs, use_cache=False, logits_to_keep=1)
    shapes = [tuple(states.shape[:2]) for states in captured]
    if shapes != [tuple(rows.input_ids.shape)]:
        raise ValueError(
            f"model: {type(causal_lm(model)).__name__} gave last hidden states of {shapes or 'no'} tokens for rows of "
            f"{tuple(rows.input_ids.shape)}, expected one state for each token from its backbone"
        )
    return HiddenStates(captured[0].flatten(0, 1), rows.place_T, sequences, first[0] if first else None)


@contextlib.contextmanager
def _first_layer(model: nn.Module, rows: Rows, sequences: Sequences) -> Iterator[list[Tensor]]:
    """While this is open, a forward appends the states [B, d] of the last tokens after the first layer, detached."""
    last_B = torch.tensor(sequences.lengths).cumsum(0) - 1
    place_B = last_B if rows.place_T is None else rows.place_T[last_B]
    found: list[Tensor] = []

    def keep(layer: nn.Module, _args: Any, out: Any) -> None:
        states = out[0] if isinstance(out, tuple) else out
        if tuple(states.shape[:2]) != tuple(rows.input_ids.shape):
            raise ValueError(
                f"context: response_first_layer, but {type(layer).__name__} gave states of shape "
                f"{tuple(states.shape)}, expected {tuple(rows.input_ids.shape)} and d"
            )
        found.append(states.detach().flatten(0, 1)[place_B.to(states.device)])

    handle = first_layer_of(model).register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def implementation_of(model: nn.Module) -> str:
    """The name of the model's attention implementation in transformers."""
    return str(getattr(causal_lm(model).config, "_attn_implementation", ""))


def completion_logprobs(
    hidden: HiddenStates,
    head: LanguageHead,
    temperature: float,
    entropy: EntropyMode,
    strategy: Strategy = "chunked",
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies [C] of the completion tokens, in nats.

    ``strategy`` is that of ``ops.token_logprobs``. "chunked" has the bits of ``ops.linear_policy_loss``.
    """
    weight = head.weight
    states, targets = hidden.completions(weight.dtype)
    out = token_logprobs(
        states, weight, targets, **head.numbers, temperature=temperature, entropy=entropy, strategy=strategy
    )
    return out.logprobs, out.entropies


def policy_outputs(
    hidden: HiddenStates, logprobs: Tensor, entropies: Tensor | None, context_mode: ContextMode = "last"
) -> PolicyOutputs:
    """The outputs of a training forward, detached from its graph, with contexts pooled from its hidden states."""
    context = hidden.detach().contexts(context_mode)
    return PolicyOutputs(logprobs.detach(), None if entropies is None else entropies.detach(), context)


# --- whole batches, without gradients ---


@torch.no_grad()
def score(
    model: nn.Module,
    sequences: Sequences,
    head: LanguageHead,
    *,
    layout: Layout | Layouts,
    micro_batch: int,
    temperature: float,
    entropy: bool = False,
    context: ContextMode | None = None,
    strategy: Strategy = "chunked",
) -> PolicyOutputs:
    """Log-probs of all completions under a policy, with the model in evaluation mode.

    Args:
        micro_batch: responses per model call. The number of calls depends on B alone, since a sharded model needs the
            same number on every process.
        entropy: whether to return entropies as well.
        context: how each response's hidden states become its context; None returns no contexts.
        strategy: see ``completion_logprobs``.
    """
    logprobs: list[Tensor] = [torch.empty(0)] * len(sequences)
    entropies: list[Tensor] = [torch.empty(0)] * len(sequences)
    pooled: list[Tensor] = [torch.empty(0)] * len(sequences)
    with evaluating(model):
        for members, part in _micro_batches(sequences, micro_batch, layout):
            hidden = last_hidden(model, part, layout, context)
            lp, ent = completion_logprobs(hidden, head, temperature, "value" if entropy else "none", strategy)
            sizes = [len(c) for c in part.completion_ids]
            for i, value in zip(members, lp.split(sizes), strict=True):
                logprobs[i] = value
            if ent is not None:
                for i, value in zip(members, ent.split(sizes), strict=True):
                    entropies[i] = value
            if context is not None:
                for i, row in zip(members, hidden.contexts(context), strict=True):
                    pooled[i] = row
    return PolicyOutputs(
        torch.cat(logprobs),
        torch.cat(entropies) if entropy else None,
        torch.stack(pooled) if context is not None else None,
    )


@torch.no_grad()
def response_contexts(
    model: nn.Module, sequences: Sequences, layout: Layout | Layouts, micro_batch: int, context: ContextMode = "last"
) -> Tensor:
    """The context of each response, float32 [B, d], by a forward that computes no log-probs.

    As in ``score``, the number of model calls depends on B alone.
    """
    states: list[Tensor] = [torch.empty(0)] * len(sequences)
    with evaluating(model):
        for members, part in _micro_batches(sequences, micro_batch, layout):
            hidden = last_hidden(model, part, layout, context)
            for i, row in zip(members, hidden.contexts(context), strict=True):
                states[i] = row
    return torch.stack(states)


@torch.no_grad()
def prompt_mean(model: nn.Module, prompt_ids: list[int], layout: Layout | Layouts) -> Tensor:
    """The mean last hidden state of one prompt, float32 [d] on the CPU.

    The prompt is alone in its forward. So the result is the same to the last bit in every batch and in a resumed run.
    """
    with evaluating(model):
        return last_hidden(model, Sequences([prompt_ids], [[]]), layout).packed().float().mean(0).cpu()


def _micro_batches(sequences: Sequences, size: int, layout: Layout | Layouts) -> Iterator[tuple[list[int], Sequences]]:
    """Yields ``size`` responses at a time with their indices.

    The longest come first, so that there is little padding. Where prompts may be shared and there is much to share,
    responses to one prompt, or to prompts that begin alike, stand together, and such a family goes by its longest.
    """
    lengths = sequences.lengths
    order = sorted(range(len(sequences)), key=lambda i: -lengths[i])
    if layout == "shared" or (isinstance(layout, Layouts) and layout.sharing != "never"):
        families, shared = prompt_families([sequences.prompt_ids[i] for i in order])
        if shared > _MUCH * sum(lengths):
            families.sort(key=min)  # The longest of a family is the one that comes first in the order so far.
            order = [order[i] for family in families for i in family]
    for start in range(0, len(order), size):
        members = order[start : start + size]
        yield members, sequences.select(members)


_MUCH = 0.25  # The share of all tokens that must be common, or else the order by length saves more.


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model in evaluation mode, and back into the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
