"""Sends the weights of the policy to an inference engine, and proves that they arrived.

The engine gets, under the names of a checkpoint, what ``save_pretrained`` would write of the policy: sharded weights
are gathered one at a time, adapters are merged into copies, and tied weights are sent once.

A probe follows every sync: it compares the log-probs of a few tokens between engine and trainer. It catches weights
that did not arrive (a skipped sync, a tied head that kept the old ones), and attention states in a prefix cache that
outlived the weights with which they were computed. For the latter the engine has scored the same sequences before the
sync, so that they are in such a cache.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from maestro_fast.generation import Engine, Generator, ProbeConfig, SamplingConfig
from maestro_fast.generation.shared_process import TorchSettings
from maestro_fast.model.head import causal_lm, whole
from maestro_fast.model.rows import Sequences
from maestro_fast.model.sharding import reshard
from maestro_fast.records import Prompts, Rollouts
from maestro_fast.settings import SettingsError
from maestro_fast.training.metrics import StageClock
from maestro_fast.training.parts import Scorer

PolicyLogprobs = Callable[[nn.Module, list[list[int]]], list[Tensor]]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Thresholds(NamedTuple):
    """What rounding explains: the mean and the largest difference of a token's log-probs, in nats."""

    mean: float
    largest: float


# Two attention kernels give SmolLM2-135M log-probs that differ, in the mean, by 3e-6 nats in float32, 0.007 in float16
# and 0.05 in bfloat16, and on the worst of 107 tokens by 2e-5, 0.06 and 0.26. Longer texts have worse single tokens, so
# the largest difference alone would stop sound runs, or let all tokens be a little wrong.
THRESHOLDS = {
    torch.float32: Thresholds(2e-4, 2e-3),
    torch.float16: Thresholds(0.03, 0.3),
    torch.bfloat16: Thresholds(0.15, 2.0),
}


class StaleWeightsError(RuntimeError):
    """The engine does not compute what the policy does."""


@dataclass(frozen=True)
class SyncProbe:
    """The comparison of engine and trainer on a few sequences.

    Attributes:
        sequences: the token ids of each sequence, at least 2 of them.
        policy_logprobs: computes the trainer's log-probs, in the form of ``Engine.prompt_logprobs``.
        thresholds: the mean and the largest difference that are accepted, in nats.
    """

    sequences: list[list[int]]
    policy_logprobs: PolicyLogprobs
    thresholds: Thresholds

    def warm(self, engine: Engine) -> None:
        """Puts the sequences into the engine's prefix cache before a sync, which has to throw them out."""
        engine.prompt_logprobs(self.sequences)

    def check(self, engine: Engine, model: nn.Module) -> dict[str, float]:
        """Compares the two after a sync. Returns the mean and the largest absolute difference over all tokens.

        Raises:
            StaleWeightsError: the mean or the largest difference is above its threshold, or one is not a number.
        """
        theirs = torch.cat(engine.prompt_logprobs(self.sequences))
        ours = torch.cat([logprobs.float().cpu() for logprobs in self.policy_logprobs(model, self.sequences)])
        gap = (theirs - ours).abs()
        found = Thresholds(gap.mean().item(), gap.max().item())
        if not (found.mean <= self.thresholds.mean and found.largest <= self.thresholds.largest):  # also if NaN
            self._fail(gap.nan_to_num(nan=torch.inf), theirs, ours)
        return {"sync/probe_mean": found.mean, "sync/probe_max": found.largest}

    def _fail(self, gap: Tensor, theirs: Tensor, ours: Tensor) -> None:
        worst = int(gap.argmax())
        position, sequence = worst, 0
        while position >= len(self.sequences[sequence]) - 1:
            position -= len(self.sequences[sequence]) - 1
            sequence += 1
        token = self.sequences[sequence][position + 1]
        raise StaleWeightsError(
            f"weight sync: log-prob of token {token} at position {position + 1} of probe sequence {sequence} is "
            f"{theirs[worst]:.6g} in the engine and {ours[worst]:.6g} in the trainer, expected a difference of at most "
            f"{self.thresholds.largest:g} (generation.probe.threshold); the mean over {len(gap)} tokens is "
            f"{gap.mean():.2g}, expected at most {self.thresholds.mean:g} (generation.probe.mean_threshold): the "
            "engine has other weights, or a prefix cache of earlier ones"
        )


