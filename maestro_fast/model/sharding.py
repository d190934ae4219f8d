"""Weights that are sharded over processes: what of accelerate's FSDP is served, and how a second model is sharded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.utils import str_to_bool
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether accelerate shards the policy with FSDP."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def saves_shards(accelerator: Accelerator) -> bool:
    """Whether the policy is sharded, and each process writes its own shards into a checkpoint."""
    return is_sharded(accelerator) and "FULL_STATE_DICT" not in str(accelerator.state.fsdp_plugin.state_dict_type)


def check_sharding(accelerator: Accelerator, where: str = "trainer.") -> None:
    """Checks that the policy is sharded as the run asks for, in a way that the loss can be computed with.

    The loss reads the LM head behind the model's forward. FSDP2 keeps the head whole up to the backward, FSDP1 and
    ZeRO-3 do not.

    Args:
        accelerator: accelerate's own, which knows how the model will be wrapped.
        where: what stands before the names of the settings in an error.

    Raises:
        ValueError: FSDP is asked for where accelerate does not shard, it is FSDP1, it is to load the weights on the
            first process alone, or DeepSpeed shards the weights (ZeRO-3).
    """
    state = accelerator.state
    asked = str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")) == 1  # accelerate's launcher and plugin set it.
    if asked and not is_sharded(accelerator) and accelerator.num_processes > 1:
        raise ValueError(
            f"{where}fsdp: accelerate shards over GPUs alone, on {accelerator.device.type} it would train with "
            f"{accelerator.num_processes} whole copies; expected GPUs, or no fsdp"
        )
    if is_sharded(accelerator):
        plugin = state.fsdp_plugin
        if plugin.fsdp_version < 2:
            raise ValueError(
                f"{where}fsdp_config.version: 1, under which the LM head is sharded where the loss reads it; expected 2"
            )
        if plugin.cpu_ram_efficient_loading:
            raise ValueError(
                f"{where}fsdp_config.cpu_ram_efficient_loading: true, so only the first process would hold weights "
                "when the reference is made; expected false"
            )
    deepspeed = getattr(state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError(
            f"{where}deepspeed: ZeRO stage 3, under which the LM head is sharded where the loss reads it; expected "
            f"{where}fsdp, or stage 2"
        )


def shard_frozen(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shards a model that is not trained, in place, as FSDP2 shards the policy."""
    sharded: nn.Module = fsdp2_prepare_model(accelerator, model)
    return sharded


@contextlib.contextmanager
def sharded_again(model: Any) -> Iterator[None]:
    """When this closes, a sharded model holds its own shards alone, also of the weights that a forward keeps gathered.

    FSDP2 keeps the last weights of a forward for the backward. A frozen model has none, so they would stay: those of
    the LM head alone are V d numbers.
    """
    try:
        yield
    finally:
        reshard(model)


def reshard(model: Any) -> None:
    """Lets a sharded model hold its own shards alone. No backward may be pending."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
