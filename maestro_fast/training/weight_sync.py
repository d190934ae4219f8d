"""From the trained model to an inference engine: its weights under the names of a checkpoint, and proof that they took.

What is sent is what ``save_pretrained`` would write of the policy: sharded weights gathered one at a time, adapters
merged into copies, tied weights once.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from maestro_fast.generation import Engine
from maestro_fast.model.head import causal_lm, whole
from maestro_fast.records import Prompts, Rollouts
from maestro_fast.training.sync_probe import SyncProbe

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Clock(Protocol):
    """See ``timing.StageClock``."""

    def stage(self, name: str) -> AbstractContextManager[None]: ...


class SyncedGenerator:
    """A ``Generator`` that samples with an engine, whose weights it renews when those of the policy have changed.

    Every renewal is probed, and so is every call without one: if a change of the policy went unnoticed, this does
    not. Of calls from several threads the first renews and probes for those that come while it samples: the policy
    does not change meanwhile. Sharded weights are probed at every call, which takes all processes.
    """

    def __init__(self, engine: Engine, probe: SyncProbe, clock: Clock) -> None:
        """``clock``: gets the time of the syncs, with their probes, as the stage ``sync``; in a thread of its own, a
        sync is part of the generation."""
        self.engine = engine
        self.concurrent_parts = engine.concurrent_parts
        self._probe = probe
        self._clock = clock
        self._lock = threading.Lock()
        self._sent: list[int] | None = None  # fingerprint of the policy that the engine has
        self._sampling = 0  # calls

    @torch.no_grad()
    def generate(self, model: nn.Module, prompts: Prompts, *, seed: int) -> Rollouts:
        """See ``Generator.generate``.

        Raises:
            StaleWeightsError: the engine computes other log-probs than the policy.
        """
        stage = contextlib.nullcontext() if self.concurrent_parts else self._clock.stage("sync")
        with self._lock, stage:
            known = self._sampling > 0 and not any(map(_sharded, model.parameters()))
            metrics = {} if known else self._sync(model)
            self._sampling += 1
        try:
            rollouts = self.engine.sample(prompts, seed=seed)
        finally:
            with self._lock:
                self._sampling -= 1
        with self._lock:
            if not self._sampling and not self.engine.sleep():
                self._sent = None
        return Rollouts(
            rollouts.prompts,
            rollouts.completion_ids,
            rollouts.completions,
            rollouts.truncated_B,
            rollouts.sampling_logprobs_C,
            rollouts.metrics | metrics,
        )

    def _sync(self, model: nn.Module) -> dict[str, float]:
        current = fingerprint(model)
        if current != self._sent:
            if self._sent is not None:
                self._probe.warm(self.engine)
            self._sent = None
            self.engine.load_weights(checkpoint_weights(model, self.engine.dtype))
            self.engine.reset_prefix_cache()
            self._sent = current
        return self._probe.check(self.engine, model)


def check_syncable(model: nn.Module) -> None:
    """
    Raises:
        ValueError: weights that a checkpoint of the plain model could not hold.
    """
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise ValueError(
            f"generation: adapters of type {config.peft_type.value} add to the prompt, expected some that can be "
            "merged into the weights, or generation: transformers"
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
            raise ValueError(
                f"generation: {name} is quantised ({parameter.dtype}), expected floating-point weights, or "
                "generation: transformers"
            )


@torch.no_grad()
def fingerprint(model: nn.Module) -> list[int]:
    """Sums of the bits of every parameter, over all shards: one pass over the weights.

    Not ``Tensor._version``: a fused optimiser and whoever writes through ``.data`` leave it as it is.
    """
    sums, sharded = [], False
    for parameter in model.parameters():
        local: Any = parameter.detach()
        if _sharded(parameter):
            sharded, local = True, local.to_local()
        sums.append(local.view(_INTEGERS[local.element_size()]).sum(dtype=torch.int64))
    total = torch.stack(sums)
    if sharded:
        torch.distributed.all_reduce(total)
    return [int(value) for value in total.tolist()]


@torch.no_grad()
def checkpoint_weights(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as ``save_pretrained`` writes them, adapters merged; the model is left as it is.

    One tensor is gathered or merged at a time, except where transformers' names or shapes of a checkpoint differ from
    the model's own: then all of them.

    Args:
        model: a causal language model of transformers, with or without PEFT adapters, sharded by FSDP2 or not. With
            sharded weights all processes iterate together.
        dtype: of the floating-point tensors; None: their own.
    """
    language_model = causal_lm(model)
    weights = _named_weights(language_model, "", set())
    for name, tensor in _as_saved(language_model, weights):
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _named_weights(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers below ``module``; of tied ones the first."""
    base, module = _without_adapter(module)
    tensors = dict(module._parameters)
    tensors |= {n: t for n, t in module._buffers.items() if n not in module._non_persistent_buffers_set}
    for name, tensor in tensors.items():
        identity = id(getattr(base, name))  # that of a merged copy is free again after this
        if tensor is not None and identity not in seen:
            seen.add(identity)
            yield prefix + name, whole(tensor.detach())
    for name, child in module._modules.items():
        if child is not None:
            yield from _named_weights(child, f"{prefix}{name}.", seen)


def _without_adapter(module: Any) -> tuple[Any, Any]:
    """The module below PEFT's wrapping, and what is to be saved of it: a copy with the active adapters merged in."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        chosen = module.active_adapter if isinstance(module.active_adapter, str) else module.active_adapter[0]
        return (module.modules_to_save[chosen],) * 2
    if not hasattr(module, "get_base_layer") or not hasattr(module, "merge"):
        return module, module
    base = module.get_base_layer()
    if module.merged or module.disable_adapters:
        return base, base
    gathered = {id(p): nn.Parameter(whole(p.detach()), p.requires_grad) for p in module.parameters() if _sharded(p)}
    twin = copy.deepcopy(module, gathered)
    twin.merge()
    return base, twin.get_base_layer()


def _sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _as_saved(model: Any, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Under the names, and in the shapes, of the checkpoint."""
    if not isinstance(model, PreTrainedModel) or not _converts(model):
        return weights
    from transformers.core_model_loading import revert_weight_conversion

    return iter(revert_weight_conversion(model, dict(weights)).items())


def _converts(model: PreTrainedModel) -> bool:
    """Whether transformers renames or regroups the weights of this model when it saves them."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        conversions = get_model_conversion_mapping(model, add_legacy=False)
    return bool(conversions)
