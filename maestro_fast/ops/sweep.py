"""The sweep of ``linear_policy_loss`` over the rows: in which order they go through the head, and what is computed.

    x = h @ W.T -> log p, H -> dL/dlog p, dL/dH (``ops.policy_loss``) -> dL/dx -> dL/dh, dL/dW

A row is a token of the batch. Its gradient follows from its own log-prob, from the log-probs of its whole response, or
from those of the whole batch: that is the ``Scope`` of a loss. Rows without a gradient need the forward alone. The host
decides which rows to skip by the tensors that it can read without waiting for the device; where it can read nothing,
every row is swept.

For a chunk's gradient the loss is differentiated over the whole batch, with the log-probs that are known so far. That
costs little compared with the chunk's matrix products, and the loss does not have to know about chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from maestro_fast.ops.backend import Backend
from maestro_fast.ops.head import GradientSums, Head, Rows, float16_unit
from maestro_fast.ops.loss_function import LogprobGradients, call_loss_function, is_row_wise, loss_function_gradient
from maestro_fast.ops.pack_sequences import pack_sequences
from maestro_fast.ops.policy_loss import loss_of, policy_gradient
from maestro_fast.ops.tensors import readable, wide
from maestro_fast.specs import LossFunction, LossInputs, PolicyLoss, PolicyLossConfig

IGNORED = -100  # the target of a masked token
Scope = Literal["token", "response", "batch"]  # whose log-probs the gradient of a token depends on


def scope_of(loss: PolicyLossConfig | LossFunction, inputs: LossInputs, dtype: torch.dtype) -> Scope:
    """The scope of a loss for hidden states of ``dtype``.

    Gradients of a float16 head are scaled by their size (``float16_unit``). For a user's function that size is known
    only when all log-probs are, so its scope is the batch.
    """
    if not isinstance(loss, PolicyLossConfig):
        return "token" if is_row_wise(loss) and dtype is not torch.float16 else "batch"
    corrects_kl = loss.kl_coef > 0 and loss.kl_bias_correction
    if loss.ratio == "sequence" and (inputs.old_logprobs is not None or corrects_kl):
        return "response"
    # Without old log-probs, a sampler's weight depends on the current ones.
    by_sequence = loss.sampler_correction.startswith("sequence")
    averaged = loss.ratio == "sequence" and loss.sampler_correction != "none"
    return "response" if inputs.old_logprobs is None and (by_sequence or averaged) else "token"


def keeps_every_gradient(loss: PolicyLossConfig | LossFunction) -> bool:
    """Whether a response may have a gradient although its advantage is 0."""
    return not isinstance(loss, PolicyLossConfig) or loss.kl_coef > 0 or loss.entropy_coef > 0


# --- the order of the rows ---


class Step(NamedTuple):
    """The rows of one chunk. ``gradient`` says whether their gradients are computed, or only their log-probs."""

    rows: Rows
    gradient: bool


class HeadSizes(Protocol):
    """What the order of the rows follows from; a ``Head`` is one."""

    @property
    def chunk(self) -> int: ...

    @property
    def product_rows(self) -> int: ...


class Known(NamedTuple):
    """Inputs that the host can read, as CPU tensors; None for those that it cannot.

    Attributes:
        bounds: int64 [B + 1], where the responses begin and end.
        worked_T: bool [T], whether a row is swept: it is not masked, and its response is active.
        has_gradient_B: bool [B], whether a response may have a gradient.
    """

    bounds: Tensor | None = None
    worked_T: Tensor | None = None
    has_gradient_B: Tensor | None = None

    @staticmethod
    def by_the_host(
        inputs: LossInputs, targets: Tensor, active: Tensor | None, loss: PolicyLossConfig | LossFunction
    ) -> Known:
        """What the host knows of these inputs. A tensor on the device is left alone, because the host would wait."""
        bounds = inputs.cu_seqlens.long() if readable(inputs.cu_seqlens) else None
        has_gradient_B = worked_T = None
        if readable(inputs.advantages) and not keeps_every_gradient(loss):
            has_gradient_B = inputs.advantages != 0
        for mask_T in (targets != IGNORED if readable(targets) else None, inputs.token_mask):
            if mask_T is not None and readable(mask_T):
                worked_T = mask_T != 0 if worked_T is None else worked_T & (mask_T != 0)
        if active is not None and readable(active) and bounds is not None:
            active_T = active.repeat_interleave(bounds.diff())
            worked_T = active_T if worked_T is None else worked_T & active_T
        return Known(bounds, worked_T, has_gradient_B)


def sweep_steps(tokens: int, sizes: HeadSizes, known: Known, *, gradient: bool, scope: Scope) -> list[Step]:
    """The steps that sweep all rows, at most a chunk of rows each. Steps with a gradient come last.

    With the scope "response", the rows of a response share a step. A response that is longer than a chunk is swept
    twice, first for the log-probs; so is every response where the host does not know the bounds. With the scope
    "batch", all rows are swept twice unless they fit into one chunk.

    Args:
        sizes: the rows of a chunk, and of a product of the head.
        gradient: whether any gradient is wanted.
    """
    chunk = sizes.chunk
    if all(x is None for x in known):  # This is also the case under torch.compile.
        kinds = [False, True] if gradient and scope != "token" else [gradient]
        starts = range(0, tokens, chunk)
        return [Step(slice(start, min(start + chunk, tokens)), kind) for kind in kinds for start in starts]
    rows = torch.arange(tokens) if known.worked_T is None else known.worked_T.nonzero()[:, 0]
    if not gradient:
        return [*_steps(rows, chunk, gradient=False)]
    if scope == "batch":
        first = _steps(rows, chunk, gradient=False) if len(rows) > chunk else ()
        return [*first, *_steps(rows, chunk, gradient=True)]
    without = rows[:0]
    if known.bounds is not None and known.has_gradient_B is not None:
        has_gradient = known.has_gradient_B[torch.bucketize(rows, known.bounds[1:], right=True)]
        without, rows = rows[~has_gradient], rows[has_gradient]
    if scope == "token":
        without, rows = _filled_up(without, rows, sizes.product_rows)
        return [*_steps(without, chunk, gradient=False), *_steps(rows, chunk, gradient=True)]
    bins, long = _by_response(rows, chunk, known.bounds)
    return [
        *_steps(torch.cat([without, long]), chunk, gradient=False),
        *(step for members in bins for step in _steps(members, chunk, gradient=True)),
        *_steps(long, chunk, gradient=True),
    ]


def _filled_up(without: Tensor, rows: Tensor, product: int) -> tuple[Tensor, Tensor]:
    """Moves rows without a gradient to those with one, if they save a product there.

    They take the place of zeros in the last product of the logits. The two products of the gradient get these rows
    more, so it pays for at most half of a product.
    """
    count = len(without) % product
    if not 0 < count <= min(-len(rows) % product, product // 2):
        return without, rows
    kept = len(without) - count
    return without[:kept], torch.cat([rows, without[kept:]]).sort().values


def _by_response(rows: Tensor, chunk: int, bounds: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Packs rows of whole responses, at most ``chunk`` together. Rows of longer responses are returned apart."""
    if bounds is None:
        return [], rows
    response = torch.bucketize(rows, bounds[1:], right=True)
    counts_B = torch.bincount(response, minlength=len(bounds) - 1)
    members = rows.split(counts_B.tolist())
    short = (counts_B <= chunk).nonzero()[:, 0]
    bins = pack_sequences(counts_B[short], chunk)
    packed = [torch.cat([members[short[i]] for i in sorted(packed)]) for packed in bins]
    return packed, rows[counts_B[response] > chunk]


