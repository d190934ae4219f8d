"""The states of the first layer and the means over responses are those of a plain forward, in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from maestro_fast.model.attention import Layout
from maestro_fast.model.forward import last_hidden, response_contexts, score
from maestro_fast.model.head import first_layer_of, head_of
from maestro_fast.model.hidden_states import ContextMode
from maestro_fast.model.rows import Sequences
from maestro_fast.training import parse_config, train
from maestro_fast.training.step import Sampled, Step
from maestro_fast.weighting import WeightContext
from tests.tiny import tiny_model

STEM = list(range(5, 25))
SEQUENCES = Sequences(
    [STEM, STEM, [8], [*STEM, 30], STEM, [15, 16]],
    [[31, 32], [33, 34, 35, 36, 37, 38, 39], [40], [41, 42, 43], [44, 45, 46, 47], []],
)


@torch.no_grad()
def plain(model: Any, sequences: Sequences) -> dict[ContextMode, Tensor]:
    """The contexts from a forward of each sequence by itself, which returns the states of all layers."""
    first, mean = [], []
    model.eval()
    for prompt, completion in zip(sequences.prompt_ids, sequences.completion_ids, strict=True):
        states = model(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states
        first.append(states[1][0, -1])
        own = states[-1][0, len(prompt) :]
        mean.append(own.mean(0) if completion else torch.zeros_like(first[-1]))
    return {"response_first_layer": torch.stack(first), "response_mean": torch.stack(mean)}


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_they_equal_those_of_a_plain_forward_in_every_layout(family: str, layout: Layout) -> None:
    model = tiny_model(family)
    expected = plain(model, SEQUENCES)
    hooks = len(first_layer_of(model)._forward_hooks)  # transformers has one for ``output_hidden_states``.
    for mode, expected_Bd in expected.items():
        alone_Bd = response_contexts(model, SEQUENCES, layout, 4, mode)
        scored = score(model, SEQUENCES, head_of(model), layout=layout, micro_batch=6, temperature=1.0, context=mode)
        trained_Bd = last_hidden(model, SEQUENCES, layout, mode).contexts(mode)
        for found_Bd in (alone_Bd, scored.context_Bd, trained_Bd):
            assert found_Bd is not None and found_Bd.dtype == torch.float32
            torch.testing.assert_close(found_Bd, expected_Bd, rtol=1e-5, atol=1e-5)
    assert len(first_layer_of(model)._forward_hooks) == hooks, "a hook stayed behind"


def test_the_first_layer_under_gradient_checkpointing_keeps_no_graph() -> None:
    model = tiny_model().train()
    expected_Bd = plain(model, SEQUENCES)["response_first_layer"]
    model.train()
    model.activation_checkpointing_enable()
    hidden = last_hidden(model, SEQUENCES, "padded", "response_first_layer")
    hidden.states_Ud.sum().backward()
    found_Bd = hidden.contexts("response_first_layer")
    assert not found_Bd.requires_grad and first_layer_of(model).mlp.gate_proj.weight.grad is not None  # type: ignore[union-attr]
    torch.testing.assert_close(found_Bd, expected_Bd, rtol=1e-5, atol=1e-5)


def test_the_layers_are_found_by_their_number() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    assert first_layer_of(model) is model.transformer.h[0]
    expected_Bd = plain(model, SEQUENCES)["response_first_layer"]
    found_Bd = response_contexts(model, SEQUENCES, "padded", 6, "response_first_layer")
    torch.testing.assert_close(found_Bd, expected_Bd, rtol=1e-5, atol=1e-5)
    model.transformer.h = nn.ModuleList([*model.transformer.h, nn.Identity()])
    with pytest.raises(ValueError, match=r"^context: response_first_layer, but GPT2LMHeadModel has no list of its 2"):
        first_layer_of(model)


def test_a_forward_that_kept_no_first_layer_says_so() -> None:
    with pytest.raises(ValueError, match=r"^mode: 'response_first_layer', but this forward kept no states"):
        last_hidden(tiny_model(), SEQUENCES, "padded").contexts("response_first_layer")


@pytest.mark.parametrize("micro_batch", [8, 16], ids=["a scoring forward", "the training forward"])
def test_the_first_layer_reaches_the_conductor_in_training(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    seen: list[tuple[Sequences, WeightContext]] = []
    context_of = Step.context_of

    def spy(step: Step, sampled: Sampled, outputs: Any) -> WeightContext:
        context = context_of(step, sampled, outputs)
        seen.append((sampled.sequences, context))
        return context

    monkeypatch.setattr(Step, "context_of", spy)
    raw_config["weights"] |= {"context": "response_first_layer"}
    raw_config["batch"]["micro_batch"] = micro_batch
    raw_config["trainer"]["max_steps"] = 1
    trainer = train(parse_config(raw_config), raw_config)
    assert trainer.step.scoring.source == ("scoring" if micro_batch == 8 else "training")
    ((sequences, context),) = seen
    assert context.context_Bd is not None
    expected_Bd = plain(tiny_model(), sequences)["response_first_layer"]  # This is the checkpoint before training.
    torch.testing.assert_close(context.context_Bd, expected_Bd, rtol=1e-5, atol=1e-5)
