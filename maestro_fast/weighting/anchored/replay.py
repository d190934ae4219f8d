"""What is learnt from utilities: the labelled groups of the run, and the statistics of all contexts.

The frozen reference model gives a prompt the same context at every visit, so equal contexts are stored once. A labelled
group takes 4 (G K + G + 1) bytes, and each different context 4 d more. (Contexts of the trained policy differ at every
visit, and each is stored.) A run that holds n labelled groups of P different prompts holds

    4 n (G K + G + 1) + 4 P d  bytes        with G = 8, K = 6, d = 4096: 228 n + 16,384 P

At most ``capacity`` groups are held. Beyond that, group by group, the context that has the most groups loses its oldest
one; among several such contexts, the oldest of all their groups goes. So what is held covers as many prompts as it can,
each by its latest responses, and where all contexts differ it is the last ``capacity`` groups. A context without a
group goes, too. No draw is made, so all processes, and a run that is resumed, hold the same groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor

from maestro_fast.ops.group_advantages import group_advantages
from maestro_fast.weighting.conductor.experience import RunningStatistics, policy_contexts
from maestro_fast.weighting.policy import ContextKind, WeightContext, check_shapes
from maestro_fast.weighting.utilities import labelled_groups, standardised_utilities

VARIANCE_EPS = 4e-4  # It is added to the variance of the contexts, so that dimensions that hardly vary stay small.
CAPACITY = 4096  # The most groups that are held; with d = 4096 they take 65 MiB, and as much in every checkpoint.
CLIP = 4.0  # The bound of standardised contexts: a prompt unlike all others gets no extreme weights.

# The hidden state of the prompt that is read. "none" reads no state: what is learnt is the same for every prompt.
PromptContext = Literal["reference_prompt_mean", "prompt_mean", "prompt_last", "none"]

_PREFIX = "replay."
_NAMES = ("contexts", "index", "rewards", "utilities")


class Replay:
    """The last labelled groups. Tensors are replaced and never written to, so they are handed out without a copy.

    Attributes:
        capacity: the most groups that are held.
        contexts: float32 [P, d], the different contexts.
        index: int32 [n], the row of ``contexts`` for each group.
        rewards: float32 [n, G, K], standardised within their group, NaN where a reward abstained.
        utilities: float32 [n, G], standardised within their group.
    """

    def __init__(self, size: int, actions: int, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.contexts = torch.empty(0, size)
        self.index = torch.empty(0, dtype=torch.int32)
        self.rewards = torch.empty(0, 0, actions)
        self.utilities = torch.empty(0, 0)
        self._rows: dict[bytes, int] = {}  # the row of each context by the hash of its bytes, in the order of the rows

    def __len__(self) -> int:
        """n, the number of groups."""
        return len(self.index)

    def add(self, contexts_Nd: Tensor, rewards_NGK: Tensor, utilities_NG: Tensor) -> None:
        """Appends N groups, and drops as many as are too many.

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
        self._thin()

    def _thin(self) -> None:
        """Drops the groups beyond ``capacity`` and the contexts that have none any more."""
        if len(self) <= self.capacity:
            return
        kept = torch.ones(len(self), dtype=torch.bool)
        counts = self.index.bincount(minlength=len(self.contexts))
        for _ in range(len(self) - self.capacity):
            # Groups stand in the order in which they came, so the first one is the oldest.
            oldest = int((kept & (counts == counts.max())[self.index]).to(torch.uint8).argmax())
            kept[oldest] = False
            counts[self.index[oldest]] -= 1
        used = counts > 0
        self.contexts = self.contexts[used]
        self.index = (used.cumsum(0) - 1)[self.index[kept]].to(torch.int32)
        self.rewards, self.utilities = self.rewards[kept], self.utilities[kept]
        keys = [key for key, held in zip(self._rows, used.tolist(), strict=True) if held]
        self._rows = {key: row for row, key in enumerate(keys)}

    def state_dict(self) -> dict[str, Tensor]:
        """The four tensors under ``replay.``; nothing while there are no groups."""
        return {_PREFIX + name: getattr(self, name) for name in _NAMES} if len(self) else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a ``state_dict`` that ``check`` has accepted, as far as there is room for its groups."""
        empty = Replay(self.contexts.shape[1], self.rewards.shape[2])
        for name in _NAMES:
            setattr(self, name, state.get(_PREFIX + name, getattr(empty, name)).clone())
        self._rows = {_key(row): i for i, row in enumerate(self.contexts)}
        self._thin()

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


class Memory:
    """The labelled groups that are held, and the statistics of the contexts of all groups so far.

    Attributes:
        context_kind: the hidden state that is read; without a meaning where ``needs_context`` is False.
        needs_context: whether one is read at all.
        statistics: the running mean and variance of the contexts.
        replay: the labelled groups.
    """

    def __init__(self, kind: PromptContext, size: int, actions: int, capacity: int = CAPACITY) -> None:
        self.needs_context = kind != "none"
        self.context_kind: ContextKind = "response" if kind == "none" else kind
        size = size if self.needs_context else 0
        self.statistics = RunningStatistics(size)
        self.replay = Replay(size, actions, capacity)

    @property
    def size(self) -> int:
        """d, the width of the contexts; 0 for none."""
        return self.statistics.mean.numel()

    def contexts(self, context: WeightContext) -> Tensor:
        """float32 [N, d] on the CPU, one context per group."""
        if not self.needs_context:
            return torch.empty(len(context.rewards_BK) // context.group_size, 0)
        x_Bd = policy_contexts(context, self.context_kind, self.size, 0, torch.device("cpu"))
        return x_Bd[:: context.group_size]

    def standardised(self, x_Nd: Tensor) -> Tensor:
        """The contexts in standard deviations, clipped at +-4."""
        return standardised(x_Nd, *self.statistics.standardisation(VARIANCE_EPS))

    def observe(self, context: WeightContext) -> None:
        """Adds the contexts of the batch to the statistics, and its labelled groups to the replay.

        A group in which fewer than two responses have a reward is left out: it says nothing of what rewards are worth,
        and a regression that had seen no other group would give arbitrary scores.
        """
        x_Nd = self.contexts(context)
        self.statistics.update(x_Nd)
        rewards_NGK = normalised_rewards(context)
        chosen_N = labelled_groups(context) & ((~rewards_NGK.isnan().all(-1)).sum(1) > 1)
        utilities_NG = standardised_utilities(context).view(-1, context.group_size)
        self.replay.add(x_Nd[chosen_N], rewards_NGK[chosen_N], utilities_NG[chosen_N])

    def state_dict(self) -> dict[str, Tensor]:
        """The statistics under ``statistics.`` and the replay under ``replay.``."""
        return self.statistics.state_dict("statistics.") | self.replay.state_dict()

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Checks a saved state before it is loaded. A ValueError names a tensor that is missing or does not fit."""
        check_shapes(state, self.statistics.saved_shapes("statistics."))
        self.replay.check(state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a ``state_dict`` that ``check`` has accepted."""
        self.statistics.load_state_dict(state, "statistics.")
        self.replay.load_state_dict(state)


def standardised(x_Nd: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """(x - mean) * rstd, clipped at +-4."""
    return ((x_Nd - mean) * rstd).clamp(-CLIP, CLIP)


def normalised_rewards(context: WeightContext) -> Tensor:
    """r' [N, G, K] on the CPU in float32: the rewards standardised within their group, NaN where one abstained."""
    rewards_BK = group_advantages(context.rewards_BK, None, context.group_size).normalized_rewards
    rewards_BK = torch.where(context.rewards_BK.isnan(), float("nan"), rewards_BK)
    return rewards_BK.float().cpu().view(-1, context.group_size, rewards_BK.shape[1])


def _widened(x_NG: Tensor, width: int, fill: float) -> Tensor:
    """[N, G, ...] -> [N, width, ...]."""
    padding = x_NG.new_full((x_NG.shape[0], width - x_NG.shape[1], *x_NG.shape[2:]), fill)
    return torch.cat([x_NG, padding], 1)


def _key(row: Tensor) -> bytes:
    """A hash of the row's bytes. Rows that differ in the sign of a zero alone count as different."""
    return blake2b(row.contiguous().numpy().tobytes(), digest_size=16).digest()
