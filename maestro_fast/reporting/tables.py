"""Tables of text and numbers, which look the same on the terminal, in Markdown and on the report page."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

Cell = str | int | float | None

# Text that starts as a number is aligned at the right, for example "0.70", "+0.043 ± 0.024", "< 1 %" or "1,234 s".
_NUMERIC = re.compile(r"[<>≤≥~≈±+\-\u2212]?\s?\d.{0,24}")
_GAP = "  "


@dataclass(frozen=True)
class Table:
    """A caption, the names of the columns, and rows with one cell for each column; None is shown as a dash.

    Raises:
        ValueError: The number of cells in a row differs from that in the header.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows, 1):
            if len(row) != len(self.header):
                raise ValueError(f"rows: row {number} has {len(row)} cells, expected {len(self.header)}")


def format_table(table: Table, width: int = 100) -> str:
    """Writes the table as lines of at most ``width`` characters.

    Words may be wrapped. Numbers are aligned at the right and never wrapped. If the columns do not fit side by side,
    the table continues below itself and repeats the first column.
    """
    cells = [list(table.header), *cell_texts(table)]
    right = numeric_columns(table)
    blocks = [
        _block([[row[c] for c in columns] for row in cells], [right[c] for c in columns], width)
        for columns in _column_blocks(cells, right, width)
    ]
    return "\n".join([*textwrap.wrap(table.caption, width), "\n\n".join(blocks)])


def markdown_table(table: Table) -> str:
    """Writes the table in Markdown, with its caption as a paragraph above it."""
    rows = [list(table.header), *cell_texts(table)]
    marks = ["---:" if right else "---" for right in numeric_columns(table)]
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (rows[0], marks, *rows[1:])]
    return "\n".join([table.caption, "", *(f"| {' | '.join(line)} |" for line in lines)])


def cell_texts(table: Table) -> list[list[str]]:
    """The rows as text. All floats of a column are written alike, with decimals that suit its largest number."""
    columns = [_column_texts([row[c] for row in table.rows]) for c in range(len(table.header))]
    return [list(row) for row in zip(*columns, strict=True)]


def numeric_columns(table: Table) -> list[bool]:
    """For each column, whether it holds only numbers, text that starts as a number, and dashes."""
    return [_is_numeric([row[c] for row in table.rows]) for c in range(len(table.header))]


def _is_numeric(cells: Sequence[Cell]) -> bool:
    present = [cell for cell in cells if cell is not None and cell != ""]
    return bool(present) and all(not isinstance(cell, str) or _NUMERIC.fullmatch(cell.strip()) for cell in present)


def _column_texts(cells: Sequence[Cell]) -> list[str]:
    sizes = [abs(cell) for cell in cells if isinstance(cell, float) and math.isfinite(cell)]
    before = math.floor(math.log10(max(sizes))) if sizes and max(sizes) > 0 else 0
    # The largest number has three significant digits, or two where it is below 0.01; below 0.0001 it has an exponent.
    decimals = min(max(2 - before, 0), 3) if before >= -2 else 1 - before
    return [_text(cell, decimals if before >= -4 else None) for cell in cells]


def _text(cell: Cell, decimals: int | None) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "-"
    if not isinstance(cell, float) or not math.isfinite(cell):
        return " ".join(str(cell).split())
    if decimals is None:
        return f"{cell:.1e}"
    least = 10.0**-decimals
    if 0 < abs(cell) < 0.5 * least:  # It is not 0, so it is not written as 0.
        return f"< {least:.{decimals}f}" if cell > 0 else f"> -{least:.{decimals}f}"
    return f"{cell:.{decimals}f}"


def _column_blocks(cells: list[list[str]], right: list[bool], width: int) -> list[list[int]]:
    """Divides the columns into as few blocks as the width allows. Each block begins with column 0."""
    floors = [_floor([row[c] for row in cells], numeric) for c, numeric in enumerate(right)]
    blocks = [[0]]
    for column in range(1, len(floors)):
        taken = sum(floors[c] + len(_GAP) for c in blocks[-1])
        if taken + floors[column] > width and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(column)
    return blocks


def _floor(column: list[str], numeric: bool) -> int:
    """The least width of a column. Its numbers must fit whole; words longer than 12 characters may be broken."""
    header, *body = column
    words = [word for text in (column if not numeric else [header]) for word in text.split()]
    return max([1, *(min(len(word), 12) for word in words), *(len(cell) for cell in body if numeric)])


def _block(cells: list[list[str]], right: list[bool], width: int) -> str:
    """Writes some columns side by side. While they are too wide, the column with the most spare width gets narrower."""
    floors = [_floor([row[c] for row in cells], numeric) for c, numeric in enumerate(right)]
    widths = [max(len(row[c]) for row in cells) for c in range(len(right))]
    while sum(widths) + len(_GAP) * (len(widths) - 1) > width:
        spare, column = max((widths[c] - floors[c], c) for c in range(len(widths)))
        if spare == 0:
            break
        widths[column] -= 1
    header, *rows = [_lines(row, widths, right) for row in cells]
    rule = _GAP.join("-" * w for w in widths)
    return "\n".join([*header, rule, *(line for row in rows for line in row)])


def _lines(row: list[str], widths: list[int], right: list[bool]) -> list[str]:
    """Writes one row as several lines, as many as its tallest cell needs."""
    wrapped = [textwrap.wrap(cell, w) or [""] for cell, w in zip(row, widths, strict=True)]
    height = max(len(cell) for cell in wrapped)
    return [
        _GAP.join(
            (cell[i] if i < len(cell) else "").rjust(w) if r else (cell[i] if i < len(cell) else "").ljust(w)
            for cell, w, r in zip(wrapped, widths, right, strict=True)
        ).rstrip()
        for i in range(height)
    ]
