"""Attention over many sequences at once: which path serves a device, and torch's varlen kernel as one of them.

Four paths give the same log-probs. Two of them need a kernel that is told where each sequence begins, and take all
tokens as one row without padding: ``flash`` (flash-attn, through transformers) and ``varlen``
(``torch.nn.attention.varlen``, which this file makes known to transformers). The other two run on any device:
``packed`` puts several sequences into a row and keeps them apart with a block mask, ``padded`` puts one sequence into a
row. A fifth, ``shared``, puts a prompt into a row once for all its responses: with the varlen kernel, or with a mask.
The implementation is fixed when the model is loaded; ``layout_trial.choose_layout`` then tries the path on the model.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen as torch_varlen
from transformers import AttentionInterface
from transformers import utils as transformers_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from maestro_fast.model.merged_attention import merging_obstacle
from maestro_fast.model.shared_row import SharedRow
from maestro_fast.settings import SettingsError

__all__ = [
    "VARLEN",
    "Attention",
    "AttentionPath",
    "Layout",
    "attention_choice",
    "attention_paths",
    "bounds_mask",
    "default_device",
    "flash_obstacle",
    "layout_of",
    "register_varlen",
    "use_attention",
    "varlen_attention",
    "varlen_obstacle",
]

Layout = Literal["flash", "varlen", "packed", "padded", "shared"]
Attention = Literal["auto", "shared", "flash_attention_2", "flash_attention_3", "varlen", "sdpa", "eager"]

VARLEN = "maestro_varlen"  # the name of our implementation in transformers

_HALF = (torch.bfloat16, torch.float16)
_FLASH: dict[str, tuple[str, Callable[[], bool]]] = {
    "flash_attention_2": ("flash_attn", transformers_utils.is_flash_attn_2_available),
    "flash_attention_3": ("flash_attn_interface", transformers_utils.is_flash_attn_3_available),
}
_NEVER_RUN = "never run with its kernel; tests put a plain attention in the kernel's place"
_FLEX_RUN = "never run on a GPU; on CPUs its forward alone"
_VARLEN_RUN = "on an H100, in small models, against float64"


# --- which path serves where ---


@dataclass(frozen=True)
class AttentionPath:
    """One of the five paths, and whether it serves on a device.

    Attributes:
        what: what the path is, in words.
        obstacle: why the path cannot serve on the device; None if it can.
        tried: on what this path has been run so far.
    """

    name: Layout
    what: str
    obstacle: str | None
    tried: str


def attention_paths(device: torch.device, dtype: torch.dtype | None = None) -> tuple[AttentionPath, ...]:
    """All paths, those that compute each prompt for itself in the order in which "auto" prefers them.

    Args:
        dtype: the dtype in which the model computes, of its weights or of autocast; None if it is not known yet.
    """
    flash = {name: flash_obstacle(name, device, dtype) for name in _FLASH}
    blocked = None if None in flash.values() else flash["flash_attention_2"]
    kernel = varlen_obstacle(device, dtype)
    return (
        AttentionPath("flash", "flash-attn through transformers, one row", blocked, _NEVER_RUN),
        AttentionPath("varlen", "torch.nn.attention.varlen, one row", kernel, _VARLEN_RUN),
        AttentionPath("packed", "SDPA, several sequences to a row, block mask", None, "on CPUs, against float64"),
        AttentionPath("padded", "SDPA, one sequence to a row", None, "on CPUs, against float64"),
        _shared_path(kernel),
    )


def _shared_path(kernel_obstacle: str | None) -> AttentionPath:
    """The path of shared prompts: what serves them depends on whether torch's varlen kernel does."""
    if kernel_obstacle is not None:
        what, tried = "each prompt once for its responses: SDPA, a mask of every row", "on CPUs, against float64"
    elif (unmerged := merging_obstacle()) is not None:
        what, tried = f"each prompt once for its responses: FlexAttention, one row ({unmerged})", _FLEX_RUN
    else:
        what = (
            "each prompt once for its responses: torch.nn.attention.varlen, one row, two calls merged; FlexAttention "
            "for sliding windows"
        )
        tried = f"{_NEVER_RUN}; FlexAttention {_FLEX_RUN}"
    return AttentionPath("shared", what, None, tried)


