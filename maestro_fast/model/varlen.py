"""torch.nn.attention.varlen as an attention implementation of transformers: many sequences in one row, no padding.

A forward asks for it by ``cu_seq_lens_q`` and ``max_length_q`` (the names that transformers has for flash-attn) and by
``bounds_mask`` in place of an attention mask. A forward without them, such as one of ``generate``, is served by SDPA
with SDPA's own masks, so the implementation can stay on the model for everything that is done with it.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen as torch_varlen
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

VARLEN = "maestro_varlen"


def register_varlen() -> None:
    """Makes ``VARLEN`` known to transformers: ``model.set_attn_implementation(VARLEN)``."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, sdpa_mask)


def bounds_mask() -> Tensor:
    """[1, 1, 0, 0]: says that the sequence bounds stand for the mask.

    transformers hands masks with four axes to every layer as they are, and so builds none of size [T, T]. Attention
    that does not know the bounds fails on it, instead of mixing the sequences of a row.
    """
    return torch.empty(1, 1, 0, 0, dtype=torch.bool)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_k: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within the sequences of one row, by the signature of transformers' AttentionInterface.

    Args:
        query: [1, H, T, D]; key and value [1, H_kv, T, D] with H a multiple of H_kv.
        attention_mask: ``bounds_mask``; with ``cu_seq_lens_q`` None, a mask for SDPA.
        cu_seq_lens_q: int32 [N + 1], the bounds of N sequences; those of the keys are the same.
        max_length_q: the longest of them, in tokens.

    Returns:
        [1, T, H, D], and None in place of attention weights.

    Raises:
        ValueError: bounds without their mask or the reverse, or something that the kernel does not do: dropout,
            windows, sinks, capped scores, attention to later tokens.
    """
    del cu_seq_lens_k, max_length_k  # a row attends to itself
    if _is_bounds_mask(attention_mask) != (cu_seq_lens_q is not None and max_length_q is not None):
        raise ValueError(f"cu_seq_lens_q: expected with bounds_mask only, and always: {type(module).__name__} lost one")
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    _refuse_what_the_kernel_lacks(module, query, value, dropout, options)
    q_THD, k_THD, v_THD = (_compute_dtype(x)[0].transpose(0, 1) for x in (query, key, value))
    grouped: dict[str, Any] = {}
    if q_THD.shape[1] != k_THD.shape[1]:
        if "enable_gqa" in signature(torch_varlen.varlen_attn).parameters:
            grouped["enable_gqa"] = True
        else:  # torch before it said so asks for equal numbers of heads
            repeats = q_THD.shape[1] // k_THD.shape[1]
            k_THD, v_THD = (x.repeat_interleave(repeats, dim=1) for x in (k_THD, v_THD))
    out_THD: Tensor = torch_varlen.varlen_attn(  # type: ignore[assignment]
        q_THD,
        k_THD,
        v_THD,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1, 0),  # everything before, nothing behind: causal
        **grouped,
    )
    return out_THD[None], None


def _is_bounds_mask(mask: Tensor | None) -> bool:
    return mask is not None and mask.shape == (1, 1, 0, 0)


def _compute_dtype(tensor: Tensor) -> Tensor:
    """As autocast has it for SDPA: norms of queries and keys leave float32 behind, the kernel wants one half dtype."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def _refuse_what_the_kernel_lacks(
    module: nn.Module, query: Tensor, value: Tensor, dropout: float, options: dict[str, Any]
) -> None:
    causal = options.get("is_causal")
    lacking = {
        "dropout": dropout > 0,
        "is_causal=False": not (getattr(module, "is_causal", True) if causal is None else causal),
        "rows side by side": query.shape[0] != 1,
        "values of another head size": query.shape[-1] != value.shape[-1],
        **{name: options.get(name) is not None for name in ("sliding_window", "softcap", "s_aux", "position_bias")},
    }
    if wanted := [name for name, is_wanted in lacking.items() if is_wanted]:
        raise ValueError(f"{type(module).__name__} asks for {', '.join(wanted)}, which {VARLEN} does not do")
