"""Forward passes of the policy: packed last hidden states of many sequences, and what is read off them.

The model itself is called, and a hook on its backbone takes the hidden states. So DDP, FSDP, PEFT, gradient
checkpointing and torch.compile see an ordinary forward. The model's own head runs on one position of each row only;
log-probs come from ``ops.token_logprobs``, which never forms the logits of all tokens.

Axis suffixes: B responses, T tokens of prompts and completions, C completion tokens, d hidden size.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from maestro_fast.model.attention import Layout, layout_of
from maestro_fast.model.head import LanguageHead, backbone_of, causal_lm, product_dtype
from maestro_fast.model.rows import Sequences, rows_of
from maestro_fast.ops import pool_hidden, token_logprobs
from maestro_fast.ops.pool_hidden import PoolMode
from maestro_fast.records import PolicyOutputs, cumulative
from maestro_fast.specs import EntropyMode

logger = logging.getLogger(__name__)
__all__ = [
    "choose_layout",
    "completion_logprobs",
    "completion_states",
    "contexts",
    "last_hidden",
    "policy_outputs",
    "prompt_mean",
    "score",
    "terminal_states",
]


# --- hidden states ---


def last_hidden(model: nn.Module, sequences: Sequences, layout: Layout) -> Tensor:
    """Packed last hidden states [T, d] of all tokens, sequence after sequence; differentiable if grad is on.

    Raises:
        ValueError: the layout is ``flash`` or ``varlen``, and the model has another attention implementation.
    """
    implementation = _implementation(model)
    if layout in ("flash", "varlen") and layout_of(implementation) != layout:
        raise ValueError(f"layout: {layout}, but the model's attention implementation is {implementation}")
    rows = rows_of(sequences.tokens, layout)
    captured: list[Tensor] = []
    handle = backbone_of(model).register_forward_hook(lambda _m, _a, out: captured.append(out.last_hidden_state))
    try:
        model(**rows.model_input(next(model.parameters()).device), use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return rows.tokens_of(captured[0])


def completion_states(hidden: Tensor, sequences: Sequences, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Selects from packed states [T, d] those that predict the completion tokens.

    Returns:
        The states [C, d] in ``dtype``, and the completion tokens that they predict, int64 [C].
    """
    rows, targets = [], []
    start = 0
    for prompt, completion in zip(sequences.prompt_ids, sequences.completion_ids, strict=True):
        first = start + len(prompt) - 1  # The prompt's last token predicts the first completion token.
        rows.append(torch.arange(first, first + len(completion)))
        targets.extend(completion)
        start += len(prompt) + len(completion)
    states = hidden[torch.cat(rows).to(hidden.device)].to(dtype)
    return states, torch.tensor(targets, dtype=torch.int64, device=hidden.device)


