"""Reward functions that return and raise what they like: the rewards are right, or an error names the reward.

    python -m tests.fuzz rewards --inputs 20000 --json tests/fuzz/rewards.json

Every input is a set of one to three rewards of the user's own, each a function, plain or async, that returns values in
some container: numbers of many kinds, abstentions, and things that are no numbers. They stand behind guards, masks,
gates and labels. What is right follows from the documented rule, evaluated here in Python's floats: which rows a
reward sees, what it says of them, and what becomes of it where it fails.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import collections
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from maestro_fast.records import RewardBatch
from maestro_fast.rewards import FunctionReward, RewardSet
from maestro_fast.rewards.conditional import Gate, Labelled, LabelsConfig, Where
from maestro_fast.rewards.guarded import Guarded
from maestro_fast.rewards.reward import Reward
from tests.fuzz.trial import Input, add_options, as_tally, try_inputs

__all__ = ["add_options", "main", "run"]

Values = list[float | None]
_FLOAT32 = float(torch.finfo(torch.float32).max)


class _Float(float):
    pass


class _Lies(list[Any]):
    def __len__(self) -> int:
        raise RuntimeError("no length")


class _Floats:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __float__(self) -> float:
        if isinstance(self.value, Exception):
            raise self.value
        return float(self.value)

    def __repr__(self) -> str:
        raise RuntimeError("no words")


class OwnError(Exception):
    """An error of the user's own function."""


# An item, and the number that it stands for; None is an abstention, and an error says that it is no number.
_NO_NUMBER, _NOT_FINITE = TypeError(), ValueError()
ITEMS: tuple[tuple[Any, float | Exception | None], ...] = (
    *((x, x) for x in (0.0, -0.0, 1.0, 0.7, -2.5, 1e-45, 1e-300, 1e30, _FLOAT32, -_FLOAT32, 0.1)),
    *((x, float(x)) for x in (0, 3, -7, True, False, 2**63, Fraction(1, 3), Decimal("0.25"), _Float(0.5))),
    *((x, float(x)) for x in (np.float64(0.3), np.int8(-3), np.bool_(True), np.float16(0.5), np.uint64(7))),
    *((torch.tensor(x), float(torch.tensor(x))) for x in (0.5, 2, True)),
    (_Floats(0.5), 0.5),
    *((None, None) for _ in range(8)),
    *((x, _NOT_FINITE) for x in (math.nan, math.inf, -math.inf, 1e39, -1e300, 10**400, np.float64("nan"))),
    *((x, _NOT_FINITE) for x in (Fraction(10**400), Decimal("1e500"), torch.tensor(math.nan), np.float32("inf"))),
    *((x, _NO_NUMBER) for x in ("1", b"1", "", "nan", [], [1.0], (1.0,), {}, {1: 2}, 1j, object(), float, lambda: 1)),
    *((x, _NO_NUMBER) for x in (torch.ones(2), np.ones(1), _Floats(OSError()), [0.0] * 5000, np.datetime64("2026"))),
)
_PLAIN = [item for item in ITEMS if not isinstance(item[1], Exception)]
# Ways to return numbers. A container of one dtype rounds them first.
CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "deque": collections.deque,
    "object array": lambda x: np.fromiter(x, dtype=object, count=len(x)),
}
ROUNDING: dict[str, Callable[[list[float]], Any]] = {
    "float32": lambda x: torch.tensor(x, dtype=torch.float32),
    "float64": lambda x: torch.tensor(x, dtype=torch.float64, requires_grad=True),
    "float16": lambda x: torch.tensor(x).half(),
    "bfloat16": lambda x: torch.tensor(x).bfloat16(),
    "int8": lambda x: torch.tensor(x).clamp(-100, 100).to(torch.int8),
    "bool": lambda x: torch.tensor(x) > 0,
    "float8": lambda x: torch.tensor(x).to(torch.float8_e4m3fn),
    "NumPy": lambda x: np.array(x, dtype=np.float64),
    "NumPy, float32": lambda x: np.array(x).astype(np.float32),
    "NumPy, longdouble": lambda x: np.array(x, dtype=np.longdouble),
    "array": lambda x: array.array("d", x),
    "strided": lambda x: torch.tensor(x, dtype=torch.float64).repeat_interleave(2)[::2],
}
# What is no list of numbers, of as many values as there are completions.
WRONG: dict[str, Callable[[list[float]], Any]] = {
    "None": lambda x: None,
    "a generator": iter,
    "a dict": lambda x: dict(enumerate(x)),
    "a set": set,
    "text": lambda x: "1" * len(x),
    "bytes": lambda x: b"1" * len(x),
    "a bytearray": lambda x: bytearray(len(x)),
    "a number": lambda x: 1.0,
    "a scalar": lambda x: torch.tensor(1.0),
    "a class": lambda x: list,
    "no length": _Lies,
    "a column": lambda x: torch.tensor(x).view(-1, 1).expand(-1, 2) if x else torch.tensor(1.0),
    "meta": lambda x: torch.tensor(x, device="meta"),
    "sparse": lambda x: torch.tensor(x).to_sparse(),
    "complex": lambda x: torch.tensor([*x, 0.0]).to(torch.complex64),
    "nested": lambda x: torch.nested.nested_tensor([torch.ones(1) for _ in x] or [torch.ones(1)]),
    "one more": lambda x: [*x, 0.5],
    "one less": lambda x: x[1:] if x else [0.5],
    "a list of lists": lambda x: [x, x, x, *([x] * len(x))],
}
RAISED = (OwnError, ValueError, TypeError, KeyError, ZeroDivisionError, StopIteration, RecursionError, TimeoutError)


