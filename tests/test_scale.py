"""What processes exchange in a step is what ``bench/scale.py`` says, to the byte."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from bench import scale
from bench.scale_processes import Shape, by_stage, expected, launch, trained


@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(prompts=6, group_size=3, rewards=5, width=48, updates=2, completion_bytes=300),
        Shape(prompts=4, group_size=4, context="reference", anchor=True),
        Shape(prompts=300, group_size=2, rewards=1, width=16, context="none", completion_bytes=7),
    ],
    ids=["conductor", "two updates", "anchored", "no context, many prompts"],
)
def test_a_step_gives_the_bytes_of_the_formula(tmp_path: Path, shape: Shape) -> None:
    (calls,), _ = trained(shape, 2, tmp_path)

    assert by_stage(calls) == by_stage(expected(shape, 1, calls))


@pytest.mark.long
def test_two_processes_give_the_bytes_of_the_formula(tmp_path: Path) -> None:
    """The program compares them in every batch, and fails where they differ."""
    found = launch(2, tmp_path)

    assert {row["stage"] for row in found["runs"]["large"]} >= {"_hidden_states", "step_record", "agreed", "_anywhere"}


@pytest.mark.parametrize(("count", "size", "shared_by"), [(1, 3, 1), (7, 300, 1), (40, 5, 8), (1500, 9, 2)])
def test_pickled_texts(count: int, size: int, shared_by: int) -> None:
    texts = [f"{i:09d}".rjust(size, "x")[-size:] for i in range(count)]
    pickled = pickle.dumps([text for text in texts for _ in range(shared_by)])

    assert scale.pickled_texts(scale.Texts([size] * count, shared_by)) == len(pickled)


def test_the_time_of_a_call() -> None:
    """Sixteen processes on two nodes make 14 hops within a node and one between them."""
    link = scale.Link(call=1.0, near=0.1, far=5.0, rate=10.0, unpickle=0.5, text_rate=4.0)

    assert link.seconds(16, 20) == pytest.approx(1 + 14 * 0.1 + 5 + 15 * 20 / 10)
    lengths, pickles = 1 + 14 * 0.1 + 5 + 15 * 8 / 10, 16 * (0.5 + 20 / 4)
    assert link.seconds(16, 20, objects=True) == pytest.approx(link.seconds(16, 20) + lengths + pickles)


def test_the_page_has_the_table_of_the_formulas() -> None:
    folder = Path(scale.__file__).parent
    assert scale.table() in (folder / "SCALE.md").read_text(encoding="utf-8")
    assert max(map(len, scale.table().splitlines())) <= 132
    measured = json.loads((folder / "results" / "scale_cpu.json").read_text(encoding="utf-8"))
    assert sorted(measured["processes"]) == ["1", "2", "4"]
