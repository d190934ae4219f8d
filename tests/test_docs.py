"""The tables in the READMEs are those that the code gives, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs import PLACE, ROOT, filled, pages

NOT_OURS = (".", "build")  # how the names of folders begin that hold environments and what is built
PAGES = [path for path in ROOT.rglob("*.md") if not path.relative_to(ROOT).parts[0].startswith(NOT_OURS)]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_generated_tables_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")

    assert text == filled(text), "run: python -m tests.docs"


def test_a_stale_table_is_found() -> None:
    stale = "<!-- generated: profiles -->\n| old |\n<!-- end -->\n"

    assert PLACE.search(stale)
    assert "`maestro`" in filled(stale) and "old" not in filled(stale)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
