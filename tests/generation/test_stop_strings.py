"""Stop strings: a response ends with the token that completes one, and has only tokens that were sampled."""

from __future__ import annotations

import pytest
import torch

from maestro_fast.generation.transformers import _StopStrings
from tests.generation.helpers import EOS, PAD, TOKENIZER, generate, prompts, recomputed
from tests.tiny import tiny_model, tiny_tokenizer

LETTERS = ["a", "b", "c"]


@pytest.mark.parametrize("pad", ["<|pad|>", "<|end|>", None])
def test_a_response_ends_where_a_stop_string_is_complete(pad: str | None) -> None:
    """The padding behind a response may be an id that ends responses; it must not be taken for a sampled token."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.pad_token = pad
    rollouts = generate(model, prompts("the", times=32), tokenizer=tokenizer, max_new_tokens=25, stop=LETTERS)
    kinds = {"string": 0, "eos": 0, "limit": 0}
    for ids, text, truncated in zip(
        rollouts.completion_ids, rollouts.completions, rollouts.truncated_B.tolist(), strict=True
    ):
        assert not any(letter in tokenizer.decode(ids[:-1]) for letter in LETTERS)
        assert EOS not in ids[:-1]
        if any(letter in text for letter in LETTERS):
            kinds["string"] += 1
            assert ids[-1] != EOS and not truncated
        elif ids[-1] == EOS:
            kinds["eos"] += 1
            assert not truncated
        else:
            kinds["limit"] += 1
            assert truncated and len(ids) == 25
    assert kinds["string"] > 10 and kinds["eos"] > 0 and kinds["limit"] > 0
    assert rollouts.sampling_logprobs_C is not None
    torch.testing.assert_close(rollouts.sampling_logprobs_C, recomputed(model, rollouts), rtol=0, atol=1e-5)


def test_stopping_does_not_change_what_is_sampled() -> None:
    asked = prompts("the", times=16)
    free, stopped = generate(tiny_model(), asked), generate(tiny_model(), asked, stop=LETTERS)
    assert free.completion_ids != stopped.completion_ids
    for whole, part in zip(free.completion_ids, stopped.completion_ids, strict=True):
        assert whole[: len(part)] == part


def test_the_end_of_the_prompt_is_no_part_of_a_stop_string() -> None:
    """If the prompt's last letter counted, the first token would complete each of these strings."""
    stop = ["b" + TOKENIZER.decode([token]) for token in range(40, 120)]
    rollouts = generate(tiny_model(), prompts("the ab", times=32), stop=stop)
    firsts = [ids[0] for ids in rollouts.completion_ids]
    assert sum(40 <= token < 120 for token in firsts) >= 5
    for ids, text in zip(rollouts.completion_ids, rollouts.completions, strict=True):
        assert len(ids) == 12 or ids[-1] == EOS or any(string in text for string in stop)


def test_a_stop_string_with_the_last_token_is_not_truncated() -> None:
    rollouts = generate(tiny_model(), prompts("the", times=64), max_new_tokens=1, stop=["e"])
    has = ["e" in text for text in rollouts.completions]
    assert any(has)
    assert rollouts.truncated_B.tolist() == [
        not (h or ids == [EOS]) for h, ids in zip(has, rollouts.completion_ids, strict=True)
    ]


def fed(strings: list[str], rows: list[list[int]], prompt: list[int]) -> dict[int, int]:
    """The ends of rows that grow token by token, as in generation, where a finished row gets padding."""
    watcher, ended = _StopStrings(TOKENIZER, strings, len(prompt)), [False] * len(rows)
    for length in range(1, max(map(len, rows)) + 1):
        ids = torch.tensor([prompt + (row + [PAD] * 999)[:length] for row in rows])
        now = watcher(ids, None).tolist()
        assert all(after or not before for before, after in zip(ended, now, strict=True))
        ended = now
    assert ended == [i in watcher.ends for i in range(len(rows))]
    return watcher.ends


def test_a_string_over_several_tokens() -> None:
    """The row ends where the decoded text first holds the string, however long the text before it is."""
    before = TOKENIZER("the quick brown fox jumps over the lazy dog " * 3)["input_ids"]
    for string in ("zq", "</answer>", "é→ü", " zq ", "\n\n", "zqzqzqzqzqzqzqzqzqzqzqzq"):
        tail = TOKENIZER(string)["input_ids"]
        row = before + tail + TOKENIZER("xx")["input_ids"]
        expected = next(n for n in range(1, len(row) + 1) if string in TOKENIZER.decode(row[:n]))
        assert len(before) < expected <= len(before) + len(tail)
        assert fed(["never", string], [row, before], [3, 4, 5]) == {0: expected}


def test_padding_is_not_read_as_text_of_a_row_that_has_ended() -> None:
    row = TOKENIZER("zq")["input_ids"]
    assert fed(["zq"], [row, row * 3], [3])[0] == len(row)
