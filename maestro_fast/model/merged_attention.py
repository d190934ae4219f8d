"""Attention over a row of prompts and their completions, by two calls of torch's varlen kernel.

A row holds ``[prompt A | completion 1 | completion 2 | prompt B | completion 3 | ...]``, and a completion sees its
prompt and itself. The kernel cannot be told so in one call, but in two: in the first, every piece of the row attends to
itself; in the second, the completions of each prompt attend to the prompt. Both give a weighted mean of values and the
logarithm of the sum of the weights, from which the mean over both follows:

    lse = log(exp(lse_own) + exp(lse_prompt))
    out = out_own exp(lse_own - lse) + out_prompt exp(lse_prompt - lse)

The backward is as exact. A pair's weight is ``exp(score - lse)``, and its gradient needs the sum of ``grad * out`` of
its query. So each call's own backward gives its pairs' part of the gradient, if it is handed the merged ``lse`` and
``out``.

Axis suffixes: T tokens of the row, C those that go on from another piece, P those of pieces that others go on from, H
heads, D size of a head.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from maestro_fast.records import cumulative

__all__ = ["Pieces", "merged_attention", "merging_obstacle"]

_INPUTS = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "is_causal", "scale", "window_size"]
_BACKWARD_INPUTS = ["grad_out", *_INPUTS[:3], "out", "lse", *_INPUTS[3:8], "rng_state", *_INPUTS[8:]]
_Over = tuple[Tensor, Tensor, int, int]  # The bounds of queries and of keys, and the longest of either.
_CAUSAL, _FULL = [-1, 0], [-1, -1]  # The kernel's windows: how far a query sees back and ahead.


def _inputs_of(name: str) -> list[str]:
    """The names of the arguments of an op that ``torch.nn.attention.varlen`` defines; none if it does not."""
    schemas = torch._C._jit_get_schemas_for_operator(f"torch_attn::{name}")
    return [argument.name for argument in schemas[0].arguments] if schemas else []


_TAKES_GROUPS = "enable_gqa" in _inputs_of("_varlen_attn")  # Otherwise it may want as many key heads as query heads.


@dataclass(frozen=True)
class Pieces:
    """The pieces of a row: prompts, and completions that go on from them.

    Attributes:
        bounds: int32 [pieces + 1], the bounds of all pieces.
        longest: the tokens of the longest piece.
        after_C, before_P: int64, the places of the tokens of completions, and of those of their prompts.
        after_bounds, before_bounds: int32 [prompts + 1], the bounds of each prompt's completions in ``after_C``, and of
            the prompts in ``before_P``. A prompt without completions is not among them.
        longest_after, longest_before: the largest number of tokens of a prompt's completions, and of a prompt.
    """

    bounds: Tensor
    longest: int
    after_C: Tensor
    before_P: Tensor
    after_bounds: Tensor
    before_bounds: Tensor
    longest_after: int
    longest_before: int

    @property
    def tables(self) -> list[Tensor]:
        """All tensors, as the ops below take them."""
        return [self.bounds, self.after_C, self.before_P, self.after_bounds, self.before_bounds]

    @property
    def lengths(self) -> list[int]:
        """All numbers, as the ops below take them."""
        return [self.longest, self.longest_after, self.longest_before]

    @classmethod
    def of(cls, starts: list[int], parents: list[int], tokens: int, device: torch.device) -> Pieces:
        """The pieces of a row of ``tokens`` tokens, by their starts and the pieces that they go on from (-1: none).

        Pieces that go on from the same piece follow each other and that piece, and none goes on from them.
        """
        bounds = [*starts, tokens]
        children: dict[int, tuple[int, int]] = {}
        for i, parent in enumerate(parents):
            if parent >= 0:
                children[parent] = (children.get(parent, (bounds[i], 0))[0], bounds[i + 1])
        before = [(bounds[parent], bounds[parent + 1]) for parent in children]
        after = list(children.values())
        return cls(
            torch.tensor(bounds, dtype=torch.int32).to(device),
            _longest(list(itertools.pairwise(bounds))),
            _places(after).to(device),
            _places(before).to(device),
            _bounds(after).to(device),
            _bounds(before).to(device),
            _longest(after),
            _longest(before),
        )


def _places(ranges: list[tuple[int, int]]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(*each) for each in ranges)])


def _bounds(ranges: list[tuple[int, int]]) -> Tensor:
    return cumulative(torch.tensor([stop - start for start, stop in ranges], dtype=torch.int64)).to(torch.int32)


def _longest(ranges: list[tuple[int, int]]) -> int:
    # The kernel has another way for queries of one token, which gains nothing here. 2 keeps it from that way.
    return max([2, *(stop - start for start, stop in ranges)])


def merging_obstacle() -> str | None:
    """Why this torch's varlen kernel cannot serve two merged calls; None if it can."""
    for name, expected in (("_varlen_attn", _INPUTS), ("_varlen_attn_backward", _BACKWARD_INPUTS)):
        found = _inputs_of(name)
        if found[: len(expected)] != expected:
            return f"torch_attn::{name} of torch {torch.__version__} takes {', '.join(found) or 'nothing known'}"
    return None if torch.version.hip is None else "the varlen kernel of ROCm lays its log-sum-exps out in another way"