def flash_obstacle(implementation: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why flash-attn cannot serve a model that computes in ``dtype`` on ``device``; None if it can."""
    module, accepted = _FLASH[implementation]
    if importlib.util.find_spec(module) is None:
        return f"{module} cannot be imported"
    if (reason := _kernel_obstacle(module, device, dtype)) is not None:
        return reason
    return None if accepted() else f"transformers does not accept the {module} that is installed"


def varlen_obstacle(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why torch's varlen kernel cannot serve a model that computes in ``dtype`` on ``device``; None if it can."""
    if "window_size" not in inspect.signature(torch_varlen.varlen_attn).parameters:
        return f"varlen_attn of torch {torch.__version__} takes no window_size, so it cannot be told to be causal"
    return _kernel_obstacle("torch.nn.attention.varlen", device, dtype)


def _kernel_obstacle(name: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Checks what both kernels need, since both are the same algorithm compiled for the same devices."""
    if device.type != "cuda":
        return f"{name} runs on CUDA devices, not on {device.type}"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"{name} needs sm_80, the device is sm_{capability[0]}{capability[1]}"
    if dtype is not None and dtype not in _HALF:
        return f"{name} needs bfloat16 or float16 weights, not {str(dtype).removeprefix('torch.')}"
    return None


def attention_choice(
    wanted: str = "auto",
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    windows: bool = False,
    refused: Mapping[str, str] = MappingProxyType({}),
) -> tuple[str, str]:
    """Chooses the attention implementation that transformers should load a model with, and says why.

    Args:
        wanted: one of ``Attention``; "auto" takes the first of varlen, flash-attn and sdpa that can serve, "shared" the
            first of varlen and sdpa.
        windows: whether the model has sliding windows. Then "auto" prefers flash-attn, because the varlen kernel takes
            them with shared prompts alone.
        refused: the implementations that the model does not take, and why not.
        device: where the model will run; None means a CUDA device if there is one.
        dtype: the dtype in which the model computes, of its weights or of autocast; None if it is not known yet, and
            then every dtype counts as right.

    Returns:
        The name of the implementation in transformers, and the reason in words.

    Raises:
        SettingsError: the name is unknown, or the implementation was asked for by name and cannot serve.
    """
    if wanted not in get_args(Attention):
        raise SettingsError(f"model.attention: {wanted}, expected one of {', '.join(get_args(Attention))}")
    device = default_device() if device is None else device
    # The varlen kernel comes first, because it serves shared prompts, too.
    varlen = [(VARLEN, refused.get(VARLEN) or varlen_obstacle(device, dtype))]
    flash = [(name, refused.get(name) or flash_obstacle(name, device, dtype)) for name in _FLASH if wanted != "shared"]
    candidates = flash + varlen if windows else varlen + flash
    asked = VARLEN if wanted == "varlen" else wanted
    for name, obstacle in candidates:
        if name == asked and obstacle is not None:
            hint = ', pip install "maestro-fast[flash-attn]"' if "imported" in obstacle else ""
            raise SettingsError(f"model.attention: {wanted} cannot serve: {obstacle}{hint}")
    if wanted not in ("auto", "shared"):
        return asked, "as configured"
    for name, obstacle in candidates:
        if obstacle is None:
            return name, f"the first choice that can serve on {device.type}"
    return "sdpa", "; ".join(dict.fromkeys(str(obstacle) for _, obstacle in candidates))


def default_device() -> torch.device:
    """The device on which transformers.Trainer puts a model unless it is told otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def use_attention(model: Any, implementation: str) -> None:
    """Makes a loaded transformers model use an implementation; ours is registered first.

    Raises:
        ValueError: the model cannot change its attention, or not to this implementation.
        ImportError: the implementation cannot be imported.
    """
    if implementation == VARLEN:
        # Calls without sequence bounds are served by SDPA, which some models cannot use (those that cap their scores).
        if (own := model.config._attn_implementation) not in ("sdpa", VARLEN):
            raise ValueError(f"model: {type(model).__name__} has {own} attention, expected sdpa beside {VARLEN}")
        register_varlen()
    model.set_attn_implementation(implementation)
    if model.config._attn_implementation != implementation:
        raise ValueError(f"model: {type(model).__name__} keeps its own attention, expected it to take {implementation}")


def layout_of(implementation: str) -> Layout:
    """The path without padding that an attention implementation of transformers offers."""
    if implementation == VARLEN:
        return "varlen"
    return "flash" if implementation in _FLASH else "packed"


# --- torch.nn.attention.varlen as an attention implementation of transformers ---


def register_varlen() -> None:
    """Makes ``VARLEN`` known to transformers, so that ``model.set_attn_implementation(VARLEN)`` works."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, sdpa_mask)


def bounds_mask() -> Tensor:
    """A mask of shape [1, 1, 0, 0], which says that the sequence bounds take the place of a mask.

    transformers hands a mask with four axes to every layer unchanged, and so does not build a mask of size [T, T].
    An attention that does not know the bounds fails on this mask, instead of mixing the sequences of a row.
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
    shared_row: SharedRow | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each of the sequences that one row holds, which may share their prompts.

    This function is a public door: transformers calls it, and its parameters are those of transformers'
    ``AttentionInterface`` and ``FlashAttentionKwargs``. A call without sequence bounds and without a shared row, for
    example from ``generate``, is served by SDPA with SDPA's own mask, so the implementation can stay on the model for
    everything.

    Args:
        query: [1, H, T, D]; key and value are [1, H_kv, T, D], and H is a multiple of H_kv.
        attention_mask: ``bounds_mask()`` with bounds or a shared row; without them a mask for SDPA.
        cu_seq_lens_q: int32 [N + 1], the bounds of N sequences; keys have the same bounds, as a row attends to itself.
        max_length_q: the length of the longest sequence, in tokens.
        shared_row: who sees whom in a row of shared prompts.

    Returns:
        The output [1, T, H, D], and None in place of attention weights.

    Raises:
        ValueError: the bounds came without ``bounds_mask()`` or the mask without the bounds, or the model asks for
            something that the kernels do not do: dropout, sinks, attention to later tokens, and without a shared row
            windows and capped scores.
    """
    del cu_seq_lens_k, max_length_k
    bounded = shared_row is not None or (cu_seq_lens_q is not None and max_length_q is not None)
    if _is_bounds_mask(attention_mask) != bounded:
        raise ValueError(
            f"cu_seq_lens_q: {type(module).__name__} got sequence bounds without bounds_mask(), or that mask without "
            "bounds, expected both or neither"
        )
    if shared_row is not None:
        _refuse_what_the_kernel_lacks(module, query, value, dropout, options, _SHARED_LACKS)
        windowed, softcap = options.get("sliding_window") is not None, options.get("softcap")
        q, k, v = (_compute_dtype(x) for x in (query, key, value))
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        return shared_row.attend(q, k, v, scale, windowed=windowed, softcap=softcap), None
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    _refuse_what_the_kernel_lacks(module, query, value, dropout, options, _LACKS)
    q_THD, k_THD, v_THD = (_compute_dtype(x)[0].transpose(0, 1) for x in (query, key, value))
    grouped: dict[str, Any] = {}
    if (repeats := q_THD.shape[1] // k_THD.shape[1]) > 1:
        if "enable_gqa" in inspect.signature(torch_varlen.varlen_attn).parameters:
            grouped["enable_gqa"] = True
        else:  # A torch without this option wants as many key heads as query heads.
            k_THD, v_THD = (x.repeat_interleave(repeats, dim=1) for x in (k_THD, v_THD))
    bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    out_THD: Tensor = torch_varlen.varlen_attn(  # type: ignore[assignment]
        q_THD,
        k_THD,
        v_THD,
        *bounds,
        scale=scaling,
        window_size=(-1, 0),  # A token sees every earlier token and no later one: causal attention.
        **grouped,
    )
    return out_THD[None], None


def _is_bounds_mask(mask: Tensor | None) -> bool:
    return mask is not None and mask.shape == (1, 1, 0, 0)


def _compute_dtype(tensor: Tensor) -> Tensor:
    """Casts to autocast's dtype, as autocast does for SDPA.

    Some models normalise queries and keys in float32, but the kernel wants one half-precision dtype for all three.
    """
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


# What layers ask for by name: what nothing here does, and what the varlen kernel does not do for plain sequences.
_SHARED_LACKS = ("s_aux", "position_bias")
_LACKS = ("sliding_window", "softcap", *_SHARED_LACKS)


def _refuse_what_the_kernel_lacks(
    module: nn.Module, query: Tensor, value: Tensor, dropout: float, options: dict[str, Any], names: tuple[str, ...]
) -> None:
    causal = options.get("is_causal")
    lacking = {
        "dropout": dropout > 0,
        "is_causal=False": not (getattr(module, "is_causal", True) if causal is None else causal),
        "rows side by side": query.shape[0] != 1,
        "values of another head size": query.shape[-1] != value.shape[-1],
        **{name: options.get(name) is not None for name in names},
    }
    if wanted := [name for name, is_wanted in lacking.items() if is_wanted]:
        raise ValueError(f"{type(module).__name__} asks for {', '.join(wanted)}, which {VARLEN} does not do")
