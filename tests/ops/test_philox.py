"""Philox4x32-10 equals Random123's vectors and a version in Python integers, and draws depend on their keys alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maestro_fast.ops.philox import philox_4x32, uniform

CPU = torch.device("cpu")
WORD = 2**32


def philox_of_integers(counter: list[int], key: list[int]) -> list[int]:
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, WORD)
        high1, low1 = divmod(c2 * 0xCD9E8D57, WORD)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([int(word, 16)]) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    got = philox_4x32((c0, c1, c2, c3), (k0, k1))
    assert " ".join(f"{int(word):08x}" for word in got) == expected


@pytest.mark.parametrize("seed", [0, 3, 2**32 + 5, 2**64 - 1])
@pytest.mark.parametrize("step", [0, 2**32 - 1])
@pytest.mark.parametrize("offset", [0, 2**32 - 1, 2**40 + 17])
def test_a_draw_is_the_first_word_of_index_step_and_seed(seed: int, step: int, offset: int) -> None:
    expected = []
    for index in range(offset, offset + 3):
        words = philox_of_integers([index % WORD, index // WORD, step, 0], [seed % WORD, seed // WORD])
        expected.append((words[0] >> 8) / 2**24)
    assert uniform(seed, step, offset, 3, CPU).tolist() == expected


def test_draws_are_uniform() -> None:
    count, bins = 160_000, 16
    u = uniform(11, 7, 0, count, CPU)
    assert u.dtype == torch.float32
    assert bool((u >= 0).all()) and bool((u < 1).all())
    assert torch.equal(u * 2**24, (u * 2**24).round())
    observed = torch.histc(u, bins, 0, 1)
    chi_square = ((observed - count / bins) ** 2 / (count / bins)).sum()
    assert chi_square < 37.7  # 15 degrees of freedom, p = 0.001
    neighbours = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]
    assert abs(neighbours) < 4 / count**0.5


@pytest.mark.parametrize("cut", [0, 1, 50, 99, 100])
def test_shards_draw_what_the_whole_draws(cut: int) -> None:
    whole = uniform(5, 9, 1000, 100, CPU)
    shards = [uniform(5, 9, 1000, cut, CPU), uniform(5, 9, 1000 + cut, 100 - cut, CPU)]
    assert torch.equal(torch.cat(shards), whole)


def test_steps_and_seeds_and_the_high_words_give_other_draws() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 2**32), (1, 1, 0), (0, 0, 64)]
    draws = [uniform(seed, step, offset, 64, CPU) for seed, step, offset in keys]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert (one == other).sum() <= 1
            assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.5


@pytest.mark.parametrize(
    ("name", "value"), [("seed", -1), ("seed", 2**64), ("step", 2**32), ("step", -1), ("offset", -1), ("offset", 2**63)]
)
def test_a_number_that_does_not_fit_is_named(name: str, value: int) -> None:
    arguments = {"seed": 0, "step": 0, "offset": 0, name: value}
    with pytest.raises(ValueError, match=f"^{name}: "):
        uniform(arguments["seed"], arguments["step"], arguments["offset"], 1, CPU)


@pytest.mark.parametrize(("name", "value"), [("seed", None), ("step", 1.5), ("step", True), ("offset", "0")])
def test_what_is_no_integer_is_named(name: str, value: Any) -> None:
    arguments = {"seed": 0, "step": 0, "offset": 0, name: value}
    with pytest.raises(TypeError, match=f"^{name}: got {type(value).__name__} .*, expected an integer"):
        uniform(arguments["seed"], arguments["step"], arguments["offset"], 1, CPU)


def test_the_last_response_has_an_index_too() -> None:
    last = 2**63 - 1
    assert torch.equal(uniform(0, 0, last - 3, 3, CPU)[2:], uniform(0, 0, last - 1, 1, CPU))
    with pytest.raises(ValueError, match=f"^offset: {last - 3} with 4 responses, expected offset \\+ responses < "):
        uniform(0, 0, last - 3, 4, CPU)
