"""The six families: the files are what the generator makes, and the utility cannot be had without being useful."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from maestro_fast.config_file import read_config
from maestro_fast.evals.six_families import SIZES, Row, splits, write
from maestro_fast.rewards import build_anchor, build_rewards
from maestro_fast.training import parse_config

FOLDER = Path(__file__).resolve().parent.parent.parent / "examples" / "six_families"
FAMILIES = ("fact", "support", "json", "rewrite", "list", "opening")
REWARDS = ("overlap", "brevity", "structure", "warmth", "richness")
_SPEC = importlib.util.spec_from_file_location("six_families_rewards", FOLDER / "rewards.py")
assert _SPEC is not None and _SPEC.loader is not None
rewards = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(rewards)

CAPITAL = {"answer": "Paris", "rivals": ["Rome", "London"]}
KETTLE = {"item": "kettle"}
DYLAN = {"values": {"name": "Dylan", "age": 67, "city": "Rome"}}
SOURCE = "The singer sells the boat on Sunday because it had been raining very hard for several days."
BOAT = {"keep": ["singer", "sells", "boat", "Sunday"], "avoid": ["because"], "words": 10, "source": SOURCE}
METALS = {"count": 3, "members": ["iron", "gold", "silver", "tin", "berry"]}
LIVIA = {"names": ["Livia", "keeper"]}
REPLY = (
    "Hello, I am so sorry that your kettle arrived broken. We will send you a new one this week. Thank you for telling "
    "us."
)
STORY = (
    "Livia was the keeper of a lighthouse that nobody had visited for nine years. That evening, somebody knocked three "
    "times on her old green door."
)

# What an answer is worth, found by hand from the sentences in rewards.py.
ANSWERS: list[tuple[str, dict[str, Any], str, float]] = [
    ("fact", CAPITAL, "Paris", 1.0),
    ("fact", CAPITAL, "It is Paris.", 1.0),
    ("fact", CAPITAL, "The capital of France is Paris.", 3 / 6),
    ("fact", CAPITAL, "Paris or Rome", 0.0),
    ("fact", CAPITAL, "Parisian", 0.0),
    ("support", KETTLE, REPLY, 1.0),
    ("support", KETTLE, REPLY.replace("kettle", "order"), 0.2),
    ("support", KETTLE, REPLY.replace("Hello, ", ""), 2 / 3),
    ("support", KETTLE, REPLY.replace("send you", "immediately send you"), 0.3),
    ("support", KETTLE, REPLY.replace("Hello", "Dear [Name]"), 0.5),
    ("support", KETTLE, REPLY.replace("us.", "us"), 0.8),
    ("support", KETTLE, "Hello, sorry, we will replace the kettle.", 7 / 20),
    ("support", KETTLE, REPLY + 4 * " We are very sorry indeed.", 40 / 44),
    ("json", DYLAN, '{"name": "Dylan", "age": 67, "city": "Rome"}', 1.0),
    ("json", DYLAN, '{\n  "city": "rome",\n  "age": "67",\n  "name": "Dylan"\n}\n', 1.0),
    ("json", DYLAN, 'Here: {"name": "Dylan", "age": 67, "city": "Rome"}', 0.6),
    ("json", DYLAN, '{"name": "Dylan", "age": 68, "city": "Rome"}', 2 / 3),
    ("json", DYLAN, '{"name": "Dylan", "age": 67, "city": "Rome", "pet": "cat"}', 3 / 4),
    ("json", DYLAN, '{"name": "Dylan", "age": 67, "city": "Rome"', 0.0),
    ("rewrite", BOAT, "The singer sells the boat on Sunday.", 1.0),
    ("rewrite", BOAT, "After days of raining, the singer sells a boat on Sunday.", 0.9 * 6 / 7),
    ("rewrite", BOAT, "The singer sells the boat because of Sunday.", 0.3),
    ("rewrite", BOAT, "singer sells boat Sunday", 0.5),
    ("rewrite", BOAT, SOURCE, 0.3 * (2 - 17 / 10)),
    ("list", METALS, "1. iron\n2. gold\n3. tin", 1.0),
    ("list", METALS, "- Iron\n- Gold\n- Berries", 1.0),
    ("list", METALS, "iron\ngold\ngold", 2 / 3),
    ("list", METALS, "1. iron\n2. gold", 2 / 3 / 2),
    ("list", METALS, "Here they are:\n1. iron\n2. gold\n3. tin", 0.5),
    ("list", METALS, "1. a\n2. b\n3. c", 0.0),
    ("list", METALS, "1. iron\n2. iron gold\n3. tin", 1.0),
    ("list", METALS, "1. iron gold tin\n2. gold\n3. gold", 2 / 3),
    ("list", METALS, "1. iron is a strong one\n2. gold\n3. tin", 2 / 3),
    ("opening", LIVIA, STORY, 1.0),
    ("opening", LIVIA, STORY.replace("Livia", "Anna"), 0.5),
    ("opening", LIVIA, STORY.rstrip("."), 0.8),
    ("opening", LIVIA, "1. " + STORY, 0.3),
    ("opening", LIVIA, "Livia was a keeper.", 4 / 25 * (1 / 4) / 0.75),
]


def worth(family: str, truth: dict[str, Any], answer: str) -> float:
    return float(rewards.utility([answer], [family], [truth])[0])


@pytest.mark.parametrize(("family", "truth", "answer", "expected"), ANSWERS)
def test_utility_is_what_the_rules_say(family: str, truth: dict[str, Any], answer: str, expected: float) -> None:
    assert worth(family, truth, answer) == pytest.approx(expected)


def rows_of(split: str) -> list[Row]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_files_are_what_the_generator_makes(tmp_path: Path) -> None:
    write(tmp_path)
    for split, size in SIZES.items():
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / f"{split}.jsonl").read_bytes()
        assert [row["family"] for row in rows_of(split)] == [*FAMILIES] * size


def test_splits_have_nothing_in_common() -> None:
    """Neither a question, nor a customer's item, a person, a trade, a kind of list or a hero."""

    def subject(row: Row) -> str:
        truth = row["truth"]
        match row["family"]:
            case "fact":
                return str(row["prompt"])
            case "support":
                return str(truth["item"])
            case "json":
                return next(str(truth["values"][key]) for key in ("name", "buyer", "owner") if key in truth["values"])
            case "rewrite":
                return str(truth["keep"][0])
            case "list":
                return str(truth["members"])
        return str(truth["names"][0])

    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for split, rows in splits().items():
        assert len({row["prompt"] for row in rows}) == len(rows)
        for row in rows:
            seen[row["family"], subject(row)].add(split)
    assert len(seen) > 150
    assert all(len(found) == 1 for found in seen.values())


