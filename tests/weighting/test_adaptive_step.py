"""One op gives a batch's weights and advantages where it can, else two ops do, always with the same bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import AdvantageProfile, GroupAdvantages, group_advantages
from maestro_fast.specs import PROFILES
from maestro_fast.weighting import (
    Comparison,
    Conductor,
    ConductorConfig,
    WeightContext,
    WeightPolicy,
    Weights,
    build_weight_policy,
    scored,
    weigh_and_compare,
)
from tests.weighting.helpers import NAMES, K, normal
from tests.weighting.one_op import FUSED, SINGLE, counted

B, G, D = 24, 4, 5
WIDE = AdvantageProfile(reward_center="batch"), AdvantageProfile(reward_scale="batch")
OVER_THE_BATCH = ("grpo_batch", "gdpo", "verl_gdpo")


def conductor(kind: type[Conductor] = Conductor, **options: Any) -> Conductor:
    """Makes a Conductor whose weights depend on the context in every layer."""
    policy = kind(ConductorConfig(**{"alpha": 0.6, "learning_rate": 0.0, **options}), NAMES, D)
    policy.weight.copy_(normal(*policy.weight.shape, seed=7))
    policy.bias.copy_(normal(K, seed=8))
    policy.statistics.update(normal(50, D, seed=9) * 2 + 1)
    return policy


def batch(step: int = 0) -> WeightContext:
    rewards_BK = normal(B, K, seed=1000 + step)
    rewards_BK[1, 0] = rewards_BK[5] = float("nan")  # one reward abstains, and all rewards of a row do
    rewards_BK[8:12] = 0.3  # a group without spread
    return WeightContext(NAMES, G, step, rewards_BK, normal(B, D, seed=step) * 3, normal(B, seed=2000 + step))


def comparison(profile: str | AdvantageProfile = "maestro") -> Comparison:
    """Makes a comparison with everything that the profile takes."""
    resolved = PROFILES[profile] if isinstance(profile, str) else profile
    kl_B = normal(B, seed=3).abs() if resolved.kl_in == "score" else None
    lengths_B = torch.arange(1, B + 1) if resolved.needs_lengths else None
    return Comparison(profile, kl_B, 0.0 if kl_B is None else 0.04, lengths_B)


def by_two_ops(
    policy: WeightPolicy, context: WeightContext, how: Comparison
) -> tuple[Weights, GroupAdvantages, dict[str, float]]:
    weights = policy.weights(context)
    advantages = group_advantages(
        *scored(context, weights), G, kl=how.kl_B, beta=how.beta, lengths=how.lengths_B, profile=how.profile
    )
    return weights, advantages, policy.metrics()


def assert_same_bits(ours: tuple[Weights, GroupAdvantages], theirs: tuple[Weights, GroupAdvantages]) -> None:
    for got, expected in ((vars(ours[0]), vars(theirs[0])), (ours[1]._asdict(), theirs[1]._asdict())):
        for name, tensor in expected.items():
            if not isinstance(tensor, Tensor):
                assert got[name] == tensor, name
            else:
                assert got[name].dtype == tensor.dtype and got[name].device == tensor.device, name
                assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("profile", [name for name in PROFILES if name not in OVER_THE_BATCH])
def test_one_op_under_every_profile_that_compares_within_groups(monkeypatch: pytest.MonkeyPatch, profile: str) -> None:
    policy, how = conductor(), comparison(profile)
    theirs = by_two_ops(policy, batch(2), how)
    assert (theirs[0].weights_BK != theirs[0].weights_BK[0]).any() and theirs[1].advantages.abs().max() > 0.5
    calls = counted(monkeypatch)
    assert_same_bits(weigh_and_compare(policy, batch(2), how), theirs[:2])
    assert calls == FUSED
    assert policy.metrics() == theirs[2] and policy.metrics()["conductor/entropy"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "soft"},
        {"hidden": 6},
        {"hidden": 6, "standardise": "layer_norm", "mode": "soft"},
        {"shuffle": True},
        {"context": "prompt_mean"},
        {"context": "reference_prompt_mean"},
        {"tau": 0.5, "min_prob": 0.0, "seed": 2**62 + 11},
    ],
    ids=str,
)
def test_one_op_with_every_option(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    policy = conductor(**options)
    theirs = by_two_ops(policy, batch(3), comparison())
    calls = counted(monkeypatch)
    assert_same_bits(weigh_and_compare(policy, batch(3), comparison()), theirs[:2])
    assert calls == FUSED
    default = by_two_ops(conductor(), batch(3), comparison())
    assert not torch.equal(theirs[1].advantages, default[1].advantages), "the option has no effect on this batch"


class Constant(Conductor):
    """A user's Conductor that does not ask its network."""

    def weights(self, context: WeightContext) -> Weights:
        fixed_BK = torch.tensor([0.2, 0.3, 0.5]).expand_as(context.rewards_BK)
        return Weights(fixed_BK, fixed_BK)


