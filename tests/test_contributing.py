"""The table "to add X, touch Y" in CONTRIBUTING.md tells the truth: the example of each row stands in no other file."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (an? .+?) \| (.+?) \| `(\w+)` \|$", TEXT, flags=re.MULTILINE)
MOST = {"a reward": 2, "a weight policy": 2, "an advantage profile": 1, "a loss variant": 2}  # files besides the test
FOLDERS = (
    "maestro_fast/specs",
    "maestro_fast/ops",
    "kernels",
    "maestro_fast/rewards",
    "maestro_fast/weighting",
    "maestro_fast/training",
)


def is_in_code(path: Path, word: str) -> bool:
    """Whether ``word`` is a name or a whole string in the code of a file. Comments and docstrings do not count."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return any(
        token.string == word if token.type == tokenize.NAME else token.string.strip("\"'") == word
        for token in tokens
        if token.type in (tokenize.NAME, tokenize.STRING)
    )


def files_with(word: str) -> set[str]:
    """The files of the package that a new variant of the same kind would touch. Re-exports do not count."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"]
    return {str(path.relative_to(ROOT)) for path in paths if is_in_code(path, word)}


def test_the_table_has_every_row() -> None:
    assert [kind for kind, _, _ in ROWS] == list(MOST)


@pytest.mark.parametrize(("kind", "files", "example"), ROWS, ids=[kind for kind, _, _ in ROWS])
def test_the_files_of_a_row_are_those_of_its_example(kind: str, files: str, example: str) -> None:
    code, tests = (re.findall(r"`([\w/]+\.py)`", part) for part in files.split(";"))

    assert files_with(example) == set(code)
    assert len(code) <= MOST[kind]
    (test,) = tests
    assert example.removesuffix("Config").lower() in (ROOT / test).read_text(encoding="utf-8").lower()
