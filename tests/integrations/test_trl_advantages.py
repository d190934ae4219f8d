"""The advantages that TRL trains with are its own or ours; ours come with the weights from one op, or after them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from trl import GRPOTrainer

from maestro_fast.integrations.trl import MaestroGRPOMixin, MaestroGRPOTrainer
from maestro_fast.integrations.trl.advantages import TRL_OPTIONS
from maestro_fast.ops import PROFILES, AdvantageProfile, GroupAdvantages, group_advantages
from maestro_fast.weighting import (
    Comparison,
    ConductorConfig,
    Outcome,
    WeightContext,
    build_weight_policy,
    scales,
    weigh_scaled,
)
from maestro_fast.weighting.conductor.meta_rewards import experience
from tests.integrations.conftest import abstaining, brevity, parity, steady
from tests.weighting.helpers import normal
from tests.weighting.one_op import FUSED, SINGLE, apart, counted

Make = Callable[..., Any]


class Recording(GRPOTrainer):
    """Keeps the rewards of all processes and the output of the batch."""

    def _calculate_rewards(self, *args: Any) -> Tensor:
        self.rewards_BK = super()._calculate_rewards(*args)
        return self.rewards_BK

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self.output = super()._generate_and_score_completions(inputs)
        self.aggregated = self.output["advantages"].clone()
        return self.output


class Maestro(MaestroGRPOMixin, Recording):
    """``aggregated`` holds what TRL made of the row weights, ``output["advantages"]`` what is trained with."""


def one_batch(trainer: Any, *, train: bool = True) -> Any:
    """Has the trainer make one generation batch of two groups."""
    trainer.model.train(train)
    rows = [trainer.train_dataset[i] for i in (0, 3) for _ in range(trainer.num_generations)]
    torch.manual_seed(0)
    trainer._generate_and_score_completions(rows)
    return trainer


@pytest.mark.parametrize("by", ["config", "profile"])
@pytest.mark.parametrize(
    "weights", ["equal", {"type": "static", "values": {"parity": 1, "brevity": 1, "abstaining": 1}}]
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
    )  # A mean over seven is rounded, one over four is not.
    trainer = one_batch(Maestro(args=args, **{**ingredients(), "reward_funcs": [steady, steady]}))

    assert trainer.aggregated.abs().max() > 0, "TRL no longer returns rounding noise here: drop this test's reason"
    assert (trainer.output["advantages"] == 0).all()
    assert list(trainer._logs["advantages"]) == [0.0] * 14


@pytest.mark.parametrize("profile", ["maestro", "rloo", "verl_gdpo"])
def test_other_profiles_are_ours(settings: Make, ingredients: Make, profile: str) -> None:
    values = {"parity": 0.7, "brevity": 0.2}
    trainer = one_batch(
        Maestro(args=settings(), weights={"type": "static", "values": values}, profile=profile, **ingredients())
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
    trainer = one_batch(Maestro(args=settings(), weights={"type": "random", "seed": 5}, **ingredients()))
    context = WeightContext(("parity", "brevity"), 4, 0, trainer.rewards_BK)
    weights = trainer.weight_policy.weights(context).weights_BK
    expected = group_advantages(trainer.rewards_BK, 2 * weights, 4, profile="grpo").advantages

    torch.testing.assert_close(trainer.output["advantages"], expected, rtol=1e-4, atol=1e-5)


def test_an_evaluation_uses_expected_weights_and_teaches_nothing(settings: Make, ingredients: Make) -> None:
    trainer = Maestro(args=settings(num_generations_eval=2), weights={"type": "random"}, **ingredients())
    one_batch(trainer, train=False)
    expected = group_advantages(trainer.rewards_BK, None, 2, profile="grpo").advantages

    torch.testing.assert_close(trainer.output["advantages"], expected, rtol=1e-4, atol=1e-5)
    assert trainer._batches == 0
    assert "weights/parity" in trainer._metrics["eval"] and "weights/parity" not in trainer._metrics["train"]


# --- weights and advantages in one op ---

CONDUCTOR = {"type": "conductor", "period": 1, "learning_rate": 0.1, "alpha": 0.6}
MIXED = AdvantageProfile(score_eps_in="variance", score_eps=1e-3)
TOKENS = AdvantageProfile(score_center="tokens", score_scale="tokens")
UNSCALED = AdvantageProfile(score_scale="none")


class Keeping(MaestroGRPOTrainer):
    """Keeps the outcomes that the policy was told, and the advantages that TRL got to train with."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        observe = self.weight_policy.observe

        def spy(outcome: Outcome) -> None:
            self.outcomes = [*getattr(self, "outcomes", []), outcome]
            observe(outcome)

        self.weight_policy.observe = spy
        try:
            out = super()._generate_and_score_completions(inputs)
        finally:
            del self.weight_policy.observe
        self.trained_with = [*getattr(self, "trained_with", []), out["advantages"]]
        return out


