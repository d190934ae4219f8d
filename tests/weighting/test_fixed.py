"""Equal, static, random, schedule, router and callable give the weights of their formulas."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.data.conditions import check_conditions
from maestro_fast.data.dataset import PromptDataset
from maestro_fast.rewards import build_rewards
from maestro_fast.settings import SettingsError
from maestro_fast.weighting import Equal, Random, Static, WeightContext, WeightPolicy, build_weight_policy
from tests.weighting.helpers import NAMES, context

PAIR = ("a", "b")


def build(name: str, **options: Any) -> WeightPolicy:
    """A policy for the rewards ``PAIR``."""
    return build_weight_policy({"type": name, **options}, PAIR, 1)


def at(rows: list[list[float]], *, step: int = 0, group_size: int = 2, **more: Any) -> WeightContext:
    return WeightContext(PAIR, group_size, step, torch.tensor(rows), **more)


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_equal_is_one_over_k(k: int) -> None:
    weights = Equal().weights(context(5, k=k))
    expected = torch.tensor([[1 / k] * k] * 5)
    assert torch.equal(weights.weights_BK, expected)
    assert torch.equal(weights.expected_BK, expected)
    assert weights.actions_B is None


def test_equal_ignores_abstentions() -> None:
    missing = context(torch.full((4, 3), float("nan")))
    assert torch.equal(Equal().weights(missing).weights_BK, torch.full((4, 3), 1 / 3))


def test_static_goes_by_the_order_of_the_rewards() -> None:
    policy = build_weight_policy({"type": "static", "values": {"entropy": -0.5, "format": 2, "length": 0}}, NAMES, 1)
    weights = policy.weights(context(4))
    expected = torch.tensor([[2.0, 0.0, -0.5]] * 4)
    assert torch.equal(weights.weights_BK, expected) and torch.equal(weights.expected_BK, expected)
    assert weights.weights_BK.dtype == torch.float32
    assert weights.actions_B is None


def test_static_ignores_abstentions() -> None:
    missing = context(torch.full((4, 3), float("nan")))
    assert torch.equal(Static((0.2, 0.3, 0.5)).weights(missing).weights_BK, torch.tensor([[0.2, 0.3, 0.5]] * 4))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"format": 1, "length": 1, "entropy": 1, "lenght": 1},
            "weights.values.lenght: there is no such reward, expected one of format, length, entropy",
        ),
        ({"format": 1, "length": 1}, "weights.values.entropy: missing, every reward needs a weight"),
        ({}, "weights.values.format: missing"),
        ({"format": math.inf, "length": 1, "entropy": 1}, "weights.values.format: inf, expected a finite number"),
        ({"format": math.nan, "length": 1, "entropy": 1}, "weights.values.format: nan, expected a finite number"),
        ({"format": "much", "length": 1, "entropy": 1}, "weights.values.format: got str 'much', expected float"),
        ([1, 1, 1], "weights.values: got list [1, 1, 1], expected a mapping"),
    ],
)
def test_errors_of_static_name_the_reward(values: Any, words: str) -> None:
    with pytest.raises(SettingsError, match="^" + re.escape(words)):
        build_weight_policy({"type": "static", "values": values}, NAMES, 1)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_random_is_uniform_on_the_simplex(k: int) -> None:
    """Weights have the moments of Dirichlet(1, ..., 1), and each has P(w <= x) = 1 - (1 - x)^(k - 1)."""
    count = 20_000
    weights_BK = Random(3).weights(context(count, step=5, k=k)).weights_BK.double()
    assert (weights_BK > 0).all()
    torch.testing.assert_close(weights_BK.sum(-1), torch.ones(count, dtype=torch.float64), rtol=0, atol=1e-6)
    standard = math.sqrt((k - 1) / (k * k * (k + 1)))
    torch.testing.assert_close(
        weights_BK.mean(0), torch.full((k,), 1 / k, dtype=torch.float64), rtol=0, atol=4 * standard / math.sqrt(count)
    )
    covariance = (torch.eye(k, dtype=torch.float64) * k - 1) / (k * k * (k + 1))
    torch.testing.assert_close(weights_BK.T.cov(), covariance, rtol=0, atol=0.05 * standard**2)
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    for column in weights_BK.T:
        distance = (1 - (1 - column.sort().values) ** (k - 1) - steps).abs().max()
        assert distance < 2.0 / math.sqrt(count)  # Kolmogorov-Smirnov, p < 0.001


def test_a_random_draw_belongs_to_seed_step_and_response() -> None:
    weights = Random(3).weights(context(16, step=2))
    again = Random(3)
    again.weights(context(7, step=1))  # what was drawn before does not matter
    assert torch.equal(again.weights(context(16, step=2)).weights_BK, weights.weights_BK)
    assert torch.equal(again.weights(context(8, step=2)).weights_BK, weights.weights_BK[:8])
    assert len({tuple(row) for row in weights.weights_BK.tolist()}) == 16
    for other in (Random(4).weights(context(16, step=2)), Random(3).weights(context(16, step=3))):
        assert (other.weights_BK != weights.weights_BK).all()


def test_the_expectation_of_random_is_equal_weights() -> None:
    weights = Random(3).weights(context(16))
    assert torch.equal(weights.expected_BK, torch.full((16, 3), 1 / 3))
    assert weights.actions_B is None


def test_random_ignores_abstentions() -> None:
    missing = context(torch.full((4, 3), float("nan")))
    assert torch.equal(Random(1).weights(missing).weights_BK, Random(1).weights(context(4)).weights_BK)


POINTS = [
    {"step": 0, "values": {"a": 1, "b": 0}},
    {"step": 4, "values": {"a": 0.5, "b": 1}},
    {"step": 10, "values": {"a": 0, "b": 2}},
]


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ("constant", {0: (1, 0), 3: (1, 0), 4: (0.5, 1), 9: (0.5, 1), 10: (0, 2), 99: (0, 2)}),
        ("linear", {0: (1, 0), 1: (0.875, 0.25), 4: (0.5, 1), 7: (0.25, 1.5), 10: (0, 2), 99: (0, 2)}),
    ],
)
def test_schedule(between: str, expected: dict[int, tuple[float, float]]) -> None:
    policy = build("schedule", points=POINTS, between=between)
    for step, row in expected.items():
        weights = policy.weights(at([[0.0, 0.0]] * 2, step=step))
        assert torch.equal(weights.weights_BK, torch.tensor([row] * 2).float())
        assert torch.equal(weights.expected_BK, weights.weights_BK)


def by_step(context: WeightContext) -> Tensor:
    return torch.tensor([context.step, 1.0])


def by_column(context: WeightContext) -> Tensor:
    return torch.tensor([[float(x), 0.0] for x in context.columns["hard"]])


def wrong(context: WeightContext) -> Tensor:
    return torch.zeros(3)


def infinite(context: WeightContext) -> Tensor:
    return torch.tensor([1.0, math.inf])


def test_callable() -> None:
    rows = [[0.0, 0.0]] * 2
    policy = build("callable", function=by_step)
    assert policy.weights(at(rows, step=3)).weights_BK.tolist() == [[3.0, 1.0]] * 2
    policy = build("callable", function=f"{__file__}:by_column", columns=["hard"])
    assert policy.needs_columns == ("hard",)
    assert policy.weights(at(rows, columns={"hard": [2, 5]})).weights_BK.tolist() == [[2.0, 0.0], [5.0, 0.0]]
    with pytest.raises(ValueError, match=r"^weights\.function: returned shape \(3,\), expected a tensor \(2, 2\) or"):
        build("callable", function=wrong).weights(at(rows))
    with pytest.raises(ValueError, match=r"^weights\.function: returned weights that are not finite"):
        build("callable", function=infinite).weights(at(rows))


def test_router() -> None:
    routes = {"poem": {"a": 0.9, "b": 0.1}, "1": {"a": 0, "b": 1}}
    policy = build("router", column="kind", routes=routes, default={"a": 0.5, "b": 0.5})
    found = policy.weights(at([[0.0, 0.0]] * 3, group_size=1, columns={"kind": ["poem", 1, "essay"]}))
    torch.testing.assert_close(found.weights_BK, torch.tensor([[0.9, 0.1], [0.0, 1.0], [0.5, 0.5]]))
    with pytest.raises(ValueError, match=r"^weights\.routes: none for kind 'essay', expected one of poem, 1, or"):
        build("router", column="kind", routes=routes).weights(at([[0.0, 0.0]], columns={"kind": ["essay"]}))


def test_routes_are_compared_with_the_data_before_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """A prompt without a route would end the run at some batch, and a misspelt one would never be taken."""
    routes, guard = {"poem": {"a": 0.9, "b": 0.1}, "eassy": {"a": 0, "b": 1}}, {"held_back": 0.5}
    rewards, data = build_rewards(["format"]), PromptDataset([{"prompt": "p", "kind": "poem"}] * 3)
    guarded = build("router", column="kind", routes=routes, guard=guard)
    check_conditions(rewards, None, guarded, data, None)
    assert ["no prompt takes 'eassy', the column 'kind' holds 'poem'" in text for text in caplog.messages] == [True]
    with pytest.raises(ValueError, match=r"^weights\.routes: none for kind 'essay', expected one of poem, eassy"):
        check_conditions(rewards, None, guarded, PromptDataset([*data.rows, {"prompt": "p", "kind": "essay"}]), None)
    with pytest.raises(ValueError, match=r"^weights: policy 'router' reads the column 'sort', the data has kind"):
        check_conditions(rewards, None, build("router", column="sort", routes=routes), data, None)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"type": "schedule", "points": []}, "weights.points: start at step None, expected 0"),
        ({"type": "schedule", "points": [POINTS[1]]}, "weights.points: start at step 4, expected 0"),
        (
            {"type": "schedule", "points": [POINTS[0], POINTS[0]]},
            "weights.points: at steps [0, 0], expected ascending",
        ),
        ({"type": "schedule", "points": [{"step": 0, "values": {"a": 1}}]}, "weights.points[0].values.b: missing"),
        ({"type": "callable", "function": 3}, "weights.function: 3, expected a function or its name"),
        ({"type": "callable", "function": "json:nothing"}, "weights.function: json has no 'nothing'"),
        ({"type": "router", "column": "k", "routes": {"x": {"a": 1}}}, "weights.routes.x.b: missing"),
        ({"type": "router", "column": "k", "routes": {"x": {"c": 1}}}, "weights.routes.x.c: there is no such reward"),
    ],
)
def test_errors_of_schedule_callable_and_router_name_the_setting(entry: Any, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        build_weight_policy(entry, PAIR, 1)
    assert str(caught.value).startswith(words)
