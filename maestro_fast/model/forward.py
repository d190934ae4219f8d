"""Forward passes of the policy: packed last hidden states of many sequences, and what is read off them.

The backbone's output is taken by a hook while the model itself is called, so that DDP, FSDP, PEFT, gradient
checkpointing and torch.compile see an ordinary forward. The model's own head runs on one position per row only.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maestro_fast.model.attention import Layout, layout_of
from maestro_fast.model.head import LanguageHead, backbone_of, causal_lm
from maestro_fast.model.rows import rows_of
from maestro_fast.ops import pool_hidden, token_logprobs
from maestro_fast.ops.pool_hidden import PoolMode
from maestro_fast.records import PolicyOutputs, cumulative
from maestro_fast.specs import EntropyMode

logger = logging.getLogger(__name__)
__all__ = [
    "Layout",
    "Sequences",
    "choose_layout",
    "completion_logprobs",
    "completion_states",
    "last_hidden",
    "score",
    "terminal_states",
]


@dataclass(frozen=True)
class Sequences:
    """Prompt and completion of each of B responses, as token ids."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def tokens(self) -> list[list[int]]:
        return [p + c for p, c in zip(self.prompt_ids, self.completion_ids, strict=True)]

    @property
    def lengths(self) -> list[int]:
        return [len(p) + len(c) for p, c in zip(self.prompt_ids, self.completion_ids, strict=True)]

    def select(self, indices: list[int]) -> Sequences:
        return Sequences([self.prompt_ids[i] for i in indices], [self.completion_ids[i] for i in indices])


def last_hidden(model: nn.Module, sequences: Sequences, layout: Layout) -> Tensor:
    """Packed last hidden states [T, d] of all tokens, sequence after sequence; differentiable if grad is on.

    Raises:
        ValueError: the layout ``flash`` or ``varlen``, and the model has another attention implementation.
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


def choose_layout(model: nn.Module) -> Layout:
    """The layout without padding that the model's attention implementation offers, if it gives what ``padded`` gives.

    Else ``padded``. Hidden states and their gradients are compared on a few tokens; the choice and its reason are
    logged. A ``padded`` forward never uses ``varlen``, so the two have only the model in common there.
    """
    language_model = causal_lm(model)
    implementation = _implementation(model)
    wanted = layout_of(implementation)
    reason = _difference(model, wanted)
    if isinstance(reason, float):
        logger.info(
            "layout: %s with %s, states and gradients equal the padded ones to %.1e", wanted, implementation, reason
        )
        return wanted
    logger.info(
        "layout: padded with %s, %s cannot take %s: %s", implementation, type(language_model).__name__, wanted, reason
    )
    return "padded"


def _implementation(model: nn.Module) -> str:
    return str(getattr(causal_lm(model).config, "_attn_implementation", ""))


def _difference(model: nn.Module, layout: Layout) -> float | str:
    """The largest relative difference between a layout and ``padded``, or in words what is wrong with the layout."""
    vocabulary = causal_lm(model).get_input_embeddings().weight.shape[0]
    ids = [i % vocabulary for i in range(1, 17)]
    probe = Sequences([ids[:9], ids[9:12], ids[12:15]], [[ids[15]]] * 3)  # the two short ones share a row
    exact = next(model.parameters()).dtype == torch.float32
    with _evaluating(model):
        padded = _states_and_gradients(model, probe, "padded")
        try:
            found = _states_and_gradients(model, probe, layout)
        except (RuntimeError, ValueError, TypeError) as error:  # whatever a model's own attention makes of the input
            return f"{type(error).__name__}: {error}"
    gaps = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, padded, strict=True)]
    # half precision: 8 or 11 bits a step, and a gradient has gone through every layer twice
    if all(gap < tolerance for gap, tolerance in zip(gaps, (1e-4, 1e-4) if exact else (5e-2, 1e-1), strict=True)):
        return max(gaps)
    return f"it mixes packed sequences (states differ by {gaps[0]:.1e}, gradients by {gaps[1]:.1e})"


def _states_and_gradients(model: nn.Module, probe: Sequences, layout: Layout) -> tuple[Tensor, Tensor]:
    """Float32 last hidden states [T, d], and the gradient of a sum of them with respect to the embedded tokens."""
    embedded: list[Tensor] = []

    def as_leaf(_module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[0].clone()  # some models scale it in place, which a leaf does not allow

    handle = causal_lm(model).get_input_embeddings().register_forward_hook(as_leaf)
    try:
        with torch.enable_grad():
            states = last_hidden(model, probe, layout).float()
            direction = torch.linspace(-1, 1, states.numel(), device=states.device).view_as(states)
            gradient = torch.autograd.grad((states * direction).sum(), embedded[0])[0]
    finally:
        handle.remove()
    return states.detach(), rows_of(probe.tokens, layout).tokens_of(gradient).float()


def completion_states(hidden: Tensor, sequences: Sequences, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the packed states [T, d] those [C, d] that predict the completion tokens, and these, int64 [C]."""
    rows, targets = [], []
    start = 0
    for prompt, completion in zip(sequences.prompt_ids, sequences.completion_ids, strict=True):
        first = start + len(prompt) - 1  # the state that predicts the first completion token
        rows.append(torch.arange(first, first + len(completion)))
        targets.extend(completion)
        start += len(prompt) + len(completion)
    states = hidden[torch.cat(rows).to(hidden.device)].to(dtype)
    return states, torch.tensor(targets, dtype=torch.int64, device=hidden.device)


