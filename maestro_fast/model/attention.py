"""Which attention serves a forward over many sequences, and why the others do not.

Four paths give the same log-probs. Two need a kernel that takes sequence bounds, and get all tokens as one row without
padding: ``flash`` (flash-attn, through transformers) and ``varlen`` (torch's own, see ``varlen``). Two run on any
device: ``packed`` (several sequences to a row, apart by a block mask) and ``padded`` (one sequence to a row). The
implementation is fixed when the model is loaded; ``forward.choose_layout`` then tries the path on the model itself.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.nn.attention import varlen as torch_varlen
from transformers import utils as transformers_utils

from maestro_fast.model.varlen import VARLEN, register_varlen
from maestro_fast.settings import SettingsError

Layout = Literal["flash", "varlen", "packed", "padded"]
Attention = Literal["auto", "flash_attention_2", "flash_attention_3", "varlen", "sdpa", "eager"]

_HALF = (torch.bfloat16, torch.float16)
_FLASH: dict[str, tuple[str, Callable[[], bool]]] = {
    "flash_attention_2": ("flash_attn", transformers_utils.is_flash_attn_2_available),
    "flash_attention_3": ("flash_attn_interface", transformers_utils.is_flash_attn_3_available),
}
_NEVER_RUN = "never run with its kernel; tests put a plain attention in the kernel's place"
_VARLEN_RUN = "on an H100, in small models, against float64"


@dataclass(frozen=True)
class AttentionPath:
    """A path, what it needs, and where it stands on a device.

    Attributes:
        obstacle: why it cannot serve there; None if it can.
        tried: what has been run of it so far.
    """

    name: Layout
    what: str
    obstacle: str | None
    tried: str


def attention_paths(device: torch.device, dtype: torch.dtype | None = None) -> tuple[AttentionPath, ...]:
    """All four, in the order in which ``auto`` prefers them; ``dtype`` None: not known yet."""
    flash = {name: flash_obstacle(name, device, dtype) for name in _FLASH}
    blocked = None if None in flash.values() else flash["flash_attention_2"]
    return (
        AttentionPath("flash", "flash-attn through transformers, one row", blocked, _NEVER_RUN),
        AttentionPath("varlen", "torch.nn.attention.varlen, one row", varlen_obstacle(device, dtype), _VARLEN_RUN),
        AttentionPath("packed", "SDPA, several sequences to a row, block mask", None, "on CPUs, against float64"),
        AttentionPath("padded", "SDPA, one sequence to a row", None, "on CPUs, against float64"),
    )


def flash_obstacle(implementation: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why flash-attn cannot serve weights of ``dtype`` on ``device``; None if it can."""
    module, accepted = _FLASH[implementation]
    if importlib.util.find_spec(module) is None:
        return f"{module} cannot be imported"
    if (reason := _kernel_obstacle(module, device, dtype)) is not None:
        return reason
    return None if accepted() else f"transformers does not accept the {module} that is installed"


def varlen_obstacle(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why torch's varlen kernel cannot serve weights of ``dtype`` on ``device``; None if it can."""
    if "window_size" not in inspect.signature(torch_varlen.varlen_attn).parameters:
        return f"varlen_attn of torch {torch.__version__} takes no window_size, so it cannot be told to be causal"
    return _kernel_obstacle("torch.nn.attention.varlen", device, dtype)


def _kernel_obstacle(name: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """What both kernels need: they are the same algorithm, compiled for the same devices."""
    if device.type != "cuda":
        return f"{name} runs on CUDA devices, not on {device.type}"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"{name} needs sm_80, the device is sm_{capability[0]}{capability[1]}"
    if dtype is not None and dtype not in _HALF:
        return f"{name} needs bfloat16 or float16 weights, not {str(dtype).removeprefix('torch.')}"
    return None


def attention_choice(
    wanted: str = "auto", device: torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[str, str]:
    """The attention implementation for transformers, and why.

    Args:
        wanted: one of ``Attention``; "auto" takes the first of flash-attn, varlen and sdpa that can serve.
        device: where the model will run; None: a CUDA device if there is one.
        dtype: of its weights; None: not known yet, any will do.

    Raises:
        SettingsError: an unknown name, or an implementation is asked for that cannot serve.
    """
    if wanted not in get_args(Attention):
        raise SettingsError(f"model.attention: {wanted}, expected one of {', '.join(get_args(Attention))}")
    device = default_device() if device is None else device
    candidates = [(name, flash_obstacle(name, device, dtype)) for name in _FLASH]
    candidates.append((VARLEN, varlen_obstacle(device, dtype)))
    asked = VARLEN if wanted == "varlen" else wanted
    for name, obstacle in candidates:
        if name == asked and obstacle is not None:
            hint = ', pip install "maestro-fast[flash-attn]"' if "imported" in obstacle else ""
            raise SettingsError(f"model.attention: {wanted} cannot serve: {obstacle}{hint}")
    if wanted != "auto":
        return asked, "as configured"
    for name, obstacle in candidates:
        if obstacle is None:
            return name, f"the first choice that can serve on {device.type}"
    return "sdpa", "; ".join(dict.fromkeys(str(obstacle) for _, obstacle in candidates))


def default_device() -> torch.device:
    """Where transformers.Trainer puts a model unless told otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def use_attention(model: Any, implementation: str) -> None:
    """Has a loaded model of transformers use an implementation; ours is registered first.

    Raises:
        ValueError: the model cannot change its attention, or not to this one.
        ImportError: the implementation cannot be imported.
    """
    if implementation == VARLEN:
        # SDPA serves whatever does not come with bounds; models with capped scores, for one, cannot use it
        if (own := model.config._attn_implementation) not in ("sdpa", VARLEN):
            raise ValueError(f"model: {type(model).__name__} has {own} attention, expected sdpa beside {VARLEN}")
        register_varlen()
    model.set_attn_implementation(implementation)
    if model.config._attn_implementation != implementation:
        raise ValueError(f"model: {type(model).__name__} keeps its own attention, expected it to take {implementation}")


def layout_of(implementation: str) -> Layout:
    """The path without padding that an implementation offers."""
    if implementation == VARLEN:
        return "varlen"
    return "flash" if implementation in _FLASH else "packed"
