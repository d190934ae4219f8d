"""What of a policy trains: whether anything does, and whether its dtype can hold what an optimiser step adds.

A step of Adam moves a weight by about the learning rate. bfloat16 has 8 significant bits, so a weight w keeps a step
only if it is larger than about abs(w) / 512. With a learning rate of 1e-6 that leaves the weights below 5e-4, a few per
cent of a language model. All others stay where they are, however long the run is. So weights are trained in float32,
and mixed precision (``trainer.bf16``) makes their products in bfloat16.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

logger = logging.getLogger(__name__)
_ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}  # the smallest relative step that is not rounded away


def trained_parameters(model: Any) -> list[tuple[str, nn.Parameter]]:
    """The parameters that an optimiser gets and that the policy uses, with their names.

    Adapters that are loaded but not active are left out, for example the adapter "ref" that TRL makes of the reference.
    """
    idle: set[str] = set()
    if hasattr(model, "peft_config") and hasattr(model, "active_adapters"):
        active = model.active_adapters  # peft has a property here, transformers a method
        idle = {*model.peft_config} - {*(active() if callable(active) else active)}
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not idle.intersection(name.split("."))
    ]


def check_trainable(model: nn.Module) -> None:
    """Checks that the optimiser would have something to train.

    Raises:
        ValueError: no parameter of the policy requires a gradient.
    """
    if not trained_parameters(model):
        raise ValueError(
            f"model: none of the parameters of {type(model).__name__} that the policy uses requires a gradient, so "
            "nothing would be trained; expected weights or adapters that do (a saved adapter: "
            "PeftModel.from_pretrained(..., is_trainable=True))"
        )


def warn_of_half_precision(model: nn.Module, learning_rate: float, accelerator: Accelerator) -> None:
    """Warns if steps of this learning rate are rounded away, because weights are trained in half precision.

    It is silent where float32 copies of the weights are trained: with DeepSpeed, and with FSDP in mixed precision.
    """
    kind, mixed = accelerator.distributed_type, accelerator.mixed_precision != "no"
    if kind == DistributedType.DEEPSPEED or (kind == DistributedType.FSDP and mixed):
        return
    for dtype, rounding in _ROUNDING.items():
        found = [parameter for _, parameter in trained_parameters(model) if parameter.dtype is dtype]
        if found and accelerator.is_main_process:
            logger.warning(
                "model.dtype: %d parameters are trained in %s, which rounds away a step of the learning rate %.2g for "
                "every weight beyond %.1g; expected float32, with trainer.bf16 for speed",
                sum(parameter.numel() for parameter in found),
                str(dtype).removeprefix("torch."),
                learning_rate,
                learning_rate / rounding,
            )
