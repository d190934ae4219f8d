"""verl's FSDP engine gives hidden states with its log-probs: those of transformers, in every layout, and only if asked.

The engines run in processes of their own, see engine_ranks.py: one with all that one process can do, and two together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.integrations.verl.ranks import results
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.verl
ONE = ("padded", "packed", "packed, dynamic", "padded, dynamic", "bucketed", "fsdp1", "fused")
TWO = ("two ranks", "ulysses", "ulysses, dynamic", "ulysses, bucketed")
KINDS = ("response", "response_mean", "prompt_last", "prompt_mean")
FIELD = "maestro_h"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def one(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results("engine_ranks.py", 1, tmp_path_factory.mktemp("one"), str(checkpoint))


@pytest.fixture(scope="module")
def two(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results("engine_ranks.py", 2, tmp_path_factory.mktemp("two"), str(checkpoint))


Sequences = tuple[list[Tensor], list[int]]  # the token ids of each row, and the lengths of their prompts


class Row(NamedTuple):
    """What transformers gives for one sequence by itself."""

    contexts: dict[str, Tensor]
    log_probs: Tensor


def expected(checkpoint: Path, sequences: Sequences, adapter: dict[str, Tensor] | None = None) -> list[Row]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="sdpa").eval()
    if adapter is not None:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        missing = model.load_state_dict(adapter, strict=False)
        assert not missing.unexpected_keys and len(adapter) == 2 * 2 * 7, "q, k, v, o, gate, up and down of two layers"
    found = []
    for ids, prompt in zip(*sequences, strict=True):
        with torch.no_grad():
            output = model(ids[None], output_hidden_states=True)
        hidden = output.hidden_states[-1][0]
        contexts = {"response": hidden[-1], "response_mean": hidden[prompt:].mean(0)}
        contexts |= {"prompt_last": hidden[prompt - 1], "prompt_mean": hidden[:prompt].mean(0)}
        log_probs = output.logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        found.append(Row(contexts, log_probs))
    return found


@pytest.fixture(scope="module")
def truth(checkpoint: Path, one: list[dict[str, Any]]) -> list[Row]:
    return expected(checkpoint, one[0]["sequences"])


def check(found: dict[str, Any], rows: list[int], kind: str, truth: list[Row], tolerance: float = 1e-5) -> None:
    states = found[FIELD]
    assert [h.dtype for h in states] == [torch.float32] * len(rows)
    want = torch.stack([truth[i].contexts[kind] for i in rows])
    torch.testing.assert_close(torch.stack(states), want, rtol=0, atol=tolerance)
    for log_probs, i in zip(found["log_probs"], rows, strict=True):
        torch.testing.assert_close(log_probs[:-1].float(), truth[i].log_probs, rtol=0, atol=10 * tolerance)


# --- what the contexts are ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ONE)
def test_contexts_are_those_of_transformers(one: list[dict[str, Any]], truth: list[Row], case: str, kind: str) -> None:
    found = one[0]["cases"][case]
    assert found["rows"] == list(range(8))
    check(found[kind], found["rows"], kind, truth)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", TWO)
def test_two_processes(two: list[dict[str, Any]], truth: list[Row], case: str, kind: str) -> None:
    """With ``ulysses`` both have all rows and half of the tokens, and each of them gets every context."""
    parts = [rank["cases"][case] for rank in two]
    rows = [part["rows"] for part in parts]
    assert rows == ([list(range(8))] * 2 if case.startswith("ulysses") else [[0, 2, 4, 6], [1, 3, 5, 7]])
    for part in parts:
        check(part[kind], part["rows"], kind, truth)
    if case.startswith("ulysses"):
        assert all(torch.equal(*pair) for pair in zip(parts[0][kind][FIELD], parts[1][kind][FIELD], strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["lora", "fsdp1, lora"])
def test_an_adapter_counts_unless_it_is_switched_off(
    one: list[dict[str, Any]], checkpoint: Path, truth: list[Row], case: str, kind: str
) -> None:
    """verl's reference is the same module with the adapter off."""
    found = one[0]["cases"][case]
    adapted = expected(checkpoint, one[0]["sequences"], found["adapter"])
    assert all((a.contexts[kind] - b.contexts[kind]).abs().max() > 1e-2 for a, b in zip(adapted, truth, strict=True))
    check(found[kind], found["rows"], kind, adapted)
    check(found[f"{kind}, adapter off"], found["rows"], kind, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_gives_float32_contexts(one: list[dict[str, Any]], truth: list[Row], kind: str) -> None:
    found = one[0]["cases"]["bfloat16"]
    check(found[kind], found["rows"], kind, truth, tolerance=5e-2)


# --- what else changes: nothing ---


@pytest.mark.parametrize("case", [*ONE, "lora", "fsdp1, lora", "bfloat16", *TWO])
def test_who_asks_for_nothing_gets_nothing(request: pytest.FixtureRequest, case: str) -> None:
    for rank in request.getfixturevalue("two" if case in TWO else "one"):
        found = rank["cases"][case]
        assert set(found["unasked"]) == {"log_probs", "entropy"}
        for kind in KINDS:
            assert set(found[kind]) == {"log_probs", "entropy", FIELD}
            for name in ("log_probs", "entropy"):
                assert all(torch.equal(*pair) for pair in zip(found[kind][name], found["unasked"][name], strict=True))
        assert found["hooks left"] == (0, False), "a hook or hidden states outlive the forward"


def test_a_batch_that_is_trained_on_gives_none(one: list[dict[str, Any]]) -> None:
    assert one[0]["cases"]["packed"]["training"] == {"log_probs", "entropy"}


# --- what is refused ---


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "unknown kind",
            "maestro_context: 'terminal', expected one of response, response_mean, prompt_last, prompt_mean",
        ),
        ("no prompts", "prompts: missing, expected a jagged tensor, for the context prompt_mean"),
        ("not seen", "hidden states: the forward of the module that makes them was not seen"),
        (
            "no states",
            "FSDPQwen3ForCausalLM returned CausalLMOutputWithPast, expected an output with last_hidden_state",
        ),
        ("other tokens", "hidden states: shape (1, 3, 4), expected (1, 173, d)"),
        ("other rows", "hidden states: shape (1, 3, 4), expected (8, 35, d)"),
    ],
)
def test_refusals(one: list[dict[str, Any]], case: str, message: str) -> None:
    assert message in one[0]["cases"]["packed"][case]


@pytest.mark.parametrize("case", [case for case in TWO if case.startswith("ulysses")])
def test_shared_tokens_need_flash_attention(two: list[dict[str, Any]], case: str) -> None:
    for rank in two:
        message = rank["cases"][case]["other attention"]
        assert "ulysses_sequence_parallel_size" in message and "attn_implementation=sdpa" in message


# --- how verl comes by the engines ---


def test_the_look_up_of_engines(one: list[dict[str, Any]]) -> None:
    assert all(found["gives contexts"] for found in one[0]["cases"].values())
    wrong = [name for name, holds in one[0]["registry"].items() if not holds]
    assert not wrong and len(one[0]["registry"]) == 7
