"""Which column of a user's data holds the prompts, and which one the families, by the names that people use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maestro_fast.data.files import Row
from maestro_fast.settings import SettingsError, near

# A run takes the first two by itself. The others are what public data sets call them, the most telling first.
_KNOWN = ("prompt", "messages")
_PROMPTS = (
    "question",
    "problem",
    "instruction",
    "query",
    "input",
    "inputs",
    "user",
    "text",
    "content",
    "task",
    "prompts",
    "conversation",
    "conversations",
)
_FAMILIES = ("family", "category", "topic", "subject", "domain", "type", "task", "source", "data_source", "dataset")
_MOST_FAMILIES = 50
_LOOKED_AT = 1000  # rows


def prompt_column(rows: Sequence[Row], asked: str | None, data: str) -> str:
    """The column of the prompts: the one that was asked for, or "prompt", or "messages".

    Any other is not taken without being asked for, since an answer is a text as well.

    Raises:
        SettingsError: there is no such column. The message lists those that there are, and names the likely one.
    """
    columns = list(rows[0])
    listed = ", ".join(columns)
    if asked is not None:
        if asked not in columns:
            raise SettingsError(
                f"--prompt-column: no column {asked!r} in {data}, columns are {listed}{near(asked, columns)}"
            )
        return asked
    for name in _KNOWN:
        if name in columns:
            return name
    lower = {name.lower(): name for name in columns}
    likely = next((lower[name] for name in _PROMPTS if name in lower), None)
    if likely is None:
        texts = [name for name in columns if isinstance(rows[0][name], str | list)]
        likely = texts[0] if len(texts) == 1 else None
    advice = "name the one with the prompts" if likely is None else "name the one with the prompts, perhaps"
    raise SettingsError(
        f"--prompt-column: no column 'prompt' or 'messages' in {data}, columns are {listed}: {advice} "
        f"--prompt-column {likely or 'NAME'}"
    )


def family_column(rows: Sequence[Row], prompts: str) -> str | None:
    """A column that sorts the prompts into a few families; None if there is none, or if it is called "family"."""
    some = rows[:_LOOKED_AT]
    for name in _FAMILIES:
        if name == prompts or name not in some[0]:
            continue
        values = [row.get(name) for row in some]
        if all(isinstance(value, str) for value in values) and 1 < len(set(values)) <= min(
            _MOST_FAMILIES, len(some) // 2
        ):
            return None if name == "family" else name
    return None


def shown_columns(rows: Sequence[Row], prompts: str) -> dict[str, str]:
    """The other columns, each with its first value, shortened."""
    return {name: _short(value) for name, value in rows[0].items() if name != prompts}


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return f"{text[:40]}..." if len(text) > 43 else text
