"""Parameters of the Conductor's head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from maestro_fast.ops.tensors import without_autocast


@dataclass(frozen=True)
class ConductorParams:
    """Parameters of the head, float32 (float64 for a reference).

    Attributes:
        mean, rstd: [d], standardisation of h, frozen between updates.
        weight, bias: [K, d] or [K, H] and [K], the last layer; zeros mean equal weights.
        hidden_weight, hidden_bias: [H, d] and [H] of an MLP head, or None for a linear one.
    """

    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor
    hidden_weight: Tensor | None = None
    hidden_bias: Tensor | None = None

    @property
    def num_rewards(self) -> int:
        return self.weight.shape[0]

    def logits(self, h: Tensor) -> Tensor:
        """z [B, K] of contexts [B, d]."""
        with without_autocast(h):
            return functional.linear(self.features(h), self.weight, self.bias)

    def features(self, h: Tensor) -> Tensor:
        """What the last layer is applied to: standardised contexts [B, d], or the hidden layer's outputs [B, H]."""
        x = (h.to(self.weight.dtype) - self.mean) * self.rstd
        if self.hidden_weight is None:
            return x
        with without_autocast(h):
            return functional.gelu(functional.linear(x, self.hidden_weight, self.hidden_bias))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.mean, self.rstd, self.weight, self.bias, self.hidden_weight, self.hidden_bias

    @property
    def contiguous_floats(self) -> ConductorParams:
        """The same in contiguous float32, as the kernels read them; itself where it is so already."""
        if all(x is None or (x.dtype is torch.float32 and x.is_contiguous()) for x in self.tensors):
            return self
        return ConductorParams(*(None if x is None else x.float().contiguous() for x in self.tensors))  # type: ignore[arg-type]

    @property
    def learned(self) -> dict[str, Tensor]:
        """What an update changes, by name."""
        found = {name: getattr(self, name) for name in ("weight", "bias", "hidden_weight", "hidden_bias")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def check_params(h: Tensor, params: ConductorParams) -> None:
    """Raises ValueError or TypeError that names the parameter; it stands before every launch, so it has to be quick."""
    if h.ndim != 2 or h.shape[1:] != params.mean.shape:
        raise ValueError(f"h: shape {tuple(h.shape)}, expected [B, d] with d = {params.mean.numel()}")
    mean, rstd, weight, bias, hidden_weight, hidden_bias = params.tensors
    assert rstd is not None and weight is not None and bias is not None
    if (hidden_weight is None) != (hidden_bias is None):
        raise ValueError("params: hidden_weight or hidden_bias alone, expected both or neither")
    size, actions = h.shape[1], weight.shape[0]
    inner = size if hidden_weight is None else hidden_weight.shape[0]
    device, dtype = h.device, weight.dtype
    for name, tensor, shape in (
        ("mean", mean, (size,)),
        ("rstd", rstd, (size,)),
        ("weight", weight, (actions, inner)),
        ("bias", bias, (actions,)),
        ("hidden_weight", hidden_weight, (inner, size)),
        ("hidden_bias", hidden_bias, (inner,)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"params.{name}: shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype is not dtype or not dtype.is_floating_point:
            raise TypeError(f"params.{name}: dtype {tensor.dtype}, expected one floating dtype for all")
        if tensor.device != device:
            raise ValueError(f"params.{name}: on {tensor.device}, expected {device} as h")