def build_probe(
    config: ProbeConfig, engine: Engine, prompt_ids: list[list[int]], policy_logprobs: PolicyLogprobs
) -> SyncProbe:
    """Makes a probe from real prompts. Each sequence is long enough to fill a block of the engine's prefix cache.

    Args:
        config: the number and length of the sequences, and the threshold.
        engine: the engine that is probed.
        prompt_ids: token ids of the first prompts of the data. Sequence k is made of them in turn, from the k-th on,
            repeated until it is long enough.
        policy_logprobs: computes the trainer's log-probs of the sequences.
    """
    block = engine.cache_block
    wanted = max(config.tokens, 2 * block + 8 if block else 0)
    length = min(wanted, engine.max_tokens - 1)  # The engine samples one token after the sequence.
    if block and (length - 1) % block == 0:  # Otherwise no log-prob would be computed from cached states.
        length -= 1
    sequences = []
    for k in range(config.sequences):
        start = k % len(prompt_ids)
        joined = [token for ids in prompt_ids[start:] + prompt_ids[:start] for token in ids]
        sequences.append((joined * -(-length // len(joined)))[:length])
    return SyncProbe(sequences, policy_logprobs, _thresholds(config, engine.dtype))


def _thresholds(config: ProbeConfig, dtype: torch.dtype) -> Thresholds:
    """Those of the config, and where it has none, those of the dtype that the engine computes in.

    On a CUDA device ``trainer.tf32`` rounds the trainer's float32 products to the 10 bits that float16 has as well.
    """
    if dtype == torch.float32 and torch.cuda.is_available() and TorchSettings.now().cuda == "tf32":
        dtype = torch.float16
    mean, largest = THRESHOLDS[dtype]
    return Thresholds(
        mean if config.mean_threshold is None else config.mean_threshold,
        largest if config.threshold is None else config.threshold,
    )


class SyncedGenerator:
    """A ``Generator`` that samples with an engine, whose weights it renews when those of the policy have changed.

    Every call is probed, even one that renews nothing, so that a change of the policy that went unnoticed shows. If
    several threads call, the first call renews and probes for all that come while it samples, because the policy does
    not change meanwhile. Sharded weights are probed at every call, and all processes take part.

    As an ``AheadGenerator`` it also samples while the policy changes. The engine then keeps its weights until the
    responses are there: a call that needs others waits for that.
    """

    def __init__(self, engine: Engine, probe: SyncProbe, clock: StageClock) -> None:
        """
        Args:
            engine: the engine that samples.
            probe: compares the engine with the policy.
            clock: counts the syncs and their probes as the stage ``sync``. Where generation runs in a thread
                of its own, a sync counts as part of the generation.
        """
        self.engine = engine
        self.concurrent_parts = engine.concurrent_parts
        self.ahead: int = getattr(engine, "ahead", 0)  # A user's own engine may not know of it.
        self._probe = probe
        self._clock = clock
        self._lock = threading.Condition()
        self._sent: list[int] | None = None  # the fingerprint of the weights that the engine has
        self._sampling = 0  # how many calls are sampling for the policy as it is
        self._ahead = 0  # how many batches are sampled with weights that have to stay, though the policy may change

    @torch.no_grad()
    def generate(self, model: nn.Module, prompts: Prompts, *, seed: int) -> Rollouts:
        """See ``Generator.generate``.

        Raises:
            StaleWeightsError: the engine computes other log-probs than the policy.
        """
        stage = contextlib.nullcontext() if self.concurrent_parts else self._clock.stage("sync")
        with self._lock, stage:
            up_to_date = self._sampling > 0 and not any(map(_sharded, model.parameters()))
            metrics = {} if up_to_date else self._sync(model)
            self._sampling += 1
        try:
            rollouts = self.engine.sample(prompts, seed=seed)
        finally:
            with self._lock:
                self._sampling -= 1
        with self._lock:
            if not self._sampling and not self._ahead and not self.engine.sleep():
                self._sent = None
        return replace(rollouts, metrics=rollouts.metrics | metrics)

    @torch.no_grad()
    def renewed(self, model: nn.Module) -> Renewed:
        """See ``AheadGenerator.renewed``. The probe, too, is over when this returns.

        Raises:
            StaleWeightsError: the engine computes other log-probs than the policy.
        """
        with self._lock, self._clock.stage("sync"):
            metrics = self._sync(model)
            self._ahead += 1
        return Renewed(self, metrics, self.concurrent_parts)

    def sample_ahead(self, prompts: Prompts, seed: int) -> Rollouts:
        """Samples for one ``Renewed``, with the weights that the engine has."""
        try:
            return self.engine.sample(prompts, seed=seed)
        finally:
            with self._lock:
                self._ahead -= 1
                self._lock.notify_all()

    def _sync(self, model: nn.Module) -> dict[str, float]:
        reshard(model)  # A forward without a backward has left some weights gathered, and rounded in mixed precision.
        current = fingerprint(model)
        if current != self._sent:
            self._lock.wait_for(lambda: self._ahead == 0)
            if self._sent is not None:
                self._probe.warm(self.engine)
            self._sent = None
            self.engine.load_weights(checkpoint_weights(model, self.engine.dtype))
            self.engine.reset_prefix_cache()
            self._sent = current
        return self._probe.check(self.engine, model)


@dataclass
class Renewed:
    """Samples one batch with the weights that ``SyncedGenerator.renewed`` has sent, whatever becomes of the policy.

    Attributes:
        synced: the generator that holds the engine.
        metrics: the figures of the sync.
        concurrent_parts: see ``Generator``.
    """

    synced: SyncedGenerator
    metrics: dict[str, float]
    concurrent_parts: int

    def generate(self, model: nn.Module, prompts: Prompts, *, seed: int) -> Rollouts:
        """See ``Generator.generate``; it has to be called, and only once."""
        del model
        rollouts = self.synced.sample_ahead(prompts, seed)
        return replace(rollouts, metrics=rollouts.metrics | self.metrics)


def synced_generator(
    engine: Engine,
    config: ProbeConfig,
    prompt_ids: list[list[int]],
    scorer: Scorer,
    accelerator: Accelerator,
    clock: StageClock,
) -> SyncedGenerator:
    """Makes the generator that samples with ``engine`` in place of the policy.

    Args:
        engine, config: the engine that samples, and the settings of its probe.
        prompt_ids: the token ids of the first prompts of the data, from which the probe is made.
        scorer: computes the policy's log-probs.
        accelerator: says how the policy's weights are sharded.
        clock: counts the seconds of the syncs.

    Raises:
        ValueError: the weights are sharded in a way from which they cannot be gathered.
    """
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        raise ValueError("trainer.deepspeed: its weights cannot be sent to an engine, expected DDP or fsdp")

    def policy_logprobs(model: nn.Module, token_ids: list[list[int]]) -> list[Tensor]:
        sequences = Sequences([ids[:1] for ids in token_ids], [ids[1:] for ids in token_ids])
        logprobs_C = replace(scorer, micro_batch=len(token_ids), temperature=1.0)(model, sequences).logprobs_C
        return list(torch.split(logprobs_C, [len(ids) - 1 for ids in token_ids]))

    return SyncedGenerator(engine, build_probe(config, engine, prompt_ids, policy_logprobs), clock)


def check_engine(engine: Engine, generator: Generator | None, model: nn.Module) -> None:
    """Checks that ``engine`` can sample for ``model``.

    Raises:
        ValueError: there is a ``generator`` beside it, or the model's weights cannot be sent.
    """
    if generator is not None:
        raise ValueError(f"engine: {type(engine).__name__} beside a generator, expected one of the two")
    check_syncable(model)


def check_room(engine: Engine, longest_prompt: int, sampling: SamplingConfig) -> None:
    """Checks that the longest prompt and the longest response fit into the engine.

    Raises:
        SettingsError: the engine would end a response before its token limit.
    """
    if longest_prompt + sampling.max_new_tokens > engine.max_tokens:
        raise SettingsError(
            f"sampling.max_new_tokens: {sampling.max_new_tokens} after the longest prompt of {longest_prompt} tokens, "
            f"expected at most {engine.max_tokens} together, the engine's longest sequence (generation.max_tokens)"
        )


def check_syncable(model: nn.Module) -> None:
    """Checks that the policy can be written as a checkpoint of the plain model.

    Raises:
        ValueError: it has adapters that cannot be merged or are rows of an embedding, or quantised weights.
    """
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise ValueError(
            f"generation: adapters of type {config.peft_type.value} add to the prompt, expected some that can be "
            "merged into the weights, or generation: transformers"
        )
    if any(hasattr(module, "token_adapter") for module in model.modules()):
        raise ValueError(
            "generation: trainable_token_indices makes a module of its own of some rows of the embedding, expected "
            "modules_to_save, or generation: transformers"
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
            raise ValueError(
                f"generation: {name} is quantised ({parameter.dtype}), expected floating-point weights, or "
                "generation: transformers"
            )


@torch.no_grad()
def fingerprint(model: nn.Module) -> list[int]:
    """Sums the bits of every parameter, over all shards, in one pass over the weights.

    ``Tensor._version`` would not do, because a fused optimiser and writes through ``.data`` leave it unchanged.
    """
    sums, sharded = [], False
    for parameter in model.parameters():
        local: Any = parameter.detach()
        if _sharded(parameter):
            sharded, local = True, local.to_local()
        sums.append(_sum_of_bits(local))
    total = torch.stack(sums)
    if sharded:
        torch.distributed.all_reduce(total)
    return [int(value) for value in total.tolist()]


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits, read as integers: int64, without dimensions, on the tensor's device.

    Torch sums smaller integers by a copy in int64, which has four times the size of a bfloat16 tensor: 5 GB for the
    embeddings of an 8B model. So eight bytes at a time are read as one integer, without a copy. Only the few elements
    before the first multiple of eight bytes and behind the last are summed by themselves.
    """
    flat, ratio = tensor.contiguous().view(-1), 8 // tensor.element_size()
    start = min(-flat.storage_offset() % ratio, flat.numel())
    end = start + (flat.numel() - start) // ratio * ratio
    edges = torch.cat([flat[:start], flat[end:]]).view(_INTEGERS[tensor.element_size()])
    if start == end:  # An empty tensor cannot be viewed as another type at any offset.
        return edges.sum(dtype=torch.int64)
    return flat[start:end].view(torch.int64).sum() + edges.sum(dtype=torch.int64)


@torch.no_grad()
def checkpoint_weights(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yields names and tensors as ``save_pretrained`` writes them, with adapters merged; the model is unchanged.

    One tensor is gathered or merged at a time; a shard is cast before it is gathered, since fewer bytes are sent then.
    If the names or shapes of transformers' checkpoints differ from the model's own, all tensors are held at once.

    Args:
        model: a causal language model of transformers, with or without PEFT adapters, sharded by FSDP2 or not. With
            sharded weights all processes iterate together.
        dtype: the dtype to which floating-point tensors are cast; None keeps their own.
    """
    language_model = causal_lm(model)
    weights = _named_weights(language_model, "", set(), dtype)
    for name, tensor in _as_saved(language_model, weights):
        yield name, _cast(tensor, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _named_weights(module: Any, prefix: str, seen: set[int], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Yields parameters and persistent buffers below ``module``; of tied ones it yields only the first."""
    base, module = _without_adapter(module)
    tensors = dict(module._parameters)
    tensors |= {n: t for n, t in module._buffers.items() if n not in module._non_persistent_buffers_set}
    for name, tensor in tensors.items():
        identity = id(getattr(base, name))  # The id of a merged copy is used again after this round.
        if tensor is not None and identity not in seen:
            seen.add(identity)
            yield prefix + name, whole(_cast(tensor.detach(), dtype))
    for name, child in module._modules.items():
        if child is not None:
            yield from _named_weights(child, f"{prefix}{name}.", seen, dtype)


def _without_adapter(module: Any) -> tuple[Any, Any]:
    """The module below PEFT's wrapping, and the module to save: a copy with the active adapters merged in."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        chosen = module.active_adapter if isinstance(module.active_adapter, str) else module.active_adapter[0]
        return (module.modules_to_save[chosen],) * 2
    if not hasattr(module, "get_base_layer") or not hasattr(module, "merge"):
        return module, module
    base = module.get_base_layer()
    if module.merged or module.disable_adapters:
        return base, base
    gathered = {id(p): nn.Parameter(_own_whole(p), p.requires_grad) for p in module.parameters() if _sharded(p)}
    twin = copy.deepcopy(module, gathered)
    twin.merge()
    return base, twin.get_base_layer()


def _own_whole(parameter: Any) -> Tensor:
    """A sharded parameter gathered into memory of its own: where one process holds all shards, nothing is copied."""
    full = whole(parameter.detach())
    return full.clone() if full.data_ptr() == parameter.to_local().data_ptr() else full


def _sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _as_saved(model: Any, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names, and in the shapes, of transformers' checkpoint."""
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
