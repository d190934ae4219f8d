"""Contexts of responses: which hidden states a batch of verl's asks for, and their means.

A batch asks by a key of its own, ``batch.CONTEXT_FLAG``, whose value is one of

    response       the state of the last token
    response_mean  the mean over the tokens of the response
    prompt_last    the state of the last token of the prompt
    prompt_mean    the mean over the tokens of the prompt

Each of them is the mean over one span of tokens of the row (``spans``), so one function serves padded, packed and
shared sequences (``pooled``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maestro_fast.integrations.verl.batch import CONTEXT_FLAG

KINDS = ("response", "response_mean", "prompt_last", "prompt_mean")


def wanted_kind(batch: Any, forward_only: bool) -> str | None:
    """The context that a batch asks for; None if it asks for none, or if it is trained on.

    Raises:
        ValueError: there is no such context.
    """
    from verl.utils import tensordict_utils

    kind = tensordict_utils.get_non_tensor_data(batch, CONTEXT_FLAG, None)
    if kind is None or not forward_only:
        return None
    if kind not in KINDS:
        raise ValueError(f"{CONTEXT_FLAG}: {kind!r}, expected one of {', '.join(KINDS)}")
    return str(kind)


def spans(batch: Any, kind: str) -> tuple[Tensor, Tensor]:
    """The tokens of each row over which a context is the mean.

    Args:
        batch: a micro-batch of verl's, with jagged ``input_ids`` and, for the prompt, ``prompts``. The prompt comes
            first in a row.
        kind: one of ``KINDS``.

    Returns:
        The first token of the span, counted from the beginning of the row, and the span's length. Both int64 [rows].

    Raises:
        ValueError: the batch does not tell the prompts apart.
    """
    length_B = _lengths(batch, "input_ids", kind)
    if kind == "response":
        return length_B - 1, torch.ones_like(length_B)
    prompt_B = _lengths(batch, "prompts", kind)
    if prompt_B.shape != length_B.shape:
        raise ValueError(f"prompts: {len(prompt_B)} rows, expected {len(length_B)} as in input_ids")
    if kind == "response_mean":
        return prompt_B, length_B - prompt_B
    if kind == "prompt_last":
        return prompt_B - 1, torch.ones_like(prompt_B)
    return torch.zeros_like(prompt_B), prompt_B


def _lengths(batch: Any, name: str, kind: str) -> Tensor:
    ids = batch.get(name, None)
    if not isinstance(ids, Tensor) or ids.layout != torch.jagged:
        came = "missing" if ids is None else f"{type(ids).__name__} {getattr(ids, 'layout', '')}".strip()
        raise ValueError(f"{name}: {came}, expected a jagged tensor, for the context {kind}")
    jagged: Any = ids
    length_B: Tensor = jagged.offsets().diff().long()
    return length_B


def pooled(hidden_Td: Tensor, begin_B: Tensor, length_B: Tensor, group: Any = None) -> Tensor:
    """The mean of the hidden states over each span, float32 [rows, d].

    Args:
        hidden_Td: the states of the tokens of all rows, or, with a group, this rank's share of them.
        begin_B, length_B: the spans, counted in all tokens. They follow each other and do not overlap.
        group: the processes that share the tokens, each of which has an equal part, by rank. They all have the same
            spans and get the same result. Only the [rows, d] sums travel, not the states.
    """
    from maestro_fast.ops import pool_hidden

    tokens = hidden_Td.shape[0]
    first = 0 if group is None else tokens * torch.distributed.get_rank(group)
    here_B = (begin_B - first).clamp(0, tokens)
    count_B = (begin_B + length_B - first).clamp(0, tokens) - here_B
    # For the op a sequence begins with its span and reaches to the next one, and the span is its prompt.
    bounds = nn.functional.pad(here_B, (0, 1), value=tokens)
    mean_Bd = pool_hidden(hidden_Td, cu_seqlens=bounds, prompt_lengths=count_B, mode="prompt_mean")
    if group is None:
        return mean_Bd
    share_Bd = mean_Bd * (count_B / length_B.clamp(min=1))[:, None]
    torch.distributed.all_reduce(share_Bd, group=group)
    return share_Bd


# --- while an engine reads them ---


class Reading:
    """Whether an engine reads contexts now, and the hidden states that its hook has seen last."""

    _context_kind: str | None = None
    _hidden: Tensor | None = None

    @contextlib.contextmanager
    def _reading(self, kind: str, hooks: Sequence[RemovableHandle]) -> Iterator[None]:
        self._context_kind = kind
        try:
            yield
        finally:
            self._context_kind = self._hidden = None
            for hook in hooks:
                hook.remove()

    def _seen(self) -> Tensor:
        """Hands over the hidden states that the hook has kept.

        Raises:
            RuntimeError: there are none.
        """
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            raise RuntimeError(
                "hidden states: the forward of the module that makes them was not seen, so there are none"
            )
        return hidden.detach()
