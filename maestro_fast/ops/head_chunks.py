"""Chunks of rows through a language-model head: which rows a GEMM takes, in which precision, and whose row maths.

Rows are worked in chunks of a fixed size that follows from the vocabulary alone, the last one padded with zeros. Every
GEMM then has the same shape, whatever else is in the batch, so the log-probs of the same hidden states are bitwise the
same in the scoring and in the training forward, and the on-policy ratio is exactly 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maestro_fast.ops import gpu_head_rows, head_rows
from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.head_rows import HeadSpec, RowStatistics
from maestro_fast.ops.tensors import wide, without_autocast

Rows = slice | Tensor  # of the batch: a range, or int64 indices

# Float32 logits alive at once: 2 MiB fits a cache, 2.5 GiB are 4,096 rows of a vocabulary up to 163,840.
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
        backend: "torch" or "triton". Triton's rows are not padded: its logits come from GEMMs of a smaller shape.
    """

    weight: Tensor
    bias: Tensor | None
    spec: HeadSpec
    chunk: int
    backend: Backend

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None, spec: HeadSpec, backend: Backend | None = None) -> Head:
        """``backend``: None takes Triton wherever it can serve ``token_logprobs``."""
        backend = backend or resolve("token_logprobs", None, weight, bias)
        bias = None if bias is None else bias.to(wide(weight[:0]).dtype).contiguous()
        return Head(_operand(weight), bias, spec, chunk_rows(weight.shape[0], weight.device), backend)

    def chunk_of(self, hidden: Tensor, targets: Tensor, rows: Rows) -> Chunk:
        """At most C rows of the batch [T, d]. Ignored ones are 0: NaN may stand there, and 0 * NaN would reach dW."""
        ids = targets[rows]
        states = torch.where((ids != self.spec.ignore_index)[:, None], hidden[rows], 0.0)
        return Chunk(self, self.padded(_operand(states)), self.padded(ids, self.spec.ignore_index), len(ids))

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

    def logits(self) -> Tensor:
        """The output of the GEMM [C, V]: neither scaled nor capped."""
        if self.head.backend == "triton":
            return gpu_head_rows.logits(self.hidden, self.head.weight)
        return _gemm(self.hidden, self.head.weight.T)

    def statistics(self, x: Tensor) -> RowStatistics:
        """Of all C rows."""
        if self.head.backend == "triton":
            return gpu_head_rows.row_statistics(x, self.targets, self.head.bias, self.head.spec)
        return head_rows.row_statistics(x, self.targets, self.head.bias, self.head.spec)

    def dlogits(self, x: Tensor, stats: RowStatistics, dlogprobs: Tensor, dentropies: Tensor | None) -> Tensor:
        """dL/d(scale * x + bias) [C, V] from the gradients of the chunk's rows [n]; uses up ``x``.

        In the dtype that the GEMMs take, but for float16, which would round most of it to 0.
        """
        bias, spec = self.head.bias, self.head.spec
        if self.head.backend == "triton":
            dtype = torch.bfloat16 if self.hidden.dtype is torch.bfloat16 else x.dtype
            return gpu_head_rows.dlogits_(x, self.targets, bias, stats, dlogprobs, dentropies, spec, dtype)
        dlogprobs = self.head.padded(dlogprobs)
        dentropies = None if dentropies is None else self.head.padded(dentropies)
        out = torch.empty_like(x, dtype=torch.bfloat16) if self.hidden.dtype is torch.bfloat16 else None
        head_rows.dlogits_(x, self.targets, bias, stats, dlogprobs, dentropies, spec, out)
        return x if out is None else out

    def dhidden(self, dlogits: Tensor) -> Tensor:
        """[n, d], wide."""
        return _gemm(dlogits, self.head.weight)[: self.rows].mul_(self.head.spec.scale)

    def add_dweight_(self, dweight: Tensor, dlogits: Tensor) -> None:
        """Adds to the wide gradient [V, d] of the weight."""
        scale = self.head.spec.scale
        with without_autocast(dlogits):
            if _narrow(dlogits, self.hidden):
                torch.addmm(dweight, dlogits.T, self.hidden, alpha=scale, out_dtype=torch.float32, out=dweight)
            else:
                dweight.addmm_(wide(dlogits).T, wide(self.hidden), alpha=scale)


def _operand(x: Tensor) -> Tensor:
    return x if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) else wide(x)


def _narrow(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)


def _gemm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in float32 (float64)."""
    with without_autocast(a):
        if _narrow(a, b):
            product: Tensor = torch.mm(a, b, out_dtype=torch.float32)
            return product
        return wide(a) @ wide(b)
