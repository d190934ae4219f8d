"""Contexts are means over spans of tokens, wherever the tokens are. These tests need no verl."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.integrations.verl.contexts import KINDS, Reading, pooled, spans

LENGTHS, PROMPTS = [7, 2, 5, 9], [3, 1, 4, 2]


def jagged(lengths: list[int]) -> Tensor:
    return torch.nested.as_nested_tensor([torch.arange(n) for n in lengths], layout=torch.jagged)


def batch(**changes: Any) -> dict[str, Any]:
    return {"input_ids": jagged(LENGTHS), "prompts": jagged(PROMPTS)} | changes


def truth(hidden: Tensor, kind: str) -> Tensor:
    found = []
    for row, prompt in zip(hidden[: sum(LENGTHS)].split(LENGTHS), PROMPTS, strict=True):
        states = {
            "response": row[-1],
            "response_mean": row[prompt:].mean(0),
            "prompt_last": row[prompt - 1],
            "prompt_mean": row[:prompt].mean(0),
        }
        found.append(states[kind])
    return torch.stack(found)


def packed_spans(kind: str) -> tuple[Tensor, Tensor]:
    first_B, length_B = spans(batch(), kind)
    start_B = torch.tensor([0, *LENGTHS[:-1]]).cumsum(0)
    return start_B + first_B, length_B


@pytest.mark.parametrize("tail", [0, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind: str, tail: int) -> None:
    """What stands in the tail counts for nothing, be it NaN."""
    hidden = torch.randn(sum(LENGTHS) + tail, 6)
    hidden[sum(LENGTHS) :] = torch.nan
    torch.testing.assert_close(pooled(hidden, *packed_spans(kind)), truth(hidden, kind))


@pytest.mark.parametrize("processes", [2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_sequences(kind: str, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process sums up what it has of a span; some have nothing, and some spans lie in several parts."""
    hidden = torch.randn(24, 6)
    parts: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: len(parts))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda part, group: parts.append(part))
    for share in hidden.split(24 // processes):
        pooled(share, *packed_spans(kind), group="all of them")
    torch.testing.assert_close(torch.stack(parts).sum(0), truth(hidden, kind))


def test_contexts_are_float32() -> None:
    hidden = torch.randn(sum(LENGTHS), 6, dtype=torch.bfloat16)
    contexts = pooled(hidden, *packed_spans("prompt_mean"))
    assert contexts.dtype == torch.float32
    torch.testing.assert_close(contexts, truth(hidden.float(), "prompt_mean"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": None}, "prompts: missing, expected a jagged tensor, for the context prompt_mean"),
        ({"prompts": torch.ones(4, 3)}, "prompts: Tensor torch.strided, expected a jagged tensor"),
        ({"prompts": jagged([3, 1])}, "prompts: 2 rows, expected 4 as in input_ids"),
        ({"input_ids": torch.ones(4, 9)}, "input_ids: Tensor torch.strided, expected a jagged tensor"),
    ],
)
def test_a_batch_without_prompts_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        spans(batch(**changes), "prompt_mean")
    assert message in str(error.value)


def test_reading_ends_with_an_error_too() -> None:
    """What the hook has kept, and the hook itself, do not outlive a forward that fails."""
    reading, layer = Reading(), torch.nn.Linear(1, 1)
    hook = layer.register_forward_hook(lambda *_: None)
    with pytest.raises(KeyError), reading._reading("response", [hook]):
        assert reading._context_kind == "response"
        reading._hidden = torch.ones(1)
        raise KeyError
    assert reading._hidden is None and reading._context_kind is None and not layer._forward_hooks


def test_states_that_nobody_saw_are_an_error() -> None:
    reading = Reading()
    with reading._reading("response", []):
        reading._hidden = torch.ones(1, requires_grad=True)
        assert not reading._seen().requires_grad
        with pytest.raises(RuntimeError, match="was not seen"):
            reading._seen()
