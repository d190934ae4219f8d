"""What the trials of many inputs share: inputs with numbers, a tally of their outcomes, and the progress."""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

_SLOW = 20.0  # seconds that one answer may take


class Input(NamedTuple):
    """One input: what was changed in it, in words, and a function that gives the kind of its outcome and words on it.

    An error that the function does not expect may come out of it; that is the outcome "traceback".
    """

    changes: str
    outcome: Callable[[], tuple[str, str]]


def try_inputs(
    make: Callable[[random.Random], Input], fine: tuple[str, ...], *, inputs: int, seed: int, first: int = 0
) -> tuple[Counter[str], list[str]]:
    """Tries inputs, of which each is a function of the seed and its number.

    Args:
        make: makes an input from random numbers of its own.
        fine: the outcomes that are no failures.
        inputs, seed, first: how many, of which seed, and the number of the first one.

    Returns:
        How many inputs had which outcome, and a text on each that failed.
    """
    tally: Counter[str] = Counter()
    failures: list[str] = []
    begun = shown = time.monotonic()
    logging.disable(logging.CRITICAL)
    try:
        for number in range(first, first + inputs):
            tried, start = make(random.Random(f"{seed}-{number}")), time.monotonic()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    kind, told = tried.outcome()
            except Exception:
                kind, told = "traceback", traceback.format_exc(limit=-4)
            if time.monotonic() - start > _SLOW:
                kind, told = "slow", f"{time.monotonic() - start:.0f} s"
            tally[kind] += 1
            if kind not in fine:
                failures.append(f"input {number} of seed {seed}: {tried.changes}\n{kind}: {told}")
            if time.monotonic() - shown > 5:
                shown, done = time.monotonic(), number - first + 1
                left = (shown - begun) / done * (inputs - done)
                print(f"{done} of {inputs}, {len(failures)} failed, {left:.0f} s left", file=sys.stderr)
    finally:
        logging.disable(logging.NOTSET)
    return tally, failures


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a trial of many inputs."""
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")


def as_tally(given: argparse.Namespace, tally: Counter[str], failures: list[str]) -> dict[str, Any]:
    """Prints the failures, and returns what the file of the trial holds."""
    for text in failures:
        print(text, end="\n\n")
    about = {"inputs": given.inputs, "seed": given.seed, "first": given.first, "faults": len(failures)}
    return {**about, **dict(sorted(tally.items())), "failures": failures}
