from __future__ import annotations

import pytest

from maestro_fast.reporting.tables import Table, cell_texts, format_table, numeric_columns

RESULTS = Table(
    "Utility by method",
    ("method", "utility", "seeds", "difference", "note"),
    (
        ("equal", 0.5411, 10, None, "the default"),
        ("anchored Conductor", 0.6749, 10, "+0.134 ± 0.02", "25 % labels"),
    ),
)


def test_numbers_stand_at_the_right_and_words_at_the_left() -> None:
    assert format_table(RESULTS).splitlines() == [
        "Utility by method",
        "method              utility  seeds     difference  note",
        "------------------  -------  -----  -------------  -----------",
        "equal                 0.541     10              -  the default",
        "anchored Conductor    0.675     10  +0.134 ± 0.02  25 % labels",
    ]


def test_text_wraps_to_the_width_and_numbers_stay_whole() -> None:
    lines = format_table(RESULTS, 50).splitlines()
    assert max(map(len, lines)) <= 50
    assert any("0.675" in line and "+0.134 ± 0.02" in line for line in lines)
    assert "Conductor" in "\n".join(lines)


def test_a_table_of_many_numbers_continues_below_itself() -> None:
    names = tuple(f"reward number {k}" for k in range(16))
    wide = Table("Weights", ("family", *names), (("a story", *(k + 1234.5678 for k in range(16))),))
    text = format_table(wide, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("family") == 2 == text.count("a story")
    assert all(f"{k + 1234.5678:.0f}" in text for k in range(16))


def test_a_column_has_one_format_and_writes_nothing_small_as_zero() -> None:
    columns = {
        (12.3456, -1.0, 0.0): ["12.3", "-1.0", "0.0"],
        (1234.5, 2.0, float("nan")): ["1234", "2", "-"],
        (0.25, 1e-6, None): ["0.250", "< 0.001", "-"],
        (0.335, -4.3e-4, 5.1e-4): ["0.335", "> -0.001", "0.001"],
        (0.0071, 4.1e-4, 0.0): ["0.0071", "0.0004", "0.0000"],
        (2.5e-9, 0.0, -3e-7): ["2.5e-09", "0.0e+00", "-3.0e-07"],
    }
    table = Table("Losses", tuple("abcdef"), tuple(zip(*columns, strict=True)))
    assert cell_texts(table) == [list(row) for row in zip(*columns.values(), strict=True)]
    assert all(numeric_columns(table))


def test_columns_of_numbers_are_told_from_words() -> None:
    table = Table("t", ("a", "b", "c", "d"), ((1, "< 1 %", "one", None), (None, "-0.2", 2, "")))
    assert numeric_columns(table) == [True, True, False, False]


def test_rows_and_header_must_agree() -> None:
    with pytest.raises(ValueError, match="row 2 has 1 cells, expected 2"):
        Table("t", ("a", "b"), ((1, 2), (3,)))


def test_a_table_without_rows_is_its_header() -> None:
    assert format_table(Table("Nothing yet", ("method", "n"), ())).splitlines()[1].split() == ["method", "n"]
