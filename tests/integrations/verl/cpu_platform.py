"""Lets verl train on a CPU: a platform, gloo in the place of NCCL, and verl's own FSDP engines registered for the CPU.

    VERL_USE_EXTERNAL_MODULES=tests.integrations.verl.cpu_platform  VERL_PLATFORM=cpu

verl imports this module in each of its processes, most of which never train. So what concerns another module of verl
waits until that module is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import wrapt
from verl.plugin.platform import PlatformBase, PlatformRegistry


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for what a CPU has no need of."""


def _no_bytes(*args: Any) -> int:
    return 0


# --- the platform ---

# What verl calls on the device's module and torch.cpu lacks.
_MISSING = {
    "empty_cache": _nothing,
    "ipc_collect": _nothing,
    "reset_peak_memory_stats": _nothing,
    "max_memory_allocated": _no_bytes,
    "max_memory_reserved": _no_bytes,
    "memory_allocated": _no_bytes,
    "memory_reserved": _no_bytes,
    "mem_get_info": lambda *args: (0, 0),
    "get_rng_state": torch.get_rng_state,
    "set_rng_state": torch.set_rng_state,
}
for _name, _function in _MISSING.items():
    if not hasattr(torch.cpu, _name):
        setattr(torch.cpu, _name, _function)


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """A CPU as a platform of verl, which has those of three accelerator vendors.

    verl places workers by Ray's resource "GPU", which is a mere number: ``ray_init.num_gpus`` says how many there are.
    """

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = torch.cpu
    set_device = synchronize = empty_cache = _nothing
    manual_seed = manual_seed_all = set_allocator_settings = _nothing
    profiler_start = profiler_stop = cudart = _nothing

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return True

    def current_device(self) -> str:  # type: ignore[override]
        """Returns what verl hands to ``tensor.to``, which would take an index for that of an accelerator."""
        return "cpu"

    def device_count(self) -> int:
        return 1

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield


# --- gloo ---


def _use_gloo(distributed: ModuleType) -> None:
    """verl asks for "cpu:gloo,<device>:<backend>", which names the CPU twice here."""
    function = distributed.initialize_global_process_group_ray
    distributed.initialize_global_process_group_ray = functools.partial(function, backend="gloo")


def _with_average(all_reduce: Any) -> Any:
    """``all_reduce`` that has the mean, too, which gloo lacks: a sum and a division."""

    @functools.wraps(all_reduce)
    def wrapped(tensor: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if op != dist.ReduceOp.AVG:
            return all_reduce(tensor, op=op, group=group, async_op=async_op)
        assert not async_op
        all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
        tensor.div_(dist.get_world_size(group))
        return None

    return wrapped


dist.all_reduce = _with_average(dist.all_reduce)
wrapt.register_post_import_hook(_use_gloo, "verl.utils.distributed")

# --- the engines ---


def _register_engines(engine: ModuleType) -> None:
    """verl registers its FSDP engines for CUDA and NPU alone. A CPU's memory needs no pinning, nor offloading."""
    from verl.workers.engine.fsdp import transformer_impl

    registry = engine.EngineRegistry
    for kind, cls in (
        ("language_model", transformer_impl.FSDPEngineWithLMHead),
        ("value_model", transformer_impl.FSDPEngineWithValueHead),
    ):
        registry.register(model_type=kind, backend=["fsdp", "fsdp2"], device="cpu")(cls)
    transformer_impl.CPUOffloadPolicy = _nothing


wrapt.register_post_import_hook(_register_engines, "verl.workers.engine")
