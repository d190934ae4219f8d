"""PerplexityReward: the formula by hand, what it asks the policy, and where it abstains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.records import RewardBatch, Text
from maestro_fast.rewards import PerplexityReward, RewardSet
from maestro_fast.rewards.perplexity import neg_log_perplexity

MakeBatch = Callable[..., RewardBatch]


@dataclass
class Scorer:
    """Stands for the policy: remembers the questions, answers with given log-probs."""

    answers: list[list[float]]
    calls: list[tuple[list[Text], list[str], list[str]]] = field(default_factory=list)

    def __call__(self, prompts: Sequence[Text], prefixes: Sequence[str], continuations: Sequence[str]) -> list[Tensor]:
        self.calls.append((list(prompts), list(prefixes), list(continuations)))
        return [torch.tensor(answer) for answer in self.answers]


def test_formula() -> None:
    """P by its definition, with n = 1 below one token, 1 + ln 20 at twenty."""
    logprobs = torch.tensor([-1.0, -2.0, -6.0])
    for tokens, n in ((0.0, 1.0), (0.2, 1.0), (1.0, 1.0), (20.0, 3.995732273553991)):
        perplexity = math.exp(-(-1.0 - 2.0 - 6.0) / (3 * n))
        assert neg_log_perplexity(logprobs, tokens) == pytest.approx(-math.log(perplexity), rel=1e-7)
    assert neg_log_perplexity(logprobs, 0) == -3.0
    assert neg_log_perplexity(logprobs, math.e) == pytest.approx(-1.5)


FORMED = "<think> It is red. </think> <answer> Blue. </answer>"  # 53 characters, "It is red." is 10 of them


@pytest.mark.parametrize("chat", [False, True])
def test_value_of_a_formed_completion(chat: bool, make_batch: MakeBatch) -> None:
    scorer = Scorer([[-1.0, -3.0]])
    batch = make_batch(
        [FORMED], chat=chat, completion_ids=[[5] * len(FORMED)], columns={"reference": ["Red."]}, score_texts=scorer
    )
    expected = -2.0 / (1 + math.log(10))  # one token a character: the reasoning is 10 tokens
    assert PerplexityReward()(batch) == [pytest.approx(expected, rel=1e-7)]
    prompt: Text = [{"role": "user", "content": "Why?"}] if chat else "Why?"
    assert scorer.calls == [([prompt], ["<think> It is red. </think> <answer>"], [" Red."])]


def test_reasoning_length_is_its_share_of_the_tokens(make_batch: MakeBatch) -> None:
    text = "<think>" + "x" * 100 + "</think><answer>y</answer>"
    assert len(text) == 133
    batch = make_batch([text], completion_ids=[[1] * 40], columns={"reference": ["z"]}, score_texts=Scorer([[-4.0]]))
    assert PerplexityReward()(batch) == [pytest.approx(-4.0 / (1 + math.log(40 * 100 / 133)))]


@pytest.mark.parametrize(
    ("text", "prefix", "continuation"),
    [
        ("<think>a</think><answer>b</answer>", "<think>a</think><answer>", "Red."),
        ("<think>a</think><answer>\nb\n</answer>", "<think>a</think><answer>\n", "Red."),
        ("<think>a</think><answer> \n  b</answer>", "<think>a</think><answer> \n", "  Red."),
        ("<think>a</think><answer> </answer>", "<think>a</think><answer>", " Red."),
        ("\n<think>a</think>\n\n<answer></answer>\n", "\n<think>a</think>\n\n<answer>", "Red."),
    ],
)
def test_the_reference_takes_the_place_of_the_answer(
    text: str, prefix: str, continuation: str, make_batch: MakeBatch
) -> None:
    scorer = Scorer([[-1.0]])
    PerplexityReward()(make_batch([text], columns={"reference": [" Red.\n"]}, score_texts=scorer))
    assert scorer.calls == [(["Why?"], [prefix], [continuation])]


def test_empty_reasoning_has_n_one(make_batch: MakeBatch) -> None:
    texts = ["<think></think><answer>b</answer>", "<think> \n </think><answer>b</answer>"]
    batch = make_batch(
        texts,
        completion_ids=[[1] * 500, [1] * 500],
        columns={"reference": ["Red."] * 2},
        score_texts=Scorer([[-1.0, -2.0], [-5.0]]),
    )
    assert PerplexityReward()(batch) == [-1.5, -5.0]


def test_abstains_without_format_or_reference_and_asks_once(make_batch: MakeBatch) -> None:
    scorer = Scorer([[-1.0], [-2.0]])
    batch = make_batch(
        ["no form", "<think></think><answer>1</answer>", FORMED, FORMED, "<think></think><answer></answer>"],
        columns={"reference": ["a", 7, None, "  ", "e"]},
        score_texts=scorer,
    )
    assert PerplexityReward()(batch) == [None, -1.0, None, None, -2.0]
    assert [call[2] for call in scorer.calls] == [["7", "e"]]


def test_asks_once_even_for_nothing(make_batch: MakeBatch) -> None:
    """Other processes may have something to ask, and the forward may be a collective."""
    scorer = Scorer([])
    batch = make_batch(["no form"], columns={"reference": ["a"]}, score_texts=scorer)
    assert PerplexityReward()(batch) == [None]
    assert scorer.calls == [([], [], [])]


def test_without_required_format_all_is_reasoning(make_batch: MakeBatch) -> None:
    scorer = Scorer([[-1.0], [-1.0], [-1.0]])
    batch = make_batch(
        ["It is red.", FORMED, ""],
        completion_ids=[[1] * 8, [1] * len(FORMED), []],
        columns={"reference": ["Red."] * 3},
        score_texts=scorer,
    )
    values = PerplexityReward(require_format=False)(batch)
    assert values == [pytest.approx(-1 / (1 + math.log(8))), pytest.approx(-1 / (1 + math.log(10))), -1.0]
    assert scorer.calls[0][1:] == (
        ["It is red.\n", "<think> It is red. </think> <answer>", "\n"],
        ["Red.", " Red.", "Red."],
    )
    scorer.calls.clear()
    PerplexityReward(require_format=False, separator="\nSo: ")(batch)
    assert scorer.calls[0][1][0] == "It is red.\nSo:"
    assert scorer.calls[0][2][0] == " Red."


def test_other_tags_and_column(make_batch: MakeBatch) -> None:
    scorer = Scorer([[-1.0]])
    text = "<plan>abc</plan><draft> defgh </draft><final>x</final>"
    batch = make_batch([text], completion_ids=[[1] * len(text)], columns={"gold": [1.5]}, score_texts=scorer)
    reward = PerplexityReward(tags=["plan", "draft", "final"], reference="gold")
    assert reward(batch) == [pytest.approx(-1 / (1 + math.log(8)))]
    assert scorer.calls[0][1:] == ([text[: text.index("x</final>")]], ["1.5"])


class TestRank:
    def values(self, make_batch: MakeBatch, scores: list[float | None], **given: Any) -> list[float | None]:
        texts = ["no form" if score is None else "<think></think><answer></answer>" for score in scores]
        columns = {"reference": given.pop("reference", ["Red."] * len(scores))}
        scorer = Scorer([[score] for score in scores if score is not None])
        batch = make_batch(texts, columns=columns, score_texts=scorer, **given)
        return PerplexityReward(transform="rank")(batch)

    @pytest.mark.parametrize("chat", [False, True])
    def test_within_each_group(self, chat: bool, make_batch: MakeBatch) -> None:
        scores = [-3.0, -1.0, -2.0, -9.0, -8.0, -7.0]
        values = self.values(make_batch, scores, prompts=["P"] * 3 + ["Q"] * 3, chat=chat)
        assert values == [0.0, 1.0, 0.5, 0.0, 0.5, 1.0]

    def test_ties_share_and_abstentions_do_not_count(self, make_batch: MakeBatch) -> None:
        assert self.values(make_batch, [-1.0, None, -1.0, -4.0, -0.5]) == [0.5, None, 0.5, 0.0, 1.0]
        assert self.values(make_batch, [-1.0, -1.0, -1.0]) == [0.5, 0.5, 0.5]

    def test_alone_is_in_the_middle(self, make_batch: MakeBatch) -> None:
        assert self.values(make_batch, [None, -1.0, None]) == [None, 0.5, None]

    def test_equal_prompts_apart_or_with_other_references_are_groups_of_their_own(self, make_batch: MakeBatch) -> None:
        scores: list[float | None] = [-4.0, -3.0, -2.0, -1.0]
        assert self.values(make_batch, scores, prompts=["P", "P", "Q", "P"]) == [0.0, 1.0, 0.5, 0.5]
        assert self.values(make_batch, scores, reference=["a", "a", "b", "b"]) == [0.0, 1.0, 0.0, 1.0]


def test_asks_for_the_policy() -> None:
    reward = PerplexityReward()
    assert (reward.name, reward.needs_entropy, reward.needs_policy) == ("perplexity", False, True)


@pytest.mark.parametrize(
    ("columns", "answers", "error", "words"),
    [
        ({"gold": ["a"]}, [[-1.0]], ValueError, "'perplexity': .* no column 'reference'; the columns are gold"),
        ({}, [[-1.0]], ValueError, "the columns are none"),
        ({"reference": [["a"]]}, [[-1.0]], TypeError, "'perplexity': row 0 of the column 'reference' is a list"),
        ({"reference": ["a"]}, [], ValueError, "'perplexity': score_texts returned 0 of 1 texts"),
        ({"reference": ["a"]}, [[]], ValueError, r"'perplexity': score_texts returned shape \(0,\) for row 0"),
        ({"reference": ["a"]}, [[[-1.0]]], ValueError, r"score_texts returned shape \(1, 1\)"),
        ({"reference": ["a"]}, None, ValueError, "'perplexity': score_texts is missing"),
    ],
)
def test_faults_name_the_reward(
    columns: dict[str, list[Any]],
    answers: list[Any] | None,
    error: type[Exception],
    words: str,
    make_batch: MakeBatch,
) -> None:
    scorer = None if answers is None else Scorer(answers)
    with pytest.raises(error, match=words):
        PerplexityReward()(make_batch([FORMED], columns=columns, score_texts=scorer))


def test_an_impossible_reference_is_a_fault(make_batch: MakeBatch) -> None:
    batch = make_batch([FORMED], columns={"reference": ["a"]}, score_texts=Scorer([[-math.inf]]))
    with pytest.raises(ValueError, match="reward 'perplexity': row 0 is -inf"):
        RewardSet([PerplexityReward()])(batch)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tags": ["answer"]}, "tags: .* expected one for the reasoning and one for the answer"),
        ({"tags": ["a", "a"]}, "tags: .* expected distinct names"),
        ({"transform": "log"}, r"transform: 'log', expected one of \('neg_log', 'rank'\)"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PerplexityReward(**options)


@pytest.mark.parametrize(
    ("prefill", "text", "formula", "prefix", "continuation"),
    [
        ("<think>\n", "why</think><answer>b</answer>", "paper", "why</think><answer>", "Red."),
        ("<think>\n", "why</think><answer>b</answer>", "released", "why</think>", "<answer>Red.</answer>"),
        ("<think></think> <answer>", "b</answer>", "paper", "", "Red."),
        ("<think></think> <answer>", "b</answer>", "released", "", "Red.</answer>"),
    ],
)
def test_what_the_prompt_has_of_the_reply_is_not_scored_twice(
    prefill: str, text: str, formula: Any, prefix: str, continuation: str, make_batch: MakeBatch
) -> None:
    scorer = Scorer([[-1.0]])
    batch = make_batch(
        [text], prefills=[prefill], prompt_ids=[[7, 8]], columns={"reference": ["Red."]}, score_texts=scorer
    )
    (value,) = PerplexityReward(formula=formula)(batch)

    assert value is not None
    assert scorer.calls == [([[7, 8]], [prefix], [continuation])]  # the very tokens that the policy read


def test_prefilled_tags_count_as_no_reasoning(make_batch: MakeBatch) -> None:
    text = "x" * 50 + "</think><answer>y</answer>"
    batch = make_batch(
        [text],
        prefills=["<think>\n"],
        completion_ids=[[1] * len(text)],
        columns={"reference": ["z"]},
        score_texts=Scorer([[-4.0]]),
    )
    assert PerplexityReward()(batch) == [pytest.approx(-4.0 / (1 + math.log(50)))]
