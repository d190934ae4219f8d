"""Which response belongs to which prompt. The host makes this partition, and devices get it when they need it.

A partition into groups of one size follows from the size alone. So ``Groups.of(8, 4096)`` is remembered, and a device
computes its own copy instead of waiting for the host's. Ids belong to one batch, so their partition is made for each
batch, and the tensors that a device needs are copied through pinned memory, once for each ``Groups``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maestro_fast.ops import cpp
from maestro_fast.ops.tensors import readable

# How many partitions are remembered, by (group size, batch, device, stream). Each holds one index for every response.
_REMEMBERED = 64
_MOST = 2**62  # responses of a group, which int64 counts
_CPU = torch.device("cpu")
_FAKE = torch._C._TorchDispatchModeKey.FAKE


@dataclass(frozen=True)
class Groups:
    """The partition of B responses into N groups, one group per prompt.

    Attributes:
        index_NG: int64 [N, G_max], the responses of each group in ascending order, padded with B.
        batch: B.
        size: G if the groups are consecutive and each has G responses, else 0.

    Its tensors are shared between calls and must not be written to. The Triton kernels read ``index_NG`` alone, so the
    other tensors, which are properties, are copied to a device when they are first needed there.

    All reductions over a group run over the padded [N, G_max] layout, by a gather and a masked reduction. They are
    deterministic on every device; a scatter with floating-point atomics would not be.
    """

    index_NG: Tensor
    batch: int
    size: int
    _others: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    _host: Groups | None = field(default=None, repr=False, compare=False)
    _on_device: dict[tuple[torch.device, int], Groups] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(groups: GroupsLike, batch: int) -> Groups:
        """Builds the partition from a group size or from ids in any order. A ``Groups`` is returned unchanged.

        Args:
            groups: G (the batch is then B / G consecutive groups of G), a [B] list or CPU tensor of integer ids, or
                a ``Groups``.
            batch: B, the number of responses.

        Raises:
            TypeError: the ids have a wrong type or are on a device, where reading them would make the host wait.
            ValueError: G does not divide B, or there are not B ids.
        """
        if isinstance(groups, Groups):
            if groups.batch != batch:
                raise ValueError(f"groups: holds {groups.batch} responses, expected {batch}")
            return groups
        if isinstance(groups, bool):
            raise TypeError("groups: got a bool, expected an int, a [B] sequence of ids or Groups")
        if isinstance(groups, int):
            if groups < 1:
                raise ValueError(f"groups: a group size of {groups}, expected at least 1")
            if groups > _MOST:
                raise ValueError(f"groups: a group size of {groups}, expected at most {_MOST}")
            if batch % groups:
                raise ValueError(f"groups: {batch} responses do not divide into groups of {groups}")
            return _computed(groups, batch, _CPU) if _recorded() else _remembered(groups, batch, _CPU, 0)
        return _ragged_groups(_checked_ids(groups, batch), batch)

    @staticmethod
    def of_keys(keys: Sequence[Hashable]) -> Groups:
        """Builds the partition from one key for each response, such as the uid of its prompt, in any order.

        Groups stand in the order in which their keys occur first. Strings are numbered by C++ where it is built.
        """
        ids, count = number_keys(keys)
        return Groups.of_numbers(ids, count)

    @staticmethod
    def of_numbers(ids: Tensor, count: int) -> Groups:
        """Builds the partition from int64 ids [B] on the CPU, all of 0 to count - 1, for those who made them so."""
        return _grouped(ids, count) if cpp.why_not_built() is None else _ragged_groups(ids, ids.numel())

    def to(self, device: torch.device) -> Groups:
        """The same partition for ops on ``device``, without waiting for the device.

        Groups of one size are computed there, others are copied there once. This object remembers the result. Call this
        before a CUDA graph is captured or a function compiled that uses the partition: otherwise every replay computes
        groups of one size again, in one launch more, and groups from ids cannot be used.

        Raises:
            RuntimeError: a CUDA graph is being captured, and a partition from ids has not been copied before.
        """
        if self.index_NG.device == device:
            return self
        kind = device.type
        if kind == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        host = self if self._host is None else self._host
        if _recorded():
            for (where, _), known in host._on_device.items():
                if where == device:
                    return known
            return _computed(self.size, self.batch, device) if self.size else host._carried(device)
        # A stream may not read a copy that another stream may not have finished, so each stream has a copy of its own.
        # It lives as long as this object, because a CUDA graph that was captured with it reads it at every replay.
        stream = 0 if kind in ("cpu", "meta") else torch.accelerator.current_stream(device).stream_id
        found = host._on_device.get((device, stream))
        if found is None:
            found = _remembered(self.size, self.batch, device, stream) if self.size else host._carried(device)
            host._on_device[device, stream] = found
        return found

    def _carried(self, device: torch.device) -> Groups:
        """A copy, on a device, of a partition that was made from ids."""
        return Groups(_copied(self.index_NG, device), self.batch, 0, _host=self)

    @property
    def slot_B(self) -> Tensor:
        """int64 [B], the place of each response in ``index_NG.flatten()``."""
        return self._other("slot_B")

    @property
    def order_B(self) -> Tensor:
        """int64 [B], the indices of the responses, group by group."""
        return self._other("order_B")

    @property
    def offsets_N1(self) -> Tensor:
        """int64 [N + 1], where each group begins in ``order_B``; the last element is B."""
        return self._other("offsets_N1")

    def _other(self, name: str) -> Tensor:
        if name in self._others:
            return self._others[name]
        if self.size:
            found = _of_consecutive(name, self.index_NG, self.size)
        else:
            assert self._host is not None  # a partition that was made from ids has every tensor on the host
            found = _copied(self._host._others[name], self.index_NG.device)
        if not _recorded():
            self._others[name] = found
        return found

    def gather(self, x: Tensor, fill: float | bool) -> Tensor:
        """[B, ...] -> [N, G_max, ...], with ``fill`` in the padding."""
        padding = x.new_full((1, *x.shape[1:]), fill)
        return torch.cat([x, padding])[self.index_NG]

    def scatter(self, x_NG: Tensor) -> Tensor:
        """[N, G_max, ...] -> [B, ...], the inverse of ``gather``."""
        return x_NG.flatten(0, 1)[self.slot_B]


def _recorded() -> bool:
    """Whether torch.compile, fake tensors or a CUDA graph record the operations, so that nothing may be remembered.

    Traced tensors hold no values. A captured graph computes its tensors only when it is replayed, and the tensors that
    it reads have to live as long as the graph, which a bounded cache cannot promise.
    """
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_FAKE) is not None or _captured()


def _captured() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=_REMEMBERED)
def _remembered(size: int, batch: int, device: torch.device, stream: int) -> Groups:
    return _computed(size, batch, device)


def _computed(size: int, batch: int, device: torch.device) -> Groups:
    with _lasting():
        return Groups(torch.arange(batch, device=device).view(-1, size), batch, size)


def _of_consecutive(name: str, index_NG: Tensor, size: int) -> Tensor:
    """The tensor that the property ``name`` returns for consecutive groups of one size."""
    with _lasting():
        if name == "offsets_N1":
            return torch.arange(index_NG.shape[0] + 1, device=index_NG.device) * size
        return index_NG.view(-1)


def _copied(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``. To a CUDA device it goes through pinned memory, so that the host does not wait."""
    with _lasting():
        if device.type != "cuda" or not readable(x):
            return x.to(device)
        if _captured():
            raise RuntimeError(f"groups: not on {device}, expected groups.to(device) before a CUDA graph is captured")
        return x.pin_memory().to(device, non_blocking=True)


