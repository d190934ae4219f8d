"""What a benchmark prints: one table per op, a line for each case as it is done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_begun: list[str] = []  # the tables of this session, the one that is being written last


def emit(capsys: Any, title: str, lines: Iterable[str], header: Iterable[str] = ()) -> None:
    """Prints lines, under their title and header unless those of the same table came last."""
    with capsys.disabled():
        if _begun[-1:] != [title]:
            _begun.append(title)
            print("\n\n" + "\n".join([title, *header]), end="")
        for line in lines:
            print("\n  " + line, end="")
        print(flush=True, end="")