@dataclass
class Own:
    """A reward function of the user's own, and what it says of each row.

    Attributes:
        words: what it does, in words.
        values: what it says of each row of the batch, where it says anything.
        raised: the error that it raises, or None; otherwise ``wrong`` makes what it returns of the numbers.
        seen: the rows of each call.
    """

    words: str
    values: Values
    raised: BaseException | None = None
    wrong: Callable[[list[float]], Any] | None = None
    items: Sequence[Any] = ()
    container: Callable[[list[Any]], Any] = list
    late: bool = False
    seen: list[list[int]] = field(default_factory=list)

    def reward(self, name: str) -> FunctionReward:
        def answer(row: list[int]) -> Any:
            self.seen.append(row)
            if self.raised is not None:
                raise self.raised
            if self.wrong is not None:
                return self.wrong([0.5] * len(row))
            return self.container([self.items[i] for i in row])

        async def later(completions: Any, row: list[int]) -> Any:
            await asyncio.sleep(0)
            return answer(row)

        def now(completions: Any, row: list[int]) -> Any:
            return answer(row)

        return FunctionReward(later if self.late else now, name)

    def on(self, rows: list[int]) -> Values | str:
        """What is right for these rows; a text says that the reward fails, and how."""
        if self.raised is not None:
            return "raises"
        if self.wrong is not None or any(isinstance(self.values[i], Exception) for i in rows):
            return "no rewards"
        return [self.values[i] for i in rows]


def draw(rng: random.Random, batch: int) -> Own:
    """A function for a batch of so many completions."""
    late = rng.random() < 0.3
    how = rng.random()
    if how < 0.12:
        error = asyncio.CancelledError() if late and rng.random() < 0.3 else rng.choice(RAISED)("mine")
        return Own(f"raises {type(error).__name__}", [], raised=error, late=late)
    if how < 0.3:
        kind = rng.choice([*WRONG])
        return Own(kind, [], wrong=WRONG[kind], late=late)
    if how < 0.6:
        kind, numbers = (
            rng.choice([*ROUNDING]),
            [rng.choice([0.0, 1.0, -1.0, 0.7, 0.1, 0.3, 2.5]) for _ in range(batch)],
        )
        rounded = [float(x) for x in (ROUNDING[kind](numbers).tolist() if batch else ())]
        return Own(f"{kind} {numbers}", [*rounded], items=numbers, container=ROUNDING[kind], late=late)
    pairs = [rng.choice(_PLAIN if rng.random() < 0.8 else ITEMS) for _ in range(batch)]
    kind = rng.choice([*CONTAINERS])
    values: list[Any] = [truth for _, truth in pairs]
    words = f"{kind} of {[type(item).__name__ if isinstance(item, _Floats) else item for item, _ in pairs]!r:.200}"
    return Own(words, values, items=[item for item, _ in pairs], container=CONTAINERS[kind], late=late)


class _Expected:
    """The documented rule: a reward, and a function that gives what is right for some rows of the batch."""

    def __init__(self, reward: Reward, on: Callable[[list[int]], Values | str], words: str) -> None:
        self.reward, self.on, self.words = reward, on, words


def _own(rng: random.Random, name: str, batch: int) -> _Expected:
    own = draw(rng, batch)
    expected = _Expected(own.reward(name), own.on, f"{'async ' * own.late}{own.words}")
    if rng.random() < 0.35:
        expected = _guarded(rng, expected)
    return expected


def _guarded(rng: random.Random, inner: _Expected) -> _Expected:
    on_error: Any = rng.choice(["stop", "abstain"])
    timeout = rng.choice([None, None, 30.0])

    def on(rows: list[int]) -> Values | str:
        found = inner.on(rows)
        return [None] * len(rows) if isinstance(found, str) and on_error == "abstain" else found

    return _Expected(
        Guarded(inner.reward, timeout=timeout, on_error=on_error), on, f"{inner.words}, {on_error}, {timeout}"
    )


def _masked(rng: random.Random, inner: _Expected, columns: dict[str, list[Any]]) -> _Expected:
    mask: Any = rng.choice(
        ["flag", {"family": "a"}, {"family": ["a", "b"]}, {"family": "nobody"}, {"family": ["c", None]}]
    )

    def counts(row: int) -> bool:
        if isinstance(mask, str):
            return bool(columns[mask][row])
        return columns["family"][row] in (mask["family"] if isinstance(mask["family"], list) else [mask["family"]])

    return _Expected(Where(inner.reward, mask), _on_rows(inner, counts, None), f"{inner.words}, where {mask}")


