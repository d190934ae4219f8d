"""The Conductor's forward: probabilities equal those by hand, draws follow them, and gradients are those of p."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import ConductorParams, ConductorSample, conductor_weights
from maestro_fast.ops.philox import uniform
from tests.ops.helpers import assert_same_compiled, assert_same_fake

B, D, H, K = 6, 5, 7, 3


def random_params(*, mlp: bool = False, dtype: torch.dtype = torch.float64, seed: int = 0) -> ConductorParams:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    inner = (normal(H, D), normal(H)) if mlp else (None, None)
    return ConductorParams(normal(D), normal(D).exp(), normal(K, H if mlp else D), normal(K), *inner)


def with_logits(*logits: float) -> ConductorParams:
    """Makes a network that gives these logits whatever h is."""
    k = len(logits)
    return ConductorParams(torch.zeros(D), torch.ones(D), torch.zeros(k, D), torch.tensor(logits))


def contexts(batch: int = B, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_probabilities_by_hand() -> None:
    params = with_logits(math.log(1.0), math.log(2.0), math.log(5.0))
    probs = conductor_weights(contexts(2, torch.float32), params, min_prob=0.1).probs
    expected = torch.tensor([0.7 / 8 + 0.1, 0.7 * 2 / 8 + 0.1, 0.7 * 5 / 8 + 0.1])
    torch.testing.assert_close(probs, expected.expand(2, 3), rtol=1e-6, atol=0)
    probs = conductor_weights(contexts(2, torch.float32), params, min_prob=0.0, tau=0.5).probs
    torch.testing.assert_close(probs, (torch.tensor([1.0, 4.0, 25.0]) / 30).expand(2, 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mlp", [False, True])
def test_probabilities_follow_the_head(mlp: bool) -> None:
    params, h = random_params(mlp=mlp), contexts()
    expected = []
    for row in h:
        x = (row - params.mean) * params.rstd
        if mlp:
            x = params.hidden_weight @ x + params.hidden_bias
            x = torch.stack([value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in x])
        q = (params.weight @ x + params.bias).div(0.8).exp()
        expected.append((1 - K * 0.05) * q / q.sum() + 0.05)
    sample = conductor_weights(h, params, tau=0.8)
    torch.testing.assert_close(sample.probs, torch.stack(expected), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("mode", ["sample", "soft"])
def test_log_probs_and_entropy_are_of_p(mlp: bool, mode: Any) -> None:
    sample = conductor_weights(contexts(), random_params(mlp=mlp), min_prob=0.2, mode=mode)
    chosen = sample.probs[torch.arange(B), sample.actions]
    torch.testing.assert_close(sample.log_probs, chosen.log())
    torch.testing.assert_close(sample.entropy, -(sample.probs * sample.probs.log()).sum(-1))
    assert (sample.probs >= 0.2).all()


def test_sampled_weights_lean_towards_the_action() -> None:
    sample = conductor_weights(contexts(), random_params(), alpha=0.3)
    for b in range(B):
        expected = [0.7 / K + 0.3 * (k == int(sample.actions[b])) for k in range(K)]
        assert sample.weights[b].tolist() == pytest.approx(expected, abs=1e-12)
    assert len(set(sample.actions.tolist())) > 1


def test_soft_weights_are_the_probabilities() -> None:
    params = random_params()
    params.weight.requires_grad_()
    sample = conductor_weights(contexts(), params, mode="soft")
    assert torch.equal(sample.weights, sample.probs) and sample.weights.requires_grad
    assert torch.equal(sample.actions, sample.probs.argmax(-1))


@pytest.mark.parametrize("mode", ["sample", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_a_row_sum_to_one(mode: Any, dtype: torch.dtype) -> None:
    sample = conductor_weights(contexts(64, dtype), random_params(dtype=torch.float32), mode=mode)
    assert {x.dtype for x in sample} == {torch.float32, torch.int64}
    torch.testing.assert_close(sample.weights.sum(-1), torch.ones(64), rtol=0, atol=3e-7)
    torch.testing.assert_close(sample.probs.sum(-1), torch.ones(64), rtol=0, atol=3e-7)


@pytest.mark.parametrize("min_prob", [0.0, 0.05])
def test_zeros_give_exactly_equal_probabilities(min_prob: float) -> None:
    for k in (2, 3, 5, 8):
        probs = conductor_weights(contexts(4, torch.float32), with_logits(*[0.0] * k), min_prob=min_prob).probs
        assert (probs == probs[0, 0]).all()
        assert probs[0, 0].item() == pytest.approx(1 / k, abs=1e-7)


def test_a_permutation_of_the_rewards_permutes_the_probabilities() -> None:
    params, order = random_params(mlp=True), torch.tensor([2, 0, 1])
    permuted = replace(params, weight=params.weight[order], bias=params.bias[order])
    before, after = (conductor_weights(contexts(), x) for x in (params, permuted))
    torch.testing.assert_close(after.probs, before.probs[:, order], rtol=1e-12, atol=0)
    torch.testing.assert_close(after.entropy, before.entropy, rtol=1e-12, atol=0)


def test_frequencies_match_p() -> None:
    count = 40_000
    sample = conductor_weights(contexts(1).float().expand(count, D), with_logits(0.0, 1.0, -2.0), seed=3, step=4)
    p = sample.probs[0]
    observed = torch.bincount(sample.actions, minlength=3) / count
    assert ((observed - p).abs() < 4 * (p * (1 - p) / count).sqrt()).all()


def test_the_action_is_where_the_draw_falls_in_the_cumulated_probabilities() -> None:
    sample = conductor_weights(
        contexts(200, torch.float32), random_params(dtype=torch.float32), seed=5, step=2, offset=9
    )
    u = uniform(5, 2, 9, 200, torch.device("cpu")).double()
    upper = sample.probs.double().cumsum(-1)
    for b, action in enumerate(sample.actions.tolist()):
        assert (upper[b, action - 1] if action else 0.0) - 1e-6 <= u[b] < upper[b, action] + 1e-6


def test_shards_draw_what_the_whole_batch_draws() -> None:
    h, params = contexts(30), random_params()
    whole = conductor_weights(h, params, seed=7, step=3, offset=100)
    for cut in (0, 1, 13, 30):
        parts = [
            conductor_weights(h[:cut], params, seed=7, step=3, offset=100),
            conductor_weights(h[cut:], params, seed=7, step=3, offset=100 + cut),
        ]
        assert torch.equal(torch.cat([x.actions for x in parts]), whole.actions)
    others = (conductor_weights(h, params, seed=8, step=3), conductor_weights(h, params, seed=7, step=4, offset=100))
    assert all(not torch.equal(x.actions, whole.actions) for x in others)


@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("mode", ["sample", "soft"])
def test_gradients_of_the_head(mlp: bool, mode: Any) -> None:
    params, h = random_params(mlp=mlp), contexts()
    names = ["weight", "bias", *(["hidden_weight", "hidden_bias"] if mlp else [])]
    leaves = tuple(getattr(params, name).requires_grad_() for name in names)

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        sample = conductor_weights(h, replace(params, **dict(zip(names, values, strict=True))), mode=mode, min_prob=0.1)
        differentiable = (sample.log_probs, sample.entropy, sample.probs)
        return (*differentiable, sample.weights) if mode == "soft" else differentiable

    assert all(x.requires_grad for x in outputs(*leaves))  # gradcheck skips outputs that do not
    assert torch.autograd.gradcheck(outputs, leaves)


def test_sampled_weights_and_actions_carry_no_gradient() -> None:
    params = random_params()
    params.weight.requires_grad_()
    sample = conductor_weights(contexts(), params)
    assert not sample.weights.requires_grad and not sample.actions.requires_grad and sample.log_probs.requires_grad


def test_an_impossible_action_leaves_finite_gradients() -> None:
    params = with_logits(0.0, 300.0, -300.0)
    params.bias.requires_grad_()
    sample = conductor_weights(contexts(4, torch.float32), params, min_prob=0.0)
    assert sample.probs[0].tolist() == [0.0, 1.0, 0.0]
    assert sample.actions.tolist() == [1] * 4
    assert (sample.log_probs == 0).all() and (sample.entropy == 0).all()
    (gradient,) = torch.autograd.grad(sample.entropy.sum() + sample.log_probs.sum(), params.bias)
    assert gradient.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("mlp", [False, True])
def test_autocast_changes_nothing(mlp: bool) -> None:
    params, h = random_params(mlp=mlp, dtype=torch.float32), contexts(64, torch.float32)
    expected = conductor_weights(h, params)
    with torch.autocast("cpu", torch.bfloat16):
        result = conductor_weights(h, params)
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(result, expected, strict=True))


@pytest.mark.parametrize(("mlp", "mode"), [(False, "soft"), (True, "sample")])
def test_compiles_to_one_graph_and_runs_on_fake_tensors(mlp: bool, mode: Any) -> None:
    params = random_params(mlp=mlp, dtype=torch.float32)
    names = [item.name for item in fields(params) if getattr(params, item.name) is not None]

    def op(h: Tensor, *values: Tensor) -> ConductorSample:
        return conductor_weights(h, ConductorParams(**dict(zip(names, values, strict=True))), mode=mode, seed=2, step=1)

    values = [getattr(params, name).requires_grad_(name not in ("mean", "rstd")) for name in names]
    assert_same_compiled(op, contexts(dtype=torch.float32), *values)
    assert_same_fake(op, contexts(dtype=torch.float32), *values)


def test_an_empty_batch() -> None:
    sample = conductor_weights(contexts(0), random_params())
    assert [tuple(x.shape) for x in sample] == [(0, K), (0,), (0,), (0,), (0, K)]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"h": torch.ones(2, D, dtype=torch.int64)}, TypeError, "h: dtype torch.int64"),
        ({"h": torch.ones(2, D + 1)}, ValueError, rf"h: shape \(2, {D + 1}\)"),
        ({"h": torch.ones(D)}, ValueError, r"h: shape \(5,\)"),
        ({"h": torch.ones(2, D, device="meta")}, ValueError, "params.mean: on cpu, expected meta"),
        ({"rstd": torch.ones(D + 1)}, ValueError, "params.rstd: shape"),
        ({"weight": torch.ones(K, D + 1)}, ValueError, "params.weight: shape"),
        ({"bias": torch.ones(1)}, ValueError, r"params.bias: shape \(1,\), expected \(3,\)"),
        ({"bias": torch.ones(K, dtype=torch.float64)}, TypeError, "params.bias: dtype torch.float64"),
        ({"hidden_weight": torch.ones(H, D)}, ValueError, "params: hidden_weight or hidden_bias alone"),
        ({"hidden_weight": torch.ones(D, D + 1), "hidden_bias": torch.ones(D)}, ValueError, "params.hidden_weight: "),
        (
            {"hidden_weight": torch.tensor(1.0), "hidden_bias": torch.ones(D)},
            ValueError,
            r"params.hidden_weight: shape \(\)",
        ),
        ({"tau": 0.0}, ValueError, "tau: 0.0"),
        ({"tau": float("nan")}, ValueError, "tau: nan"),
        ({"tau": float("inf")}, ValueError, "tau: inf"),
        ({"min_prob": "0"}, TypeError, "min_prob: got str '0', expected a number"),
        ({"alpha": None}, TypeError, "alpha: got NoneType None, expected a number"),
        ({"step": 1.5}, TypeError, "step: got float 1.5, expected an integer"),
        ({"offset": 2**63 - 2}, ValueError, "offset: 9223372036854775806 with 2 responses"),
        ({"min_prob": 1 / 3}, ValueError, "min_prob: 0.33"),
        ({"min_prob": -0.1}, ValueError, "min_prob: -0.1"),
        ({"alpha": 0.0}, ValueError, "alpha: 0.0"),
        ({"alpha": 1.5}, ValueError, "alpha: 1.5"),
        ({"mode": "greedy"}, ValueError, "mode: 'greedy'"),
        ({"seed": -1}, ValueError, "seed: -1"),
        ({"backend": "triton"}, ValueError, "backend: 'triton'"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    of_params = {item.name for item in fields(ConductorParams)}
    params = ConductorParams(torch.zeros(D), torch.ones(D), torch.zeros(K, D), torch.zeros(K))
    params = replace(params, **{name: value for name, value in changes.items() if name in of_params})
    arguments = {"h": torch.ones(2, D), **{name: x for name, x in changes.items() if name not in of_params}}
    with pytest.raises(error, match=message):
        conductor_weights(params=params, **arguments)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_a_parameter_that_is_not_finite_leaves_no_number(backend: Any) -> None:
    """An entropy of 0 would say that the choice is certain."""
    params = ConductorParams(torch.zeros(5), torch.ones(5), torch.zeros(2, 5), torch.tensor([0.0, math.nan]))
    sample = conductor_weights(
        torch.ones(3, 5), params, tau=1.0, min_prob=0.05, alpha=0.4, mode="soft", seed=1, step=0, backend=backend
    )
    assert sample.probs.isnan().all() and sample.entropy.isnan().all() and sample.weights.isnan().all()
    assert sample.log_probs.isnan().all()