def _lasting() -> AbstractContextManager[None]:
    """A context that leaves inference mode, because a backward pass could not use an index that was made in it."""
    return nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


def _checked_ids(groups: Sequence[int] | Tensor, batch: int) -> Tensor:
    """The ids as an int64 [B] tensor on the CPU."""
    if isinstance(groups, Tensor):
        if groups.device.type != "cpu":
            raise TypeError(
                f"groups: ids on {groups.device}, expected a CPU tensor or list (reading them would stall the device)"
            )
        if groups.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"groups: ids of dtype {groups.dtype}, expected int64 or int32")
        ids = groups.long()
    elif _is_sequence(groups) and all(type(i) is int for i in groups):
        ids = torch.tensor(groups, dtype=torch.int64, device=_CPU)
    else:
        raise TypeError(f"groups: got {type(groups).__name__}, expected an int, a [B] sequence of int ids or Groups")
    if ids.shape != (batch,):
        raise ValueError(f"groups: ids of shape {tuple(ids.shape)}, expected ({batch},)")
    return ids


def _is_sequence(groups: Any) -> bool:
    return isinstance(groups, Sequence) and not isinstance(groups, (str, bytes, bytearray))


def _ragged_groups(ids: Tensor, batch: int) -> Groups:
    """The partition that follows from ids [B] in any order."""
    _, compact_B, sizes_N = torch.unique(ids, return_inverse=True, return_counts=True)
    position_B = torch.arange(batch, device=_CPU)
    order = torch.argsort(compact_B, stable=True)
    starts_N = torch.cumsum(sizes_N, 0) - sizes_N
    rank_B = torch.empty_like(order)
    rank_B[order] = position_B - starts_N[compact_B[order]]  # the place of each response within its group
    width = int(sizes_N.max()) if batch else 0
    slot_B = compact_B * width + rank_B
    index = torch.full((sizes_N.numel() * width,), batch, dtype=torch.int64, device=_CPU)
    index[slot_B] = position_B
    index_NG = index.view(-1, width) if batch else index.view(0, 0)
    offsets_N1 = torch.cat([starts_N, torch.tensor([batch], device=_CPU)])
    consecutive = bool((sizes_N == width).all()) and torch.equal(order, position_B)
    others = {"slot_B": slot_B, "order_B": order, "offsets_N1": offsets_N1}
    return Groups(index_NG, batch, width if consecutive else 0, others)


