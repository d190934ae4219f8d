"""A language-model head in chunks of rows: its matrix products, and the forward and backward pass of all rows.

    x = h @ W.T         dL/dh = scale * G @ W         dL/dW = scale * G.T @ h         dL/db = sum of the rows of G

A row is a token. x are its logits before scale, bias and soft cap, and G is the gradient by scale * x + b. The steps
from x to the log-prob, and back to G, are in ``ops.head_rows``. On a CUDA device the products take 16-bit operands and
add up in float32.

The logits of a chunk of rows exist at once. They come from products of one fixed number of rows, the last of which is
filled up with zeros. So these products have the same shape, whatever else is in the batch. Then the log-probs of the
same hidden states are bitwise the same in the scoring forward and in the training forward, and the on-policy ratio is
exactly 1. The gradient by hidden states is made in the same way, unless it is collected in a buffer.

A float32 G overwrites the logits of its chunk, and its two products follow at once. A 16-bit G is collected in a buffer
until the buffer has ``Head.gradient_rows`` rows. Every product that adds to dW reads and writes all of dW, so dW then
passes through memory half as often.

A float16 G is multiplied by a power of two, and the sums are divided by it, because float16 would round a token's share
of the loss to 0. The factor brings the largest expected gradient to between 2^6 and 2^7. Gradients that turn out up to
512 times larger still fit. Beyond that they become infinite, so that the overflow is seen. Probabilities down to 2^-20
keep all 11 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maestro_fast.ops import head_rows
from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.gpu import operator
from maestro_fast.ops.tensors import PLAIN, no_outputs, wide, without_autocast
from maestro_fast.specs import HeadSpec, RowStatistics

Rows = slice | Tensor  # rows of the batch: a range, or int64 indices

# The number of float32 logits of a chunk. On a CPU they take at most 128 MiB, or are those of 256 rows. Every chunk
# reads the head twice, and reads and writes its gradient once, which for 64 rows takes about as long as a product
# (bench/NOTES.md). On a GPU they take 2.5 GiB, which hold 4,096 rows of a vocabulary of up to 163,840.
_CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 5 * 2**27}
_LEAST_ROWS = {"cpu": 256, "cuda": 1024}
# The rows of one product of hidden states and head. All products have one shape, so that a row's bits do not depend on
# its batch: more rows are faster, but calls and chunks that are not full are padded by half as many on average.
# On a CPU, with one thread of a Xeon and V = 49,152, d = 576, 64 rows take 44 ms in products of 64 rows, 32 in products
# of 128, 30 of 256 and 25 of 768.
# On the 132 processors of an H100 or H200, tiles of 128 x 256 over a vocabulary of 151,936 make 36.0 waves for 1,024
# rows, 72.0 for 2,048 and 144.0 for 4,096. Over 129,280 they make 30.6, 61.2 and 122.4, over 128,256 30.4, 60.7 and
# 121.5, over 32,000 7.6, 15.2 and 30.3. The last wave is not full. With these four vocabularies that costs 1,024 rows
# 0, 1.3, 2.1 and 5.6 %, and 2,048 rows 0, 1.3, 0.4 and 5.6 %. On an H100 with V = 151,936, products into float32 ran at
# 728, 747 and 676 TFLOP/s for 1,024, 2,048 and 4,096 rows at d = 4,096, and at 501, 516 and 560 at d = 1,024
# (bench/results/gpu_tiles.md). So 2,048 rows would gain 3 %, and short calls would take twice as long.
_PRODUCT_ROWS = {"cpu": 128, "cuda": 1024}
_LARGEST = 2.0**6  # the power of two to which the largest gradient of a float16 head is scaled
_EXPONENT = 0x7F800000  # the bits of a positive float32 that hold its power of two
_ALIGNED = 16  # rows begin at a multiple of 16 columns, 64 bytes of float32, so that they are read in whole vectors


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """The rows of a chunk, whole products. They follow from vocabulary and kind of device, so results never depend on
    the batch."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    rows = _CHUNK_ELEMENTS[kind] // vocabulary // _PRODUCT_ROWS[kind] * _PRODUCT_ROWS[kind]
    return min(max(rows, _LEAST_ROWS[kind]), 4096)


