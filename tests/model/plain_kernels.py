"""Plain attentions that stand in for the two kernels that no CPU runs: flash-attn's and torch's varlen.

They compute one sequence after the other, in the dtype of their input, and check their arguments. ``PlainKernels``
stands in for the public functions, and autograd differentiates it. ``PlainOps`` stands in for the two ops behind
torch's function: the forward, which returns log-sum-exps, too, and the backward.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
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


class PlainOps:
    """SDPA's flash kernel for CPUs in the place of the ops ``torch_attn::_varlen_attn`` and its backward.

    ``calls`` holds (op, query heads, key heads, bounds of queries, bounds of keys) of every call.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int, list[int], list[int]]] = []

    @classmethod
    def installed(cls, monkeypatch: pytest.MonkeyPatch) -> PlainOps:
        """Puts them in the place of the ops until the test ends."""
        ops = cls()
        monkeypatch.setattr("torch.nn.attention.varlen._varlen_attn", ops.forward)
        monkeypatch.setattr("torch.nn.attention.varlen._varlen_attn_backward", ops.backward)
        return ops

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        is_causal: bool = False,
        scale: float | None = None,
        window_size: list[int] | None = None,
        enable_gqa: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert enable_gqa == (query.shape[1] != key.shape[1])
        self._check("forward", query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, scale, window_size)
        out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
        for q_at, k_at in _ranges(cu_seq_q, cu_seq_k):
            q, k, v = (_of_heads(x, at, query.shape[1]) for x, at in ((query, q_at), (key, k_at), (value, k_at)))
            part, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, is_causal, scale=scale
            )
            out[q_at], lse[:, q_at] = part[0].transpose(0, 1), sums[0].float()
        return out, lse, torch.zeros(2, dtype=torch.uint64)

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        is_causal: bool,
        rng_state: Tensor,
        scale: float | None = None,
        window_size: list[int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._check("backward", query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, scale, window_size)
        assert grad_out.shape == query.shape == out.shape and out.dtype == grad_out.dtype == query.dtype
        assert lse.shape == (query.shape[1], len(query)) and lse.dtype == torch.float32 and lse.is_contiguous()
        assert rng_state.shape == (2,) and rng_state.dtype == torch.uint64
        heads, groups = query.shape[1], query.shape[1] // key.shape[1]
        dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for q_at, k_at in _ranges(cu_seq_q, cu_seq_k):
            q, k, v = (_of_heads(x, at, heads) for x, at in ((query, q_at), (key, k_at), (value, k_at)))
            grad, part = (_of_heads(x, q_at, heads) for x in (grad_out, out))
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, part, lse[None, :, q_at].to(torch.promote_types(q.dtype, torch.float32)), 0.0,
                is_causal, scale=scale,
            )  # fmt: skip
            dq[q_at] = found[0][0].transpose(0, 1)
            for total, expanded in zip((dk, dv), found[1:], strict=True):
                total[k_at] = expanded[0].float().unflatten(0, (-1, groups)).sum(1).transpose(0, 1).to(total.dtype)
        return dq, dk, dv

    def _check(
        self,
        op: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        is_causal: bool,
        scale: float | None,
        window_size: list[int] | None,
    ) -> None:
        assert window_size == ([-1, 0] if is_causal else [-1, -1]) and isinstance(scale, float)
        assert query.dtype == key.dtype == value.dtype and key.shape == value.shape
        for x, bounds, longest in ((query, cu_seq_q, max_q), (key, cu_seq_k, max_k)):
            assert x.stride(-1) == 1 and bounds.dtype == torch.int32 and isinstance(longest, int)
            assert bounds[0] == 0 and bounds[-1] == len(x) and bounds.diff().min() > 0
            assert longest == max(2, int(bounds.diff().max()))
        self.calls.append((op, query.shape[1], key.shape[1], cu_seq_q.tolist(), cu_seq_k.tolist()))


def _ranges(cu_seq_q: Tensor, cu_seq_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """The places of queries and of keys of each sequence."""
    assert len(cu_seq_q) == len(cu_seq_k)
    q, k = cu_seq_q.tolist(), cu_seq_k.tolist()
    for i in range(len(q) - 1):
        yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])


def _of_heads(x_THD: Tensor, at: slice, heads: int) -> Tensor:
    """A sequence as [1, H, T, D], with as many heads as the queries have."""
    return x_THD[at].transpose(0, 1).repeat_interleave(heads // x_THD.shape[1], 0)[None]


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
