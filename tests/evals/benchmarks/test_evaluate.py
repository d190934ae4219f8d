"""Scores of whole benchmarks: BLEU by hand, a judge on the loopback, and a model whose replies are sampled."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from maestro_fast.data.dataset import PromptDataset
from maestro_fast.evals.benchmarks import (
    BENCHMARKS,
    as_rows,
    evaluate,
    evaluate_model,
    load,
    natural_reasoning,
    opus_books,
    ss_gen,
    tombench,
    web_instruct,
    with_judge,
)
from maestro_fast.generation import SamplingConfig
from maestro_fast.model import ModelConfig, load_policy
from maestro_fast.records import plain_text
from maestro_fast.settings import SettingsError
from maestro_fast.training.prompt_weights import sample_responses
from tests.rewards.judge_server import RESET, Body, asked, serving
from tests.tiny import tiny_checkpoint

DATA = Path(__file__).parent / "data"


def part_of(question: str, name: str) -> str:
    """The answer A or B in what a judge is asked."""
    return question.split(f"{name}]\n", 1)[1].split("\n[End", 1)[0]


def rightly(body: Body) -> str:
    """A judge that only finds an answer right if it holds the reference."""
    question = asked(body)
    reference = question.split("[Reference answer]\n", 1)[1].split("\n\n[Answer A]", 1)[0]
    a, b = (reference in part_of(question, f"Answer {letter}") for letter in "AB")
    return "[[tie]]" if a and b else "[[A]]" if a else "[[B]]"


def options(url: str, **more: Any) -> dict[str, Any]:
    return {"url": url, "model": "small-judge", "cache": None, "retries": 0, **more}


def test_bleu_by_hand() -> None:
    """BLEU of one sentence: the geometric mean of the precisions of 1- to 4-grams, times the brevity penalty."""
    benchmark, rows = opus_books(), load(opus_books(), DATA / "opus_books.jsonl", part="train")
    row = next(row for row in rows if row["id"] == "1")
    # "Il ferma le livre et regarda la mer ." is the reference; these 8 of its 9 tokens end before "."
    reply = "<answer>Il ferma le livre\net regarda la mer</answer>"
    found = evaluate(benchmark, [row], [[reply]])
    assert found.scores_N == pytest.approx([math.exp(1 - 9 / 8)])
    assert found.figures["bleu"] == pytest.approx(100 * math.exp(1 - 9 / 8)) and 90 < found.figures["chrf"] < 100
    other = evaluate(benchmark, [row], [["Il ferma la porte", reply]])
    assert other.scores_N[0] < found.scores_N[0] and len(other.scores_N) == 1


def test_an_answer_counts_as_right_if_it_ties_with_the_reference() -> None:
    """Three votes in both orders, the reference shown beside; a reply without an answer costs no question."""
    rows = load(web_instruct(), DATA / "web_instruct.jsonl")
    with serving(rightly) as server:
        benchmark = with_judge(web_instruct(), options(server.url))
        replies = [["<think>v = s / t</think><answer>It is 60 km/h.</answer>"], ["x^2 + 4"], ["<think>without end"]]
        found = evaluate(benchmark, rows, replies)
    assert found.scores_N == [1.0, 0.0, 0.0] and found.unscored == 0
    assert found.figures == {"answered": pytest.approx(2 / 3)}
    assert found.mean.mean == pytest.approx(1 / 3) and found.mean.n == 3
    assert len(server.bodies) == 2 * 3 * 2 and Counter(body["seed"] for body in server.bodies) == {0: 4, 1: 4, 2: 4}
    assert all(body["temperature"] == 0.7 for body in server.bodies)
    about_speed = [asked(body) for body in server.bodies if "60 km/h" in asked(body)]
    assert Counter(part_of(text, "Answer A") for text in about_speed) == {"It is 60 km/h.": 3, "60 km/h": 3}
    assert all("mean speed" in text and "v = s / t" not in text for text in about_speed), "thoughts are not judged"


def test_a_judge_that_always_prefers_the_first_answer_gives_half() -> None:
    rows = load(ss_gen(), DATA / "ss_gen.jsonl", limit=1)
    with serving(lambda body: "[[A]]") as server:
        found = evaluate(with_judge(ss_gen(), options(server.url)), rows, [["A story.", "Another story."]])
    assert found.scores_N == [0.5]
    with serving(lambda body: "[[A]]" if "A story." in part_of(asked(body), "Story A") else "[[B]]") as server:
        found = evaluate(with_judge(ss_gen(), options(server.url)), rows, [["A story.", "<think>"]])
    assert found.scores_N == [0.5], "the mean of a story that wins and of none"


def test_answers_that_nobody_judged_are_left_out_and_counted() -> None:
    rows = load(web_instruct(), DATA / "web_instruct.jsonl")
    with serving(lambda body: RESET if "mean speed" in asked(body) else rightly(body)) as server:
        benchmark = with_judge(web_instruct(), options(server.url))
        found = evaluate(benchmark, rows, [["60 km/h"], ["x^2 + 4x + 4"], ["7"]])
        assert math.isnan(found.scores_N[0]) and found.scores_N[1:] == [1.0, 0.0]
        assert found.unscored == 1 and found.mean.n == 2 and found.mean.mean == 0.5
        written = json.loads(json.dumps(found.as_json(), allow_nan=False))
        assert written["scores"] == [None, 1.0, 0.0] and written["prompts"] == 2
        with pytest.raises(ConnectionError, match="answered none of the 6 questions"):
            evaluate(benchmark, rows[:1], [["It is 60 km/h."]])


def test_the_judge_has_to_be_named_and_leaves_the_benchmark_its_own() -> None:
    rows = load(web_instruct(), DATA / "web_instruct.jsonl")
    with pytest.raises(ValueError, match=r"^judge: none, but this benchmark is scored by one, expected with_judge"):
        evaluate(web_instruct(), rows, [["1"]] * 3)
    with pytest.raises(ValueError, match=r"^benchmark: web_instruct has no judge, expected with_judge"):
        evaluate_model(web_instruct(), rows, "no folder is looked for")
    with pytest.raises(ValueError, match=r"^benchmark: tombench is scored without a judge"):
        with_judge(tombench(), options("http://127.0.0.1:9/v1"))
    with pytest.raises(SettingsError, match=r"^judge\.votes: is set by the benchmark natural_reasoning"):
        with_judge(natural_reasoning(), options("http://127.0.0.1:9/v1", votes=1))
    with pytest.raises(SettingsError, match=r"^judge\.modell?"):
        with_judge(natural_reasoning(), {"url": "http://127.0.0.1:9/v1", "modell": "x"})


def test_replies_have_to_fit_the_rows() -> None:
    rows = load(tombench(), DATA / "tombench.jsonl", part="train")
    with pytest.raises(ValueError, match=r"^replies: 1 entries for \d rows, expected one for each row"):
        evaluate(tombench(), rows * 2, [["A"]])
    with pytest.raises(ValueError, match=r"^replies: 1 entries for 1 rows, .* with a reply at least"):
        evaluate(tombench(), rows[:1], [[]])


def test_a_model_is_sampled_and_scored(tmp_path: Path) -> None:
    """The replies are those of the model, ``samples`` for each prompt and the same in each run, in the rows' order."""
    model = tiny_checkpoint(tmp_path / "model")
    rows = load(opus_books(), DATA / "opus_books.jsonl", part="train")[:3]
    sampling = SamplingConfig(max_new_tokens=6)
    first = evaluate_model(opus_books(), rows, model, sampling, samples=2, seed=3)
    again = evaluate_model(opus_books(), rows, model, sampling, samples=2, seed=3)

    assert first == again and [len(own) for own in first.replies] == [2] * len(rows)
    network, tokenizer = load_policy(ModelConfig(str(model)))
    prompts = PromptDataset(as_rows(opus_books(), rows))
    sampled: dict[str, list[str]] = {}
    for part in sample_responses(network.eval(), tokenizer, prompts, sampling, 2, 3):
        for text, completion in zip(part.prompts.texts, part.completions, strict=True):
            sampled.setdefault(plain_text(text), []).append(plain_text(completion))
    assert first.replies == [sampled[plain_text(opus_books().prompt(row))] for row in rows]
    by_hand = evaluate(opus_books(), rows, first.replies)
    assert by_hand.scores_N == first.scores_N and first.benchmark in BENCHMARKS
    assert len({reply for own in first.replies for reply in own}) > 1
    with pytest.raises(ValueError, match=r"^samples: 0, expected at least 1"):
        evaluate_model(opus_books(), rows, model, samples=0)
