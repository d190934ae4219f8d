"""A reward that teaches nothing over the first batches is reported once, with what it gave and the likely reason."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from maestro_fast.records import StepRecord
from maestro_fast.rewards import (
    FormatReward,
    FunctionReward,
    LengthReward,
    NoverReward,
    PerplexityReward,
    Reward,
    Where,
    gate,
)
from maestro_fast.rewards.first_batches import FirstBatches

NAN, G = float("nan"), 2
FORMED = "<think> a </think> <answer> b </answer>"


def record(values: Sequence[float], texts: Sequence[str], *, cut: bool = False) -> StepRecord:
    B = len(values)
    column, zeros = torch.tensor(values)[:, None], torch.zeros(B)
    return StepRecord(
        step=0,
        reward_names=("r",),
        families=[""] * B,
        prompts=["Why?"] * B,
        completions=list(texts),
        rewards_BK=column,
        weights_BK=torch.ones(B, 1),
        expected_weights_BK=torch.ones(B, 1),
        advantages_B=zeros,
        scores_B=zeros,
        degenerate_B=zeros.bool(),
        lengths_B=torch.tensor([len(text.split()) for text in texts]),
        truncated_B=torch.full((B,), cut),
    )


def report(
    caplog: pytest.LogCaptureFixture,
    reward: Reward,
    batches: Sequence[Sequence[float]],
    texts: Sequence[str] = ("red dog", "blue sea", "one two", "three four"),
    *,
    cut: bool = False,
    written: str = "",
    prompt_end: str = "",
) -> str:
    """What is logged about the reward when it gave these values, batch by batch."""
    first = FirstBatches([reward])
    with caplog.at_level(logging.WARNING, logger="maestro_fast"):
        for values in batches:
            first.see(record(values, texts, cut=cut), G, lambda row: (written, prompt_end))
    assert len(caplog.messages) <= 1
    return caplog.text


def silly(completions: Any) -> list[float]:
    return [0.0] * len(completions)


LENGTH = LengthReward(target=2, unit="words")
GATED = gate(LENGTH, on=FormatReward(), threshold=1)
SHUT = gate(LENGTH, on=FormatReward(), threshold=1, closed=-2.0)
MASKED = Where(LENGTH, {"family": "poem"})
ZEROS, NONE = [[0.0] * 4] * 3, [[NAN] * 4] * 3


@pytest.mark.parametrize(
    ("reward", "batches", "given", "words"),
    [
        (FormatReward(), ZEROS, {}, "gave 0 to all 12 completions .*: no completion has <think>, </think>, <answer>"),
        (FormatReward(), ZEROS, {"texts": ["<answer> a </answer>", "b", "c", "d"]}, "no completion has <think>, </th"),
        (
            FormatReward(),
            ZEROS,
            {"texts": [FORMED.removeprefix("<think>"), "b", "c", "d"], "prompt_end": "<|assistant|><think>\n"},
            "the chat template ends the prompt with <think>, so the completions lack it",
        ),
        (
            FormatReward(),
            ZEROS,
            {"texts": ["a <answer> b </answer>", "b", "c", "d"], "written": FORMED},
            "<think>, </think> is a special token, which is left out of the text",
        ),
        (FormatReward(), ZEROS, {"texts": ["Sure: " + FORMED] * 4}, "no completion has every tag opened .* once"),
        (FormatReward(), [[1.0] * 4] * 3, {}, "gave 1 to all 12 .*: every completion has the wanted form already"),
        (FormatReward(pattern="x+"), ZEROS, {}, r"no completion as a whole matches the pattern 'x\+'"),
        (FormatReward(), ZEROS, {"cut": True}, "every completion was cut off at sampling.max_new_tokens, here 2 tok"),
        (FormatReward(), ZEROS, {"texts": [" "] * 4}, "the completions hold no text"),
        (FormatReward(), ZEROS, {"texts": ["a", "a", "b", "b"]}, "the same text, is sampling.temperature too low"),
        (LENGTH, ZEROS, {}, "no completion is beyond the target of 2 words, the longest has 2"),
        (LENGTH, [[-1.0] * 4] * 3, {}, "gets the floor, the shortest has 2 words"),
        (LENGTH, [[-0.5, -0.5, 0, 0]] * 3, {}, "told no two responses of a prompt apart .*: all responses to a prompt"),
        (FunctionReward(silly), ZEROS, {}, "gave 0 to all 12 .*: silly returned the same number every time"),
        (FunctionReward(silly), NONE, {}, "abstained from all 12 .*: does silly find what it needs"),
        (FunctionReward(silly), [[0.0, NAN, NAN, NAN]] * 3, {}, "gave 0 or abstained for all 12 completions"),
        (GATED, NONE, {}, r"abstained from all 12 .*: its gate never opened \('format' stayed below 1\)"),
        (SHUT, [[-2.0] * 4] * 3, {}, r"gave -2 to all 12 .*: its gate never opened"),
        (MASKED, NONE, {}, r"abstained from all 12 .*: no prompt of these batches has \{'family': 'poem'\}"),
        (MASKED, [[0.0, 0.0, NAN, NAN]] * 3, {}, "no completion is beyond the target of 2 words, the longest has 2"),
        (PerplexityReward(), NONE, {}, "the column 'reference' is empty, or no completion has <think>"),
        (NoverReward(), ZEROS, {}, "no completion has <think>, </think>"),
    ],
)
def test_the_likely_reason(
    reward: Reward, batches: Any, given: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    import re

    message = report(caplog, reward, batches, **given)
    assert re.search(words, message), message
    shown = given.get("texts", ["red dog"])[0]
    assert f"reward {reward.name!r} " in message and f"A completion begins {shown!r}" in message


def opened(completions: Any, prefills: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize("function", [silly, opened])
def test_a_function_that_could_see_how_the_prompt_opens_the_reply_is_told_so(
    function: Any, caplog: pytest.LogCaptureFixture
) -> None:
    message = report(caplog, FunctionReward(function), ZEROS, prompt_end="<|assistant|><think>\n")
    assert ("silly gets that part if it names the argument prefills" in message) == (function is silly)


@pytest.mark.parametrize("reward", [FunctionReward(silly), GATED, MASKED, PerplexityReward(), NoverReward()])
def test_a_reward_that_gave_one_number_to_each_prompt_did_not_abstain(
    reward: Reward, caplog: pytest.LogCaptureFixture
) -> None:
    message = report(caplog, reward, [[-0.5, -0.5, 0.25, 0.25]] * 3)
    assert "told no two responses of a prompt apart" in message
    for reason in ("does silly find", "never opened", "no prompt of these batches", "is empty"):
        assert reason not in message


@pytest.mark.parametrize(
    "batches",
    [
        ZEROS[:2],
        [[0.0] * 4, [0.0] * 4, [0.0, 0.0, 1.0, 0.0]],
        [[0.0, 1.0, NAN, NAN], [NAN] * 4, [NAN] * 4, [0.0] * 4],
    ],
)
def test_a_reward_that_told_two_responses_apart_is_not_reported(batches: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert report(caplog, FunctionReward(silly), batches) == ""


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """``report`` checks that there is one message at most."""
    assert "This is said once" in report(caplog, FormatReward(), ZEROS * 3)