def _grouped(ids: Tensor, count: int) -> Groups:
    """What ``_ragged_groups`` returns for ids that are 0 to count - 1, sorted by C++ instead of PyTorch."""
    batch = ids.numel()
    order, offsets_N1 = torch.empty(batch, dtype=torch.int64), torch.empty(count + 1, dtype=torch.int64)
    width = cpp._C.order_by_group(ids.data_ptr(), batch, count, order.data_ptr(), offsets_N1.data_ptr())
    position_B = torch.arange(batch, device=_CPU)
    if batch and batch == count * width:  # All groups have one size.
        if torch.equal(order, position_B):
            return Groups(order.view(count, width), batch, width, {})
        slots, index = position_B, order
    else:
        starts_N = torch.arange(count, device=_CPU) * width - offsets_N1[:-1]
        slots = position_B + starts_N.repeat_interleave(offsets_N1.diff())
        index = torch.full((count * width,), batch, dtype=torch.int64, device=_CPU)
        index[slots] = order
    slot_B = torch.empty_like(order)
    slot_B[order] = slots
    others = {"slot_B": slot_B, "order_B": order, "offsets_N1": offsets_N1}
    return Groups(index.view(-1, width) if batch else index.view(0, 0), batch, 0, others)


# --- keys ---


class SessionNumbers(NamedTuple):
    """What keys "{group}_{session}_{output}" say about B rows.

    Attributes:
        groups_B: int64 [B], the number of the group, 0 to ``groups`` - 1 by first occurrence; -1 for rows left out.
        sessions_B: int64 [B], likewise the number of the session.
        outputs_B: int64 [B], the number of the output in its session.
        groups, sessions: how many there are.
    """

    groups_B: Tensor
    sessions_B: Tensor
    outputs_B: Tensor
    groups: int
    sessions: int


def number_keys(keys: Sequence[Hashable]) -> tuple[Tensor, int]:
    """Numbers keys by their first occurrence, equal keys alike.

    Returns:
        int64 [B], and how many different keys there are.
    """
    listed: list[Any] = list(keys)
    if cpp.why_not_built() is None:
        ids = torch.empty(len(listed), dtype=torch.int64)
        count = cpp._C.number_keys(listed, ids.data_ptr())
        if count >= 0:
            return ids, count
    known: dict[Hashable, int] = {}
    return torch.tensor([known.setdefault(key, len(known)) for key in listed], dtype=torch.int64), len(known)


def number_session_keys(keys: Sequence[str], left_out: Sequence[bool]) -> SessionNumbers:
    """Reads keys "{group}_{session}_{output}", such as verl gives its rows; a group's name may hold underscores.

    Args:
        keys: B keys.
        left_out: B flags, true for rows that are in no group.

    Raises:
        ValueError: a key has another form, or there is not one flag for each key.
    """
    if len(left_out) != len(keys):
        raise ValueError(f"left_out: {len(left_out)} flags, expected {len(keys)}, one for each key")
    if cpp.why_not_built() is not None:
        return _read_session_keys(keys, left_out)
    out = torch.empty(3, len(keys), dtype=torch.int64)
    skip = torch.frombuffer(bytearray(map(bool, left_out)), dtype=torch.bool) if any(left_out) else None
    found = cpp._C.number_session_keys(list(keys), cpp.address(skip), *(row.data_ptr() for row in out))
    return SessionNumbers(out[0], out[1], out[2], *found)


def _read_session_keys(keys: Sequence[str], left_out: Sequence[bool]) -> SessionNumbers:
    """The reference of ``number_session_keys``."""
    groups: dict[str, int] = {}
    sessions: dict[str, int] = {}
    rows = []
    for key, skipped in zip(keys, left_out, strict=True):
        parts = key.rsplit("_", 2)
        if len(parts) != 3 or not (parts[2].isascii() and parts[2].isdecimal()):
            raise ValueError(f"keys: {key!r}, expected uid_session_output")
        group, session = parts[0], f"{parts[0]}_{parts[1]}"
        number = (
            (-1, -1)
            if skipped
            else (groups.setdefault(group, len(groups)), sessions.setdefault(session, len(sessions)))
        )
        rows.append((*number, int(parts[2])))
    table = torch.tensor(rows, dtype=torch.int64).view(-1, 3).T.contiguous()
    return SessionNumbers(table[0], table[1], table[2], len(groups), len(sessions))


GroupsLike = int | Groups | Sequence[int] | Tensor