def product_rows(device: torch.device) -> int:
    """The rows of one product of hidden states and head."""
    return _PRODUCT_ROWS["cpu" if device.type == "cpu" else "cuda"]


def logit_rows(chunk: int, product: int) -> int:
    """The rows whose float32 logits exist at once, where a buffer holds 16-bit gradients of ``chunk`` rows beside them.

    The gradients take half of the memory. The logits are as many whole products as fit into the other half, at least 1.
    """
    return max(chunk // 2 // product, 1) * product


def empty_rows(rows: int, columns: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor [rows, columns] on the device of ``x``, whose rows all begin at aligned addresses."""
    stride = -(-columns // _ALIGNED) * _ALIGNED
    return torch.empty(rows, stride, device=x.device, dtype=dtype)[:, :columns]


# --- matrix products ---
#
# Eager calls use torch.mm and torch.addmm with out_dtype. A compiled graph cannot: torch.addmm with out_dtype raises
# TypeError on the fake tensors of torch 2.11, Inductor's own addmm does not know the argument, and its code for several
# products into slices of one tensor is wrong where shapes are symbolic. So a graph calls the operators registered here,
# which are black boxes to it. Tensors of other classes, fake or sharded ones, are multiplied by PyTorch's @.

_HALVES = torch.bfloat16, torch.float16


def is_half(x: Tensor) -> bool:
    return x.dtype in _HALVES


def operand(x: Tensor) -> Tensor:
    """``x`` as the products take it: 16-bit if it is so on a CUDA device, whose tensor cores add up in float32, else
    float32 or float64."""
    return x if x.is_cuda and is_half(x) else wide(x)


def product(a: Tensor, b: Tensor, step: int) -> Tensor:
    """a @ b, float32 [n, m] (float64 for float64), in products of ``step`` rows.

    So no row's bits depend on other rows. Rows that the last product lacks are zeros. The rows of the result begin at
    aligned addresses, but for a graph, where gaps between rows would need a copy.
    """
    if type(a) not in PLAIN or type(b) not in PLAIN:
        with without_autocast(a):
            return wide(a) @ wide(b)
    return _product_operator(a, b, step, not torch.compiler.is_compiling())


def add_product_(total: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """total += alpha * a @ b. ``total`` is float32 or float64."""
    if a.dtype == b.dtype and is_half(a) and type(total) in PLAIN:
        _add_product_operator(total, a, b, float(alpha))
    else:
        with without_autocast(a):
            total.addmm_(wide(a), wide(b), alpha=alpha)


def _empty_product(a: Tensor, b: Tensor, step: int, aligned: bool) -> Tensor:
    dtype = torch.float64 if a.dtype is torch.float64 else torch.float32
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


@operator("head_product(Tensor a, Tensor b, SymInt step, bool aligned) -> Tensor", _empty_product)
def _product_operator(a: Tensor, b: Tensor, step: int, aligned: bool) -> Tensor:
    rows, columns = a.shape[0], b.shape[1]
    padded = -(-rows // step) * step
    dtype = wide(a[:0]).dtype
    out = empty_rows(padded, columns, a, dtype) if aligned else a.new_empty(padded, columns, dtype=dtype)
    for start in range(0, padded, step):
        part = a[start : start + step]
        missing = step - part.shape[0]
        if missing:
            part = torch.cat([part, part.new_zeros(missing, part.shape[1])])
        _product_into(out[start : start + step], part, b)
    return out[:rows]


@operator("head_add_product_(Tensor(a!) total, Tensor a, Tensor b, float alpha) -> ()", no_outputs)
def _add_product_operator(total: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    _add_product_(total, a, b, alpha)


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    with without_autocast(a), torch.no_grad():
        if is_half(a):
            torch.mm(a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out=out)


def _add_product_(total: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    with without_autocast(a), torch.no_grad():
        torch.addmm(total, a, b, alpha=alpha, out_dtype=torch.float32, out=total)


# --- a head, and a chunk of rows on its way through it ---


@dataclass(frozen=True)
class Head:
    """A head, with its weight in the dtype that the products take.

    Attributes:
        weight: [V, d], 16-bit or float32 on a CUDA device, float32 or float64 elsewhere.
        bias: [V] in the dtype of the logits, or None.
        spec: how logits become log-probs.
        chunk: C, the most rows whose logits exist at once.
        product_rows: the rows of one product of hidden states and head.
        gradient_rows: the most rows that the products of the gradient take at once. They are more than a chunk where
            dL/dlogits is 16-bit and is collected in a buffer. Then half of the memory holds the float32 logits of a
            chunk, and the other half holds the 16-bit gradients of two chunks.
        backend: what computes the rows of logits: "cpp", "triton" or "torch".
    """

    weight: Tensor
    bias: Tensor | None
    spec: HeadSpec
    chunk: int
    product_rows: int
    gradient_rows: int
    backend: Backend

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None, spec: HeadSpec, backend: Backend | None = None) -> Head:
        """The head of a weight [V, d]. ``backend=None`` takes what serves ``token_logprobs``."""
        backend = backend or head_backend("token_logprobs", None, weight, bias=bias)
        bias = None if bias is None else bias.to(wide(weight[:0]).dtype).contiguous()
        weight = operand(weight)
        rows, product = chunk_rows(weight.shape[0], weight.device), product_rows(weight.device)
        collects = backend == "triton" and is_half(weight)
        return Head(weight, bias, spec, logit_rows(rows, product) if collects else rows, product, rows, backend)

    @property
    def collects(self) -> bool:
        """Whether the gradients of several chunks wait in a buffer for one product."""
        return self.backend == "triton" and is_half(self.weight)

    @property
    def scales(self) -> bool:
        """Whether gradients are scaled before they become dL/dlogits, because float16 would round small ones to 0."""
        return self.weight.dtype is torch.float16

    def chunk_of(self, hidden: Tensor, targets: Tensor, rows: Rows) -> Chunk:
        """At most C rows of the batch [T, d]. Ignored rows become 0, because a NaN there would reach dW as 0 * NaN."""
        ids = targets[rows]
        states = torch.where((ids != self.spec.ignore_index)[:, None], hidden[rows], 0.0)
        return Chunk(self, operand(states), ids)


def head_backend(
    op: str, backend: Backend | None, *tensors: Tensor, bias: Tensor | None, others: Sequence[Any] = ()
) -> Backend:
    """The backend that serves a head's op.

    Args:
        tensors: hidden states and head.
        bias: of any floating dtype, because it is converted.
        others: further arguments, of any dtype and on any device. Tensors of a class of their own count.

    Raises:
        ValueError: see ``resolve``.
    """
    if bias is not None and bias.dtype is torch.float64:
        bias = bias.to(wide(tensors[0][:0]).dtype)
    strange = [x for x in others if isinstance(x, Tensor) and type(x) not in PLAIN]
    return resolve(op, backend, *tensors, bias, *strange)


_STATISTICS: dict[Backend, Callable[[Tensor, Tensor, Tensor | None, HeadSpec], RowStatistics]] = {
    "cpp": head_rows.cpp_row_statistics,
    "triton": head_rows.triton_row_statistics,
    "torch": head_rows.row_statistics,
}


@dataclass(frozen=True)
class Chunk:
    """Hidden states [n, d] and targets [n]."""

    head: Head
    hidden: Tensor
    targets: Tensor

    @property
    def rows(self) -> int:
        return len(self.targets)

    @staticmethod
    def joined(chunks: Sequence[Chunk]) -> Chunk:
        """Joins several chunks into one, which may have more rows than a chunk of logits."""
        if len(chunks) == 1:
            return chunks[0]
        hidden, targets = torch.cat([x.hidden for x in chunks]), torch.cat([x.targets for x in chunks])
        return Chunk(chunks[0].head, hidden, targets)

    def logits(self) -> Tensor:
        """The output x of the product [n, V], before scale, bias and soft cap."""
        return product(self.hidden, self.head.weight.T, self.head.product_rows)

    def statistics(self, x: Tensor) -> RowStatistics:
        """The statistics of all n rows."""
        return _STATISTICS[self.head.backend](x, self.targets, self.head.bias, self.head.spec)

    def dlogits(
        self, x: Tensor, stats: RowStatistics, dlogprobs: Tensor, dentropies: Tensor | None, out: Tensor | None
    ) -> Tensor:
        """G = dL/d(scale * x + bias) [n, V] in the dtype of the products, from the gradients of the chunk's rows [n].

        Args:
            x: the chunk's ``logits``.
            stats: the ``statistics`` of these logits.
            dlogprobs, dentropies: the gradients by log-probs and entropies [n]; None means 0.
            out: where the gradient is written. None overwrites ``x`` where it has the dtype of the products.
        """
        if out is None and is_half(self.hidden):
            out = torch.empty_like(x, dtype=self.hidden.dtype)
        given = self.targets, self.head.bias, stats, dlogprobs, dentropies, self.head.spec
        if self.head.backend == "cpp":
            assert out is None
            return head_rows.cpp_dlogits_(x, *given)
        (head_rows.triton_dlogits_ if self.head.backend == "triton" else head_rows.dlogits_)(x, *given, out)
        return x if out is None else out

    def dhidden(self, dlogits: Tensor) -> Tensor:
        """The gradient by the hidden states [n, d], float32 or float64."""
        # Half as many rows as for the logits are nearly as fast here, because the product is as deep as the vocabulary.
        step = dlogits.shape[0] if self.head.collects else self.head.product_rows // 2
        return product(dlogits, self.head.weight, max(step, 1)).mul_(self.head.spec.scale)

    def add_dweight_(self, dweight: Tensor, dlogits: Tensor) -> None:
        """Adds this chunk's share to the gradient by the weight [V, d], float32 or float64."""
        add_product_(dweight, dlogits.T, self.hidden, self.head.spec.scale)


# --- all rows, forward and back ---


class HeadGradients(NamedTuple):
    """The gradients by hidden [T, d], weight [V, d] and bias [V]; None where a gradient is not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def head_forward(head: Head, hidden: Tensor, targets: Tensor) -> RowStatistics:
    """The statistics of all T rows."""
    tokens = hidden.shape[0]
    logprobs, peaks, totals = (wide(hidden).new_zeros(tokens) for _ in range(3))
    whole = RowStatistics(logprobs, peaks, totals, peaks.new_zeros(tokens if head.spec.entropy != "none" else 0))
    for chunk, rows in _chunks(head, hidden, targets):
        for all_rows, part in zip(whole, chunk.statistics(chunk.logits()), strict=True):
            if len(part):
                all_rows[rows] = part
    return whole


def head_backward(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    stats: RowStatistics | None,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> HeadGradients:
    """The gradients by the head's inputs: by hidden and weight in their dtype, by the bias in the dtype of the logits.

    Args:
        stats: the result of ``head_forward``. None computes the statistics again, which is needed where the forward
            pass formed its logits in another way, and so with other bits.
        dlogprobs, dentropies: the gradients by log-probs and entropies [T]; None means 0.
        wanted: whether the gradients by hidden, weight and bias are wanted.
    """
    precision = wide(hidden[:0]).dtype
    dhidden = torch.empty_like(hidden) if wanted[0] else None
    dweight = torch.zeros_like(head.weight, dtype=precision) if wanted[1] else None
    dbias = torch.zeros_like(head.bias) if wanted[2] and head.bias is not None else None
    unit = None
    if head.scales:
        live = targets != head.spec.ignore_index  # The gradient of an ignored row may be anything.
        unit = float16_unit(
            head,
            torch.where(live, dlogprobs, 0.0),
            None if dentropies is None else torch.where(live, dentropies, 0.0),
        )
    sums = GradientSums(head, dhidden, dweight, dbias, unit)
    for chunk, rows in _chunks(head, hidden, targets):
        x = chunk.logits()
        part = chunk.statistics(x) if stats is None else _part(stats, rows)
        sums.add(chunk, rows, x, part, dlogprobs[rows], None if dentropies is None else dentropies[rows])
        del x  # The next chunk reuses its memory.
    sums.finish()
    return HeadGradients(dhidden, None if dweight is None else dweight.to(hidden.dtype), dbias)


def _part(stats: RowStatistics, rows: slice) -> RowStatistics:
    """The statistics of one chunk. A gradient does not read the log-probs, so peaks stand in their place."""
    return RowStatistics(stats.peaks[rows], stats.peaks[rows], stats.totals[rows], stats.entropies[rows])


def _chunks(head: Head, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Chunk, slice]]:
    for start in range(0, hidden.shape[0], head.chunk):
        rows = slice(start, min(start + head.chunk, hidden.shape[0]))
        yield head.chunk_of(hidden, targets, rows), rows


class GradientSums:
    """The gradients by a head's inputs, summed chunk by chunk. ``finish`` completes them.

    Attributes:
        hidden: [T, d], of which every chunk writes its rows; None where it is not wanted.
        weight, bias: [V, d] and [V], float32 or float64, to which every chunk adds; None where they are not wanted.
        unit: the factor of all gradients until ``finish`` divides by it, see ``float16_unit``; None for no factor.
    """

    def __init__(
        self, head: Head, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, unit: Tensor | None
    ) -> None:
        self.head, self.hidden, self.weight, self.bias, self.unit = head, hidden, weight, bias, unit
        self._waiting: list[tuple[Chunk, Rows]] = []
        self._filled = 0
        self._buffer: Tensor | None = None

    def add(
        self,
        chunk: Chunk,
        rows: Rows,
        x: Tensor,
        stats: RowStatistics,
        dlogprobs: Tensor,
        dentropies: Tensor | None,
    ) -> None:
        """Adds one chunk, which holds the ``rows`` of the batch. Its logits ``x`` may be overwritten."""
        if self.unit is not None:
            dlogprobs = dlogprobs * self.unit
            dentropies = None if dentropies is None else dentropies * self.unit
        if not self.head.collects:
            self._multiply(chunk, [rows], chunk.dlogits(x, stats, dlogprobs, dentropies, None))
            return
        if self._filled + chunk.rows > self.head.gradient_rows:
            self._empty()
        if self._buffer is None:
            self._buffer = empty_rows(self.head.gradient_rows, x.shape[1], x, chunk.hidden.dtype)
        chunk.dlogits(x, stats, dlogprobs, dentropies, self._buffer[self._filled : self._filled + chunk.rows])
        self._waiting.append((chunk, rows))
        self._filled += chunk.rows

    def finish(self) -> None:
        """Adds the chunks that still wait in the buffer, and divides the sums by ``unit``."""
        self._empty()
        if self.unit is not None:
            for total in (self.weight, self.bias):
                if total is not None:
                    total /= self.unit

    def _empty(self) -> None:
        """Adds the products of the rows that were collected in the buffer."""
        if self._buffer is not None and self._waiting:
            chunks, places = zip(*self._waiting, strict=True)
            self._multiply(Chunk.joined(chunks), list(places), self._buffer[: self._filled])
        self._waiting, self._filled = [], 0

    def _multiply(self, chunk: Chunk, places: list[Rows], dlogits: Tensor) -> None:
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)
        if self.hidden is not None:
            found = chunk.dhidden(dlogits)
            found = found if self.unit is None else found.div_(self.unit)
            counts = [_count(rows) for rows in places]
            for rows, part in zip(places, found.split(counts), strict=True):
                self.hidden[rows] = part.to(self.hidden.dtype)
        if self.weight is not None:
            chunk.add_dweight_(self.weight, dlogits)


def _count(rows: Rows) -> int:
    return len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start


def float16_unit(head: Head, dlogprobs: Tensor, dentropies: Tensor | None) -> Tensor:
    """A power of two, as a scalar tensor, that scales gradients about as large as these [T] into float16's range.

    It is computed on the device, so the host does not wait.
    """
    largest = _largest(dlogprobs) if dentropies is None else _largest(dlogprobs) + _largest(dentropies)
    largest = (largest / head.spec.temperature).clamp(min=2.0**-60)
    power = (largest.view(torch.int32) & _EXPONENT).view(torch.float32)
    return _LARGEST / power


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax() if x.numel() else x.new_zeros(())