def completion_logprobs(
    hidden: Tensor, sequences: Sequences, head: LanguageHead, temperature: float, entropy: EntropyMode
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies [C] of the completion tokens, in nats, from packed states [T, d]."""
    weight = head.weight
    states, targets = completion_states(hidden, sequences, weight.dtype)
    out = token_logprobs(states, weight, targets, **head.numbers, temperature=temperature, entropy=entropy)
    return out.logprobs, out.entropies


def contexts(hidden: Tensor, sequences: Sequences, mode: PoolMode) -> Tensor:
    """Pools packed states [T, d] into one vector for each response, [B, d], by ``pool_hidden``."""
    bounds = cumulative(torch.tensor(sequences.lengths)).to(hidden.device)
    prompts = torch.tensor([len(ids) for ids in sequences.prompt_ids], device=hidden.device)
    return pool_hidden(hidden, cu_seqlens=bounds, mode=mode, prompt_lengths=prompts)


def policy_outputs(
    hidden: Tensor, sequences: Sequences, logprobs: Tensor, entropies: Tensor | None, context_mode: PoolMode = "last"
) -> PolicyOutputs:
    """The outputs of a training forward, detached from its graph, with contexts pooled from its hidden states."""
    context = contexts(hidden.detach(), sequences, context_mode)
    return PolicyOutputs(logprobs.detach(), None if entropies is None else entropies.detach(), context)


# --- whole batches, without gradients ---


@torch.no_grad()
def score(
    model: nn.Module,
    sequences: Sequences,
    head: LanguageHead,
    *,
    layout: Layout,
    micro_batch: int,
    temperature: float,
    entropy: bool = False,
    context: PoolMode | None = None,
) -> PolicyOutputs:
    """Log-probs of all completions under a policy, with the model in evaluation mode.

    Args:
        micro_batch: responses per model call. The number of calls depends on B alone, since a sharded model needs the
            same number on every process.
        entropy: whether to return entropies as well.
        context: how each response's hidden states are pooled into its context; None returns no contexts.
    """
    logprobs: list[Tensor] = [torch.empty(0)] * len(sequences)
    entropies: list[Tensor] = [torch.empty(0)] * len(sequences)
    pooled: list[Tensor] = [torch.empty(0)] * len(sequences)
    with _evaluating(model):
        for members, part in _micro_batches(sequences, micro_batch):
            hidden = last_hidden(model, part, layout)
            lp, ent = completion_logprobs(hidden, part, head, temperature, "value" if entropy else "none")
            sizes = [len(c) for c in part.completion_ids]
            for i, value in zip(members, lp.split(sizes), strict=True):
                logprobs[i] = value
            if ent is not None:
                for i, value in zip(members, ent.split(sizes), strict=True):
                    entropies[i] = value
            if context is not None:
                for i, row in zip(members, contexts(hidden, part, context), strict=True):
                    pooled[i] = row
    return PolicyOutputs(
        torch.cat(logprobs),
        torch.cat(entropies) if entropy else None,
        torch.stack(pooled) if context is not None else None,
    )


@torch.no_grad()
def terminal_states(model: nn.Module, sequences: Sequences, layout: Layout, micro_batch: int) -> Tensor:
    """The last hidden state of each response, float32 [B, d], by a forward that computes no log-probs.

    As in ``score``, the number of model calls depends on B alone.
    """
    states: list[Tensor] = [torch.empty(0)] * len(sequences)
    with _evaluating(model):
        for members, part in _micro_batches(sequences, micro_batch):
            hidden = last_hidden(model, part, layout)
            bounds = cumulative(torch.tensor(part.lengths)).to(hidden.device)
            for i, row in zip(members, pool_hidden(hidden, cu_seqlens=bounds, mode="last"), strict=True):
                states[i] = row
    return torch.stack(states)


@torch.no_grad()
def prompt_mean(model: nn.Module, prompt_ids: list[int], layout: Layout) -> Tensor:
    """The mean last hidden state of one prompt, float32 [d] on the CPU.

    The prompt is alone in its forward. So the result is the same to the last bit in every batch and in a resumed run.
    """
    with _evaluating(model):
        return last_hidden(model, Sequences([prompt_ids], [[]]), layout).float().mean(0).cpu()


def _micro_batches(sequences: Sequences, size: int) -> Iterator[tuple[list[int], Sequences]]:
    """Yields ``size`` responses at a time with their indices, the longest first so that there is little padding."""
    lengths = sequences.lengths
    order = sorted(range(len(sequences)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        members = order[start : start + size]
        yield members, sequences.select(members)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# --- the trial of a layout ---


def choose_layout(model: nn.Module) -> Layout:
    """Tries the layout without padding that the model's attention offers, and returns ``padded`` if that one is wrong.

    Hidden states and their gradients are compared with those of ``padded`` on a few tokens. A ``padded`` forward never
    uses ``varlen``, so in that comparison the two have only the model in common. The choice and its reason are logged.
    """
    language_model = causal_lm(model)
    implementation = _implementation(model)
    wanted = layout_of(implementation)
    found = _difference(model, wanted)
    if isinstance(found, float):
        logger.info(
            "layout: %s with %s, states and gradients equal the padded ones to %.1e", wanted, implementation, found
        )
        return wanted
    logger.info(
        "layout: padded with %s, %s cannot take %s: %s", implementation, type(language_model).__name__, wanted, found
    )
    return "padded"


def _implementation(model: nn.Module) -> str:
    return str(getattr(causal_lm(model).config, "_attn_implementation", ""))


def _difference(model: nn.Module, layout: Layout) -> float | str:
    """Returns the largest relative difference between a layout and ``padded``, or what is wrong with the layout."""
    vocabulary = causal_lm(model).get_input_embeddings().weight.shape[0]
    ids = [i % vocabulary for i in range(1, 17)]
    probe = Sequences([ids[:9], ids[9:12], ids[12:15]], [[ids[15]]] * 3)  # When packed, the two short ones share a row.
    exact = product_dtype(next(model.parameters())) == torch.float32
    with _evaluating(model):
        padded = _padded_states_and_gradients(model, probe)
        try:
            found = _states_and_gradients(model, probe, layout)
        except (RuntimeError, ValueError, TypeError) as error:  # A model's own attention may raise any of these.
            return f"{type(error).__name__}: {error}"
    gaps = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, padded, strict=True)]
    # Half-precision numbers have 8 or 11 significant bits, and a gradient passes through every layer twice.
    if all(gap < tolerance for gap, tolerance in zip(gaps, (1e-4, 1e-4) if exact else (5e-2, 1e-1), strict=True)):
        return max(gaps)
    return f"it mixes packed sequences (states differ by {gaps[0]:.1e}, gradients by {gaps[1]:.1e})"


def _padded_states_and_gradients(model: nn.Module, probe: Sequences) -> tuple[Tensor, Tensor]:
    """What ``_states_and_gradients`` gives for the layout that every model must be able to compute.

    Raises:
        ValueError: the model cannot compute it, for example because its attention has no kernel for its device.
    """
    try:
        return _states_and_gradients(model, probe, "padded")
    except (RuntimeError, ValueError, TypeError) as error:
        weight = next(model.parameters())
        raise ValueError(
            f"model: {type(causal_lm(model)).__name__} with attention {_implementation(model)} fails on a few padded "
            f"tokens in {weight.dtype} on {weight.device}, expected an attention that works there: "
            f"{type(error).__name__}: {error}"
        ) from error


def _states_and_gradients(model: nn.Module, probe: Sequences, layout: Layout) -> tuple[Tensor, Tensor]:
    """The last hidden states, float32 [T, d], and the gradient of a weighted sum of them by the embedded tokens."""
    embedded: list[Tensor] = []

    def as_leaf(_module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[0].clone()  # Some models scale the embeddings in place, which autograd forbids for a leaf.

    handle = causal_lm(model).get_input_embeddings().register_forward_hook(as_leaf)
    try:
        with torch.enable_grad():
            states = last_hidden(model, probe, layout).float()
            direction = torch.linspace(-1, 1, states.numel(), device=states.device).view_as(states)
            gradient = torch.autograd.grad((states * direction).sum(), embedded[0])[0]
    finally:
        handle.remove()
    return states.detach(), rows_of(probe.tokens, layout).tokens_of(gradient).float()
