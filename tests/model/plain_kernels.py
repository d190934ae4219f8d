"""A plain attention that stands in for the two kernels that no CPU runs: flash-attn's and torch's varlen.

It computes one sequence after the other, differentiably, in the dtype of its input, and checks its arguments.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from torch import Tensor


class PlainKernels:
    """``calls`` holds (kernel, query heads, key heads, sequence bounds) of every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int, list[int]]] = []

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        assert dropout_p == 0.0 and window_size == (-1, -1) and softcap == 0.0
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
        return self._attend("flash", q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)

    def flash_attn_func(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
        causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:  # fmt: skip
        rows, length = q.shape[:2]
        bounds = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32)
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        return self.flash_attn_varlen_func(
            *flat, bounds, bounds, length, length, dropout_p, softmax_scale, causal
        ).unflatten(0, (rows, length))

    def varlen_attn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        assert enable_gqa == (query.shape[1] != key.shape[1]) and window_size == (-1, 0)
        assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k
        return self._attend("varlen", query, key, value, cu_seq_q, max_q, scale)

    def _attend(
        self,
        name: str,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        bounds: Tensor,
        longest: int,
        scale: float | None,
    ) -> Tensor:
        assert bounds.dtype == torch.int32 and isinstance(longest, int) and scale is not None
        assert bounds[0] == 0 and bounds[-1] == q_THD.shape[0] == k_THD.shape[0]
        assert longest == bounds.diff().max()
        assert q_THD.dtype == k_THD.dtype == v_THD.dtype
        self.calls.append((name, q_THD.shape[1], k_THD.shape[1], bounds.tolist()))
        groups = q_THD.shape[1] // k_THD.shape[1]
        out = []
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            q, k, v = (x[start:end].transpose(0, 1) for x in (q_THD, k_THD, v_THD))
            k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
            later = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
            weights = ((q @ k.mT).float() * scale).masked_fill(later, -torch.inf).softmax(-1)
            out.append((weights.to(v.dtype) @ v).transpose(0, 1))
        return torch.cat(out)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> PlainKernels:
    """Replaces both kernels; everything that transformers and we do around them still runs."""
    plain = PlainKernels()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain.varlen_attn)
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.__spec__ = ModuleSpec("flash_attn", None)
    package.flash_attn_func = plain.flash_attn_func  # type: ignore[attr-defined]
    package.flash_attn_varlen_func = plain.flash_attn_varlen_func  # type: ignore[attr-defined]
    package.flash_attn_with_kvcache = None  # type: ignore[attr-defined]
    padding.pad_input = flash_utils._pad_input  # type: ignore[attr-defined]
    padding.unpad_input = flash_utils._unpad_input  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(flash_utils, "is_flash_attn_2_available", lambda: True)
    for name, value in vars(flash_utils).copy().items():  # It remembers the kernel; undone after the test.
        if name.startswith(("_loaded_", "_flash_", "_pad_", "_unpad_", "_process_")) and name.endswith(("_fn", "tion")):
            monkeypatch.setattr(flash_utils, name, value)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    return plain
