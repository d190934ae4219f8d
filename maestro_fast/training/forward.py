"""Forward passes of the policy: packed last hidden states of many sequences, and what is read off them.

The backbone's output is taken by a hook while the model itself is called, so that DDP, FSDP, PEFT, gradient
checkpointing and torch.compile see an ordinary forward. The model's own head runs on one position per row only.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from maestro_fast.ops import pack_sequences, pool_hidden, token_logprobs
from maestro_fast.ops.token_logprobs import EntropyMode
from maestro_fast.records import PolicyOutputs, cumulative
from maestro_fast.training.head import LanguageHead, backbone_of, causal_lm

logger = logging.getLogger(__name__)
Layout = Literal["packed", "padded"]


@dataclass(frozen=True)
class Sequences:
    """Prompt and completion of each of B responses, as token ids."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def lengths(self) -> list[int]:
        return [len(p) + len(c) for p, c in zip(self.prompt_ids, self.completion_ids, strict=True)]

    def select(self, indices: list[int]) -> Sequences:
        return Sequences([self.prompt_ids[i] for i in indices], [self.completion_ids[i] for i in indices])


@dataclass(frozen=True)
class _Rows:
    """Model input [R, L], and for each token of the sequences, in order, its place in the flattened input."""

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    place_T: Tensor


def last_hidden(model: nn.Module, sequences: Sequences, layout: Layout) -> Tensor:
    """Packed last hidden states [T, d] of all tokens, sequence after sequence; differentiable if grad is on."""
    device = next(model.parameters()).device
    tokens = [p + c for p, c in zip(sequences.prompt_ids, sequences.completion_ids, strict=True)]
    rows = _packed_rows(tokens) if layout == "packed" else _padded_rows(tokens)
    captured: list[Tensor] = []
    handle = backbone_of(model).register_forward_hook(lambda _m, _a, out: captured.append(out.last_hidden_state))
    try:
        model(
            input_ids=rows.input_ids.to(device),
            position_ids=rows.position_ids.to(device),
            attention_mask=None if rows.attention_mask is None else rows.attention_mask.to(device),
            use_cache=False,
            logits_to_keep=1,
        )
    finally:
        handle.remove()
    return captured[0].flatten(0, 1)[rows.place_T.to(device)]


def _padded_rows(tokens: list[list[int]]) -> _Rows:
    width = max(map(len, tokens))
    ids, mask = (
        torch.zeros(len(tokens), width, dtype=torch.int64),
        torch.zeros(len(tokens), width, dtype=torch.int64),
    )
    for i, sequence in enumerate(tokens):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = 1
    positions = torch.arange(width).expand(len(tokens), width)
    return _Rows(ids, positions, mask, mask.flatten().nonzero()[:, 0])


def _packed_rows(tokens: list[list[int]]) -> _Rows:
    """Several sequences to a row, told apart by position ids that start again at 0, as transformers reads them."""
    lengths = [len(sequence) for sequence in tokens]
    width = max(lengths)
    bins = pack_sequences(lengths, width)
    ids = torch.zeros(len(bins), width, dtype=torch.int64)
    positions = torch.zeros(len(bins), width, dtype=torch.int64)
    places: list[Tensor] = [torch.empty(0)] * len(tokens)
    for r, members in enumerate(bins):
        start = 0
        for i in members:
            end = start + lengths[i]
            ids[r, start:end] = torch.tensor(tokens[i])
            positions[r, start:end] = torch.arange(lengths[i])
            places[i] = torch.arange(start, end) + r * width
            start = end
        positions[r, start:] = torch.arange(width - start)  # the rest of the row is one more sequence, of padding
    return _Rows(ids, positions, None, torch.cat(places))


@torch.no_grad()
def choose_layout(model: nn.Module) -> Layout:
    """``packed`` if the model keeps packed sequences apart, else ``padded``; the choice and its reason are logged."""
    language_model = causal_lm(model)
    if "flash" in str(getattr(language_model.config, "_attn_implementation", "")):
        logger.info("layout: padded, FlashAttention leaves the padding out by itself")
        return "padded"
    vocabulary = language_model.get_input_embeddings().weight.shape[0]
    ids = [i % vocabulary for i in range(1, 17)]
    probe = Sequences([ids[:9], ids[9:12], ids[12:15]], [[ids[15]]] * 3)  # the two short ones share a row
    was_training = model.training
    model.eval()
    try:
        packed, padded = (
            last_hidden(model, probe, "packed").float(),
            last_hidden(model, probe, "padded").float(),
        )
    finally:
        model.train(was_training)
    gap = ((packed - padded).abs().max() / padded.abs().max()).item()
    if gap < (1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2):
        logger.info("layout: packed, hidden states equal the padded ones to %.1e", gap)
        return "packed"
    logger.info("layout: padded, %s mixes packed sequences (difference %.1e)", type(language_model).__name__, gap)
    return "padded"


def completion_logprobs(
    hidden: Tensor, sequences: Sequences, head: LanguageHead, temperature: float, entropy: EntropyMode
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies [C] of the completion tokens, from packed states [T, d]."""
    rows, targets = [], []
    start = 0
    for prompt, completion in zip(sequences.prompt_ids, sequences.completion_ids, strict=True):
        first = start + len(prompt) - 1  # the state that predicts the first completion token
        rows.append(torch.arange(first, first + len(completion)))
        targets.extend(completion)
        start += len(prompt) + len(completion)
    weight = head.weight
    out = token_logprobs(
        hidden[torch.cat(rows).to(hidden.device)].to(weight.dtype),
        weight,
        torch.tensor(targets, dtype=torch.int64, device=hidden.device),
        bias=head.bias,
        logit_scale=head.scale,
        softcap=head.softcap,
        temperature=temperature,
        entropy=entropy,
    )
    return out.logprobs, out.entropies


def policy_outputs(hidden: Tensor, sequences: Sequences, logprobs: Tensor, entropies: Tensor | None) -> PolicyOutputs:
    """What a forward that is differentiated tells besides, without its graph."""
    bounds = cumulative(torch.tensor(sequences.lengths)).to(hidden.device)
    context = pool_hidden(hidden.detach(), cu_seqlens=bounds, mode="last")
    return PolicyOutputs(logprobs.detach(), None if entropies is None else entropies.detach(), context)


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
    context: bool = False,
) -> PolicyOutputs:
    """One forward over all responses, ``micro_batch`` at a time, longest first so that little is padded.

    The number of model calls depends on B alone: sharded models need the same number on every process.

    Args:
        entropy: whether to return entropies.
        context: whether to return the terminal hidden state of each response.
    """
    order = sorted(range(len(sequences)), key=lambda i: -sequences.lengths[i])
    logprobs: list[Tensor] = [torch.empty(0)] * len(order)
    entropies: list[Tensor] = [torch.empty(0)] * len(order)
    contexts: list[Tensor] = [torch.empty(0)] * len(order)
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
            if context:
                bounds = cumulative(torch.tensor(part.lengths)).to(hidden.device)
                for i, row in zip(members, pool_hidden(hidden, cu_seqlens=bounds, mode="last"), strict=True):
                    contexts[i] = row
    return PolicyOutputs(
        torch.cat(logprobs),
        torch.cat(entropies) if entropy else None,
        torch.stack(contexts) if context else None,
    )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
