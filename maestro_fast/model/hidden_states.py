"""The last hidden states of a forward, and what is taken out of them: completion states, contexts, packed states.

The rows of a model's input may hold padding, and in the layout ``shared`` a prompt stands once for all its responses.
So the states stay where the model has put them, and what reads them takes rows by index. Nothing is copied but the rows
that are read.

Axis suffixes: B responses, T tokens of prompts and completions, C completion tokens, d hidden size, U tokens of the
model's input, with padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from maestro_fast.model.rows import Sequences
from maestro_fast.ops import pool_hidden
from maestro_fast.ops.pool_hidden import PoolMode
from maestro_fast.records import cumulative

# How contexts are read: pooled as by ``pool_hidden``; as the mean over the tokens of the response; or as the state of
# the last token after the first layer.
ContextMode = PoolMode | Literal["response_mean", "response_first_layer"]


@dataclass(frozen=True)
class HiddenStates:
    """The last hidden states of B sequences.

    Attributes:
        states_Ud: the model's output, row after row.
        place_T: int64 [T] on the CPU, the row of ``states_Ud`` for each token, sequence after sequence; None if the
            states are exactly those of the tokens in this order. Several tokens may have one row.
        sequences: the sequences.
        first_layer_Bd: [B, d], the state of each sequence's last token after the first layer, detached; None unless it
            was asked for.
    """

    states_Ud: Tensor
    place_T: Tensor | None
    sequences: Sequences
    first_layer_Bd: Tensor | None = None

    def detach(self) -> HiddenStates:
        return replace(self, states_Ud=self.states_Ud.detach())

    def take(self, tokens_N: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The states [N, d] of tokens, which are counted sequence after sequence, in ``dtype``; differentiable.

        The gradient of a state that is taken several times is the sum of its gradients. The sum is made in float32 and
        in one order, so that two runs give the same bits.
        """
        rows_N = tokens_N if self.place_T is None else self.place_T[tokens_N]
        taken: Tensor = _TakeRows.apply(  # type: ignore[no-untyped-call]
            self.states_Ud, rows_N, dtype or self.states_Ud.dtype
        )
        return taken

    def packed(self) -> Tensor:
        """The states [T, d] of all tokens, sequence after sequence."""
        return self.states_Ud if self.place_T is None else self.take(torch.arange(len(self.place_T)))

    def completions(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Takes the states that predict the completion tokens.

        Returns:
            The states [C, d] in ``dtype``, and the completion tokens that they predict, int64 [C].
        """
        rows, targets = [], []
        start = 0
        for prompt, completion in zip(self.sequences.prompt_ids, self.sequences.completion_ids, strict=True):
            first = start + len(prompt) - 1  # The prompt's last token predicts the first completion token.
            rows.append(torch.arange(first, first + len(completion)))
            targets.extend(completion)
            start += len(prompt) + len(completion)
        device = self.states_Ud.device
        return self.take(torch.cat(rows), dtype), torch.tensor(targets, dtype=torch.int64, device=device)

    def contexts(self, mode: ContextMode) -> Tensor:
        """The states of each response as one vector, float32 [B, d] (float64 for states in float64).

        Raises:
            ValueError: the mode reads the first layer, whose states the forward did not keep.
        """
        if mode == "response_first_layer":
            if self.first_layer_Bd is None:
                raise ValueError(f"mode: {mode!r}, but this forward kept no states of the first layer")
            return pool_hidden(
                self.first_layer_Bd, cu_seqlens=_ones(len(self.first_layer_Bd), self.first_layer_Bd.device)
            )
        if mode == "response_mean":
            return self._response_means()
        prompts = torch.tensor([len(ids) for ids in self.sequences.prompt_ids])
        bounds = cumulative(torch.tensor(self.sequences.lengths))
        if self.place_T is not None and mode.endswith("last"):
            last_B = bounds[:-1] + prompts - 1 if mode == "prompt_last" else bounds[1:] - 1
            return pool_hidden(self.take(last_B), cu_seqlens=_ones(len(last_B), self.states_Ud.device), mode="last")
        if self.place_T is not None and mode == "prompt_mean":
            return self._prompt_means(prompts, bounds)
        where = self.states_Ud.device
        return pool_hidden(self.packed(), cu_seqlens=bounds.to(where), mode=mode, prompt_lengths=prompts.to(where))

    def _response_means(self) -> Tensor:
        """The mean state over the tokens of each response; 0 for an empty one."""
        lengths = torch.tensor([len(ids) for ids in self.sequences.completion_ids])
        stop_B = torch.tensor(self.sequences.lengths).cumsum(0)
        tokens = [torch.arange(stop - length, stop) for stop, length in zip(stop_B, lengths, strict=True)]
        cu_seqlens = cumulative(lengths).to(self.states_Ud.device)
        return pool_hidden(self.take(torch.cat(tokens)), cu_seqlens=cu_seqlens, mode="mean")

    def _prompt_means(self, prompts: Tensor, bounds: Tensor) -> Tensor:
        """The mean state of each response's prompt, computed once for responses whose prompt has the same places."""
        assert self.place_T is not None
        of_place: dict[tuple[int, int, int], int] = {}
        own: list[int] = []
        tokens: list[Tensor] = []
        lengths: list[int] = []
        for start, length in zip(bounds[:-1].tolist(), prompts.tolist(), strict=True):
            places = self.place_T[start : start + length]
            key = (int(places[0]), int(places[-1]), length)
            if key not in of_place:
                of_place[key] = len(lengths)
                tokens.append(torch.arange(start, start + length))
                lengths.append(length)
            own.append(of_place[key])
        cu_seqlens = cumulative(torch.tensor(lengths)).to(self.states_Ud.device)
        means = pool_hidden(self.take(torch.cat(tokens)), cu_seqlens=cu_seqlens, mode="mean")
        return means[torch.tensor(own, device=means.device)]


def _ones(count: int, device: torch.device) -> Tensor:
    return torch.arange(count + 1, device=device)


class _TakeRows(torch.autograd.Function):
    """Takes rows [N, d] of states [U, d] by their indices, int64 [N] on the CPU, and casts them."""

    @staticmethod
    def forward(ctx: Any, states_Ud: Tensor, rows_N: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.rows_N, ctx.shape, ctx.dtype = rows_N, states_Ud.shape, states_Ud.dtype
        return states_Ud[rows_N.to(states_Ud.device)].to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Nd: Tensor) -> tuple[Tensor, None, None]:
        """Writes gradients of rows taken once, and sums those of the others over a table [M, most] of their takers."""
        rows_N, device = ctx.rows_N, grad_Nd.device
        grad_Ud = torch.zeros(ctx.shape, dtype=ctx.dtype, device=device)
        _, inverse_N, count = rows_N.unique(return_inverse=True, return_counts=True)
        once_N = count[inverse_N] == 1
        single = once_N.nonzero()[:, 0]
        grad_Ud.index_copy_(0, rows_N[single].to(device), grad_Nd[single.to(device)].to(ctx.dtype))
        if not bool(once_N.all()):
            several = (~once_N).nonzero()[:, 0]
            order = several[rows_N[several].argsort(stable=True)]
            rows_M, count_M = rows_N[order].unique_consecutive(return_counts=True)
            first_M = count_M.cumsum(0) - count_M
            taker = torch.arange(int(count_M.max()))
            there = taker < count_M[:, None]
            table = order[(first_M[:, None] + taker).clamp(max=len(order) - 1)].to(device)
            wide = torch.promote_types(grad_Nd.dtype, torch.float32)
            summed_Md = grad_Nd[table].to(wide).masked_fill(~there.to(device)[..., None], 0.0).sum(1)
            grad_Ud.index_copy_(0, rows_M.to(device), summed_Md.to(ctx.dtype))
        return grad_Ud, None, None
