"""NoverReward: its two terms by hand, the gate, and what it asks the policy."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from maestro_fast.records import RewardBatch
from maestro_fast.rewards import NoverReward, PerplexityReward, build_rewards
from maestro_fast.rewards.nover import efficiency_reward, rank_reward
from maestro_fast.rewards.perplexity import Judged, neg_log_perplexity

MakeBatch = Callable[..., RewardBatch]

# log-perplexities 1.0, 2.0, 3.0, 1.5 after reasoning of 10, 20, 5, 30 tokens
GROUP = [Judged(-1.0, 10.0), Judged(-2.0, 20.0), Judged(-3.0, 5.0), Judged(-1.5, 30.0)]


def formed(words: int, character: str = "x") -> str:
    """A formed completion with so many characters of reasoning."""
    return f"<think>{character * words}</think><answer>y</answer>"


class Scorer:
    """Stands for the policy: a log-prob by the number of x in the prefix, and remembers what was asked."""

    def __init__(self, logprob: Callable[[str], float] = lambda prefix: -1.0) -> None:
        self.logprob, self.calls = logprob, []

    def __call__(self, prompts: Any, prefixes: Any, continuations: Any) -> list[torch.Tensor]:
        self.calls.append((list(prompts), list(prefixes), list(continuations)))
        return [torch.tensor([self.logprob(prefix)]) for prefix in prefixes]


def test_ranks_by_hand() -> None:
    """The lowest perplexity of V = 4 gets 4/4, the next 3/4, ..., the worst 1/4, never 0."""
    assert [rank_reward(row, GROUP) for row in GROUP] == [1.0, 0.5, 0.25, 0.75]
    assert rank_reward(GROUP[2], [GROUP[2]]) == 1.0
    tied = [Judged(-1.0, 1.0), Judged(-1.0, 2.0), Judged(-3.0, 3.0)]
    assert [rank_reward(row, tied) for row in tied] == pytest.approx([5 / 6, 5 / 6, 1 / 3])


def test_efficiency_by_hand() -> None:
    """The first is shorter and better than the second and the fourth, of three others; nobody else beats anybody."""
    assert [efficiency_reward(row, GROUP) for row in GROUP] == pytest.approx([2 / 3, 0.0, 0.0, 0.0])
    assert efficiency_reward(GROUP[0], [GROUP[0]]) == 0.0
    same = [Judged(-1.0, 4.0), Judged(-2.0, 4.0), Judged(-1.0, 9.0)]  # as long, or as good, is not beaten
    assert [efficiency_reward(row, same) for row in same] == [0.0, 0.0, 0.0]


def test_terms_against_sorting() -> None:
    """Without ties R_r is what sorting by perplexity gives, whose sum over the group is (V + 1) / 2."""
    generator = random.Random(0)
    for size in (2, 5, 8):
        group = [Judged(-generator.random(), generator.random()) for _ in range(size)]
        order = sorted(group, key=lambda row: -row.neg_log_perplexity)
        for place, row in enumerate(order):
            assert rank_reward(row, group) == pytest.approx((size - place) / size)
            beaten = [other for other in order[place + 1 :] if other.reasoning_tokens > row.reasoning_tokens]
            assert efficiency_reward(row, group) == pytest.approx(len(beaten) / (size - 1))


def test_log_perplexity_of_the_released_code() -> None:
    """n = 1 + log10 of the reasoning's tokens."""
    logprobs = torch.tensor([-1.0, -2.0, -6.0])
    assert neg_log_perplexity(logprobs, 100.0, "released") == pytest.approx(-3.0 / 3, rel=1e-12)
    assert neg_log_perplexity(logprobs, 20.0, "released") == pytest.approx(-3.0 / (1 + math.log10(20)), rel=1e-12)
    assert neg_log_perplexity(logprobs, 0.0, "released") == -3.0
    assert neg_log_perplexity(logprobs, 0.5, "released") == -3.0


@pytest.mark.parametrize(
    ("text", "prefix", "continuation"),
    [
        (
            "<think> It is red. </think> <answer> Blue. </answer>",
            "<think> It is red. </think>",
            " <answer> Red. </answer>",
        ),
        ("<think>a</think><answer>b</answer>", "<think>a</think>", "<answer>Red.</answer>"),
        ("<think>a</think>\n<answer>\nb\n</answer>\n", "<think>a</think>\n", "<answer>\nRed.\n</answer>"),
        ("<think>a</think>\n  <answer></answer>", "<think>a</think>\n", "  <answer>Red.</answer>"),
        ("<think>a</think><answer> </answer>", "<think>a</think>", "<answer> Red.</answer>"),
    ],
)
def test_the_tags_of_the_answer_belong_to_what_is_scored(
    text: str, prefix: str, continuation: str, make_batch: MakeBatch
) -> None:
    scorer = Scorer()
    batch = make_batch([text], columns={"reference": ["Red."]}, score_texts=scorer)
    PerplexityReward(formula="released")(batch)
    assert scorer.calls == [(["Why?"], [prefix], [continuation])]


