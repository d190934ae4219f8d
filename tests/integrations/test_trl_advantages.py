"""The advantages that TRL trains with: its own where the profile is its own, ours where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from trl import GRPOTrainer

from maestro_fast.integrations.trl import MaestroGRPOMixin
from maestro_fast.integrations.trl.profile import TRL_OPTIONS
from maestro_fast.ops import group_advantages
from maestro_fast.weighting import WeightContext
from tests.integrations.conftest import abstaining, brevity, parity, steady

Make = Callable[..., Any]


class Recording(GRPOTrainer):
    """Keeps the rewards of all processes, and what came of them."""

    def _calculate_rewards(self, *args: Any) -> Tensor:
        self.rewards_BK = super()._calculate_rewards(*args)
        return self.rewards_BK

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self.output = super()._generate_and_score_completions(inputs)
        self.aggregated = self.output["advantages"].clone()
        return self.output


class Maestro(MaestroGRPOMixin, Recording):
    """``aggregated`` is what TRL made of the row weights, ``output["advantages"]`` what is trained with."""


def one_batch(trainer: Any, *, train: bool = True) -> Any:
    """The trainer, after one generation batch of two groups."""
    trainer.model.train(train)
    rows = [trainer.train_dataset[i] for i in (0, 3) for _ in range(trainer.num_generations)]
    torch.manual_seed(0)
    trainer._generate_and_score_completions(rows)
    return trainer


@pytest.mark.parametrize("by", ["config", "profile"])
@pytest.mark.parametrize(
    "weights", ["equal", {"policy": "static", "values": {"parity": 1, "brevity": 1, "abstaining": 1}}]
)
@pytest.mark.parametrize("profile", TRL_OPTIONS)
def test_equal_weights_are_trls_own(settings: Make, ingredients: Make, profile: str, weights: Any, by: str) -> None:
    aggregation, scale = TRL_OPTIONS[profile]
    theirs_args = settings(multi_objective_aggregation=aggregation, scale_rewards=scale)
    parts = {**ingredients(), "reward_funcs": [parity, brevity, abstaining]}
    theirs = one_batch(Recording(args=theirs_args, **parts))
    ours_args = theirs_args if by == "config" else settings(multi_objective_aggregation="sum_then_normalize")
    parts = {**ingredients(), "reward_funcs": [parity, brevity, abstaining]}
    named = None if by == "config" else profile
    ours = one_batch(Maestro(args=ours_args, weights=weights, profile=named, **parts))

    assert torch.equal(ours.output["completion_ids"], theirs.output["completion_ids"])
    assert theirs.rewards_BK.isnan().any()
    assert theirs.output["advantages"].abs().max() > 0.5
    torch.testing.assert_close(ours.output["advantages"], theirs.output["advantages"], rtol=1e-5, atol=1e-6)
    ours_log, theirs_log = (dict(trainer._metrics["train"]) for trainer in (ours, theirs))
    for name in theirs_log.keys() - {"step_time"}:
        assert ours_log[name] == pytest.approx(theirs_log[name], rel=1e-5, nan_ok=True), name
    reference = group_advantages(ours.rewards_BK, None, 4, profile=profile).advantages
    torch.testing.assert_close(ours.output["advantages"], reference, rtol=1e-5, atol=1e-6)


def test_a_group_of_equal_scores_gets_exactly_zero(settings: Make, ingredients: Make) -> None:
    args = settings(
        num_generations=7, per_device_train_batch_size=14
    )  # the mean of seven rounds, that of four does not
    trainer = one_batch(Maestro(args=args, **{**ingredients(), "reward_funcs": [steady, steady]}))

    assert trainer.aggregated.abs().max() > 0, "TRL no longer returns rounding noise here: drop this test's reason"
    assert (trainer.output["advantages"] == 0).all()
    assert list(trainer._logs["advantages"]) == [0.0] * 14


@pytest.mark.parametrize("profile", ["maestro", "rloo", "verl_gdpo"])
def test_other_profiles_are_ours(settings: Make, ingredients: Make, profile: str) -> None:
    values = {"parity": 0.7, "brevity": 0.2}
    trainer = one_batch(
        Maestro(args=settings(), weights={"policy": "static", "values": values}, profile=profile, **ingredients())
    )
    lengths = trainer.output["completion_mask"].sum(1) if profile == "verl_gdpo" else None
    expected = group_advantages(
        trainer.rewards_BK.double(), torch.tensor([0.7, 0.2]).double(), 4, lengths=lengths, profile=profile
    )

    torch.testing.assert_close(trainer.output["advantages"].double(), expected.advantages, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trainer.output["advantages"], trainer.aggregated, atol=1e-3)
    assert list(trainer._logs["advantages"]) == trainer.output["advantages"].tolist()


def test_reward_weights_of_the_config_multiply_the_policys(settings: Make, ingredients: Make) -> None:
    plain = one_batch(Recording(args=settings(reward_weights=[0.2, 3.0]), **ingredients()))
    ours = one_batch(Maestro(args=settings(reward_weights=[0.2, 3.0]), **ingredients()))

    torch.testing.assert_close(ours.output["advantages"], plain.output["advantages"], rtol=1e-5, atol=1e-6)


def test_every_response_has_its_own_weights(settings: Make, ingredients: Make) -> None:
    trainer = one_batch(Maestro(args=settings(), weights={"policy": "random", "seed": 5}, **ingredients()))
    context = WeightContext(("parity", "brevity"), 4, 0, trainer.rewards_BK)
    weights = trainer.weight_policy.weights(context).weights_BK
    expected = group_advantages(trainer.rewards_BK, 2 * weights, 4, profile="grpo").advantages

    torch.testing.assert_close(trainer.output["advantages"], expected, rtol=1e-4, atol=1e-5)


def test_an_evaluation_uses_expected_weights_and_teaches_nothing(settings: Make, ingredients: Make) -> None:
    trainer = Maestro(args=settings(num_generations_eval=2), weights={"policy": "random"}, **ingredients())
    one_batch(trainer, train=False)
    expected = group_advantages(trainer.rewards_BK, None, 2, profile="grpo").advantages

    torch.testing.assert_close(trainer.output["advantages"], expected, rtol=1e-4, atol=1e-5)
    assert trainer._batches == 0
    assert "weights/parity" in trainer._metrics["eval"] and "weights/parity" not in trainer._metrics["train"]
