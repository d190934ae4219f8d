"""Which rows of a batch are compared, and their groups. These tests need no verl."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from maestro_fast.integrations.verl.rows import Rows, prompt_rank
from maestro_fast.ops import Groups, cpp
from maestro_fast.ops.groups import _read_session_keys, number_keys, number_session_keys

# uid "b" has three sessions, of which the first has three outputs out of order, and "a_1" has underscores in its name.
KEYS = ["b_0_1", "a_1_0_0", "b_0_2", "pad_0_0", "b_10_0", "a_1_1_0", "b_0_0", "b_2_0", "pad_1_0"]
PADDING = [key.startswith("pad") for key in KEYS]


def members(rows: Rows) -> list[list[str]]:
    """The keys of each group."""
    index = rows.groups.index_NG.tolist()
    return [[KEYS[int(rows.final_R[i])] for i in group if i < rows.groups.batch] for group in index]


def test_the_last_output_of_a_session_is_compared() -> None:
    rows = Rows.of_keys(KEYS, PADDING)
    assert members(rows) == [["b_0_2", "b_10_0", "b_2_0"], ["a_1_0_0", "a_1_1_0"]]
    spread = rows.spread(torch.arange(1.0, 1.0 + len(rows.final_R)))
    by_key = dict(zip(KEYS, spread.tolist(), strict=True))
    assert by_key["b_0_0"] == by_key["b_0_1"] == by_key["b_0_2"] != 0.0
    assert by_key["pad_0_0"] == by_key["pad_1_0"] == 0.0 and len({*by_key.values()}) == 6


def test_groups_are_sorted_by_the_prompts_number_and_then_by_session() -> None:
    """A session's number is a number: 10 stands behind 2."""
    order = [3 if key.startswith("b") else 7 for key in KEYS]
    expected = [["b_0_2", "b_2_0", "b_10_0"], ["a_1_0_0", "a_1_1_0"]]
    assert members(Rows.of_keys(KEYS, PADDING, order)) == expected
    for seed in range(5):
        shuffled = torch.randperm(len(KEYS), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = Rows.of_keys([KEYS[i] for i in shuffled], [PADDING[i] for i in shuffled], [order[i] for i in shuffled])
        index = rows.groups.index_NG.tolist()
        found = [[KEYS[shuffled[int(rows.final_R[i])]] for i in group if i < rows.groups.batch] for group in index]
        assert found == expected


def test_prompts_of_one_number_are_sorted_by_uid() -> None:
    """They are the same prompt, sampled twice."""
    assert members(Rows.of_keys(KEYS, PADDING, [0] * len(KEYS)))[0] == ["a_1_0_0", "a_1_1_0"]


@pytest.mark.parametrize("indices", [[float("nan")], [None, 2], ["b", 1, 2.5], ["x", "y"], [True, 0]])
def test_whatever_numbers_the_prompts_a_group_stands_together(indices: list[object]) -> None:
    """Data may lack the number in some rows, and the rows of a prompt may even have several."""
    keys = [f"u{i % 4}_{i}_0" for i in range(24)]
    order = [prompt_rank(indices[i % len(indices)], f"source{i % 4}") for i in range(24)]
    rows = Rows.of_keys(keys, [False] * 24, order)
    for group in rows.groups.index_NG.tolist():
        assert len({keys[int(rows.final_R[i])].split("_")[0] for i in group}) == 1 and len(group) == 6


def test_prompts_of_equal_number_stand_by_the_name_of_their_data() -> None:
    """So they do not stand by their uids, which differ in a run that is resumed."""
    for uids in (("a", "b"), ("b", "a")):
        keys = [f"{uids[0]}_0_0", f"{uids[1]}_0_0"]
        rows = Rows.of_keys(keys, [False] * 2, [prompt_rank(0, "math"), prompt_rank(0, "gsm8k")])
        assert rows.final_R.tolist() == [1, 0]


def test_ids_beyond_the_groups_are_refused() -> None:
    for ids in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match="expected 0 to 1"):
            Groups.of_numbers(torch.tensor(ids), 2)


def test_rows_that_are_all_compared_stand_in_their_places() -> None:
    keys = [f"u{i % 3}_{i}_0" for i in range(12)]
    for rows in (Rows.of_keys(keys, [False] * 12), Rows.of_uids([key.split("_")[0] for key in keys])):
        values = torch.arange(12.0)
        assert torch.equal(rows.take(values), values) and torch.equal(rows.spread(values), values)
        assert torch.equal(rows.groups.index_NG[1], torch.tensor([1, 4, 7, 10]))


def test_a_batch_of_padding_alone_and_no_rows_at_all() -> None:
    rows = Rows.of_keys(["pad_0_0", "pad_1_0"], [True, True])
    assert rows.final_R.numel() == 0 and torch.equal(rows.spread(torch.zeros(0)), torch.zeros(2))
    assert Rows.of_keys([], []).final_R.numel() == 0 and Rows.of_uids([]).groups.batch == 0