def merged_attention(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, pieces: Pieces, scale: float) -> Tensor:
    """Attention of each token to the earlier tokens of its piece and to all of the piece that this one goes on from.

    Args:
        q_THD: [T, H, D] in half precision, on a device that the varlen kernel serves; ``k_THD`` and ``v_THD`` are
            [T, H_kv, D], and H is a multiple of H_kv.

    Returns:
        The output [T, H, D].
    """
    if (repeats := q_THD.shape[1] // k_THD.shape[1]) > 1 and not _TAKES_GROUPS:
        k_THD, v_THD = (x.repeat_interleave(repeats, dim=1) for x in (k_THD, v_THD))
    out_THD: Tensor = _merged(q_THD, k_THD, v_THD, pieces.tables, pieces.lengths, scale)[0]
    return out_THD


# --- two ops, which torch.compile and checkpointing take as they are ---


@torch.library.custom_op("maestro_fast::merged_attention", mutates_args=())
def _merged(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, tables: list[Tensor], lengths: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Returns the output [T, H, D], and the logarithm of the sum of each query's weights, float32 [H, T]."""
    own, over, after_C, before_P = _calls(tables, lengths)
    out_THD, lse_HT = _call(q_THD, k_THD, v_THD, own, scale, causal=True)
    if not len(after_C):
        return out_THD, lse_HT
    prompt_CHD, prompt_HC = _call(q_THD[after_C], k_THD[before_P], v_THD[before_P], over, scale, causal=False)
    own_CHD, own_HC = out_THD[after_C], lse_HT[:, after_C]
    merged_HC = torch.logaddexp(own_HC, prompt_HC)
    own_weight, prompt_weight = ((lse - merged_HC).exp().mT[..., None] for lse in (own_HC, prompt_HC))
    merged_CHD = own_CHD.float() * own_weight + prompt_CHD.float() * prompt_weight
    out_THD.index_copy_(0, after_C, merged_CHD.to(out_THD.dtype))
    lse_HT.index_copy_(1, after_C, merged_HC)
    return out_THD, lse_HT


def _calls(tables: list[Tensor], lengths: list[int]) -> tuple[_Over, _Over, Tensor, Tensor]:
    """The sequences of both calls, and the places of the second one's queries and keys."""
    bounds, after_C, before_P, after_bounds, before_bounds = tables
    longest, longest_after, longest_before = lengths
    own, over = (bounds, bounds, longest, longest), (after_bounds, before_bounds, longest_after, longest_before)
    return own, over, after_C, before_P


def _call(
    query: Tensor, key: Tensor, value: Tensor, over: _Over, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    out, lse, _ = torch_varlen._varlen_attn(
        query, key, value, *over, causal, scale, _CAUSAL if causal else _FULL, **grouped
    )
    return out, lse


@_merged.register_fake
def _merged_fake(q_THD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, _size = q_THD.shape
    return torch.empty_like(q_THD), q_THD.new_empty((heads, tokens), dtype=torch.float32)


@torch.library.custom_op("maestro_fast::merged_attention_backward", mutates_args=())
def _merged_backward(
    grad_THD: Tensor,
    qkv: list[Tensor],
    out_THD: Tensor,
    lse_HT: Tensor,
    tables: list[Tensor],
    lengths: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of queries, keys and values."""
    q_THD, k_THD, v_THD = qkv
    own, over, after_C, before_P = _calls(tables, lengths)
    unused = torch.zeros(2, dtype=torch.uint64, device=q_THD.device)  # The state of the dropout's random numbers.

    def call(tensors: list[Tensor], over: _Over, *, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        window = _CAUSAL if causal else _FULL
        found: tuple[Tensor, Tensor, Tensor] = torch_varlen._varlen_attn_backward(
            *tensors, *over, causal, unused, scale, window
        )
        return found

    gradients = call([grad_THD, *qkv, out_THD, lse_HT], own, causal=True)
    if not len(after_C):
        return gradients
    grad_CHD, q_CHD, out_CHD = (x[after_C] for x in (grad_THD, q_THD, out_THD))
    lse_HC = lse_HT[:, after_C].contiguous()
    more = call([grad_CHD, q_CHD, k_THD[before_P], v_THD[before_P], out_CHD, lse_HC], over, causal=False)
    for total, part, places in zip(gradients, more, (after_C, before_P, before_P), strict=True):
        total.index_copy_(0, places, total[places] + part)  # No place occurs twice, so the sum has one order.
    return gradients


@_merged_backward.register_fake
def _merged_backward_fake(_grad: Tensor, qkv: list[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq_THD, dk_THD, dv_THD = (torch.empty_like(x) for x in qkv)
    return dq_THD, dk_THD, dv_THD


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_THD, k_THD, v_THD, tables, ctx.lengths, ctx.scale = inputs
    ctx.save_for_backward(q_THD, k_THD, v_THD, *output, *tables)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_THD: Tensor, _: Tensor) -> tuple[Any, ...]:
    q_THD, k_THD, v_THD, out_THD, lse_HT, *tables = ctx.saved_tensors
    qkv = [q_THD, k_THD, v_THD]
    gradients = _merged_backward(grad_THD, qkv, out_THD, lse_HT, tables, ctx.lengths, ctx.scale)
    return (*gradients, [None] * len(tables), None, None)


_merged.register_autograd(_backward, setup_context=_remember)