def of_meta(context: WeightContext) -> WeightContext:
    return replace(context, rewards_BK=context.rewards_BK.to("meta"), utilities_B=None)


class Leaning(Conductor):
    """A user's Conductor that reads its contexts in another way, and leaves the weights to ours."""

    def contexts(self, context: WeightContext) -> Tensor:
        return super().contexts(context) + 1.0


def test_a_subclass_has_its_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, through in ((Constant, {"group_advantages": 1}), (Leaning, FUSED)):
        policy = conductor(kind)
        theirs = by_two_ops(policy, batch(), comparison())
        with monkeypatch.context() as patch:
            calls = counted(patch)
            assert_same_bits(weigh_and_compare(policy, batch(), comparison()), theirs[:2])
        assert calls == through
        assert not torch.equal(theirs[0].weights_BK, conductor().weights(batch()).weights_BK)


@pytest.mark.parametrize(
    ("policy", "how"),
    [
        (conductor(mode="group"), comparison()),
        (build_weight_policy({"type": "conductor", "guard": {}}, NAMES, D), comparison()),
        (conductor(), replace(comparison(), kl_B=normal(B, seed=3).double())),
        (conductor(), replace(comparison(), kl_B=normal(B, seed=3).requires_grad_())),
        *((conductor(), comparison(profile)) for profile in (*OVER_THE_BATCH, *WIDE)),
    ],
    ids=[
        "one action per group",
        "a guard",
        "a KL in float64",
        "a KL with a gradient",
        *OVER_THE_BATCH,
        "means of rewards over the batch",
        "deviations of rewards over the batch",
    ],
)
def test_two_ops_where_one_has_no_such_case(
    monkeypatch: pytest.MonkeyPatch, policy: WeightPolicy, how: Comparison
) -> None:
    theirs = by_two_ops(policy, batch(), how)
    calls = counted(monkeypatch)
    assert_same_bits(weigh_and_compare(policy, batch(), how), theirs[:2])
    assert calls == SINGLE


def test_two_ops_for_rewards_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    context = replace(batch(), rewards_BK=batch().rewards_BK.double())
    theirs = by_two_ops(conductor(), context, Comparison())
    assert theirs[1].advantages.dtype == torch.float64
    calls = counted(monkeypatch)
    assert_same_bits(weigh_and_compare(conductor(), context, Comparison()), theirs[:2])
    assert calls == SINGLE


def test_two_ops_where_the_conductor_is_on_another_device_than_the_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    weights, advantages = weigh_and_compare(conductor(), of_meta(batch()), Comparison())
    assert calls == SINGLE
    assert weights.weights_BK.device == advantages.advantages.device == torch.device("meta")


@pytest.mark.parametrize("entry", ["equal", "random", "saw", {"type": "anchored", "hybrid": True}], ids=str)
def test_two_ops_for_all_other_policies(monkeypatch: pytest.MonkeyPatch, entry: Any) -> None:
    policy = build_weight_policy(entry, NAMES, D)
    context = batch()
    if policy.needs_context:
        context = replace(context, rewards_BK=normal(B, K, seed=5))
    theirs = by_two_ops(policy, context, comparison())
    uses_utilities = theirs[0].direct_B is not None
    assert uses_utilities == policy.needs_context
    assert theirs[1].normalized_rewards.shape == (B, K + uses_utilities)
    calls = counted(monkeypatch)
    assert_same_bits(weigh_and_compare(policy, context, comparison()), theirs[:2])
    assert calls == {"group_advantages": 1}


@pytest.mark.parametrize("missing", [True, False])
def test_contexts_that_are_missing_or_misshapen_are_named(missing: bool) -> None:
    context = replace(batch(), context_Bd=None if missing else normal(B, D + 1, seed=0))
    message = r"^context_Bd: missing" if missing else r"^context_Bd: shape \(24, 6\), expected \(24, 5\)"
    with pytest.raises(ValueError, match=message):
        weigh_and_compare(conductor(), context, comparison())
