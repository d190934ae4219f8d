"""Which response belongs to which prompt: built once on the host, carried to the device with its offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """The partition of B responses into N groups, one group per prompt.

    Attributes:
        index_NG: int64 [N, G_max], the responses of each group in ascending order, padded with B.
        slot_B: int64 [B], where response b stands in ``index_NG.flatten()``.
        sizes_N: int64 [N], responses per group.
        order_B: int64 [B], the responses group by group.
        offsets_N1: int64 [N + 1], where each group begins in ``order_B``, and B.
        batch: B.
        size: G if the groups are consecutive and all of G responses, else 0.

    All reductions over a group run over the padded [N, G_max] layout: a gather and a masked reduction. This is
    deterministic on every device, which a scatter with floating-point atomics is not.
    """

    index_NG: Tensor
    slot_B: Tensor
    sizes_N: Tensor
    order_B: Tensor
    offsets_N1: Tensor
    batch: int
    size: int
    _on_device: dict[torch.device, Groups] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(groups: GroupsLike, batch: int) -> Groups:
        """Builds the partition from a group size, from ids in any order, or returns a finished one.

        Args:
            groups: G (the batch is then B / G consecutive groups of G), a [B] list or CPU tensor of integer ids, or
                a ``Groups``.
            batch: B, the number of responses.

        Raises:
            TypeError: ids of a wrong type, or on a device (reading them would make the host wait).
            ValueError: G does not divide B, or there are not B ids.
        """
        if isinstance(groups, Groups):
            if groups.batch != batch:
                raise ValueError(f"groups: holds {groups.batch} responses, expected {batch}")
            return groups
        if isinstance(groups, bool):
            raise TypeError("groups: got a bool, expected an int, a [B] sequence of ids or Groups")
        if isinstance(groups, int):
            return _equal_groups(groups, batch)
        return _ragged_groups(_checked_ids(groups, batch), batch)

    def to(self, device: torch.device) -> Groups:
        """The same partition with its tensors on ``device``; copied once, then remembered."""
        if self.index_NG.device == device:
            return self
        if device not in self._on_device:
            self._on_device[device] = Groups(
                self.index_NG.to(device),
                self.slot_B.to(device),
                self.sizes_N.to(device),
                self.order_B.to(device),
                self.offsets_N1.to(device),
                self.batch,
                self.size,
            )
        return self._on_device[device]

    @property
    def num_groups(self) -> int:
        return self.index_NG.shape[0]

    @property
    def live_NG(self) -> Tensor:
        """bool [N, G_max]: True where the padded layout holds a response."""
        return self.index_NG < self.batch

    def gather(self, x: Tensor, fill: float | bool) -> Tensor:
        """[B, ...] -> [N, G_max, ...], ``fill`` in the padding."""
        padding = x.new_full((1, *x.shape[1:]), fill)
        return torch.cat([x, padding])[self.index_NG]

    def scatter(self, x_NG: Tensor) -> Tensor:
        """[N, G_max, ...] -> [B, ...], the inverse of ``gather``."""
        return x_NG.flatten(0, 1)[self.slot_B]


def _equal_groups(size: int, batch: int) -> Groups:
    if size < 1:
        raise ValueError(f"groups: a group size of {size}, expected at least 1")
    if batch % size:
        raise ValueError(f"groups: {batch} responses do not divide into groups of {size}")
    slot_B = torch.arange(batch)
    count = batch // size
    offsets_N1 = torch.arange(count + 1) * size
    return Groups(slot_B.view(-1, size), slot_B, torch.full((count,), size), slot_B, offsets_N1, batch, size)


def _checked_ids(groups: Sequence[int] | Tensor, batch: int) -> Tensor:
    if isinstance(groups, Tensor):
        if groups.device.type != "cpu":
            raise TypeError(
                f"groups: ids on {groups.device}, expected a CPU tensor or list (reading them would stall the device)"
            )
        if groups.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"groups: ids of dtype {groups.dtype}, expected int64 or int32")
        ids = groups.long()
    elif isinstance(groups, Sequence) and not isinstance(groups, str) and all(type(i) is int for i in groups):
        ids = torch.tensor(groups, dtype=torch.int64)
    else:
        raise TypeError(f"groups: got {type(groups).__name__}, expected an int, a [B] sequence of int ids or Groups")
    if ids.shape != (batch,):
        raise ValueError(f"groups: ids of shape {tuple(ids.shape)}, expected ({batch},)")
    return ids


def _ragged_groups(ids: Tensor, batch: int) -> Groups:
    _, compact_B, sizes_N = torch.unique(ids, return_inverse=True, return_counts=True)
    order = torch.argsort(compact_B, stable=True)
    starts_N = torch.cumsum(sizes_N, 0) - sizes_N
    rank_B = torch.empty_like(order)
    rank_B[order] = torch.arange(batch) - starts_N[compact_B[order]]
    width = int(sizes_N.max()) if batch else 0
    slot_B = compact_B * width + rank_B
    index = torch.full((sizes_N.numel() * width,), batch, dtype=torch.int64)
    index[slot_B] = torch.arange(batch)
    index_NG = index.view(-1, width) if batch else index.view(0, 0)
    offsets_N1 = torch.cat([starts_N, torch.tensor([batch])])
    consecutive = bool((sizes_N == width).all()) and torch.equal(order, torch.arange(batch))
    return Groups(index_NG, slot_B, sizes_N, order, offsets_N1, batch, width if consecutive else 0)


GroupsLike = int | Groups | Sequence[int] | Tensor
