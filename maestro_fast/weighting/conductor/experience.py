"""What a Conductor reads and what it keeps: contexts, their running statistics, and the batches that it learns from.

Axis suffixes: B responses in N groups, K rewards, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maestro_fast.weighting.policy import ContextKind, WeightContext

# --- contexts ---


def policy_contexts(
    context: WeightContext, kind: ContextKind, size: int, seed: int, device: torch.device, *, shuffle: bool = False
) -> Tensor:
    """The contexts that a Conductor reads, float32 [B, d] on ``device``.

    A batched forward leaves rounding noise between copies of one prompt. Contexts of the prompt are therefore made
    exactly equal within a group: every response gets the context of the first one.

    Args:
        context: the batch.
        kind: which hidden state of each response the batch has.
        size: d, the width that the Conductor's network expects.
        seed: decides, together with the step, which response gets which state where they are shuffled.
        device: the device of the contexts that are returned.
        shuffle: whether each response gets the state of another one, and with a state of the prompt each group that of
            another group.

    Raises:
        ValueError: the batch has no contexts, or they have the wrong shape.
    """
    if context.context_Bd is None:
        raise ValueError("context_Bd: missing, the Conductor reads the hidden state of each response")
    expected = (context.rewards_BK.shape[0], size)
    if context.context_Bd.shape != expected:
        raise ValueError(f"context_Bd: shape {tuple(context.context_Bd.shape)}, expected {expected}")
    h_Bd = context.context_Bd.detach().float().to(device)
    of_prompts = not kind.startswith("response")
    rows = h_Bd[:: context.group_size] if of_prompts else h_Bd
    rows = _shuffled(rows, seed, context.step) if shuffle else rows
    return rows.repeat_interleave(context.group_size, 0) if of_prompts else rows


def group_mean(h_Bd: Tensor, group_size: int) -> Tensor:
    """The mean context of each group, [N, d]."""
    return h_Bd.view(-1, group_size, h_Bd.shape[-1]).mean(1)


def _shuffled(rows: Tensor, seed: int, step: int) -> Tensor:
    """Gives every row, which is a response or a prompt, the state of another one; a row that is alone keeps its own.

    The rows are put in a random order, and each gets the state of the one before it. A random permutation would leave
    some rows their own state.
    """
    generator = torch.Generator().manual_seed((seed + step) % 2**63)
    order = torch.randperm(rows.shape[0], generator=generator).to(rows.device)
    shuffled = torch.empty_like(rows)
    shuffled[order] = rows[order.roll(1)]
    return shuffled


# --- running statistics ---


class RunningStatistics:
    """Mean and population variance of all contexts seen so far, in float64.

    Batches are merged by the formula of Chan, Golub and LeVeque (1983), so the split into batches does not matter.
    Nothing changes between two calls of ``update``.

    Attributes:
        count: the number of contexts seen, a float64 scalar on the CPU.
        mean: float64 [d], the mean of the contexts.
        m2: float64 [d], the sum of the squared deviations from the mean.
    """

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.m2 = torch.zeros(size, dtype=torch.float64, device=device)

    def update(self, rows_Bd: Tensor) -> None:
        """Adds these rows to the contexts seen."""
        rows = rows_Bd.detach().to(self.mean)
        if rows.shape[0] == 0:
            return
        mean = rows.mean(0)
        delta = mean - self.mean
        total = self.count + rows.shape[0]
        self.m2 = self.m2 + (rows - mean).square().sum(0) + delta.square() * self.count * rows.shape[0] / total
        self.mean = self.mean + delta * rows.shape[0] / total
        self.count = total

    def standardisation(self, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
        """The mean [d] and one over the standard deviation [d], both float32; 0 and 1 before the first update."""
        if self.count == 0:
            return torch.zeros_like(self.mean, dtype=torch.float32), torch.ones_like(self.mean, dtype=torch.float32)
        variance = self.m2 / self.count
        return self.mean.float(), (variance + eps).rsqrt().float()

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        return {prefix + name: getattr(self, name).clone() for name in ("count", "mean", "m2")}

    def saved_shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """The shapes that ``load_state_dict`` expects, by name."""
        return {f"{prefix}count": (), f"{prefix}mean": tuple(self.mean.shape), f"{prefix}m2": tuple(self.m2.shape)}

    def load_state_dict(self, state: Mapping[str, Tensor], prefix: str) -> None:
        for name in ("count", "mean", "m2"):
            setattr(self, name, state[prefix + name].clone().to(getattr(self, name).device))


# --- the buffer ---


@dataclass
class Buffer:
    """The batches that wait for the next update, and those that are kept for later ones.

    A batch is a mapping of named tensors on one device, as ``meta_rewards.experience`` makes it, plus its ``step``, an
    int64 scalar on the CPU.

    Attributes:
        period, capacity, staleness: the options of ``ConductorConfig`` with these names.
        batches: the batches, in the order of their steps.
        fresh: how many batches have come since the last update.
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
        """Whether it is time for an update. A loaded buffer may hold more batches than this Conductor's period."""
        return self.fresh >= self.period

    def take(self, step: int) -> list[dict[str, Tensor]]:
        """The batches for an update at ``step``. The buffer drops what ``capacity`` and ``staleness`` do not keep."""
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

    @staticmethod
    def saved_shapes(state: Mapping[str, Tensor], size: int, num_rewards: int) -> dict[str, tuple[int, ...]]:
        """The shapes that ``load_state_dict`` expects of the buffer in ``state``, by name.

        The number of rows of a batch is free. Meta-rewards may have one column or K, as the estimator wanted them.
        """
        shapes: dict[str, tuple[int, ...]] = {"buffer_fresh": ()}
        for name, tensor in state.items():
            if name.startswith("buffer."):
                kind = name.split(".")[2]
                columns = {"h": (size,), "rewards": (num_rewards,), "meta": tuple(tensor.shape[1:])}.get(kind, ())
                whole = {"step": (), "used": (), "group_size": (), "factors": (num_rewards,)}
                shapes[name] = whole.get(kind, (*tensor.shape[:1], *columns))
        return shapes

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        self.fresh = int(state["buffer_fresh"])
        self.batches = [{} for _ in {key.split(".")[1] for key in state if key.startswith("buffer.")}]
        for key, tensor in state.items():
            if key.startswith("buffer."):
                _, number, name = key.split(".")
                self.batches[int(number)][name] = tensor.clone().to(device if tensor.ndim else "cpu")