def completion_logprobs(
    hidden: Tensor, sequences: Sequences, head: LanguageHead, temperature: float, entropy: EntropyMode
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies [C] of the completion tokens, from packed states [T, d]."""
    weight = head.weight
    states, targets = completion_states(hidden, sequences, weight.dtype)
    out = token_logprobs(states, weight, targets, **head.numbers, temperature=temperature, entropy=entropy)
    return out.logprobs, out.entropies


def policy_outputs(
    hidden: Tensor, sequences: Sequences, logprobs: Tensor, entropies: Tensor | None, context_mode: PoolMode = "last"
) -> PolicyOutputs:
    """What a forward that is differentiated tells besides, without its graph."""
    context = contexts(hidden.detach(), sequences, context_mode)
    return PolicyOutputs(logprobs.detach(), None if entropies is None else entropies.detach(), context)


def contexts(hidden: Tensor, sequences: Sequences, mode: PoolMode) -> Tensor:
    """[B, d] from packed states [T, d]."""
    bounds = cumulative(torch.tensor(sequences.lengths)).to(hidden.device)
    prompts = torch.tensor([len(ids) for ids in sequences.prompt_ids], device=hidden.device)
    return pool_hidden(hidden, cu_seqlens=bounds, mode=mode, prompt_lengths=prompts)


@torch.no_grad()
def prompt_mean(model: nn.Module, prompt_ids: list[int], layout: Layout) -> Tensor:
    """float32 [d] on the CPU, the mean last hidden state of one prompt, which is alone in its forward.

    So its bits depend on nothing else: not on the batch that a prompt is first met in, nor on a resumed run.
    """
    with _evaluating(model):
        return last_hidden(model, Sequences([prompt_ids], [[]]), layout).float().mean(0).cpu()


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
    """One forward over all responses, ``micro_batch`` at a time, longest first so that little is padded.

    The number of model calls depends on B alone: sharded models need the same number on every process.

    Args:
        entropy: whether to return entropies.
        context: which hidden state of each response to return; None: none.
    """
    order = sorted(range(len(sequences)), key=lambda i: -sequences.lengths[i])
    logprobs: list[Tensor] = [torch.empty(0)] * len(order)
    entropies: list[Tensor] = [torch.empty(0)] * len(order)
    pooled: list[Tensor] = [torch.empty(0)] * len(order)
    with _evaluating(model):
        for start in range(0, len(order), micro_batch):
            members = order[start : start + micro_batch]
            part = sequences.select(members)
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
    """float32 [B, d], the last hidden state of each response, by one forward that computes no log-probs.

    As in ``score``, the number of model calls depends on B alone, and the longest come first.
    """
    order = sorted(range(len(sequences)), key=lambda i: -sequences.lengths[i])
    states: list[Tensor] = [torch.empty(0)] * len(order)
    with _evaluating(model):
        for start in range(0, len(order), micro_batch):
            members = order[start : start + micro_batch]
            part = sequences.select(members)
            hidden = last_hidden(model, part, layout)
            bounds = cumulative(torch.tensor(part.lengths)).to(hidden.device)
            for i, row in zip(members, pool_hidden(hidden, cu_seqlens=bounds, mode="last"), strict=True):
                states[i] = row
    return torch.stack(states)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
