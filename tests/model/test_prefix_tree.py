"""Trees of prompts and completions hold every sequence, and a token sees exactly what comes before it in its own."""

from __future__ import annotations

from bisect import bisect_right

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_fast.model.prefix_tree import MIN_COMMON, Ids, Tree, forest
from maestro_fast.model.rows import Sequences, rows_of
from maestro_fast.model.shared_attention import tree_mask

PAIR_COSTS = st.sampled_from([0.0, 1e-3, 0.02, 1.0])


@st.composite
def batches(draw: st.DrawFn) -> Sequences:
    """Groups in any order. Prompts begin alike, or one begins another; completions may be equal, short or empty."""
    stem = list(range(1, 1 + 2 * MIN_COMMON))
    prompts = []
    for _ in range(draw(st.integers(1, 4))):
        common = draw(st.sampled_from([0, 1, MIN_COMMON - 1, MIN_COMMON, MIN_COMMON + 3, 2 * MIN_COMMON]))
        tail = draw(st.lists(st.integers(1, 3), min_size=int(common == 0), max_size=5))
        prompts.append(stem[:common] + tail)
    completions = st.lists(st.integers(1, 3), max_size=6)
    responses = [(prompt, draw(completions)) for prompt in prompts for _ in range(draw(st.integers(1, 4)))]
    responses = draw(st.permutations(responses))
    return Sequences([p for p, _ in responses], [c for _, c in responses])


def seen(tree: Tree, token: int) -> Ids:
    """What a token sees by the rule of the mask, in order."""
    return [j for j in range(len(tree)) if j <= token < tree.ends[j]]


def path_to(starts: Ids, parents: Ids, token: int, total: int) -> Ids:
    """The tokens of the pieces from the root to that of a token, which is the last of its piece."""
    bounds = [*starts, total]
    piece, path = bisect_right(starts, token) - 1, Ids()
    while piece >= 0:
        path = [*range(bounds[piece], bounds[piece + 1]), *path]
        piece = parents[piece]
    return path


@settings(max_examples=100)
@given(batches(), PAIR_COSTS, st.booleans())
def test_a_token_sees_exactly_the_earlier_tokens_of_its_sequence(
    batch: Sequences, pair_cost: float, across_prompts: bool
) -> None:
    trees = forest(batch.prompt_ids, batch.completion_ids, pair_cost=pair_cost, across_prompts=across_prompts)

    assert sorted(i for tree in trees for i in tree.places) == list(range(len(batch)))
    for tree in trees:
        for i, place in tree.places.items():
            assert [tree.ids[at] for at in place.tolist()] == batch.tokens[i]
            assert [tree.positions[at] for at in place.tolist()] == list(range(batch.lengths[i]))
            for length, at in enumerate(place.tolist(), start=1):
                assert seen(tree, at) == place[:length].tolist()
        assert {at for place in tree.places.values() for at in place.tolist()} == set(range(len(tree)))
        if not across_prompts:
            assert tree.depth <= 2 and len({tuple(batch.prompt_ids[i]) for i in tree.places}) == 1


@settings(max_examples=60)
@given(batches())
def test_pieces_lead_from_the_root_to_every_sequence(batch: Sequences) -> None:
    for tree in forest(batch.prompt_ids, batch.completion_ids, pair_cost=0.0):
        bounds = [*tree.starts, len(tree)]
        depths = [0] * len(tree.starts)
        for piece, parent in enumerate(tree.parents):
            assert parent < piece and bounds[piece] < bounds[piece + 1]
            depths[piece] = 1 + (0 if parent < 0 else depths[parent])
        assert tree.parents[0] == -1 and tree.depth == max(depths)
        for place in tree.places.values():
            assert path_to(tree.starts, tree.parents, int(place[-1]), len(tree)) == place.tolist()


