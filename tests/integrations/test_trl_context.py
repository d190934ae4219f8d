"""The weight policy sees the right hidden states, from as few forwards as possible."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from transformers import AutoModelForCausalLM

from maestro_fast.integrations.trl import MaestroGRPOTrainer
from maestro_fast.integrations.trl.context import GenerationBatch
from maestro_fast.model.head import backbone_of
from maestro_fast.weighting import WeightContext, Weights
from maestro_fast.weighting.policy import Stateless
from tests.integrations.test_trl_training import FREE

Make = Callable[..., Any]


class Spy(Stateless):
    """Gives equal weights, and keeps the contexts that it was shown."""

    name = "spy"
    needs_context = True

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def weights(self, context: WeightContext) -> Weights:
        assert context.context_Bd is not None
        self.seen.append(context.context_Bd)
        equal = torch.full_like(context.rewards_BK, 1 / context.rewards_BK.shape[1])
        return Weights(equal, equal)


class Keeping(MaestroGRPOTrainer):
    """Keeps the generated ids, and counts the calls of the backbone after generation."""

    calls = 0

    def _generate(self, prompts: Any) -> Any:
        out = super()._generate(prompts)
        self.prompt_ids, self.completion_ids = out[:2]
        self.calls = 0  # Generation is over, its calls do not count.
        return out

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        def count(*_: Any) -> None:
            self.calls += 1

        handle = backbone_of(self.model).register_forward_hook(count)
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            handle.remove()


class Beside(Spy):
    """Gives a reward of its own beside equal weights."""

    needs_context = False

    def weights(self, context: WeightContext) -> Weights:
        equal = torch.full_like(context.rewards_BK, 1 / context.rewards_BK.shape[1])
        return Weights(equal, equal, residual_B=equal[:, 0])


def one_batch(trainer: Any) -> None:
    trainer.model.train()
    torch.manual_seed(0)
    rows = [{"prompt": "prompt " * (1 + 2 * i)} for i in range(2) for _ in range(4)]
    trainer._generate_and_score_completions(rows)


@torch.no_grad()
def expected_states(model: Any, prompt_ids: Any, completion_ids: Any) -> Tensor:
    """The terminal states, from one response at a time, without any padding."""
    model.eval()
    rows = [
        backbone_of(model)(input_ids=torch.tensor([[*prompt, *completion]])).last_hidden_state[0, -1]
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("masked", [False, True], ids=["", "truncated completions masked"])
@pytest.mark.parametrize("free", [True, False], ids=["read off TRL's forward", "a forward of its own"])
def test_the_terminal_states(settings: Make, ingredients: Make, free: bool, masked: bool) -> None:
    args = settings(mask_truncated_completions=masked, **(FREE if free else {}))
    trainer = Keeping(args=args, weights=Spy(), **ingredients())
    with torch.no_grad():  # Some responses shall end early.
        trainer.model.get_output_embeddings().weight[trainer.processing_class.eos_token_id] *= 20
    one_batch(trainer)
    truncated = [ids[-1] != trainer.processing_class.eos_token_id for ids in trainer.completion_ids]

    assert any(truncated) and not all(truncated)
    assert len({len(ids) for ids in trainer.completion_ids}) > 2
    assert len({len(ids) for ids in trainer.prompt_ids}) == 2
    (seen,) = trainer.weight_policy.seen
    expected = expected_states(trainer.model, trainer.prompt_ids, trainer.completion_ids)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    assert trainer.calls == (2 if free else 1), "two micro-batches of TRL's own forward, or one of ours"


@pytest.mark.parametrize(
    ("free", "masked"), [(True, True), (False, False)], ids=["read off TRL's forward", "a forward of its own"]
)
def test_states_of_prompts_and_means_over_responses(
    settings: Make, ingredients: Make, free: bool, masked: bool
) -> None:
    args = settings(mask_truncated_completions=masked, **(FREE if free else {}))
    trainer = Keeping(args=args, weights=Spy(), **ingredients())
    with torch.no_grad():  # Some responses shall end early.
        trainer.model.get_output_embeddings().weight[trainer.processing_class.eos_token_id] *= 20
    for kind in ("response_mean", "prompt_last", "prompt_mean"):
        trainer.weight_policy.context_kind = kind
        one_batch(trainer)
        expected = []
        for prompt, completion in zip(trainer.prompt_ids, trainer.completion_ids, strict=True):
            with torch.no_grad():
                out = backbone_of(trainer.model)(input_ids=torch.tensor([[*prompt, *completion]]))
            states = out.last_hidden_state[0].split([len(prompt), len(completion)])[kind == "response_mean"]
            expected.append(states[-1] if kind == "prompt_last" else states.mean(0))
        torch.testing.assert_close(trainer.weight_policy.seen[-1], torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_reward_beside_the_weights_is_not_dropped_in_silence(settings: Make, ingredients: Make) -> None:
    trainer = MaestroGRPOTrainer(args=settings(), weights=Beside(), profile="maestro", **ingredients())
    with pytest.raises(ValueError, match=r"^weights: policy spy returned direct_B or residual_B, expected None"):
        one_batch(trainer)


def test_no_forward_is_added_for_a_policy_that_reads_nothing(settings: Make, ingredients: Make) -> None:
    trainer = Keeping(args=settings(), weights="random", **ingredients())
    one_batch(trainer)

    assert trainer.calls == 0


@pytest.mark.parametrize("free", [True, False])
def test_the_cost_is_said_once(settings: Make, ingredients: Make, caplog: pytest.LogCaptureFixture, free: bool) -> None:
    with caplog.at_level(logging.INFO, logger="maestro_fast.integrations.trl.trainer"):
        trainer = Keeping(args=settings(**(FREE if free else {})), weights="conductor", **ingredients())
        one_batch(trainer)
    said = [record for record in caplog.records if record.name == "maestro_fast.integrations.trl.trainer"]

    assert len(said) == 1
    assert ("none is added" if free else "one forward without log-probs is added") in said[0].message


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("retrained", [False, True], ids=["new adapter", "adapter trained before"])
def test_the_reference_of_an_adapter_is_not_read(
    settings: Make, ingredients: Make, tmp_path: Path, checkpoint: Path, retrained: bool, free: bool
) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    parts: dict[str, Any] = {**ingredients(), "peft_config": lora}
    if retrained:
        peft.get_peft_model(parts["model"], lora).save_pretrained(tmp_path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(checkpoint)
        parts |= {"model": peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)}
        del parts["peft_config"]
    trainer = Keeping(args=settings(beta=0.1, **(FREE if free else {})), weights=Spy(), **parts)
    with torch.no_grad():  # The adapter shall differ from its reference.
        for name, value in trainer.model.named_parameters():
            if ".default." in name:
                value.add_(0.05)
    one_batch(trainer)

    (seen,) = trainer.weight_policy.seen
    expected = expected_states(trainer.model, trainer.prompt_ids, trainer.completion_ids)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    with trainer.model.disable_adapter():
        reference = expected_states(trainer.model, trainer.prompt_ids, trainer.completion_ids)
    assert (expected - reference).abs().max() > 1e-2


def test_a_separate_reference_model_is_not_read(settings: Make, ingredients: Make) -> None:
    trainer = Keeping(args=settings(beta=0.1, **FREE), weights=Spy(), **ingredients())
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.mul_(1.5)
    one_batch(trainer)

    (seen,) = trainer.weight_policy.seen
    expected = expected_states(trainer.model, trainer.prompt_ids, trainer.completion_ids)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


def test_the_mask_of_trls_layout() -> None:
    batch = GenerationBatch([[5], [5, 5, 5]], [[7, 7], [7]])
    input_ids = torch.zeros(2, 7)  # Prompts are padded to 4 tokens, completions to 3.

    assert batch.attention_mask(input_ids, 3).tolist() == [[0, 0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0, 0]]
