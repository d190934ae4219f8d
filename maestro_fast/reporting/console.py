"""Prints a few responses above the progress bar while a run goes on."""

from __future__ import annotations

import logging
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Sequence

from tqdm.auto import tqdm

from maestro_fast.records import StepRecord
from maestro_fast.watching import ConsoleConfig, Sample, is_due, pick_samples

logger = logging.getLogger(__name__)
_WIDEST = 120  # columns; longer lines are hard to read on a wide screen
_COMPLETION_LINES = 4
_LONGEST_WORD = 20  # characters; what is longer may be cut at the end of a line
_LABEL = 11  # columns in front of each text


class ConsoleSamples:
    """Observes step records, and prints samples of those whose turn it is.

    Whatever a policy writes is shown on few lines, and cannot steer the terminal: line ends and control characters are
    written out. The text goes to the standard output through ``tqdm``, which takes its bars away meanwhile.
    """

    def __init__(self, config: ConsoleConfig, group_size: int, updates: int) -> None:
        """
        Args:
            config: how many samples, and how often.
            group_size: the number of responses to a prompt.
            updates: the number of optimiser steps from a batch.
        """
        self._config, self._group_size, self._updates = config, group_size, updates
        self._broken = False

    def __call__(self, record: StepRecord) -> None:
        if self._broken or not is_due(record.step, self._config.every, self._updates):
            return
        width = min(shutil.get_terminal_size().columns - 1, _WIDEST)  # A full line would wrap on some terminals.
        samples = pick_samples(record, self._group_size, self._config.samples)
        text = "\n".join([f"step {record.step}", *as_lines(samples, max(width, 40))])
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        try:
            tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:  # Nobody reads the output any more, which is no reason to end a run.
            self._broken = True
            logger.warning("console: no more samples are shown, the output is closed (%s)", error)


def as_lines(samples: Sequence[Sample], width: int) -> Iterator[str]:
    """The lines of some samples, each at most ``width`` columns wide. A prompt stands once for the pair of a group."""
    last = None
    for sample in samples:
        if sample.group != last:
            last = sample.group
            yield f"{'  prompt':{_LABEL}}{_end(visible(sample.prompt), width - _LABEL)}"
        figures = [f"advantage {sample.advantage:+.2f}", *_rewards(sample), f"{sample.length} tokens"]
        figures[-1] += ", cut off by the limit" if sample.truncated else ""
        head, *more = _joined(figures, width - _LABEL)
        yield f"  {sample.rank:{_LABEL - 2}}{head}"
        for line in [*more, *_wrapped(visible(sample.completion) or "(nothing)", width - _LABEL, _COMPLETION_LINES)]:
            yield " " * _LABEL + line


def _rewards(sample: Sample) -> Iterator[str]:
    for name, reward in sample.rewards.items():
        value = "abstained" if reward is None else f"{reward:.3g}"
        yield f"{visible(name)} {value} (weight {sample.weights[name]:.2f})"


def visible(text: str) -> str:
    """The text on one line, with everything written out that does not show: line ends, control characters and such."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _columns(character: str) -> int:
    """The columns that a character takes on a terminal."""
    if unicodedata.combining(character) or unicodedata.category(character) == "Me":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _fitting(text: str, width: int) -> int:
    """How many characters of the text fit into ``width`` columns."""
    used = 0
    for i, character in enumerate(text):
        used += _columns(character)
        if used > width:
            return i
    return len(text)


def _end(text: str, width: int) -> str:
    """The end of the text in ``width`` columns, behind "..." if something is missing."""
    backwards = text[::-1]
    if _fitting(backwards, width) == len(text):
        return text
    return "..." + backwards[: _fitting(backwards, width - 3)][::-1]


def _wrapped(text: str, width: int, lines: int) -> Iterator[str]:
    """The text on at most ``lines`` lines of ``width`` columns; the last ends in "..." if something is missing."""
    for line in range(lines):
        count = _fitting(text, width)
        if count == len(text):
            yield text
            return
        if line == lines - 1:
            yield text[: _fitting(text, width - 3)] + "..."
            return
        space = text.rfind(" ", max(1, count - _LONGEST_WORD), count + 1)
        end = count if space == -1 else space
        yield text[:end]
        text = text[end:].removeprefix(" ")


def _joined(parts: Sequence[str], width: int) -> list[str]:
    """The parts beside each other, on as many lines as they need."""
    lines = [""]
    for part in parts:
        longer = f"{lines[-1]}  {part}" if lines[-1] else part
        if lines[-1] and _fitting(longer, width) < len(longer):
            lines.append(part[: _fitting(part, width)])
        else:
            lines[-1] = longer[: _fitting(longer, width)]
    return lines