@pytest.mark.parametrize("key", ["", "uid", "uid_0", "uid_0_x", "uid_0_", "uid_0_1.5", "uid_0_-1", "uid_0_+1"])
def test_other_keys_are_named(key: str) -> None:
    for read in (number_session_keys, _read_session_keys):
        with pytest.raises(ValueError, match=r"keys: '.*', expected uid_session_output"):
            read([key], [False])


def test_flags_that_do_not_fit_the_keys_are_named() -> None:
    with pytest.raises(ValueError, match="left_out: 1 flags, expected 2"):
        number_session_keys(["a_0_0", "a_1_0"], [False])


def test_other_types_than_str() -> None:
    """Keys of sessions are texts; a uid may be anything that can be a key of a dict."""
    with pytest.raises(TypeError, match="keys: expected a list of str"):
        number_session_keys(["a_0_0", 1], [False, False])  # type: ignore[list-item]
    numbers, count = number_keys(["1", 1, ("1",), 1.0, "1", None])
    assert numbers.tolist() == [0, 1, 2, 1, 0, 3] and count == 4


def test_many_keys_fill_the_hash_table() -> None:
    keys = [f"{i * 2654435761 % 2**32:x}_{i}_0" for i in range(5000)]
    found, expected = number_session_keys(keys * 2, [False] * 10000), _read_session_keys(keys * 2, [False] * 10000)
    assert torch.equal(found.sessions_B, expected.sessions_B) and found.sessions == expected.sessions == 5000
    assert torch.equal(found.groups_B, expected.groups_B)


def test_without_the_compiled_module_python_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, padding = awkward(0)
    found, of_uids = Rows.of_keys(keys, padding), Rows.of_uids(keys)
    monkeypatch.setattr(cpp, "why_not_built", lambda: "it is not built")
    plain, plain_of_uids = Rows.of_keys(keys, padding), Rows.of_uids(keys)
    assert torch.equal(found.final_R, plain.final_R) and found.session_B is not None and plain.session_B is not None
    assert torch.equal(found.session_B, plain.session_B)
    same_groups(found.groups, plain.groups)
    same_groups(of_uids.groups, plain_of_uids.groups)


def awkward(seed: int) -> tuple[list[str], list[bool]]:
    """Keys with underscores, empty parts, characters of several bytes, and repeats, in random order."""
    generator = torch.Generator().manual_seed(seed)
    uids = ["a", "a_b", "a_b_c", "", "_", "Ü_ß", "日本", "x" * 300, "a_0"]
    keys = [f"{uid}_{session}_{output}" for uid in uids for session in ("0", "1", "s", "") for output in (0, 2, 10)]
    order = torch.randint(0, len(keys), (200,), generator=generator).tolist()
    return [keys[i] for i in order], (torch.rand(200, generator=generator) < 0.2).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_cpp_reads_keys_as_the_reference_does(seed: int) -> None:
    keys, padding = awkward(seed)
    found, expected = number_session_keys(keys, padding), _read_session_keys(keys, padding)
    assert found[3:] == expected[3:]
    for one, two in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("seed", range(4))
def test_groups_of_keys_are_those_of_their_numbers(seed: int) -> None:
    """Whatever the keys are, and in whatever order they come."""
    keys, _ = awkward(seed)
    numbers, count = number_keys(keys)
    mixed: Sequence[object] = [(key,) if i % 2 else key for i, key in enumerate(keys)]
    known: dict[object, int] = {}
    assert numbers.tolist() == [known.setdefault(key, len(known)) for key in keys] and count == len(known)
    same_groups(Groups.of_keys(keys), Groups.of(numbers, len(keys)))
    other, _ = number_keys(mixed)  # type: ignore[arg-type]
    same_groups(Groups.of_keys(mixed), Groups.of(other, len(keys)))  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [[3, 3, 3], [1], [1, 4, 2], [5], []])
def test_consecutive_groups_of_one_size_are_seen(sizes: list[int]) -> None:
    keys = [f"u{n}" for n, size in enumerate(sizes) for _ in range(size)]
    numbers = torch.tensor([n for n, size in enumerate(sizes) for _ in range(size)], dtype=torch.int64)
    found, expected = Groups.of_keys(keys), Groups.of(numbers, len(keys))
    same_groups(found, expected)
    assert found.size == expected.size == (sizes[0] if sizes and {*sizes} == {sizes[0]} else 0)


def same_groups(found: Groups, expected: Groups) -> None:
    assert found.batch == expected.batch and found.size == expected.size
    assert torch.equal(found.index_NG, expected.index_NG)
    for name in ("slot_B", "order_B", "offsets_N1"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