def _steps(rows: Tensor, chunk: int, *, gradient: bool) -> Iterator[Step]:
    for part in rows.split(chunk):
        if len(part):
            yield Step(_range_or_indices(part), gradient)


def _range_or_indices(rows: Tensor) -> Rows:
    """Adjacent rows as a range, which makes a view where indices would make a copy."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) and bool((rows.diff() == 1).all()) else rows


# --- the sweep ---


class Sweep:
    """The state of a sweep: log-probs and entropies of the rows swept so far, and the sums of their gradients.

    Attributes:
        inputs: the inputs of the loss, on the device. Steps write log-probs and entropies into them.
        entropies: [T], or None where neither the loss nor a metric reads them.
        sums: the gradients so far of the tensors that ``want`` asked for.
    """

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        targets: Tensor,
        inputs: LossInputs,
        loss: PolicyLossConfig | LossFunction,
        backend: Backend | None,
    ) -> None:
        """Starts with log-probs equal to ``old_logprobs``, or with 0.

        Args:
            targets: int64 [T]; rows that are not swept have the target ``IGNORED``.
            inputs: the inputs of the loss. Their log-probs and entropies [T] are overwritten; the token mask is bool.
        """
        self.head, self.hidden, self.targets, self.inputs, self.loss = head, hidden, targets, inputs, loss
        self._backend, self.scope = backend, scope_of(loss, inputs, hidden.dtype)
        if inputs.old_logprobs is not None:  # Skipped rows have a ratio of 1: an infinite ratio times 0 would be NaN.
            assert inputs.token_mask is not None
            inputs.logprobs.copy_(torch.where(inputs.token_mask, inputs.old_logprobs, 0.0))
        self.entropies = inputs.entropies
        if self.entropies is None and head.spec.entropy != "none":
            self.entropies = torch.zeros_like(inputs.logprobs)
        self.sums = GradientSums(head, None, None, None, None)
        self._of_batch: tuple[PolicyLoss, LogprobGradients] | None = None

    def want(self, hidden: bool, weight: bool, bias: bool) -> None:
        """Says which gradients are wanted, and allocates them.

        The gradient of float16 states is held in float32, because float16 would round a token's share of the loss to 0.
        """
        dtype, head, states = self.inputs.logprobs.dtype, self.head, self.hidden
        narrow = dtype if states.dtype is torch.float16 else states.dtype
        self.sums = GradientSums(
            head,
            torch.zeros_like(states, dtype=narrow) if hidden else None,
            torch.zeros_like(head.weight, dtype=dtype) if weight else None,
            torch.zeros_like(head.bias) if bias and head.bias is not None else None,
            float16_unit(head, *self._foreseen()) if head.scales and self.scope != "batch" else None,
        )

    def _foreseen(self) -> LogprobGradients:
        """An estimate of the size of dL/dlog p and dL/dH [T]: all ratios are 1, and no term cancels another."""
        assert isinstance(self.loss, PolicyLossConfig)
        inputs = self.inputs
        if inputs.old_logprobs is None and inputs.sampling_logprobs is not None:
            assert inputs.token_mask is not None
            inputs = inputs._replace(logprobs=torch.where(inputs.token_mask, inputs.sampling_logprobs, 0.0))
        inputs = inputs._replace(advantages=inputs.advantages.abs() + self.loss.kl_coef, ref_logprobs=None)
        return policy_gradient(inputs, replace(self.loss, kl_coef=0.0), self._backend)

    def step(self, rows: Rows, gradient: bool) -> None:
        """Computes one chunk: its log-probs and entropies, and with ``gradient`` its share of the gradients."""
        chunk = self.head.chunk_of(self.hidden, self.targets, rows)
        x = chunk.logits()
        stats = chunk.statistics(x)
        logprobs = self.inputs.logprobs
        logprobs[rows] = torch.where(chunk.targets != IGNORED, stats.logprobs, logprobs[rows])
        if self.entropies is not None:
            self.entropies[rows] = stats.entropies
        if gradient:
            found = self._gradients()
            dentropies = None if found.entropies is None else found.entropies[rows]
            self.sums.add(chunk, rows, x, stats, found.logprobs[rows], dentropies)

    def _gradients(self) -> LogprobGradients:
        """The gradients by the log-probs so far. With the scope "batch" these are all, so the loss is called once."""
        if self.scope != "batch":
            return policy_gradient(self.inputs, self.loss, self._backend)
        if self._of_batch is None:
            assert not isinstance(self.loss, PolicyLossConfig)
            self._of_batch = loss_function_gradient(self.loss, self.inputs)
            if self.head.scales:
                live = self.targets != IGNORED  # The function may leave anything in the gradients of other rows.
                found = (None if x is None else torch.where(live, x, 0.0) for x in self._of_batch[1])
                self.sums.unit = float16_unit(self.head, *found)  # type: ignore[arg-type]
        return self._of_batch[1]

    def result(self, worked_T: Tensor | None) -> PolicyLoss:
        """Loss and metrics after all steps. The metrics count the tokens ``worked_T``; None counts all live tokens."""
        if not isinstance(self.loss, PolicyLossConfig):
            return call_loss_function(self.loss, self.inputs) if self._of_batch is None else self._of_batch[0]
        found = loss_of(self.inputs, self.loss, self._backend)
        if worked_T is None:
            return found
        counted = loss_of(self.inputs._replace(token_mask=worked_T), self.loss, self._backend)
        return PolicyLoss(found.loss, counted.metrics)


def empty_logprobs(hidden: Tensor) -> Tensor:
    """Zeros [T], into which log-probs or entropies of hidden states [T, d] will be written."""
    return hidden.new_zeros(hidden.shape[0], dtype=wide(hidden[:0]).dtype)
