"""Shared prompts give what padded rows give: at most twice their error, in every number that training reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from maestro_fast.model.forward import last_hidden, response_contexts
from maestro_fast.model.layouts import Layouts
from maestro_fast.model.prefix_tree import MIN_COMMON
from maestro_fast.model.rows import Sequences
from tests.model.shared_cases import (
    MODELS,
    SHARED,
    Float64,
    batch,
    errors,
    found,
    gradients,
    model_of,
    truth,
    with_lora,
)

# What a single rounding, or a few, may add. Where the padded error happens to be nearly 0, twice that is nothing.
EPSILON = {"float32": 2.0**-21, "bfloat16": 2.0**-8, "autocast": 2.0**-8}


@pytest.mark.parametrize("precision", EPSILON)
@pytest.mark.parametrize("name", [*MODELS, "qwen3, lora"])
def test_the_error_is_at_most_twice_that_of_padded_rows(name: str, precision: str) -> None:
    model = with_lora(model_of("qwen3")) if name == "qwen3, lora" else model_of(name)
    model = model.bfloat16() if precision == "bfloat16" else model
    sequences, autocast = batch(), precision == "autocast"
    rows = SHARED.rows_of(sequences)
    assert rows.trees is not None and rows.trees.depth == 3 and rows.input_ids.numel() < sum(sequences.lengths) / 2

    exact = truth(model, sequences)
    padded = errors(found(model, sequences, "padded", autocast, packed=True), exact)
    shared = errors(found(model, sequences, SHARED, autocast, packed=True), exact)

    assert shared.keys() == {*exact, "whole gradient"}
    assert shared["whole gradient"] <= 2 * padded["whole gradient"]
    worse = {key: (error, padded[key]) for key, error in shared.items() if error > 2 * padded[key] + EPSILON[precision]}
    assert not worse, "\n".join(f"{key}: {a:.2e}, padded {b:.2e}" for key, (a, b) in worse.items())
    if precision == "float32":  # So neither of the two may be far off.
        assert max(shared.values()) < 1e-5, max(shared.items(), key=lambda item: item[1])


def test_responses_that_are_dealt_to_several_trees_keep_their_numbers() -> None:
    model, sequences = model_of("llama, tied"), batch()
    layouts = Layouts("padded", "always", pair_cost=0.1)
    assert layouts.rows_of(sequences).input_ids.numel() > SHARED.rows_of(sequences).input_ids.numel()

    wrong = errors(found(model, sequences, layouts, packed=True), truth(model, sequences))

    assert max(wrong.values()) < 1e-5, max(wrong.items(), key=lambda item: item[1])


@st.composite
def batches(draw: st.DrawFn) -> Sequences:
    """Groups whose prompts begin alike or begin one another, with responses of 0 to 5 tokens, some of them equal."""
    stem = list(range(10, 10 + MIN_COMMON + 2))
    responses = []
    for _ in range(draw(st.integers(1, 3))):
        common = draw(st.sampled_from([0, 2, MIN_COMMON, MIN_COMMON + 2]))
        prompt = stem[:common] + draw(st.lists(st.integers(3, 6), min_size=int(common == 0), max_size=3))
        completions = draw(st.lists(st.lists(st.integers(3, 8), max_size=5), min_size=1, max_size=4))
        responses += [(prompt, completion) for completion in completions]
    responses = draw(st.permutations(responses))
    return Sequences([p for p, _ in responses], [c for _, c in responses])


MIXED = model_of("qwen3, mixed").double()
# Three rows, two of them with padding.
THREE = Sequences([[9] * 6, [9] * 6, [10] * 5, [11] * 6], [[5, 5], [6], [5, 5, 5], [7]])


@settings(max_examples=30)
@given(batches(), st.sampled_from([0.0, 0.02]))
@example(THREE, 0.0)
def test_in_float64_shared_and_padded_rows_are_equal(sequences: Sequences, pair_cost: float) -> None:
    """The model has a layer with a window shorter than the prompts and one without."""
    both = []
    with Float64():
        for layouts in (Layouts("padded"), Layouts("padded", "always", pair_cost=pair_cost)):
            states = last_hidden(MIXED, sequences, layouts).packed()
            weights = torch.linspace(-1, 1, states.numel(), dtype=torch.float64).view_as(states)
            (states * weights).sum().backward()
            both.append({"states": states.detach(), **gradients(MIXED.model)})
    padded, shared = both

    assert sequences is not THREE or (SHARED.rows_of(sequences).input_ids == 0).sum() == 3
    for name, expected in padded.items():
        torch.testing.assert_close(shared[name], expected, rtol=1e-10, atol=1e-11, msg=name)


# --- nothing leaks ---


def states_of(model: torch.nn.Module, sequences: Sequences) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return last_hidden(model, sequences, SHARED).packed().split(sequences.lengths)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2", "mistral, window"])
def test_no_bit_of_a_response_depends_on_another_response(name: str, precision: torch.dtype) -> None:
    model, sequences = model_of(name).to(precision), batch()
    before = states_of(model, sequences)
    for i, completion in enumerate(sequences.completion_ids):
        if not completion:
            continue
        others = [*sequences.completion_ids]
        others[i] = [3 + (t - 2) % 90 for t in completion]
        after = states_of(model, Sequences(sequences.prompt_ids, others))
        for j, (one, other) in enumerate(zip(before, after, strict=True)):
            same = len(sequences.prompt_ids[j]) if i == j else len(one)
            assert torch.equal(one[:same], other[:same]), f"response {j} changed with response {i}"
            assert not (one[same:] == other[same:]).all(1).any()


def test_a_prompt_reaches_all_its_responses_and_no_other() -> None:
    model, sequences = model_of("llama, tied"), batch()
    long = sequences.prompt_ids[0]
    for place in (0, 12, len(long) - 1):
        other = [*long]
        other[place] = 95
        changed = [other if prompt == long else prompt for prompt in sequences.prompt_ids]
        before, after = (
            states_of(model, Sequences(p, sequences.completion_ids)) for p in (sequences.prompt_ids, changed)
        )
        for prompt, one, two in zip(sequences.prompt_ids, before, after, strict=True):
            if prompt == long:
                assert ((one[place:] - two[place:]).abs().amax(1) > 1e-3).all()
                torch.testing.assert_close(one[:place], two[:place], rtol=1e-4, atol=1e-5)
            else:
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_gradients_of_a_response_reach_its_own_tokens_alone(name: str) -> None:
    """They are exactly 0 elsewhere, and not 0 at any token of its own that it sees."""
    model, sequences = model_of(name), batch()
    embedded: list[Tensor] = []

    def as_leaf(_module: object, _inputs: object, out: Tensor) -> Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[-1] * 1.0

    handle = model.get_input_embeddings().register_forward_hook(as_leaf)
    hidden = last_hidden(model, sequences, SHARED)
    handle.remove()
    assert hidden.place_T is not None
    starts = torch.tensor([0, *sequences.lengths]).cumsum(0)
    for i, place in enumerate(hidden.place_T.split(sequences.lengths)):
        states = hidden.take(torch.arange(int(starts[i]), int(starts[i + 1])))
        (gradient,) = torch.autograd.grad(states.sin().sum(), embedded[0], retain_graph=True)
        reached = gradient.flatten(0, 1).abs().amax(1).nonzero()[:, 0]
        assert torch.equal(reached, place.sort().values)


def test_batches_without_any_response_token_are_served() -> None:
    model = model_of("qwen3")
    prompts = [[5, 6, 7], [5, 6, 7], [8]]
    both = [response_contexts(model, Sequences(prompts, [[], [], []]), layout, 2) for layout in (SHARED, "padded")]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5)
