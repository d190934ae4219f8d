"""What a step of a run holds in memory, part by part, and the largest micro-batch for which that fits.

Weights, gradients, optimiser, reference and other models are counted: their tensors are there, or follow from those
that are. What grows with the tokens is measured on a few of them, see ``activations``. The table gives a step whose
prompts are as long as the longest of the data, and whose completions all reach ``sampling.max_new_tokens``; most steps
hold less. What an allocator holds beyond the tensors is not counted, so a share of the room is kept free for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from maestro_fast.generation import TransformersConfig
from maestro_fast.generation.config import ColocateConfig, GenerationConfig
from maestro_fast.model.trained import trained_parameters
from maestro_fast.reporting.tables import Table
from maestro_fast.starting.activations import PassMemory, Shape
from maestro_fast.training.step import Step

SHARE = 0.85  # of the room that a step may take; the rest is for what an allocator holds beyond the tensors
GRADIENTS = "gradients"
_MOMENTS = {"sgd": 0.0, "adafactor": 0.1, "adamw_8bit": 0.5, "adamw_bnb_8bit": 0.5, "paged_adamw_8bit": 0.5}


@dataclass(frozen=True)
class Room:
    """The memory of the device that trains, in bytes.

    Attributes:
        where: what it is, for sentences.
        free: what this process may hold, with what it holds already.
        own: what this process held, or others hold on a GPU, before the model: it is no tensor of the run.
    """

    where: str
    free: int
    own: int

    @staticmethod
    def now(device: torch.device) -> Room:
        """Looks at a device; call it before the model is loaded."""
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            held = torch.cuda.memory_reserved(device)
            return Room(f"GPU memory ({torch.cuda.get_device_name(device)})", total, total - free - held)
        resident = _resident()
        return Room("memory of this machine", _available() + resident, resident)


def _resident() -> int:
    """The bytes of this process that are in memory; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _available() -> int:
    """The bytes that processes can still get here, within the limit of a container if there is one."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
        free = int(found[1]) * 1024 if found else 0
    except OSError:
        free = 0
    free = free or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        free = min(free, int(limit) - int(used))
    except (OSError, ValueError):  # There is no container, or it has no limit.
        pass
    return max(0, free)


@dataclass(frozen=True)
class Part:
    """What one part of a run holds, in bytes, while the policy samples and while it trains."""

    name: str
    sampling: float
    training: float
    why: str


@dataclass(frozen=True)
class StepMemory:
    """The memory of a step.

    Attributes:
        fixed: the parts that do not depend on ``shape``.
        passes: what the passes of the policy allocate.
        shape: a micro-batch at its largest.
        batch: all responses that are sampled at once, at their longest.
        update: the number of responses of an optimiser step.
        samples: whether the policy itself samples.
        room: the memory that there is.
    """

    fixed: tuple[Part, ...]
    passes: PassMemory
    shape: Shape
    batch: Shape
    update: int
    samples: bool
    room: Room

    @property
    def parts(self) -> list[Part]:
        """All parts, those of the passes last."""
        why = f"{self.shape.responses} x ({self.shape.prompt} + {self.shape.completion}) tokens"
        training = self.passes.training(self.shape)
        if self.shape.responses == self.update:  # The gradients come into being while the pass lets go of its tensors.
            training = max(0.0, training - sum(part.training for part in self.fixed if part.name == GRADIENTS))
            why += ", beyond the gradients"
        found = [*self.fixed, Part("training pass", 0.0, training, why)]
        if self.samples:
            cache, rest = self.passes.sampling(self.batch)
            found.append(Part("generation cache", cache, 0.0, f"{self.batch.responses} responses at once"))
            found.append(Part("sampling pass", rest, 0.0, "logits, and the cache of a layer as it grows"))
        return found

    @property
    def peak(self) -> float:
        """The most that is held at once."""
        return max(sum(part.sampling for part in self.parts), sum(part.training for part in self.parts))

    @property
    def fits(self) -> bool:
        return self.peak <= SHARE * self.room.free

    def with_micro_batch(self, responses: int) -> StepMemory:
        """The same step with another ``batch.micro_batch``."""
        return replace(self, shape=replace(self.shape, responses=responses))

    def largest_micro_batch(self, responses: int, most: int | None = None) -> int | None:
        """The largest micro-batch that fits, divides the ``responses`` of an optimiser step, and is not above ``most``.

        None if none fits.
        """
        sizes = [m for m in range(min(responses, most or responses), 0, -1) if responses % m == 0]
        return next((m for m in sizes if self.with_micro_batch(m).fits), None)

    def table(self) -> Table:
        """The parts as a table, in GiB, or in MiB for a small model. Parts below a thousandth are left out."""
        unit, name = (2**30, "GiB") if self.peak >= 2**30 else (2**20, "MiB")
        parts = [part for part in self.parts if max(part.sampling, part.training) >= self.peak / 1000]
        both = sum(part.sampling for part in self.parts), sum(part.training for part in self.parts)
        rows = [(part.name, part.sampling, part.training, part.why) for part in parts]
        rows.append(("together", *both, "the larger of the two is the peak"))
        return Table(
            f"Memory of a step at its longest, about, in {name}; there are {gib(self.room.free)} GiB of "
            f"{self.room.where}",
            ("part", "sampling", "training", "what it is"),
            tuple((first, digits(a / unit), digits(b / unit), why) for first, a, b, why in rows),
        )


def digits(value: float) -> str | None:
    """A number with about three digits; None for 0."""
    return None if not value else f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def gib(size: float) -> str:
    """Bytes as GiB."""
    return digits(size / 2**30) or "0"


def step_memory(
    step: Step, model: nn.Module, passes: PassMemory, shapes: tuple[Shape, Shape], about: About, room: Room
) -> StepMemory:
    """Counts what a step holds.

    Args:
        step: the parts of the run's steps.
        model: the policy, on its device.
        passes: what was measured on it.
        shapes: a micro-batch and the batch that is sampled at once, both at their longest.
        about: what else is known of the run.
        room: the memory that there is.
    """
    weights = bytes_of([*model.parameters(), *model.buffers()])
    trained = [parameter for _, parameter in trained_parameters(model)]
    gradients = bytes_of(trained)
    moments = 2 * gradients * _MOMENTS.get(str(getattr(about.args.optim, "value", about.args.optim)), 1.0)
    count, all_weights = sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters())
    fixed = [
        Part("weights", weights, weights, f"{millions(all_weights)}, {millions(count)} of them trained"),
        Part(GRADIENTS, 0.0, gradients, "of the trained parameters"),
        Part("optimiser", moments, moments, f"the moments of {getattr(about.args.optim, 'value', about.args.optim)}"),
    ]
    if about.reference is not None:
        own = bytes_of([p for p in about.reference.parameters() if not any(p is q for q in _shared(model))])
        fixed.append(Part("reference", own, own, "a frozen copy of what trains, for the KL or the Conductor"))
    learner = bytes_of(tensors_in(step.weights.state_dict()))
    fixed.append(Part("weight policy", learner, learner, f"{step.weights.name}, without what it keeps of batches"))
    judges = bytes_of([p for reward in about.judges for p in models_in(reward)])
    fixed.append(Part("reward models", judges, judges, "models that the rewards have loaded"))
    samples = isinstance(about.generation, TransformersConfig)
    if isinstance(about.generation, ColocateConfig) and room.free:
        size = about.generation.gpu_memory_share * room.free
        awake = 0.0 if about.generation.sleep == 2 else size
        fixed.append(Part("vLLM", size, awake, "generation.gpu_memory_share, at most"))
    fixed.append(Part("outside the run", room.own, room.own, "Python and its libraries, or other users of the device"))
    update = step.plan.responses // step.plan.updates
    return StepMemory(tuple(fixed), passes, *shapes, update, samples, room)


@dataclass(frozen=True)
class About:
    """What ``step_memory`` has to know of a run beside its steps.

    Attributes:
        args, generation: as in the run's config.
        reference: the reference policy if it is a model of its own.
        judges: the rewards, and the anchor.
    """

    args: TrainingArguments
    generation: GenerationConfig
    reference: nn.Module | None
    judges: tuple[Any, ...]


def _shared(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if not p.requires_grad]


def bytes_of(tensors: Any) -> float:
    """The bytes of tensors, each storage counted once."""
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return float(sum(sizes.values()))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested mappings and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def models_in(reward: Any, depth: int = 3) -> Iterator[Tensor]:
    """The parameters of models that a reward holds, or one that it wraps."""
    for value in vars(reward).values() if hasattr(reward, "__dict__") else ():
        if isinstance(value, nn.Module):
            yield from value.parameters()
        elif depth and hasattr(value, "__dict__") and not isinstance(value, type):
            yield from models_in(value, depth - 1)


def millions(count: float) -> str:
    """A number of parameters, such as "135 M" or "7.2 B"."""
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.3g} M"
