"""SAW, DVAO, weakest first and Exp3 compute their formulas, and refuse wrong options by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import AdvantageProfile, group_advantages
from maestro_fast.settings import SettingsError
from maestro_fast.weighting import Outcome, WeightContext, WeightPolicy, Weights, build_weight_policy
from tests.weighting.helpers import normal

NAMES = ("a", "b")
NAN = float("nan")


def build(name: str, **options: Any) -> WeightPolicy:
    return build_weight_policy({"type": name, **options}, NAMES, 1)


def at(rows: list[list[float]] | Tensor, *, step: int = 0, group_size: int = 2, **more: Any) -> WeightContext:
    return WeightContext(NAMES, group_size, step, torch.as_tensor(rows), **more)


def see(policy: WeightPolicy, context: WeightContext) -> Weights:
    weights = policy.weights(context)
    advantages = group_advantages(context.rewards_BK, weights.weights_BK, context.group_size)
    policy.observe(Outcome(context, weights, advantages))
    return weights


def test_saw_by_hand() -> None:
    """Above their minima, a is 1 or 3 with mean 2 and b is 8 or 10 with mean 9. Both deviations are sqrt(4 / 3)."""
    rows = [[1.0, 4.0], [3.0, 4.0], [1.0, 6.0], [3.0, 6.0]]
    cv = [math.sqrt(4 / 3) / 2.0, math.sqrt(4 / 3) / 9.0]
    expected = [x / sum(cv) for x in cv]
    policy = build("saw", minima={"a": 0, "b": -4}, delta=1e-7)
    assert policy.weights(at(rows)).weights_BK[2].tolist() == pytest.approx(expected, rel=1e-5)
    assert policy.metrics() == pytest.approx({"saw/cv/a": cv[0], "saw/cv/b": cv[1]}, rel=1e-5)
    policy = build("saw", minima={"a": 0, "b": -4}, delta=1e-7, mode="advantage", priorities={"b": 3})
    assert policy.weights(at(rows)).weights_BK[0].tolist() == pytest.approx(
        [2 * expected[0], 6 * expected[1]], rel=1e-5
    )


def test_saw_without_minima_remembers_the_least_value() -> None:
    policy, rows = build("saw", delta=1e-7), [[1.0, 10.0], [3.0, 11.0]]
    see(policy, at([[0.0, 9.0], [0.0, 9.0]]))
    cv = [math.sqrt(2) / 2, math.sqrt(0.5) / 1.5]
    assert see(policy, at(rows)).weights_BK[0].tolist() == pytest.approx([x / sum(cv) for x in cv], rel=1e-5)
    assert policy.state_dict()["minima"].tolist() == [0.0, 9.0]


def test_saw_edges() -> None:
    policy = build("saw", minima={"a": 0, "b": 0})
    assert policy.weights(at([[2.0, 1.0]] * 4)).weights_BK.tolist() == [[0.5, 0.5]] * 4  # nothing varies
    found = policy.weights(at([[1.0, NAN], [3.0, NAN]])).weights_BK
    assert found[0].tolist() == pytest.approx([1.0, 0.0])
    with pytest.raises(ValueError, match=r"^weights\.minima\.b: 0.0, but the reward gave -1"):
        policy.weights(at([[1.0, -1.0]]))


def test_dvao_by_hand() -> None:
    """In group 1 the deviations are sqrt(2) and 3 sqrt(2). In group 2 only b varies, and in group 3 nothing does."""
    rows = [[0.0, 1.0], [2.0, 7.0], [5.0, 1.0], [5.0, 2.0], [1.0, 1.0], [1.0, 1.0]]
    found = build("dvao").weights(at(rows)).weights_BK
    torch.testing.assert_close(found[::2], torch.tensor([[0.25, 0.75], [0.0, 1.0], [0.5, 0.5]]))
    assert torch.equal(found[::2], found[1::2])
    found = build("dvao", priorities={"a": 3}).weights(at(rows)).weights_BK
    torch.testing.assert_close(found[::2], torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.75, 0.25]]))
    found = build("dvao").weights(at([[0.0, 1.0], [2.0, NAN], [0.1, NAN], [0.1, NAN]])).weights_BK
    torch.testing.assert_close(found[::2], torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    for size in (1e-30, 1e25):  # whose squares are no float32 numbers
        found = build("dvao").weights(at([[0.0, 1.0 * size], [2.0 * size, 7.0 * size]])).weights_BK
        torch.testing.assert_close(found[0], torch.tensor([0.25, 0.75]))


def test_dvao_is_the_published_advantage() -> None:
    """The paper's advantage, sum_k (r_k - mean_k) / sum_l std_l, comes of a profile that leaves scores as they are."""
    rewards_BK = normal(12, 2, seed=0).double() * torch.tensor([1.0, 7.0])
    weights_BK = build("dvao").weights(at(rewards_BK, group_size=4)).weights_BK
    profile = AdvantageProfile("group", "group", "none", "none", reward_eps=0.0)
    found_B = group_advantages(rewards_BK, weights_BK, 4, profile=profile).advantages
    r_NGK = rewards_BK.view(3, 4, 2)
    expected_NG = (r_NGK - r_NGK.mean(1, keepdim=True)).sum(-1) / r_NGK.std(1).sum(-1, keepdim=True)
    torch.testing.assert_close(found_B, expected_NG.flatten(), rtol=1e-6, atol=1e-9)


