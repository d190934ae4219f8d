"""Chunks of rows through a language-model head: which rows a GEMM takes, in which precision, and whose row maths.

Rows are worked in chunks of a fixed size that follows from the vocabulary alone, the last one padded with zeros. Every
GEMM then has the same shape, whatever else is in the batch, so the log-probs of the same hidden states are bitwise the
same in the scoring and in the training forward, and the on-policy ratio is exactly 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maestro_fast.ops import gpu_head_rows, head_rows
from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.head_products import add_product_, is_half, operand, product
from maestro_fast.ops.tensors import wide
from maestro_fast.specs import HeadSpec, RowStatistics

Rows = slice | Tensor  # of the batch: a range, or int64 indices

# Float32 logits that would fit into the memory of a chunk: 2 MiB fits a cache, 2.5 GiB are 4,096 rows of a vocabulary
# up to 163,840.
_CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 5 * 2**27}


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows per chunk: from the vocabulary and the kind of device alone, so that results never depend on the batch."""
    if device.type == "cpu":
        return min(max(_CHUNK_ELEMENTS["cpu"] // vocabulary // 16 * 16, 64), 4096)
    return min(max(_CHUNK_ELEMENTS["cuda"] // vocabulary // 1024 * 1024, 1024), 4096)


@dataclass(frozen=True)
class Head:
    """A head as its GEMMs take it: in half precision on a CUDA device, which multiplies that into float32; else wide.

    Attributes:
        weight: [V, d].
        bias: [V] in the dtype of the logits, or None.
        chunk: the most rows whose logits are alive at once, C below; PyTorch's GEMM has as many, with zeros for those
            that a chunk lacks.
        gradient_rows: the most rows that the gradient's GEMMs take at once. More than a chunk where dL/dlogits is
            16-bit and gathered in a buffer of its own: then half of the memory holds float32 logits of half as many
            rows, and the other half the 16-bit gradient of all of them.
        backend: "torch" or "triton". Triton's rows are not padded: its logits come from GEMMs of a smaller shape.
    """

    weight: Tensor
    bias: Tensor | None
    spec: HeadSpec
    chunk: int
    gradient_rows: int
    backend: Backend

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None, spec: HeadSpec, backend: Backend | None = None) -> Head:
        """``backend``: None takes Triton wherever it can serve ``token_logprobs``."""
        backend = backend or resolve("token_logprobs", None, weight, bias)
        bias = None if bias is None else bias.to(wide(weight[:0]).dtype).contiguous()
        weight = operand(weight)
        rows = chunk_rows(weight.shape[0], weight.device)
        gathers = backend == "triton" and is_half(weight)
        return Head(weight, bias, spec, gpu_head_rows.logit_rows(rows) if gathers else rows, rows, backend)

    @property
    def gathers(self) -> bool:
        """Whether the gradients of several chunks wait in a buffer for one GEMM."""
        return self.backend == "triton" and is_half(self.weight)

    @property
    def scales(self) -> bool:
        """Whether slopes are scaled before they become dL/dlogits: float16 has no exponent for them."""
        return self.weight.dtype is torch.float16

    def chunk_of(self, hidden: Tensor, targets: Tensor, rows: Rows) -> Chunk:
        """At most C rows of the batch [T, d]. Ignored ones are 0: NaN may stand there, and 0 * NaN would reach dW."""
        ids = targets[rows]
        states = torch.where((ids != self.spec.ignore_index)[:, None], hidden[rows], 0.0)
        return Chunk(self, self.padded(operand(states)), self.padded(ids, self.spec.ignore_index), len(ids))

    def padded(self, x: Tensor, value: float = 0.0) -> Tensor:
        """[n, ...] -> [C, ...], or [n, ...] for Triton."""
        missing = self.chunk - x.shape[0] if self.backend == "torch" else 0
        return x if missing == 0 else torch.cat([x, x.new_full((missing, *x.shape[1:]), value)])


@dataclass(frozen=True)
class Chunk:
    """States [C, d] and targets [C], of which the first ``rows`` are not padding; for Triton C is ``rows``."""

    head: Head
    hidden: Tensor
    targets: Tensor
    rows: int

    @staticmethod
    def joined(chunks: Sequence[Chunk]) -> Chunk:
        """Several chunks without padding as one, which may have more rows than a chunk of logits."""
        if len(chunks) == 1:
            return chunks[0]
        hidden, targets = torch.cat([x.hidden for x in chunks]), torch.cat([x.targets for x in chunks])
        return Chunk(chunks[0].head, hidden, targets, len(targets))

    def logits(self) -> Tensor:
        """The output of the GEMM [C, V]: neither scaled nor capped."""
        if self.head.backend == "triton":
            return gpu_head_rows.logits(self.hidden, self.head.weight)
        return product(self.hidden, self.head.weight.T)

    def statistics(self, x: Tensor) -> RowStatistics:
        """Of all C rows."""
        if self.head.backend == "triton":
            return gpu_head_rows.row_statistics(x, self.targets, self.head.bias, self.head.spec)
        return head_rows.row_statistics(x, self.targets, self.head.bias, self.head.spec)

    def dlogits(
        self, x: Tensor, stats: RowStatistics, dlogprobs: Tensor, dentropies: Tensor | None, out: Tensor | None
    ) -> Tensor:
        """dL/d(scale * x + bias) [C, V] from the gradients of the chunk's rows [n], in the dtype that the GEMMs take.

        Args:
            out: where it is written; None takes the place of ``x`` where that has the dtype.
        """
        bias, spec = self.head.bias, self.head.spec
        if self.head.backend == "triton":
            return gpu_head_rows.dlogits_(x, self.targets, bias, stats, dlogprobs, dentropies, spec, out)
        dlogprobs = self.head.padded(dlogprobs)
        dentropies = None if dentropies is None else self.head.padded(dentropies)
        if out is None and is_half(self.hidden):
            out = torch.empty_like(x, dtype=self.hidden.dtype)
        head_rows.dlogits_(x, self.targets, bias, stats, dlogprobs, dentropies, spec, out)
        return x if out is None else out

    def dhidden(self, dlogits: Tensor) -> Tensor:
        """[n, d], wide."""
        return product(dlogits, self.head.weight)[: self.rows].mul_(self.head.spec.scale)

    def add_dweight_(self, dweight: Tensor, dlogits: Tensor) -> None:
        """Adds to the wide gradient [V, d] of the weight."""
        add_product_(dweight, dlogits.T, self.hidden, self.head.spec.scale)
