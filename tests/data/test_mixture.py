"""Shares of several data sets: right in every batch, in expectation, and over a run; and the sets as one data set."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_fast.data.dataset import PromptDataset
from maestro_fast.data.mixture import MixedOrder, MixedPrompts
from maestro_fast.data.order import PromptOrder, ShuffledOrder, StreamOrder
from maestro_fast.model.chat import ChatConfig
from tests.tiny import tiny_tokenizer

SHARES = [0.55, 0.13, 0.32]
SIZES = [11, 7, 60]
SET_OF = np.repeat([0, 1, 2], SIZES)


def test_shares_that_divide_are_exact_in_every_batch() -> None:
    for shares, block in (([0.7, 0.2, 0.1], 10), ([1 / 3] * 3, 6), ([0.25, 0.75], 8)):
        order = MixedOrder([20] * len(shares), shares, block, seed=5)
        assert all(order.counts(n) == [round(block * share) for share in shares] for n in range(200))


def test_other_shares_are_rounded_without_bias_and_met_over_a_run() -> None:
    """The mean over the seeds is the share, for any batch; and no run drifts away from its shares."""
    wanted = 8 * np.array(SHARES)
    orders = [MixedOrder(SIZES, SHARES, 8, seed) for seed in range(1200)]
    for number in (0, 7):
        counts = np.array([order.counts(number) for order in orders])
        assert (counts.sum(1) == 8).all() and (abs(counts - wanted) < 1).all()
        assert abs(counts.mean(0) - wanted).max() < 4 * 0.5 / 1200**0.5  # four standard errors of a coin at most
    counts = np.array([orders[0].counts(number) for number in range(2000)])
    assert abs(counts.cumsum(0) - wanted * np.arange(1, 2001)[:, None]).max() < 4


def test_shares_are_those_of_interleaved_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    sets = [datasets.Dataset.from_dict({"set": [i] * 4000}) for i in range(3)]
    mixed = datasets.interleave_datasets(sets, probabilities=SHARES, seed=0)
    theirs = np.bincount(mixed["set"][:4000], minlength=3) / 4000
    order = MixedOrder(SIZES, SHARES, 8, seed=0)
    ours = np.bincount([SET_OF[row] for number in range(500) for row in order.rows(number)], minlength=3) / 4000

    assert abs(ours - SHARES).max() < 1e-3  # theirs draws every row alone, so it spreads by 1 / sqrt(4000)
    assert abs(theirs - ours).max() < 4 * 0.5 / 4000**0.5


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 15), min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    block=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_row_of_a_set_comes_before_any_comes_again(
    sizes: list[int], weights: list[int], block: int, seed: int
) -> None:
    shares = [weight / sum(weights[: len(sizes)]) for weight in weights[: len(sizes)]]
    sizes = [max(size, int(block * share + 1)) for size, share in zip(sizes, shares, strict=True)]
    order, set_of = MixedOrder(sizes, shares, block, seed), np.repeat(range(len(sizes)), sizes)
    seen: Counter[int] = Counter(dict.fromkeys(range(sum(sizes)), 0))
    for number in range(40):
        rows = order.rows(number)
        assert len(rows) == len(set(rows)) == block
        seen.update(rows)
        for i in range(len(sizes)):
            visits = [seen[row] for row in seen if set_of[row] == i]
            assert max(visits) - min(visits) <= 1
    fresh = MixedOrder(sizes, shares, block, seed)
    assert [fresh.rows(number) for number in (39, 3, 20)] == [order.rows(number) for number in (39, 3, 20)]


@pytest.mark.parametrize(
    "order",
    [ShuffledOrder(40, 8, 3), MixedOrder([9, 31], [0.5, 0.5], 8, 3), StreamOrder(8, 3, 5)],
    ids=["one set", "a mixture", "a stream"],
)
def test_spare_rows_are_new_to_the_batch_and_the_same_again(order: PromptOrder) -> None:
    own = order.rows(2)
    first = order.spare_rows(2, 0, 6, {*own})
    second = order.spare_rows(2, 1, 6, {*own, *first})

    assert first == order.spare_rows(2, 0, 6, {*own}) != order.spare_rows(3, 0, 6, {*own})
    assert len({*own, *first, *second}) == 8 + 6 + 6
    everything = order.spare_rows(2, 0, 1000, {*own})
    assert len(everything) == len({*everything}) == 32 and not {*everything} & {*own}


def test_spare_rows_of_a_mixture_have_its_shares_while_there_are_any() -> None:
    order = MixedOrder([30, 90], [0.5, 0.5], 8, 3)
    used: set[int] = {*order.rows(0)}
    for round in range(5):
        spare = order.spare_rows(0, round, 6, used)
        assert sum(row < 30 for row in spare) == 3
        used |= {*spare}
    assert len(order.spare_rows(0, 9, 40, {*range(25)})) == 40, "A set that is used up leaves its places to the other."


def parts(*columns: str) -> list[PromptDataset]:
    return [
        PromptDataset([{name: f"Sea {i}{j}", "n": j} for j in range(3)], name, field=f"data[{i}]")
        for i, name in enumerate(columns)
    ]


def test_sets_become_one_data_set_whose_rows_are_named_by_their_sets() -> None:
    rows = [
        {"prompt": "the sea " * 9, "kind": "x"},
        {"prompt": "Sea 10", "kind": "x"},
        {"prompt": "Sea 11", "extra": 1},
    ]
    last = PromptDataset(
        rows, family_column="kind", family="other", field="data[1]", max_prompt_tokens=9, too_long="drop"
    )
    mixed = MixedPrompts([*parts("question"), last], [3, 1], ChatConfig())
    assert mixed.check_prompts(tiny_tokenizer()) <= 9
    prompts = mixed.prompts([mixed[i] for i in range(5)], tiny_tokenizer())

    assert prompts.texts == ["Sea 00", "Sea 01", "Sea 02", "Sea 10", "Sea 11"]
    assert prompts.families == mixed.families == ["", "", "", "x", "other"]
    assert (prompts.columns["n"], prompts.columns["extra"]) == ([0, 1, 2, None, None], [None] * 4 + [1])
    assert [mixed.name_of(i) for i in (0, 2, 3)] == ["row 0 of data[0]", "row 2 of data[0]", "row 1 of data[1]"]
    assert mixed.describe() == [
        "data[0]: 3 prompts",
        "data[1]: 2 prompts; 1 of more than 9 tokens were left out",
        "shares of every generation batch: data[0] 0.75, data[1] 0.25",
    ]


def test_sets_without_shares_are_shuffled_as_one() -> None:
    mixed, one = MixedPrompts(parts("prompt", "prompt"), None, ChatConfig()), ShuffledOrder(6, 2, 7)

    assert [mixed.order(2, 7, 1).rows(number) for number in range(6)] == [one.rows(number) for number in range(6)]


def test_what_a_mixture_cannot_do_is_said() -> None:
    mixed = MixedPrompts(parts("prompt", "prompt"), [0.9, 0.1], ChatConfig())
    with pytest.raises(ValueError, match=r"data\[0\]\.share: 0\.9 of batch\.prompts_per_batch 4 is up to 4 prompts"):
        mixed.check_enough(4)
    with pytest.raises(ValueError, match=r"batch\.prompts_per_batch: 7, but the data holds 6 prompts"):
        mixed.check_enough(7)
    clash = PromptDataset([{"question": "a", "prompt": "b"}], "question", field="data[1]")
    with pytest.raises(ValueError, match=r"data\[1\]\.prompt_column: 'question', but there is another column 'prompt'"):
        MixedPrompts([*parts("prompt"), clash], None, ChatConfig())