def by_family(answer: str | None, rows: list[Row]) -> dict[str, float]:
    """The mean utility of one answer to all prompts, by family; None answers with the prompt itself."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        found[row["family"]].append(worth(row["family"], row["truth"], row["prompt"] if answer is None else answer))
    return {family: sum(values) / len(values) for family, values in found.items()}


GREEDY = {
    "brevity": "",
    "richness": "Ancient bridges carry dreaming elephants forward, gently humming inside jubilant kingdoms; little "
    "mountains never object, possibly quietly remembering silver trains under velvet windows.",
    "structure": '1. {"a": 1}\n2. {"b": 2}\n3. {"c": 3}\n4. {"d": 4}\n5. {"e": 5}',
    "warmth": "Hello dear, thank you, sorry, please, I am happy and glad to help.",
    "overlap": None,
}
CONSTANT = [
    "ok",
    "Paris",
    "March",
    "4",
    "Hello, I am so sorry about this. We will look into it and send you a new one this week. Thank you.",
    '{"name": "Dylan", "age": 67, "city": "Rome"}',
    "{}",
    "The singer sells the boat on Sunday.",
    "1. red\n2. blue\n3. green\n4. yellow",
    "1. a\n2. b\n3. c\n4. d",
    STORY,
    "You are a helpful assistant.",
]


def test_no_constant_answer_is_worth_much() -> None:
    rows = rows_of("test") + rows_of("validation")
    for answer in [*CONSTANT, *GREEDY.values()]:
        found = by_family(answer, rows)
        assert max(found.values()) <= 0.25, (answer, found)
        assert sum(found.values()) / len(found) <= 0.06, (answer, found)


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_is_greatest_where_the_utility_is_low(name: str) -> None:
    """So the utility is no reward, and a policy that follows one reward alone is of no use."""
    rows = rows_of("test")
    answers = [row["prompt"] if GREEDY[name] is None else GREEDY[name] for row in rows]
    values = getattr(rewards, name)(answers, prompts=[row["prompt"] for row in rows])
    assert min(values) == 1.0
    good = [answer for _, _, answer, expected in ANSWERS if expected == 1.0]
    most = getattr(rewards, name)(good, prompts=["How much is 999 minus thirty?"] * len(good))
    assert min(most) < 0.5, "some good answer has little of it"


def test_conversations_are_read_as_their_last_message() -> None:
    prompts = [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tell me about whales"}]]
    answers = [[{"role": "assistant", "content": "Whales sing. Sorry, thank you!"}]]
    assert rewards.overlap(answers, prompts=prompts) == [pytest.approx(1 / 3)]  # whales, of tell, about and whales
    assert rewards.warmth(answers) == [0.5]
    assert rewards.brevity(answers) == [1 - 5 / 40]
    assert rewards.richness(answers) == [4 / 20]
    assert rewards.structure(["- a\n* b\n3) c\nd"]) == [0.6]
    assert rewards.utility([[{"role": "assistant", "content": "Paris."}]], ["fact"], [CAPITAL]) == [1.0]


def test_the_config_is_understood() -> None:
    config = parse_config(read_config(FOLDER / "config.yaml"))
    assert build_rewards(config.rewards).names == REWARDS
    assert config.anchor is not None and build_anchor(config.anchor).names == ("utility",)
    assert config.weights.build is not None
