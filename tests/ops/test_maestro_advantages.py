"""The adaptive step gives what the ops that it is made of give one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import (
    ConductorParams,
    ConductorSample,
    GroupAdvantages,
    conductor_weights,
    group_advantages,
    maestro_advantages,
    pool_hidden,
)
from tests.ops.helpers import assert_same_compiled, assert_same_fake

B, D, H, K = 6, 5, 7, 3
IDS = [0, 1, 0, 1, 1, 0]
torch.manual_seed(0)
rewards_BK = torch.randn(B, K)
rewards_BK[2, 1] = float("nan")
kl_B = torch.rand(B)
hidden_TD = torch.randn(21, D)
cu_seqlens = torch.tensor([0, 4, 5, 11, 14, 18, 21])
prompt_lengths = torch.tensor([2, 1, 3, 1, 4, 2])
LINEAR = ConductorParams(torch.randn(D), torch.rand(D), torch.randn(K, D), torch.randn(K))
MLP = ConductorParams(
    torch.randn(D), torch.rand(D), torch.randn(K, H), torch.randn(K), torch.randn(H, D), torch.randn(H)
)
CONDUCTING: dict[str, Any] = {"tau": 0.7, "min_prob": 0.1, "alpha": 0.5, "seed": 3, "step": 8, "offset": 40}


def assert_same(
    ours: tuple[ConductorSample, GroupAdvantages], sample: ConductorSample, result: GroupAdvantages
) -> None:
    for name, mine, wanted in [
        *zip(sample._fields, ours[0], sample, strict=True),
        *zip(result._fields, ours[1], result, strict=True),
    ]:
        assert torch.equal(mine, wanted), name


@pytest.mark.parametrize("params", [LINEAR, MLP], ids=["linear", "mlp"])
@pytest.mark.parametrize("mode", ["sample", "soft"])
def test_from_contexts(params: ConductorParams, mode: Any) -> None:
    h = torch.randn(B, D)
    sample = conductor_weights(h, params, mode=mode, **CONDUCTING)
    result = group_advantages(rewards_BK, sample.weights, IDS, kl=kl_B, beta=0.3, profile="maestro")
    ours = maestro_advantages(rewards_BK, params, IDS, h=h, mode=mode, kl=kl_B, beta=0.3, **CONDUCTING)
    assert_same(ours, sample, result)


@pytest.mark.parametrize("params", [LINEAR, MLP], ids=["linear", "mlp"])
@pytest.mark.parametrize("pool", ["last", "mean", "prompt_last", "prompt_mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_packed_hidden_states(params: ConductorParams, pool: Any, dtype: torch.dtype) -> None:
    hidden = hidden_TD.to(dtype)
    h = pool_hidden(hidden, cu_seqlens=cu_seqlens, mode=pool, prompt_lengths=prompt_lengths)
    sample = conductor_weights(h, params, **CONDUCTING)
    result = group_advantages(rewards_BK, sample.weights, 3, profile="gdpo")
    ours = maestro_advantages(
        rewards_BK,
        params,
        3,
        hidden=hidden,
        cu_seqlens=cu_seqlens,
        pool=pool,
        prompt_lengths=prompt_lengths,
        profile="gdpo",
        **CONDUCTING,
    )
    assert_same(ours, sample, result)


def test_a_new_conductor_weighs_equally() -> None:
    """A last layer of zeros gives soft weights of 1 / K, and the advantages under them."""
    zeros = ConductorParams(torch.zeros(D), torch.ones(D), torch.zeros(K, D), torch.zeros(K))
    _, ours = maestro_advantages(rewards_BK, zeros, IDS, h=torch.randn(B, D), mode="soft")
    equal = group_advantages(rewards_BK, torch.full((K,), 1 / K), IDS)
    torch.testing.assert_close(ours.advantages, equal.advantages, rtol=1e-5, atol=1e-6)


def test_soft_weights_carry_the_gradient_of_the_advantages() -> None:
    weight = LINEAR.weight.clone().requires_grad_()
    params = ConductorParams(LINEAR.mean, LINEAR.rstd, weight, LINEAR.bias)
    _, result = maestro_advantages(rewards_BK, params, IDS, h=torch.randn(B, D), mode="soft")
    (gradient,) = torch.autograd.grad(result.advantages[0], weight)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_compiles_to_one_graph_and_runs_on_fake_tensors() -> None:
    def op(rewards: Tensor, hidden: Tensor, bounds: Tensor, *values: Tensor) -> Any:
        return maestro_advantages(
            rewards, ConductorParams(*values), 3, hidden=hidden, cu_seqlens=bounds, pool="mean", **CONDUCTING
        )

    values = (MLP.mean, MLP.rstd, MLP.weight, MLP.bias, MLP.hidden_weight, MLP.hidden_bias)
    assert_same_compiled(op, rewards_BK, hidden_TD, cu_seqlens, *values)
    assert_same_fake(op, rewards_BK, hidden_TD, cu_seqlens, *values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h": None}, "h, hidden: expected exactly one"),
        ({"hidden": hidden_TD}, "h, hidden: expected exactly one"),
        ({"rewards": rewards_BK[:, :2]}, r"rewards: shape \(6, 2\), expected \[B, 3\]"),
        ({"rewards": rewards_BK[:, 0]}, r"rewards: shape \(6,\)"),
        ({"h": torch.ones(B - 1, D)}, "h: 5 contexts, expected 6 as rewards"),
        ({"h": None, "hidden": hidden_TD, "cu_seqlens": cu_seqlens[:6]}, "cu_seqlens: 5 contexts, expected 6"),
        ({"groups": 4}, "groups: 6 responses"),
        ({"kl": kl_B, "profile": "grpo"}, "kl: given"),
        ({"h": None, "hidden": hidden_TD}, r"cu_seqlens: missing, expected int \[B \+ 1\] beside hidden"),
        ({"rewards": rewards_BK.to("meta")}, "h: on cpu, expected meta as rewards"),
        ({"backend": "triton"}, "backend: 'triton'"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "rewards": rewards_BK,
        "conductor": LINEAR,
        "groups": 3,
        "h": torch.ones(B, D),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        maestro_advantages(**arguments)
