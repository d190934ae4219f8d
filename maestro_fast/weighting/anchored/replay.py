"""What the anchored Conductor learns from: every labelled group, for good.

A context belongs to a prompt, and the frozen reference gives a prompt the same one for ever: equal contexts are kept
once. A labelled group takes 4 (G K + G + 1) bytes, each different context 4 d more; states of the trained policy
differ at every visit. Over a run of n labelled groups of P different prompts that is

    4 n (G K + G + 1) + 4 P d  bytes        G = 8, K = 6, d = 4096: 228 n + 16,384 P
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import torch
from torch import Tensor

_PREFIX = "replay."
_NAMES = ("contexts", "index", "rewards", "utilities")


class Replay:
    """Grows only. Its tensors are replaced, never written to: they can be handed out without a copy.

    Attributes:
        contexts: float32 [P, d], each once. index: int32 [n], the context of each group.
        rewards: float32 [n, G, K], standardised in their group. utilities: float32 [n, G], standardised.
    """

    def __init__(self, size: int, actions: int) -> None:
        self.contexts = torch.empty(0, size)
        self.index = torch.empty(0, dtype=torch.int32)
        self.rewards = torch.empty(0, 0, actions)
        self.utilities = torch.empty(0, 0)
        self._rows: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self.index)

    def add(self, contexts_Nd: Tensor, rewards_NGK: Tensor, utilities_NG: Tensor) -> None:
        """N groups, in their order."""
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
        first = self.utilities.numel() == 0  # the size of a group is known now
        self.rewards = rewards_NGK.clone() if first else torch.cat([self.rewards, rewards_NGK])
        self.utilities = utilities_NG.clone() if first else torch.cat([self.utilities, utilities_NG])

    def state_dict(self) -> dict[str, Tensor]:
        return {_PREFIX + name: getattr(self, name) for name in _NAMES} if len(self) else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what ``state_dict`` gave, checked by ``check``."""
        held = Replay(self.contexts.shape[1], self.rewards.shape[2])
        for name in _NAMES:
            setattr(self, name, state.get(_PREFIX + name, getattr(held, name)).clone())
        self._rows = {_key(row): i for i, row in enumerate(self.contexts)}

    def check(self, state: Mapping[str, Tensor]) -> None:
        """
        Raises:
            ValueError: a tensor that is missing, or does not fit the others or this Conductor.
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


def _key(row: Tensor) -> bytes:
    """Of its bits: -0 and 0 differ."""
    return blake2b(row.contiguous().numpy().tobytes(), digest_size=16).digest()