def trained(args: Any, parts: dict[str, Any], **options: Any) -> Any:
    trainer = Keeping(args=args, **{"weights": CONDUCTOR, **parts, **options})
    trainer.train()
    return trainer


def assert_close(got: Tensor, expected: Tensor, *, bitwise: bool) -> None:
    if bitwise:
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("profile", ["maestro", "rloo", MIXED], ids=["maestro", "rloo", "an epsilon in the variance"])
@pytest.mark.parametrize("rewards", [[parity, brevity], [parity, brevity, abstaining]], ids=["two", "three"])
def test_one_op_for_each_batch(
    settings: Make, ingredients: Make, monkeypatch: pytest.MonkeyPatch, rewards: list[Any], profile: Any
) -> None:
    """With two rewards the weights are doubled, which is exact; three times the weights are rounded."""

    def run() -> Any:
        return trained(settings(), {**ingredients(), "reward_funcs": rewards}, profile=profile)

    with monkeypatch.context() as patch:
        calls = counted(patch, trl=True)
        ours = run()
    assert calls == {name: 2 * count for name, count in FUSED.items()}
    apart(monkeypatch)
    calls = counted(monkeypatch, trl=True)
    theirs = run()
    assert calls == {name: 2 * count for name, count in SINGLE.items()}

    bitwise = len(rewards) == 2
    batches = 2 if bitwise else 1  # The first update may amplify a rounding error.
    assert len(ours.outcomes) == 2
    for one, two in zip(ours.outcomes[:batches], theirs.outcomes[:batches], strict=True):
        assert torch.equal(one.weights.weights_BK, two.weights.weights_BK)
        assert (one.weights.weights_BK != one.weights.weights_BK[0]).any()
        for name, expected in two.advantages._asdict().items():
            assert_close(getattr(one.advantages, name), expected, bitwise=bitwise or expected.dtype == torch.bool)
        assert two.advantages.advantages.abs().max() > 0.5
    for got, expected in zip(ours.trained_with[:batches], theirs.trained_with[:batches], strict=True):
        assert_close(got, expected, bitwise=bitwise)
    assert torch.equal(ours.trained_with[0], ours.outcomes[0].advantages.advantages)
    if bitwise:
        left = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
        assert all(torch.equal(got, expected) for got, expected in left)
    for line, other in zip(ours.state.log_history[:batches], theirs.state.log_history[:batches], strict=True):
        for name in ("reward", "reward_std", "advantages/std", "frac_reward_zero_std", "weights/parity"):
            assert line[name] == pytest.approx(other[name], rel=0 if bitwise else 1e-6, abs=0 if bitwise else 1e-6)


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"profile": None}, {}),
        ({"profile": "gdpo"}, {}),
        ({"profile": TOKENS}, {}),
        ({"profile": "verl_grpo"}, {}),
        ({"profile": "maestro"}, {"reward_weights": [0.2, 3.0]}),
        ({"profile": "maestro", "weights": {**CONDUCTOR, "mode": "group"}}, {}),
    ],
    ids=[
        "TRL computes",
        "TRL computes what profile= names",
        "lengths",
        "raw singletons",
        "weights of TRL's config",
        "one action per group",
    ],
)
def test_two_ops_elsewhere(
    settings: Make,
    ingredients: Make,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    config: dict[str, Any],
) -> None:
    calls = counted(monkeypatch, trl=True)
    trainer = trained(settings(max_steps=1, **config), ingredients(), **options)
    assert calls == SINGLE
    (outcome,) = trainer.outcomes
    factor_K = 2 * torch.tensor(config.get("reward_weights", [1.0, 1.0]))
    lengths_B = torch.full((8,), 8) if trainer.profile.needs_lengths else None  # No response ends early here.
    expected = group_advantages(
        outcome.context.rewards_BK,
        outcome.weights.weights_BK * factor_K,
        4,
        lengths=lengths_B,
        profile=trainer.profile,
    )
    assert torch.equal(outcome.advantages.advantages, expected.advantages)


