"""Log-probs, entropies and contexts from packed hidden states equal those of the model's own logits."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from maestro_fast.model.attention import Layout
from maestro_fast.model.forward import completion_logprobs, last_hidden, score
from maestro_fast.model.head import LanguageHead, check_head, head_of
from maestro_fast.model.hidden_states import HiddenStates
from maestro_fast.model.layout_trial import choose_layout
from maestro_fast.model.rows import Sequences
from tests.tiny import tiny_model

SEQUENCES = Sequences(
    [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16], [17, 18, 19, 20]],
    [[21, 22], [23, 24, 25, 26, 27, 28, 29], [30], [31, 32, 33], [34, 35, 36, 37]],
)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def truth(model: PreTrainedModel, sequences: Sequences, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of one sequence at a time, from the model's own logits, in float64."""
    logprobs, entropies = [], []
    for prompt, completion in zip(sequences.prompt_ids, sequences.completion_ids, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double() / temperature
        logp = logits[len(prompt) - 1 : -1].log_softmax(-1)
        logprobs.append(logp.gather(1, torch.tensor(completion)[:, None])[:, 0])
        entropies.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


@pytest.mark.parametrize("layout", ["packed", "padded", "shared"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_scores_equal_the_models_own(layout: Layout, family: str, tied: bool) -> None:
    model = tiny_model(family, tied=tied)
    out = score(
        model, SEQUENCES, head_of(model), layout=layout, micro_batch=2, temperature=0.7, entropy=True, context="last"
    )
    with torch.no_grad():
        logprobs, entropies = truth(model, SEQUENCES, 0.7)
        states = [
            model.base_model(input_ids=torch.tensor([p + c])).last_hidden_state[0, -1]
            for p, c in zip(SEQUENCES.prompt_ids, SEQUENCES.completion_ids, strict=True)
        ]

    torch.testing.assert_close(out.logprobs_C.double(), logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropies_C.double(), entropies, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.context_Bd, torch.stack(states), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["packed", "padded", "shared"])
def test_gradients_equal_those_through_the_models_own_logits(layout: Layout) -> None:
    model, expected = tiny_model(tied=True), tiny_model(tied=True)
    coefficients = torch.linspace(-1, 1, sum(map(len, SEQUENCES.completion_ids)))

    hidden = last_hidden(model, SEQUENCES, layout)
    logprobs, _ = completion_logprobs(hidden, head_of(model), 1.0, "none")
    (logprobs * coefficients).sum().backward()
    (truth(expected, SEQUENCES)[0] * coefficients).sum().backward()

    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("mixed", [True, False], ids=["autocast", "no autocast"])
def test_the_head_multiplies_in_the_dtype_of_a_linear_layer(mixed: bool) -> None:
    """Under autocast its operands are rounded as ``F.linear`` rounds them, and the float32 weight gets the gradient."""
    torch.manual_seed(0)
    model = tiny_model()
    head, tokens = head_of(model), sum(SEQUENCES.lengths)
    hidden = torch.randn(tokens, 32, requires_grad=True)
    rounded = (lambda x: x.bfloat16().double()) if mixed else (lambda x: x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        packed = HiddenStates(hidden, None, SEQUENCES)
        ours, _ = completion_logprobs(packed, head, 1.0, "none")
        states, targets = packed.completions(torch.float32)
        logits = torch.nn.functional.linear(states, head.module.weight)
        theirs = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    gradients = [torch.autograd.grad(x.sum(), [hidden, head.module.weight]) for x in (ours, theirs)]
    exact = (rounded(states) @ rounded(head.module.weight).T).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    assert head.weight.dtype is torch.float32
    assert logits.dtype is (torch.bfloat16 if mixed else torch.float32)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-5)
    assert (ours - theirs).abs().max() <= (3e-2 if mixed else 1e-5)
    for one, other in zip(*gradients, strict=True):
        assert one.dtype is torch.float32
        assert (one - other).abs().max() <= (3e-2 if mixed else 1e-5) * other.abs().max()


def test_packing_is_chosen_where_the_model_keeps_sequences_apart() -> None:
    assert choose_layout(tiny_model("qwen3")).plain == "packed"
    assert choose_layout(tiny_model("llama")).plain == "packed"


def test_packing_is_not_chosen_where_sequences_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    # A model that ignores the positions sees one long sequence.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)

    assert choose_layout(tiny_model("qwen3")).plain == "padded"


def test_a_model_that_fails_even_with_padded_rows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention fails so for a model that is still on the CPU."""
    model = tiny_model("qwen3")

    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("FlashAttention only supports CUDA tensors")

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", fails)
    words = r"^model: Qwen3ForCausalLM with attention sdpa fails on a few padded tokens in torch\.float32 on cpu"
    with pytest.raises(ValueError, match=words):
        choose_layout(model)


@pytest.mark.parametrize(
    "model",
    [
        GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0, pad_token_id=0)),
        Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=0.3, pad_token_id=0)),
        Cohere2ForCausalLM(Cohere2Config(**SMALL, logit_scale=0.25, pad_token_id=0)),
    ],
    ids=["granite", "gemma2", "cohere2"],
)
def test_heads_that_scale_or_cap_are_read_off_the_config(model: PreTrainedModel) -> None:
    check_head(model, head_of(model))
    model.eval()
    out = score(model, SEQUENCES, head_of(model), layout=choose_layout(model), micro_batch=3, temperature=1.0)
    with torch.no_grad():
        torch.testing.assert_close(out.logprobs_C.double(), truth(model, SEQUENCES)[0], rtol=1e-5, atol=1e-5)


def test_a_head_that_is_read_wrong_is_refused() -> None:
    model = tiny_model()

    check_head(model, head_of(model))
    with pytest.raises(ValueError, match="model: Qwen3ForCausalLM computes its logits in a way that is not supported"):
        check_head(model, LanguageHead(model.lm_head, scale=0.5, softcap=None))