@settings(max_examples=60)
@given(batches(), PAIR_COSTS, st.booleans())
def test_rows_keep_trees_and_padding_apart(batch: Sequences, pair_cost: float, one_row: bool) -> None:
    rows = rows_of(batch, "shared", one_row=one_row, pair_cost=pair_cost)
    assert rows.trees is not None and rows.place_T is not None
    sees = tree_mask(rows.trees, torch.device("cpu"))[:, 0]
    near = tree_mask(rows.trees, torch.device("cpu"), window=3)[:, 0]
    count, width = rows.input_ids.shape
    expected = torch.eye(width, dtype=torch.bool).repeat(count, 1, 1)  # That is what padding sees: itself.
    windowed = expected.clone()
    for place in rows.place_T.split(batch.lengths):
        row, columns = int(place[0]) // width, place % width
        assert (place // width == row).all()
        for length, at in enumerate(columns.tolist(), start=1):
            expected[row, at, columns[:length]] = True
            windowed[row, at, columns[max(length - 3, 0) : length]] = True

    assert rows.input_ids.flatten()[rows.place_T].tolist() == [t for ids in batch.tokens for t in ids]
    assert rows.position_ids.flatten()[rows.place_T].tolist() == [t for n in batch.lengths for t in range(n)]
    assert torch.equal(sees, expected) and torch.equal(near, windowed)
    assert rows.trees.pairs == int(expected.sum())
    if one_row:
        assert count == 1 and len(rows.place_T.unique()) == width, "one row has no padding"
    held = set(rows.place_T.tolist())
    bounds = [*rows.trees.starts, count * width]
    for start, stop, parent in zip(bounds, bounds[1:], rows.trees.parents, strict=False):
        assert held.issuperset(range(start, stop)) or (parent == -1 and held.isdisjoint(range(start, stop)))
    for place in rows.place_T.split(batch.lengths):
        assert path_to(rows.trees.starts, rows.trees.parents, int(place[-1]), count * width) == place.tolist()


def test_a_prompt_stands_once_for_all_its_responses() -> None:
    prompts = [[7] * 5, [8] * 3, [7] * 5, [7] * 5]
    first, second = forest(prompts, [[1], [2, 3], [], [1]], pair_cost=0.0)

    assert first.ids == [7] * 5 + [1, 1] and second.ids == [8] * 3 + [2, 3]
    assert first.ends == [7] * 5 + [6, 7] and first.positions == [0, 1, 2, 3, 4, 5, 5]
    assert first.places[2].tolist() == [0, 1, 2, 3, 4] and first.places[3].tolist() == [0, 1, 2, 3, 4, 6]


def test_prompts_share_a_beginning_where_that_pays() -> None:
    def sizes(common: int, pair_cost: float, across_prompts: bool = True) -> list[int]:
        stem = list(range(10, 10 + common))
        prompts = [[*stem, 1, 2], [*stem, 3], stem]
        completions = [[4] * 30, [5] * 20, [6]]
        return [len(t) for t in forest(prompts, completions, pair_cost=pair_cost, across_prompts=across_prompts)]

    apart = [MIN_COMMON + 1, MIN_COMMON + 32, MIN_COMMON + 21]
    assert sizes(MIN_COMMON, 0.0) == [MIN_COMMON + 54]
    assert sizes(MIN_COMMON - 1, 0.0) == [size - 1 for size in apart]
    assert sizes(MIN_COMMON, 0.0, across_prompts=False) == apart
    assert sizes(MIN_COMMON, 1.0) == [MIN_COMMON + 33, MIN_COMMON + 21]  # Only the first two have fewer pairs together.


def test_the_responses_of_a_prompt_are_dealt_to_several_trees_where_pairs_are_dear() -> None:
    completions = [[1] * 20, [2] * 20, [3] * 10, [4] * 10, [], [5] * 20]

    def dealt(pair_cost: float) -> list[int]:
        return [len(tree) for tree in forest([[9] * 4] * 6, completions, pair_cost=pair_cost)]

    def cost(sizes: list[int], pair_cost: float) -> float:
        return sum(size + pair_cost * size**2 for size in sizes)

    assert dealt(0.0) == [84] and dealt(1e-4) == [84]
    for pair_cost in (0.01, 0.1, 1.0):
        sizes = dealt(pair_cost)
        assert len(sizes) > 1 and sum(sizes) == 80 + 4 * len(sizes)
        assert cost(sizes, pair_cost) < cost([84], pair_cost)