def test_weakest_first_by_hand() -> None:
    policy = build("weakest_first", low={"a": 0}, high={"a": 10}, tau=0.5, decay=0.75)
    assert policy.weights(at([[9.0, 9.0]])).weights_BK.tolist() == [[0.5, 0.5]]  # nothing is known yet
    see(policy, at([[2.0, 1.0], [4.0, 1.0]]))  # a has the mean 3; b has shown no range, so it counts as half earned
    row = policy.weights(at([[0.0, 0.0]])).weights_BK[0]
    torch.testing.assert_close(row, torch.tensor([-0.3 / 0.5, -0.5 / 0.5]).softmax(0))
    see(policy, at([[7.0, 5.0], [7.0, NAN]]))  # a: 0.75 * 3 + 0.25 * 7 = 4; b: 0.75 * 1 + 0.25 * 5 = 2, of 1 to 5
    row = policy.weights(at([[0.0, 0.0]])).weights_BK[0]
    torch.testing.assert_close(row, torch.tensor([-0.4 / 0.5, -0.25 / 0.5]).softmax(0))
    assert policy.metrics() == pytest.approx({"weakest_first/earned/a": 0.4, "weakest_first/earned/b": 0.25})
    see(policy, at([[NAN, 5.0], [NAN, 5.0]]))
    assert policy.metrics()["weakest_first/earned/a"] == pytest.approx(0.4)


def test_exp3_by_hand() -> None:
    policy = build("exp3", gamma=0.4, alpha=0.5, sharpness=2.0, seed=3)
    first = see(policy, at([[0.0, 0.0], [2.0, 4.0]]))  # the means are 1 and 2, and so are the deviations
    assert first.actions_B is not None
    arm = int(first.actions_B[0])
    assert first.weights_BK[0].tolist() == [0.25 + 0.5 * (k == arm) for k in range(2)]
    assert first.expected_BK[0].tolist() == [0.5, 0.5]
    assert policy.metrics() == {"exp3/prob/a": 0.5, "exp3/prob/b": 0.5}  # its gain is not known yet
    see(policy, at([[2.0, 1.0], [2.0, 2.0]], step=1))  # the means are 2 and 1.5: d = (1 / 1 - 0.5 / 2) / 2
    x = 1 / (1 + math.exp(-2 * 0.375))
    s = 0.4 * x / (2 * 0.5)
    p = 0.6 / (1 + math.exp(-s)) + 0.2
    assert policy.metrics()[f"exp3/prob/{NAMES[arm]}"] == pytest.approx(p, rel=1e-9)


def test_exp3_gives_no_credit_to_an_arm_whose_reward_abstained() -> None:
    """The drawn reward changed nothing in the batch, though the other one rises afterwards."""
    policy = build("exp3", gamma=0.4, alpha=0.5, seed=3)
    arm = policy.arm(0)  # type: ignore[attr-defined]
    rows = [[0.0, 0.0], [2.0, 4.0]]
    for row in rows:
        row[arm] = NAN
    see(policy, at(rows))
    see(policy, at([[3.0, 3.0], [4.0, 5.0]], step=1))
    assert policy.metrics() == {"exp3/prob/a": 0.5, "exp3/prob/b": 0.5}


def test_exp3_finds_the_arm_that_pays() -> None:
    policy, level = build("exp3", gamma=0.2, sharpness=5.0), 0.0
    for step in range(150):
        weights = see(policy, at((normal(8, 2, seed=step) * 0.1 + level), step=step, group_size=4))
        assert weights.actions_B is not None
        level += 0.1 * float(weights.actions_B[0] == 1) - 0.1 * float(weights.actions_B[0] == 0)
    assert policy.metrics()["exp3/prob/b"] > 0.8


@pytest.mark.parametrize("name", ["saw", "weakest_first", "exp3"])
def test_a_resumed_policy_has_the_same_future(name: str) -> None:
    whole, resumed = build(name), build(name)
    for step in range(9):
        if step == 4:
            resumed.load_state_dict(whole.state_dict())
        context = at(normal(8, 2, seed=step), step=step, group_size=4)
        weights = see(whole, context)
        if step >= 4:
            assert torch.equal(see(resumed, context).weights_BK, weights.weights_BK)
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in resumed.state_dict().items())
    with pytest.raises(ValueError, match=r"^state"):
        whole.load_state_dict({"other": torch.zeros(2)})


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"type": "saw", "delta": 0}, "weights.delta: 0.0, expected a number above 0"),
        ({"type": "saw", "priorities": {"a": 0}}, "weights.priorities.a: 0.0, expected a number above 0"),
        ({"type": "saw", "minima": {"c": 0}}, "weights.minima.c: there is no such reward, expected one of a, b"),
        ({"type": "dvao", "priorities": {"a": -1}}, "weights.priorities.a: -1.0, expected a number above 0"),
        ({"type": "weakest_first", "tau": 0}, "weights.tau: 0.0, expected a positive number"),
        ({"type": "weakest_first", "decay": 1}, "weights.decay: 1.0, expected 0 <= decay < 1"),
        ({"type": "weakest_first", "low": {"a": 1}, "high": {"a": 1}}, "weights.high.a: 1.0, expected more than low"),
        ({"type": "exp3", "gamma": 0}, "weights.gamma: 0.0, expected 0 < gamma <= 1"),
        ({"type": "exp3", "alpha": 2}, "weights.alpha: 2.0, expected 0 < alpha <= 1"),
    ],
)
def test_errors_name_the_setting(entry: Any, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        build_weight_policy(entry, NAMES, 1)
    assert str(caught.value).startswith(words)