def _on_rows(
    inner: _Expected, counts: Callable[[int], bool], otherwise: float | None
) -> Callable[[list[int]], Values | str]:
    def on(rows: list[int]) -> Values | str:
        own = [row for row in rows if counts(row)]
        found = inner.on(own) if own else []
        if isinstance(found, str):
            return found
        known = dict(zip(own, found, strict=True))
        return [known.get(row, otherwise) for row in rows]

    return on


def _gated(rng: random.Random, inner: _Expected, batch: int) -> _Expected:
    gate = _own(rng, "gate", batch)
    threshold, closed = rng.choice([0.7, 0.1, 0.3, 0, 1.0, -1e300, math.inf]), rng.choice([None, None, 0.0, -1.5])

    def on(rows: list[int]) -> Values | str:
        opened = gate.on(rows)
        if isinstance(opened, str):
            return opened
        least = _float32(threshold)  # Rewards are float32, and so is the least one that opens the gate.
        known = {row: value is not None and _float32(value) >= least for row, value in zip(rows, opened, strict=True)}
        return _on_rows(inner, lambda row: known[row], closed)(rows)

    reward = Gate(inner.reward, on=gate.reward, threshold=threshold, closed=closed)
    return _Expected(reward, on, f"{inner.words}, gate ({gate.words}) from {threshold}, else {closed}")


def _labelled(rng: random.Random, inner: _Expected, step: int, prompts: list[str]) -> _Expected:
    labels = LabelsConfig(share=rng.choice([1.0, 0.5, 0.1]), early=rng.choice([0, 3]))
    counts = [labels.chosen(step, prompt) for prompt in prompts]
    return _Expected(
        Labelled(inner.reward, labels), _on_rows(inner, lambda row: counts[row], None), f"{inner.words}, {labels}"
    )


def _float32(x: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(x))


def judge(rewards: list[_Expected], batch: RewardBatch) -> tuple[str, str]:
    """How a batch ends: "right", "refused by name", or a fault, and words on it."""
    rows = [*range(len(batch))]
    truth = [expected.on(rows) for expected in rewards]
    fails = [isinstance(found, str) for found in truth]
    names = [expected.reward.name for expected in rewards]
    try:
        found = RewardSet([expected.reward for expected in rewards])(batch)
    except Exception as error:
        told = " ".join([str(error), *getattr(error, "__notes__", [])])
        named = any(fail and f"reward {name!r}" in told for fail, name in zip(fails, names, strict=True))
        named |= any(fails) and "reward 'gate'" in told
        meant = isinstance(error, (ValueError, TypeError, *RAISED, RuntimeError))
        return ("refused by name" if named and meant else "refused wrongly"), f"{type(error).__name__}: {told:.300}"
    if any(fails):
        return "wrong", f"{found.tolist()}, expected an error: {truth}"
    expected_BK = [
        [math.nan if x is None else _float32(x) for x in column] for column in truth if not isinstance(column, str)
    ]
    right = torch.tensor(expected_BK, dtype=torch.float64).T.reshape(len(batch), len(rewards))
    same = found.shape == right.shape and torch.equal(found.double().nan_to_num(1e40), right.nan_to_num(1e40))
    return ("right", "") if same else ("wrong", f"{found.tolist()}, expected {right.tolist()}")


def make(rng: random.Random) -> Input:
    """A set of rewards for a batch of up to six completions."""
    count, step = rng.choice([0, 1, 2, 3, 4, 6]), rng.randrange(5)
    prompts: list[Any] = [f"prompt {rng.randrange(3)}" for _ in range(count)]
    columns = {
        "row": [*range(count)],
        "flag": [rng.choice([True, False, "", "x", 0, 1, None]) for _ in range(count)],
        "family": [rng.choice(["a", "b", "c", None]) for _ in range(count)],
    }
    replies: list[Any] = [f"reply {i}" for i in range(count)]
    batch = RewardBatch(prompts, replies, [[i] for i in range(count)], columns, step=step)
    rewards = []
    for k in range(rng.choice([1, 1, 2, 3])):
        expected = _own(rng, f"mine {k}", count)
        if rng.random() < 0.25:
            expected = _gated(rng, expected, count)
        if rng.random() < 0.25:
            expected = _masked(rng, expected, columns)
        if rng.random() < 0.15:
            expected = _labelled(rng, expected, step, prompts)
        rewards.append(expected)
    words = "; ".join(expected.words for expected in rewards)
    return Input(f"{count} completions, {words}", lambda: judge(rewards, batch))


def run(inputs: int, seed: int, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Tries sets of rewards, see ``trial.try_inputs``."""
    return try_inputs(make, ("right", "refused by name"), inputs=inputs, seed=seed, first=first)


def main(given: argparse.Namespace) -> dict[str, Any]:
    """Runs the command, and returns its tally."""
    return as_tally(given, *run(given.inputs, given.seed, given.first))
