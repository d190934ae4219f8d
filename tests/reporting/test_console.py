"""Samples on the console: what a user sees, whatever the policy writes."""

from __future__ import annotations

import io
import math
import os
import sys
import unicodedata
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm.auto import tqdm

from maestro_fast.records import StepRecord
from maestro_fast.reporting.console import ConsoleSamples, as_lines
from maestro_fast.watching import ConsoleConfig, Sample


def columns_of(line: str) -> int:
    """What a line takes on a terminal, counted here on its own."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def sample(prompt: str = "Name a colour.", completion: str = "red", **changes: Any) -> Sample:
    values = {"rewards": {"mine": 0.51234, "tone": None}, "weights": {"mine": 0.25, "tone": 0.75}}
    values |= {"advantage": 1.5, "length": 3, "truncated": False}
    return Sample(0, "best", prompt, completion, **{**values, **changes})


def record(step: int, completion: str = "red") -> StepRecord:
    flags, zeros = torch.zeros(4, dtype=torch.bool), torch.zeros(4)
    rewards = torch.tensor([[0.5], [math.nan], [1.0], [0.0]])
    texts: Any = ["first", "first", "second", "second"]
    columns = (rewards, torch.ones(4, 1), torch.ones(4, 1), torch.tensor([1.0, -1.0, 1.0, -1.0]), zeros, flags)
    return StepRecord(step, ("mine",), ["f"] * 4, texts, [completion] * 4, *columns, zeros + 3, flags)


def test_a_sample_says_what_it_is_and_what_it_got() -> None:
    worst = sample(advantage=-0.5, truncated=True)
    assert list(as_lines([sample(), Sample(**{**vars(worst), "rank": "worst"})], 100)) == [
        "  prompt   Name a colour.",
        "  best     advantage +1.50  mine 0.512 (weight 0.25)  tone abstained (weight 0.75)  3 tokens",
        "           red",
        "  worst    advantage -0.50  mine 0.512 (weight 0.25)  tone abstained (weight 0.75)",
        "           3 tokens, cut off by the limit",
        "           red",
    ]


def test_a_long_prompt_shows_its_end_and_a_long_completion_its_beginning() -> None:
    words = " ".join(f"word{i}" for i in range(200))
    prompt, _, *completion = as_lines([sample(words, words)], 100)
    assert prompt.startswith("  prompt   ...") and prompt.endswith("word198 word199") and len(prompt) == 100
    assert len(completion) == 4 and all(line.startswith(" " * 11 + "word") for line in completion)
    shown = " ".join(line.strip() for line in completion)
    assert shown.endswith("...") and words.startswith(shown[:-3]), "words stay whole, and none is lost at a line's end"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\u202eevil\u2066 \x9b1m", r"\u202eevil\u2066 \x9b1m"),
        ("lone \ud83d", r"lone \ud83d"),
        ("", "(nothing)"),
    ],
)
def test_nothing_that_a_policy_writes_steers_the_terminal(text: str, shown: str) -> None:
    assert list(as_lines([sample(text, text, rewards={}, weights={})], 80))[-1] == " " * 11 + shown


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60), st.text(max_size=100), st.integers(40, 60))
def test_no_line_is_wider_than_the_terminal(prompt: str, completion: str, width: int) -> None:
    lines = list(as_lines([sample(prompt, completion)], width))
    assert all(columns_of(line) <= width and line.isprintable() for line in lines)
    assert len(lines) <= 1 + 4 + 4


def test_they_come_above_the_bar_in_the_steps_that_are_due(capsys: pytest.CaptureFixture[str]) -> None:
    console = ConsoleSamples(ConsoleConfig(every=2, samples=1), group_size=2, updates=1)
    with tqdm(total=4, file=sys.stderr) as bar:
        for step in range(1, 5):
            capsys.readouterr()
            console(record(step))
            out, err = capsys.readouterr()
            assert (out == "") == (step % 2 == 0)
            if out:
                assert out.startswith(f"step {step}\n  prompt   ") and out.endswith("red\n")
                assert err.startswith("\r") and err.split("\r")[1].isspace(), "the bar is taken away before"
            bar.update()


def test_a_terminal_that_knows_fewer_characters_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    ConsoleSamples(ConsoleConfig(), group_size=2, updates=1)(record(1, "gr\u00fcn \u6d77"))
    sys.stdout.flush()
    assert rb"gr\xfcn \u6d77" in raw.getvalue()


def test_an_output_that_is_closed_ends_the_samples_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read, write = os.pipe()
    os.close(read)
    console = ConsoleSamples(ConsoleConfig(every=1), group_size=2, updates=1)
    closed = io.TextIOWrapper(io.FileIO(write, "w"), encoding="utf-8", write_through=True)
    monkeypatch.setattr(sys, "stdout", closed)
    for step in (1, 2):
        console(record(step))
    monkeypatch.undo()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("console: no more samples are shown, the output is closed")
    closed.close()
