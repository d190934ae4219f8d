"""The reference of the KL is the policy that a run starts from, with adapters of any kind and age."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from maestro_fast.model import reference_policy
from maestro_fast.model.head import causal_lm, vocabulary_of
from tests.tiny import tiny_model

peft = pytest.importorskip("peft")
IDS = torch.arange(12)[None]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def adapted(**options: Any) -> Any:
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(tiny_model(), lora)


@pytest.mark.parametrize(
    "options",
    [{}, {"init_lora_weights": False}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["up_proj"]}, None],
    ids=["new", "trained before", "pissa", "whole modules", "no adapter"],
)
def test_the_reference_is_where_the_policy_started(options: dict[str, Any] | None) -> None:
    model = tiny_model() if options is None else adapted(**options)
    start = logits(model)
    reference = reference_policy(model, Accelerator(cpu=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    with reference() as (frozen, head):
        found = logits(frozen)
        assert head.weight.shape == (320, 32)

    torch.testing.assert_close(found, start, rtol=0, atol=1e-6)
    assert (logits(model) - start).abs().max() > 1e-2, "the policy has moved"
    assert any(parameter.requires_grad for parameter in model.parameters()), "the policy still trains"


def test_a_trained_adapter_that_is_frozen_below_a_new_one_belongs_to_the_start() -> None:
    model = adapted(init_lora_weights=False)
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".second." in name)
    start = logits(model)
    with reference_policy(model, Accelerator(cpu=True))() as (frozen, _):
        found = logits(frozen)

    torch.testing.assert_close(found, start, rtol=0, atol=1e-6)


def test_the_reference_of_a_trained_adapter_shares_the_frozen_weights() -> None:
    model = adapted(init_lora_weights=False)
    with reference_policy(model, Accelerator(cpu=True))() as (frozen, _):
        theirs = dict(frozen.named_parameters())
        shared = {name for name, parameter in model.named_parameters() if theirs[name] is parameter}

        assert shared == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "embed_tokens"]}, {"trainable_token_indices": [1]}])
def test_the_vocabulary_is_known_where_peft_wraps_the_embedding(options: dict[str, Any]) -> None:
    model = tiny_model()
    expected = model.get_input_embeddings().num_embeddings
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ["q_proj"], **options}))

    assert vocabulary_of(causal_lm(wrapped)) == vocabulary_of(wrapped) == expected
