"""What the anchored Conductor learns from: every labelled group of the run, kept for good.

The frozen reference model gives a prompt the same context at every visit, so equal contexts are stored once. A labelled
group takes 4 (G K + G + 1) bytes, and each different context 4 d more. (Contexts of the trained policy differ at every
visit, and each is stored.) A run with n labelled groups of P different prompts holds

    4 n (G K + G + 1) + 4 P d  bytes        with G = 8, K = 6, d = 4096: 228 n + 16,384 P
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import torch
from torch import Tensor

_PREFIX = "replay."
_NAMES = ("contexts", "index", "rewards", "utilities")


class Replay:
    """All labelled groups so far. Tensors are replaced and never written to, so they are handed out without a copy.

    Attributes:
        contexts: float32 [P, d], the different contexts.
        index: int32 [n], the row of ``contexts`` for each group.
        rewards: float32 [n, G, K], standardised within their group, NaN where a reward abstained.
        utilities: float32 [n, G], standardised within their group.
    """

    def __init__(self, size: int, actions: int) -> None:
        self.contexts = torch.empty(0, size)
        self.index = torch.empty(0, dtype=torch.int32)
        self.rewards = torch.empty(0, 0, actions)
        self.utilities = torch.empty(0, 0)
        self._rows: dict[bytes, int] = {}  # the row of each context, by the hash of its bytes

    def __len__(self) -> int:
        """n, the number of groups."""
        return len(self.index)

    def add(self, contexts_Nd: Tensor, rewards_NGK: Tensor, utilities_NG: Tensor) -> None:
        """Appends N groups.

        Where their size differs from that of earlier groups, the smaller ones are filled up with responses from which
        every reward abstains.
        """
        if not len(contexts_Nd):
            return
        index, new = [], []
        for row in contexts_Nd:
            key = _key(row)
            if key not in self._rows:
                self._rows[key] = len(self._rows)
                new.append(row)
            index.append(self._rows[key])
        if new:
            self.contexts = torch.cat([self.contexts, torch.stack(new)])
        self.index = torch.cat([self.index, torch.tensor(index, dtype=torch.int32)])
        width = max(self.utilities.shape[1], utilities_NG.shape[1])
        self.rewards = torch.cat([_widened(x, width, float("nan")) for x in (self.rewards, rewards_NGK)])
        self.utilities = torch.cat([_widened(x, width, 0.0) for x in (self.utilities, utilities_NG)])

    def state_dict(self) -> dict[str, Tensor]:
        """The four tensors under ``replay.``; nothing while there are no groups."""
        return {_PREFIX + name: getattr(self, name) for name in _NAMES} if len(self) else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a ``state_dict`` that ``check`` has accepted."""
        empty = Replay(self.contexts.shape[1], self.rewards.shape[2])
        for name in _NAMES:
            setattr(self, name, state.get(_PREFIX + name, getattr(empty, name)).clone())
        self._rows = {_key(row): i for i, row in enumerate(self.contexts)}

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Checks a saved state before it is loaded.

        Raises:
            ValueError: A tensor is missing, or does not fit the others or this Conductor.
        """
        found = {name: state[_PREFIX + name] for name in _NAMES if _PREFIX + name in state}
        if not found:
            return
        for name in _NAMES:
            if name not in found:
                raise ValueError(f"state.{_PREFIX}{name}: missing, beside {_PREFIX}{next(iter(found))}")
        groups, known = len(found["index"]), len(found["contexts"])
        expected: dict[str, tuple[int, ...]] = {
            "contexts": (known, self.contexts.shape[1]),
            "rewards": (groups, found["utilities"].shape[-1], self.rewards.shape[2]),
            "utilities": (groups, found["utilities"].shape[-1]),
        }
        for name, shape in expected.items():
            if found[name].shape != shape:
                raise ValueError(f"state.{_PREFIX}{name}: shape {tuple(found[name].shape)}, expected {shape}")
        if groups and not 0 <= int(found["index"].min()) <= int(found["index"].max()) < known:
            raise ValueError(f"state.{_PREFIX}index: points beyond the {known} contexts")


def _widened(x_NG: Tensor, width: int, fill: float) -> Tensor:
    """[N, G, ...] -> [N, width, ...]."""
    padding = x_NG.new_full((x_NG.shape[0], width - x_NG.shape[1], *x_NG.shape[2:]), fill)
    return torch.cat([x_NG, padding], 1)


def _key(row: Tensor) -> bytes:
    """A hash of the row's bytes. Rows that differ in the sign of a zero alone count as different."""
    return blake2b(row.contiguous().numpy().tobytes(), digest_size=16).digest()