def test_released_value_of_a_formed_completion(make_batch: MakeBatch) -> None:
    """One token a character, ten of them reasoning: n = 1 + log10 10 = 2."""
    text = "<think> It is red. </think> <answer> Blue. </answer>"
    columns = {"reference": ["Red."]}
    batch = make_batch([text], completion_ids=[[5] * len(text)], columns=columns, score_texts=Scorer(lambda _: -3.0))
    assert PerplexityReward(formula="released")(batch) == [pytest.approx(-1.5, rel=1e-7)]


@pytest.mark.parametrize("chat", [False, True])
def test_badly_formatted_rows_get_zero_and_do_not_count(chat: bool, make_batch: MakeBatch) -> None:
    """Two groups; the first has three formed rows of five, of which the shortest is the best."""
    texts = [formed(10), "no form", formed(20), formed(30), "<think>x</think>", formed(5), formed(10)]
    prompts = ["P"] * 5 + ["Q"] * 2
    # log-probs that grow with the length of the reasoning where the reasoning is y, fall where it is x
    scorer = Scorer(lambda prefix: -float(len(prefix)))
    batch = make_batch(
        texts,
        chat=chat,
        prompts=prompts,
        completion_ids=[[1] * len(text) for text in texts],
        columns={"reference": ["Red."] * 7},
        score_texts=scorer,
    )
    # len(prefix) is 15 more than the reasoning, n = 1 + log10(reasoning):
    # 25/2 = 12.5, 35/2.301 = 15.2, 45/2.477 = 18.2 | 20/1.699 = 11.8, 25/2 = 12.5
    expected = [1 + 2 / 2, 0.0, 2 / 3 + 1 / 2, 1 / 3, 0.0, 1 + 1, 1 / 2]
    assert NoverReward()(batch) == pytest.approx(expected)
    assert len(scorer.calls) == 1, "one scoring serves both terms"
    only_ranks = NoverReward(efficiency_weight=0.0)(batch)
    assert only_ranks == pytest.approx([1.0, 0.0, 2 / 3, 1 / 3, 0.0, 1.0, 0.5])
    only_efficiency = NoverReward(reasoning_weight=0, efficiency_weight=2.0)(batch)
    assert only_efficiency == pytest.approx([2.0, 0.0, 1.0, 0.0, 0.0, 2.0, 0.0])


def test_without_a_reference_it_abstains(make_batch: MakeBatch) -> None:
    batch = make_batch([formed(3), "no form", formed(4)], columns={"reference": [None, " ", "a"]}, score_texts=Scorer())
    assert NoverReward()(batch) == [None, None, 1.0]


def test_a_group_without_the_format(make_batch: MakeBatch) -> None:
    scorer = Scorer()
    batch = make_batch(["no", "form"], columns={"reference": ["a", "a"]}, score_texts=scorer)
    assert NoverReward()(batch) == [0.0, 0.0]
    assert len(scorer.calls) == 1, "other processes may have something to ask"


def test_from_a_config() -> None:
    (reward,) = build_rewards([{"name": "mine", "type": "nover", "formula": "paper", "efficiency_weight": 0.5}]).rewards
    assert reward == NoverReward(formula="paper", efficiency_weight=0.5, name="mine")
    assert (reward.needs_entropy, reward.needs_policy) == (False, True)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"reasoning_weight": -1}, ValueError, "reasoning_weight: -1, expected a finite number, at least 0"),
        ({"efficiency_weight": math.nan}, ValueError, "efficiency_weight: nan, expected"),
        ({"efficiency_weight": "1"}, TypeError, "efficiency_weight: '1', expected a number"),
        ({"formula": "log10"}, ValueError, r"formula: 'log10', expected one of \('paper', 'released'\)"),
        ({"tags": ["answer"]}, ValueError, "tags: .* expected one for the reasoning and one for the answer"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        NoverReward(**options)


def test_the_released_formula_needs_the_format() -> None:
    with pytest.raises(ValueError, match="formula: 'released' scores the answer's tags, expected require_format: True"):
        PerplexityReward(formula="released", require_format=False)
