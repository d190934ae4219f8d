"""A function as ``loss=`` takes the place of TRL's loss, with TRL's inputs and normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from trl import GRPOConfig, GRPOTrainer

from maestro_fast.integrations.trl import MaestroGRPOTrainer
from maestro_fast.integrations.trl.loss import head_policy_loss, packed_policy_loss
from maestro_fast.ops import LossFunction, LossInputs, loss_function
from tests.integrations.test_trl_loss import Make, computed, gap, make, micro_batch, on_policy
from tests.integrations.test_trl_training import history


def dapo(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """DAPO's loss as a user would write it, with a KL if there is a reference, and a bonus if there are entropies."""
    advantages = inputs.advantages.repeat_interleave(inputs.cu_seqlens.diff())
    old = inputs.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
    ratio = (inputs.logprobs - old).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    if inputs.ref_logprobs is not None:
        gap = inputs.ref_logprobs - inputs.logprobs
        loss = loss + 0.3 * (gap.exp() - gap - 1)
    total = loss.sum() / inputs.normalizer
    if inputs.entropies is not None:
        total = total - 0.2 * inputs.entropies.sum() / inputs.entropy_normalizer
    return total, {"my_ratio": ratio.mean()}


@loss_function(entropies=True)
def dapo_with_entropies(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    return dapo(inputs)


def by_function(trainer: Any, inputs: dict[str, Any], function: LossFunction, way: Callable[..., Tensor]) -> Any:
    return computed(trainer, lambda: way(trainer, function, trainer.model, inputs))


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_function_that_is_dapo_is_trls_dapo(settings: Make, ingredients: Make, beta: float) -> None:
    """The batch has log-probs of an old policy, and of a reference if beta is not 0."""
    config = {"use_bias_correction_kl": False} if "use_bias_correction_kl" in GRPOConfig.__dataclass_fields__ else {}
    trainer = make(settings, ingredients, loss_type="dapo", beta=beta, temperature=1.0, **config)
    inputs = micro_batch(trainer)
    if beta == 0:
        del inputs["ref_per_token_logps"]
    ours = by_function(trainer, inputs, dapo, packed_policy_loss)
    trls = computed(trainer, lambda: GRPOTrainer._compute_loss(trainer, trainer.model, inputs))

    torch.testing.assert_close(ours[0], trls[0], rtol=1e-5, atol=1e-7)
    assert gap(ours[1], trls[1]) < 1e-5
    assert ours[2].keys() == {"my_ratio", "entropy"}
    assert ours[2]["entropy"] == pytest.approx(trls[2]["entropy"], rel=1e-5)
    assert abs(ours[2]["my_ratio"][0] - 1) > 1e-3


@pytest.mark.parametrize("coefficient", [0.0, 0.2])
@pytest.mark.parametrize("way", [packed_policy_loss, head_policy_loss], ids=["log-probs", "hidden states"])
def test_on_policy_by_both_ways(settings: Make, ingredients: Make, coefficient: float, way: Any) -> None:
    case = {"entropy_coef": coefficient} if coefficient else {}
    trainer = make(settings, ingredients, loss_type="dapo", **case)
    inputs = on_policy(trainer)
    ours = by_function(trainer, inputs, dapo_with_entropies if coefficient else dapo, way)
    trls = computed(trainer, lambda: GRPOTrainer._compute_loss(trainer, trainer.model, inputs))

    torch.testing.assert_close(ours[0], trls[0], rtol=1e-5, atol=1e-7)
    assert gap(ours[1], trls[1]) < 1e-5
    assert ours[2]["my_ratio"] == [1.0] and ours[2]["entropy"] == pytest.approx(trls[2]["entropy"], rel=1e-5)


def test_what_the_function_gets(settings: Make, ingredients: Make) -> None:
    trainer = make(settings, ingredients, loss_type="grpo")
    inputs = micro_batch(trainer)
    seen: list[LossInputs] = []

    def spy(given: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(given)
        return dapo(given)

    by_function(trainer, inputs, spy, packed_policy_loss)
    (given,) = seen
    counted = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    assert given.logprobs.shape == (int(counted.sum()),) and given.logprobs.requires_grad
    assert torch.equal(given.advantages, inputs["advantages"])
    assert given.cu_seqlens.diff().tolist() == counted.sum(1).tolist()
    for name in ("old", "ref", "sampling"):
        assert torch.equal(getattr(given, f"{name}_logprobs"), inputs[f"{name}_per_token_logps"][counted])
    assert given.entropies is None
    assert float(given.normalizer) == 29 and int(given.entropy_normalizer) == 2 * int(counted.sum())


def test_training_by_a_function_is_training_by_the_config(settings: Make, ingredients: Make) -> None:
    def trained(loss: Any) -> Any:
        args = settings(
            max_steps=3, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, loss_type="dapo", logging_steps=3
        )
        trainer = MaestroGRPOTrainer(args=args, loss=loss, **ingredients())
        before = trainer.model.lm_head.weight.detach().clone()
        trainer.train()
        assert trainer._head_in_loss and (trainer.model.lm_head.weight - before).abs().max() > 1e-3
        return trainer

    ours, theirs = trained(dapo), trained("maestro_fast")
    for got, expected in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert history(ours, "my_ratio") == history(theirs, "ratio") == [1.0]
