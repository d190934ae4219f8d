"""The seven benchmarks on small files of the same columns: what is asked, right, refused and held out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from maestro_fast.data import DataConfig, load_prompts
from maestro_fast.evals.benchmarks import BENCHMARKS, as_rows, emobench, load, opus_books, tombench, write_rows
from maestro_fast.evals.benchmarks.benchmark import Part
from maestro_fast.records import RewardBatch, content_text
from maestro_fast.rewards import FormatReward

DATA = Path(__file__).parent / "data"
# The number of rows that can be used, of those in the file, with the train and the held-out part together.
USED = {
    "natural_reasoning": 4,
    "ss_gen": 3,
    "web_instruct": 3,
    "tombench": 4,
    "general_thoughts": 2,
    "opus_books": 4,
    "emobench": 3,
}


def both_parts(name: str, **options: Any) -> list[dict[str, Any]]:
    """All rows that can be used. Of data sets with one split they stand in two parts, which may be empty here."""
    benchmark = BENCHMARKS[name](**options)
    if benchmark.splits["train"] != benchmark.splits["held_out"]:
        return load(benchmark, DATA / f"{name}.jsonl")
    found = []
    for part in ("train", "held_out"):
        try:
            found += load(benchmark, DATA / f"{name}.jsonl", part=part)
        except ValueError as error:
            assert "has no row that can be used" in str(error)
    return found


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_row_becomes_a_prompt_with_a_right_answer(name: str) -> None:
    benchmark, rows = BENCHMARKS[name](), both_parts(name)
    assert benchmark.name == name and len(rows) == USED[name]
    for row in rows:
        prompt, reference = benchmark.prompt(row), benchmark.reference(row)
        assert prompt[-1]["role"] == "user" and reference == reference.strip() != ""
        if benchmark.scorer.__class__.__name__ == "JudgeScorer":
            continue
        reply = f"<think>Hm.</think><answer>{reference}</answer>"
        assert benchmark.scorer.score([prompt], [reply], [row]) == pytest.approx([1.0])
        assert benchmark.scorer.score([prompt], ["I do not know."], [row])[0] < 0.1


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_column_is_named_with_those_that_are_there(name: str, tmp_path: Path) -> None:
    benchmark = BENCHMARKS[name]()
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    column = benchmark.columns[0][-1]
    rows[0].pop(column)
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    with pytest.raises(ValueError) as error:
        load(benchmark, tmp_path / "data.jsonl")
    message = str(error.value)
    assert message.startswith(f"{name}: no column {column!r} in row 0, columns are {next(iter(rows[0]))!r}")
    assert benchmark.home in message


def test_what_is_asked() -> None:
    """Options stand behind letters, in another order than in the file somewhere, and languages are kept apart."""
    english, chinese = both_parts("tombench"), both_parts("tombench", language="zh")
    for rows, benchmark, story in ((english, tombench(), "STORY"), (chinese, tombench("zh"), "故事")):
        text = [content_text(benchmark.prompt(row)[0]) for row in rows]
        assert all(row[story] in one for row, one in zip(rows, text, strict=True))
        assert all("A. A." not in one and "B. A." not in one for one in text), "the file's own letters are taken away"
    assert {tombench().reference(row)[3:] for row in english} == {
        "The basket",
        "The drawer",
        "Disappointment",
        "Lili",
    }
    assert {tombench("zh").reference(row)[3:] for row in chinese} == {"篮子", "抽屉", "失望", "丽丽"}
    assert any(tombench().reference(row)[0] != row["答案\nANSWER"][0] for row in english)
    assert [emobench("zh").reference(row)[3:] for row in both_parts("emobench", language="zh")] == [
        "倾听，并提出陪她练习"  # noqa: RUF001
    ]
    (with_history,) = [row for row in both_parts("general_thoughts") if row["prev_messages"]]
    roles = [message["role"] for message in BENCHMARKS["general_thoughts"]().prompt(with_history)]
    assert roles == ["user", "assistant", "user"]


def test_both_questions_of_emobench_have_to_be_right() -> None:
    benchmark = emobench()
    row = next(row for row in both_parts("emobench") if "cause_label" in row)
    emotion, cause = benchmark.reference(row).split(", Cause: ")
    wrong = next(letter for letter in "ABCD" if letter != cause[0])
    for reply, score in ((f"{emotion}, Cause: {cause}", 1.0), (f"{emotion}, Cause: {wrong}", 0.0), (emotion, 0.0)):
        assert benchmark.scorer.score([benchmark.prompt(row)], [reply], [row]) == [score]
    assert benchmark.scorer.figures([emotion, f"{emotion}, Cause: {wrong}"], [row, row]) == {"chose": 0.5}


def test_the_form_that_is_asked_for_is_that_of_the_format_reward() -> None:
    (message,) = BENCHMARKS["ss_gen"]().prompt(both_parts("ss_gen")[0])
    assert "<think>" in message["content"] and "<answer>" in message["content"]
    assert FormatReward()(RewardBatch(["?"], ["<think>a</think><answer>b</answer>"], [[1]])) == [1.0]


def test_translations_both_ways() -> None:
    rows = both_parts("opus_books")
    assert opus_books("fr", "en").configs == opus_books("en", "fr").configs == ("en-fr",)
    assert opus_books("fr", "en").reference(rows[0]) == rows[0]["translation"]["en"]
    assert "from French into English" in content_text(opus_books("fr", "en").prompt(rows[0])[0])
    with pytest.raises(ValueError, match=r"opus_books: row 0: .*'translation' has no 'de', it has en, fr"):
        load(opus_books("en", "de"), DATA / "opus_books.jsonl", part="train")
    with pytest.raises(ValueError, match=r"^target: 'xx', expected one of ca, de"):
        opus_books("en", "xx")


def test_parts_do_not_overlap_and_hold_a_story_together(tmp_path: Path) -> None:
    """400 questions on 200 stories: a fifth is held out, whatever the order of the file."""
    row = json.loads((DATA / "tombench.jsonl").read_text(encoding="utf-8").splitlines()[0])
    rows = [row | {"STORY": f"story {i // 2}", "QUESTION": f"question {i}"} for i in range(400)]
    found: dict[str, dict[Part, set[str]]] = {}
    for order, file in ((rows, "a"), (rows[::-1], "b")):
        (tmp_path / file).mkdir()
        (tmp_path / file / "one.jsonl").write_text("\n".join(map(json.dumps, order[:133])), encoding="utf-8")
        (tmp_path / file / "two.jsonl").write_text("\n".join(map(json.dumps, order[133:])), encoding="utf-8")
        found[file] = {
            part: {one["QUESTION"] for one in load(tombench(), tmp_path / file, part=part)}
            for part in ("train", "held_out")
        }
    assert found["a"] == found["b"]
    train, held_out = found["a"]["train"], found["a"]["held_out"]
    assert not train & held_out and len(train | held_out) == 400
    assert 45 < len(held_out) < 115
    assert all(f"question {int(name.split()[1]) ^ 1}" in held_out for name in held_out), "stories are not torn apart"
    assert len(load(tombench(), tmp_path / "a", part="train", limit=7)) == 7


def test_a_part_with_a_split_of_its_own_is_the_whole_file() -> None:
    for part in ("train", "held_out"):
        assert len(load(BENCHMARKS["web_instruct"](), DATA / "web_instruct.jsonl", part=part)) == 3


def test_what_is_written_is_what_a_run_reads(tmp_path: Path) -> None:
    benchmark, rows = BENCHMARKS["web_instruct"](), both_parts("web_instruct")
    section = write_rows(benchmark, rows, tmp_path / "train.jsonl")
    prompts = load_prompts(DataConfig(**section))

    assert [row["prompt"] for row in prompts.rows] == [benchmark.prompt(row) for row in rows]
    assert [row["reference"] for row in prompts.rows] == ["60 km/h", "x^2 + 4x + 4", "8"]
    assert {*prompts.families} == {"web_instruct"} and prompts.rows == as_rows(benchmark, rows)


def test_the_hub_is_asked_for_the_right_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every config is read, from the split of the part, row by row."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, Any]]:
        asked.append((name, config, split, streaming))
        file = {"TIGER-Lab/WebInstruct-verified": "web_instruct", "SahandSab/EmoBench": "emobench"}[name]
        return [json.loads(line) for line in (DATA / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()]

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)

    assert len(load(BENCHMARKS["web_instruct"](), part="held_out")) == 3
    load(emobench(), part="train")
    assert asked == [
        ("TIGER-Lab/WebInstruct-verified", None, "test", True),
        ("SahandSab/EmoBench", "emotional_understanding", "train", True),
        ("SahandSab/EmoBench", "emotional_application", "train", True),
    ]
    with pytest.raises(
        ValueError, match=r"^natural_reasoning: cannot load facebook/natural_reasoning, config None, split"
    ):
        load(BENCHMARKS["natural_reasoning"]())


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^path: None, but tombench is on no hub, expected its files from github"):
        load(tombench())
    with pytest.raises(FileNotFoundError, match=r"^path: no file or folder .*none\.jsonl"):
        load(tombench(), tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"^limit: 0, expected at least 1"):
        load(tombench(), DATA / "tombench.jsonl", limit=0)
    with pytest.raises(ValueError, match=r"^part: 'test', expected 'train' or 'held_out'"):
        load(tombench(), DATA / "tombench.jsonl", part="test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^language: 'fr', expected 'en' or 'zh'"):
        emobench("fr")  # type: ignore[arg-type]
    row = json.loads((DATA / "emobench.jsonl").read_text(encoding="utf-8").splitlines()[0])
    for change, message in (
        ({"emotion_label": "Hunger"}, r"^emobench: row 0: .*'emotion_label' is 'Hunger', which is none of the options"),
        ({"scenario": None}, r"^emobench: column 'scenario' of row 0 is null"),
        ({"language": "zh"}, r"^emobench: .*bad.jsonl has no row that can be used for part 'train'"),
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps(row | change), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load(emobench(), tmp_path / "bad.jsonl", part="train")
