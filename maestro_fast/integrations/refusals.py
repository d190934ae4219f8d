"""What a refusal is: a setting of somebody else's trainer with which some part of maestro_fast does not work.

Each integration has a table of them. A run is checked against it before it starts, and the documentation prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

Applies: TypeAlias = Callable[[Any, Any], bool | str | None]


@dataclass(frozen=True)
class Refusal:
    """A setting that is refused.

    Attributes:
        setting: what the user has set, by its name in their trainer.
        where: the part of maestro_fast that does not work with the setting.
        reason: why it does not, and what to do about it where that is not plain.
        applies: whether a run has the setting; a string says what it is in this run. What describes the run is up to
            the integration: TRL's trainer and the weight policy, or verl's config and the settings made of it.
    """

    setting: str
    where: str
    reason: str
    applies: Applies

    def message(self, found: bool | str) -> str:
        """The refusal in words, for a run to which it applies.

        Args:
            found: what ``applies`` returned.
        """
        what = f"{self.setting} ({found})" if isinstance(found, str) else self.setting
        return f"{what}: not with {self.where}: {self.reason}"


def as_table(refusals: Iterable[Refusal]) -> str:
    """The refusals as a table in Markdown."""
    rows = (f"| {row.setting} | {row.where} | {row.reason} |" for row in refusals)
    return "\n".join(["| setting | not with | because |", "|---|---|---|", *rows])
