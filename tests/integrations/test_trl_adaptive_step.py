"""Where TRL's trainer makes weights and advantages in one op, and that it trains on what two ops would give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from maestro_fast.integrations.trl import MaestroGRPOTrainer
from maestro_fast.integrations.trl.scale import scales, weigh_scaled
from maestro_fast.ops import PROFILES, AdvantageProfile, GroupAdvantages, group_advantages
from maestro_fast.weighting import ConductorConfig, Outcome, WeightContext, build_weight_policy
from tests.integrations.conftest import abstaining, brevity, parity
from tests.weighting.helpers import normal
from tests.weighting.one_op import FUSED, SINGLE, apart, counted

Make = Callable[..., Any]
CONDUCTOR = {"policy": "conductor", "period": 1, "learning_rate": 0.1, "alpha": 0.6}
MIXED = AdvantageProfile(score_eps_in="variance", score_eps=1e-3)
TOKENS = AdvantageProfile(score_center="tokens", score_scale="tokens")


class Keeping(MaestroGRPOTrainer):
    """Keeps what the policy was told, and what TRL got to train with."""

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
    """Two rewards double the weights, which changes no bit; three times the weights are rounded."""

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
    batches = 2 if bitwise else 1  # the first update may take roundings further
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
    lengths_B = torch.full((8,), 8) if trainer.profile.needs_lengths else None  # none of the responses ends early
    expected = group_advantages(
        outcome.context.rewards_BK,
        outcome.weights.weights_BK * factor_K,
        4,
        lengths=lengths_B,
        profile=trainer.profile,
    )
    assert torch.equal(outcome.advantages.advantages, expected.advantages)


def test_two_ops_for_an_evaluation(settings: Make, ingredients: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are the expected ones, which the one op does not compare by."""
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
    """With epsilons that matter: a tenth of the deviations."""
    profile = replace(SCALED[name], score_eps=0.1, reward_eps=0.1)
    policy, context = ConductorConfig(alpha=0.6).build(batch(k).reward_names, 6), batch(k)
    policy.weight.copy_(normal(k, 6, seed=3))
    weights, found = weigh_scaled(policy, context, profile, float(k))
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
    weights, found = weigh_scaled(policy, batch(3), PROFILES["maestro"], 3.0)
    assert found is None and torch.equal(weights.weights_BK, torch.full((32, 3), 1 / 3))
