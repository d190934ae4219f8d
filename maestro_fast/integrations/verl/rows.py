"""Which rows of a batch of verl are compared with each other.

A row is an output of a session, and its key is "{uid}_{session}_{output}": ``uid`` names the prompt, whose sessions are
a group. Of a session with several outputs the last one is compared, and all of them get its advantage, as verl has it
for ``grpo``. Rows that verl pads a batch with belong to nobody.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maestro_fast.ops import Groups
from maestro_fast.ops.groups import number_session_keys

PromptRank = tuple[int, float, str, str]


@dataclass(frozen=True)
class Rows:
    """The responses among the B rows of a batch.

    Attributes:
        final_R: int64 [R], the rows that are compared.
        groups: the partition of these R rows into groups, which may differ in size.
        session_B: int64 [B], the place in ``final_R`` of the row's session, -1 for padding; None if every row is
            compared and stands in its own place.
    """

    final_R: Tensor
    groups: Groups
    session_B: Tensor | None

    @staticmethod
    def of_uids(uids: Sequence[Hashable]) -> Rows:
        """Every row is a response, and those with the same uid are a group."""
        return Rows(torch.arange(len(uids)), Groups.of_keys(uids), None)

    @staticmethod
    def of_keys(keys: Sequence[str], padding: Sequence[bool], order: Sequence[PromptRank] | None = None) -> Rows:
        """The responses of a batch of the V1 trainer.

        Args:
            keys: the key of each row.
            padding: whether a row is padding.
            order: the rank of each row's prompt. Groups are then sorted by it and by uid, and each by session, so that
                the result does not depend on the order of the rows. Without it they stand as they first occur.

        Raises:
            ValueError: a key has another form.
        """
        found = number_session_keys(keys, padding)
        if order is None and found.sessions == len(keys):  # Every row is the only output of its session.
            return Rows(torch.arange(len(keys)), Groups.of_numbers(found.groups_B, found.groups), None)
        final_R = _last_outputs(found.sessions_B, found.outputs_B, found.sessions)
        groups_R = found.groups_B[final_R]
        if order is not None:
            final_R = final_R[torch.tensor(_sorted(keys, order, final_R.tolist()), dtype=torch.int64)]
            groups_R = _renumbered(found.groups_B[final_R])
        place_S = torch.empty(found.sessions, dtype=torch.int64)
        place_S[found.sessions_B[final_R]] = torch.arange(found.sessions)
        session_B = found.sessions_B.clone()
        session_B[session_B >= 0] = place_S[found.sessions_B[session_B >= 0]]
        return Rows(final_R, Groups.of_numbers(groups_R, found.groups), session_B)

    def take(self, x_B: Tensor) -> Tensor:
        """[B, ...] -> [R, ...], the values of the rows that are compared."""
        return x_B if self.session_B is None else x_B[self.final_R]

    def spread(self, x_R: Tensor) -> Tensor:
        """[R] -> [B], the value of each row's session; 0 for padding."""
        if self.session_B is None:
            return x_R
        if not x_R.numel():
            return x_R.new_zeros(self.session_B.shape)
        return torch.where(self.session_B >= 0, x_R[self.session_B.clamp(min=0)], 0.0)


def _last_outputs(sessions_B: Tensor, outputs_B: Tensor, sessions: int) -> Tensor:
    """int64 [R], the row of each session's last output, the sessions by their numbers."""
    last: list[int] = [-1] * sessions
    outputs = outputs_B.tolist()
    for row, session in enumerate(sessions_B.tolist()):
        if session >= 0 and (last[session] < 0 or outputs[last[session]] < outputs[row]):
            last[session] = row
    return torch.tensor(last, dtype=torch.int64)


def prompt_rank(index: object, source: str = "") -> PromptRank:
    """Where a prompt stands among others: by its number in the data, a number or not, and the name of its data."""
    if isinstance(index, int | float) and math.isfinite(index):
        return 0, index, "", source
    return 1, 0, str(index), source


def _sorted(keys: Sequence[str], order: Sequence[PromptRank], rows: Sequence[int]) -> list[int]:
    """The places of ``rows``, sorted by the rank of their prompt, then uid, then session, a number where it is one.

    A group has one rank, the least of its rows, so that it stands together whatever the data say.
    """
    parts = [keys[row].rsplit("_", 2)[:2] for row in rows]
    rank_of: dict[str, PromptRank] = {}
    for (uid, _), row in zip(parts, rows, strict=True):
        rank_of[uid] = min(order[row], rank_of.get(uid, order[row]))

    def rank(place: int) -> tuple[PromptRank, str, int, str]:
        uid, session = parts[place]
        return rank_of[uid], uid, int(session) if session.isdecimal() else -1, session

    return sorted(range(len(rows)), key=rank)


def _renumbered(groups_R: Tensor) -> Tensor:
    """Numbers for groups whose responses stand together, in their order."""
    changes = torch.ones_like(groups_R)
    changes[1:] = groups_R[1:] != groups_R[:-1]
    return changes.cumsum(0) - 1