def test_two_ops_for_an_evaluation(settings: Make, ingredients: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation uses the expected weights, but the one op compares under the weights that it draws."""
    parts = ingredients()
    trainer = Keeping(
        args=settings(), weights=CONDUCTOR, profile="maestro", eval_dataset=parts["train_dataset"].select([0]), **parts
    )
    calls = counted(monkeypatch, trl=True)
    trainer.evaluate()
    assert calls == SINGLE and not hasattr(trainer, "outcomes")


def batch(k: int) -> WeightContext:
    names = tuple(f"r{i}" for i in range(k))
    rewards_BK = normal(32, k, seed=1)
    rewards_BK[0, 0] = rewards_BK[5] = float("nan")
    rewards_BK[8:12] = 0.3
    return WeightContext(names, 4, 0, rewards_BK, normal(32, 6, seed=2))


SCALED = {name: PROFILES[name] for name in ("maestro", "grpo", "dr_grpo", "rloo")} | {"variance": MIXED}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("k", [2, 3, 4, 5, 8])
def test_scaled_advantages_are_those_of_scaled_weights(name: str, k: int) -> None:
    """The epsilons are about a tenth of the standard deviations, so that they matter."""
    profile = replace(SCALED[name], score_eps=0.1, reward_eps=0.1)
    policy, context = ConductorConfig(alpha=0.6).build(batch(k).reward_names, 6), batch(k)
    policy.weight.copy_(normal(k, 6, seed=3))
    weights, found = weigh_scaled(policy, context, Comparison(profile), float(k))
    expected = group_advantages(context.rewards_BK, k * weights.weights_BK, 4, profile=profile)
    assert found is not None and expected.advantages.abs().max() > 0.5
    truth = group_advantages(context.rewards_BK.double(), k * weights.weights_BK.double(), 4, profile=profile)
    for field in GroupAdvantages._fields:
        got, wanted, exact = (getattr(x, field) for x in (found, expected, truth))
        if field == "degenerate":
            assert torch.equal(got, wanted) and wanted[8:12].all()
        else:
            assert_close(got, wanted, bitwise=k in (2, 4, 8))
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    unscaled = group_advantages(context.rewards_BK, weights.weights_BK, 4, profile=profile).advantages
    assert (unscaled - expected.advantages).abs().max() > 1e-2, "the factor has no effect on this batch"


def test_raw_singletons_do_not_scale() -> None:
    assert {name for name, profile in PROFILES.items() if not scales(profile)} == {
        "verl_grpo",
        "verl_dr_grpo",
        "verl_gdpo",
    }


def test_other_policies_give_weights_alone() -> None:
    policy = build_weight_policy("equal", batch(3).reward_names, 6)
    weights, found = weigh_scaled(policy, batch(3), Comparison(PROFILES["maestro"]), 3.0)
    assert found is None and torch.equal(weights.weights_BK, torch.full((32, 3), 1 / 3))


# --- what a policy that tries other weights is told ---

BASELINE = {**CONDUCTOR, "estimator": "baseline"}


@pytest.mark.parametrize(
    ("profile", "reward_weights"),
    [
        (None, None),
        ("dr_grpo", None),
        ("maestro", None),
        ("rloo", None),
        (replace(MIXED, score_eps=0.1), None),
        (UNSCALED, None),
        (None, [0.2, 3.0]),
        ("rloo", [0.2, 3.0]),
        ("maestro", [0.2, 3.0]),
    ],
    ids=["grpo", "dr_grpo", "maestro", "rloo", "variance", "unscaled", "grpo weighted", "rloo weighted", "weighted"],
)
def test_the_policy_compares_as_the_trainer_does(
    settings: Make, ingredients: Make, profile: Any, reward_weights: Any
) -> None:
    """Among the advantages under every action, the one under the action drawn is the advantage that is trained with.

    One profile has a large epsilon, so that any other epsilon is found out, and one scales rewards but not scores.
    """
    args = settings(max_steps=1, reward_weights=reward_weights)
    parts = {**ingredients(), "reward_funcs": [parity, brevity]}
    (outcome,) = trained(args, parts, weights=BASELINE, profile=profile).outcomes
    tried = experience(
        outcome,
        torch.zeros(8, 1),
        torch.full((8, 2), 0.5),
        objective="advantage",
        estimator="all_actions",
        alpha=CONDUCTOR["alpha"],
        meta_reward=None,
        keep_drawn_probs=False,
    )
    live_B = ~outcome.advantages.degenerate
    trained_with_B = outcome.advantages.advantages[live_B]
    assert outcome.weights.actions_B.unique().numel() == 2 and trained_with_B.abs().max() > 0.5
    drawn_B = tried["meta"].gather(1, tried["actions"][:, None])[:, 0]
    torch.testing.assert_close(drawn_B, trained_with_B, rtol=1e-4, atol=1e-4)


def test_every_policy_sees_the_rewards_as_they_are(settings: Make, ingredients: Make) -> None:
    args = settings(max_steps=1, reward_weights=[0.2, 3.0])
    (outcome,) = trained(args, ingredients(), weights=BASELINE, profile="rloo").outcomes
    assert (outcome.context.rewards_BK[:, 0] % 1 == 0).all() and outcome.context.rewards_BK[:, 0].max() > 1
    assert outcome.profile == PROFILES["rloo"]
