"""The batches that a Conductor learns from: kept until an update has used them, or longer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Buffer:
    """Batches in the order of their steps, each a mapping of named tensors on one device with its ``step``, an int64
    scalar on the CPU.

    Attributes:
        period, capacity, staleness: as in ``ConductorConfig``.
        batches: what is held.
        fresh: batches since the last update.
    """

    period: int
    capacity: int | None
    staleness: int | None
    batches: list[dict[str, Tensor]] = field(default_factory=list)
    fresh: int = 0

    def add(self, step: int, batch: dict[str, Tensor]) -> None:
        self.batches.append({"step": torch.tensor(step), **batch})
        self.fresh += 1

    @property
    def due(self) -> bool:
        return self.fresh >= self.period  # more, if a state was loaded that a longer period had filled

    def take(self, step: int) -> list[dict[str, Tensor]]:
        """The batches for an update at ``step``; those beyond ``capacity`` or ``staleness`` are let go."""
        oldest = -1 if self.staleness is None else step - self.staleness
        usable = [batch for batch in self.batches if int(batch["step"]) >= oldest]
        self.batches = usable[-self.capacity :] if self.capacity is not None else []
        self.fresh = 0
        return usable

    def state_dict(self) -> dict[str, Tensor]:
        state = {
            f"buffer.{i}.{name}": tensor.clone()
            for i, batch in enumerate(self.batches)
            for name, tensor in batch.items()
        }
        return {**state, "buffer_fresh": torch.tensor(self.fresh)}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device) -> None:
        self.fresh = int(state["buffer_fresh"])
        self.batches = [{} for _ in {key.split(".")[1] for key in state if key.startswith("buffer.")}]
        for key, tensor in state.items():
            if key.startswith("buffer."):
                _, number, name = key.split(".")
                self.batches[int(number)][name] = tensor.clone().to(device if tensor.ndim else "cpu")
