"""The public ops with backend="triton": the same results as PyTorch's, gradients, and what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast import ops
from maestro_fast.kernels import pool_hidden as pool_kernel
from maestro_fast.ops import (
    ConductorBatch,
    ConductorParams,
    ConductorState,
    ConductorUpdateConfig,
    PolicyLossConfig,
)
from maestro_fast.specs import as_text
from tests.kernels.helpers import DEVICE, assert_close, counted_launches
from tests.kernels.test_policy_loss import Operations
from tests.ops.awkward import (
    MAGNITUDES,
    POISONS,
    check_a_weight_that_is_not_a_number,
    check_any_magnitude,
    check_no_epsilon_and_no_spread,
    check_poison_reaches_only_what_is_compared,
)

B, K, D, H, G = 12, 3, 40, 8, 4
BOUNDS = torch.tensor([0, 3, 4, 9, 11, 18, 19, 25, 27, 30, 33, 34, 40])
T = 40


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def rewards() -> Tensor:
    x = rand(B, K)
    x[1, 0] = x[5] = torch.nan
    return x


def params(mlp: bool = False) -> ConductorParams:
    head = (rand(K, H if mlp else D, seed=3) / 4, rand(K, seed=4) / 4)
    hidden = (rand(H, D, seed=5) / 6, rand(H, seed=6)) if mlp else (None, None)
    return ConductorParams(rand(D, seed=1) / 4, rand(D, seed=2).abs() + 0.5, *head, *hidden)


def wide(value: Any) -> Any:
    """Everything in float64 on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().double() if value.is_floating_point() else value.cpu()
    if isinstance(value, ConductorParams):
        return ConductorParams(*(wide(x) for x in value.tensors))
    return value


def compare(ours: Any, truth: Any, what: str) -> None:
    for name, one, other in zip(type(truth)._fields, ours, truth, strict=True):
        assert_close(one, other, epsilon=2e-6, what=f"{what} {name}")


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "group": (ops.group_advantages, {"rewards": rewards(), "weights": rand(B, K, seed=7).abs(), "groups": G}),
    "group, one weight for all": (
        ops.group_advantages,
        {"rewards": rewards(), "weights": rand(K, seed=7), "groups": G},
    ),
    "group, ragged": (
        ops.group_advantages,
        {"rewards": rand(B), "groups": [3, 1, 1, 3, 0, 3, 1, 0, 5, 3, 1, 0], "kl": rand(B, seed=8), "beta": 0.1},
    ),
    "group, tokens": (
        ops.group_advantages,
        {"rewards": rewards(), "groups": G, "lengths": BOUNDS.diff().to(DEVICE), "profile": "verl_gdpo"},
    ),
    "counterfactual": (
        ops.counterfactual_advantages,
        {
            "rewards": rewards(),
            "weights": rand(B, K, seed=7).abs(),
            "action_weights": torch.eye(K).to(DEVICE),
            "groups": G,
        },
    ),
    "weights": (ops.conductor_weights, {"h": rand(B, D, seed=9), "params": params(), "seed": 3, "step": 2}),
    "weights, MLP, soft": (ops.conductor_weights, {"h": rand(B, D, seed=9), "params": params(True), "mode": "soft"}),
    "pool": (ops.pool_hidden, {"hidden": rand(T, D), "cu_seqlens": BOUNDS.to(DEVICE), "mode": "mean"}),
    "pool, prompts": (
        ops.pool_hidden,
        {
            "hidden": rand(B, 7, D),
            "lengths": torch.arange(B).to(DEVICE) % 8,
            "mode": "prompt_last",
            "prompt_lengths": torch.full((B,), 2).to(DEVICE),
        },
    ),
}
STEP: dict[str, dict[str, Any]] = {
    "contexts": {"h": rand(B, D, seed=9), "groups": G},
    "ragged contexts": {"h": rand(B, D, seed=9), "groups": [0, 1, 1, 0, 2, 0, 1, 2, 2, 2, 0, 0]},
    "last states": {"hidden": rand(T, D), "cu_seqlens": BOUNDS.to(DEVICE), "groups": G},
    "means, soft": {
        "hidden": rand(T, D),
        "cu_seqlens": BOUNDS.to(DEVICE),
        "groups": G,
        "pool": "mean",
        "mode": "soft",
        "profile": "grpo",
    },
}


@pytest.mark.parametrize("name", CASES)
def test_an_op_by_triton_equals_the_reference(name: str) -> None:
    op, arguments = CASES[name]
    ours = op(**arguments, backend="triton")
    truth = op(**{key: wide(value) for key, value in arguments.items()}, backend="torch")

    if isinstance(truth, Tensor):
        assert_close(ours, truth, epsilon=2e-6, what=name)
    else:
        compare(ours, truth, name)


@pytest.mark.parametrize("mlp", [False, True], ids=["linear", "MLP"])
@pytest.mark.parametrize("name", STEP)
def test_the_adaptive_step_by_triton_equals_the_reference(name: str, mlp: bool) -> None:
    arguments = {"rewards": rewards(), "conductor": params(mlp), **STEP[name]}
    ours = ops.maestro_advantages(**arguments, backend="triton")
    truth = ops.maestro_advantages(**{key: wide(value) for key, value in arguments.items()}, backend="torch")

    for one, other in zip(ours, truth, strict=True):
        compare(one, other, name)


def experience(kind: str) -> ConductorBatch:
    before = rand(B, seed=7).abs() + 0.1 if kind == "drawn before" else None
    actions = None if kind == "all actions" else (torch.arange(B) % K).to(DEVICE)
    meta = rand(B, seed=8) if actions is not None else rand(B, K, seed=8)
    return ConductorBatch(rand(B, D, seed=9), meta, actions, before, (torch.arange(B) % 4 > 0).to(DEVICE))


def started(mlp: bool) -> ConductorState:
    return ConductorState.start(ConductorParams(*(None if x is None else x.clone() for x in params(mlp).tensors)))  # type: ignore[arg-type]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mlp", [False, True], ids=["linear", "MLP"])
@pytest.mark.parametrize("kind", ["drawn", "drawn before", "all actions"])
def test_the_update_by_triton_equals_the_reference(kind: str, mlp: bool, compiled: bool) -> None:
    config = ConductorUpdateConfig(tau=0.7, min_prob=0.02, learning_rate=0.01)
    batch, mine, right = experience(kind), started(mlp), started(mlp)
    right = ConductorState(wide(right.params), *({k: wide(x) for k, x in m.items()} for m in (mine.first, mine.second)))

    def op(state: ConductorState) -> tuple[ConductorState, dict[str, Tensor]]:
        return ops.conductor_update(state, batch, config, backend="triton")

    if compiled:
        torch._dynamo.reset()
        op = torch.compile(op, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        mine, metrics = op(mine)
        right, truth = ops.conductor_update(
            right, ConductorBatch(*map(wide, vars(batch).values())), config, backend="torch"
        )

        for name, value in truth.items():
            assert_close(metrics[name], value, epsilon=1e-6, what=name)
        for name, x in right.params.learned.items():
            assert_close(
                mine.params.learned[name], x, epsilon=1e-5, what=name
            )  # as tests/kernels/test_conductor_update


def test_groups_too_large_for_the_fused_step_take_the_single_ops() -> None:
    many = 130
    h, values = rand(many, D), rand(many, K, seed=1)
    ours = ops.maestro_advantages(values, params(), many, h=h, backend="triton")
    truth = ops.maestro_advantages(wide(values), wide(params()), many, h=wide(h), backend="torch")

    for one, other in zip(ours, truth, strict=True):
        compare(one, other, "large")


LOSSES = {
    "dapo": (PolicyLossConfig("dapo"), {"normalizer": 37.0}),
    "grpo, KL": (PolicyLossConfig("grpo", kl_coef=0.1), {}),
    "gspo, masked": (PolicyLossConfig("bnpo", ratio="sequence"), {"token_mask": (torch.arange(T) % 3 > 0).to(DEVICE)}),
    "cispo": (PolicyLossConfig("dapo", objective="cispo", clip_max=2.0), {"normalizer": torch.tensor(40.0)}),
    "sampler, entropy": (
        PolicyLossConfig("grpo", sampler_correction="token_truncate", entropy_coef=0.1),
        {"entropies": rand(T, seed=5).abs()},
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_and_its_gradients(name: str) -> None:
    config, more = LOSSES[name]
    arguments: dict[str, Any] = {
        "logprobs": -rand(T, seed=1).abs(),
        "advantages": rand(B, seed=2),
        "cu_seqlens": BOUNDS.to(DEVICE),
        "old_logprobs": -rand(T, seed=3).abs(),
        "ref_logprobs": -rand(T, seed=4).abs() if config.kl_coef else None,
        "sampling_logprobs": -rand(T, seed=6).abs() if config.sampler_correction != "none" else None,
        **more,
    }
    results = []
    for backend in ("triton", "torch"):
        given = arguments if backend == "triton" else {key: wide(value) for key, value in arguments.items()}
        leaves = {k: v.detach().clone().requires_grad_() for k, v in given.items() if k in ("logprobs", "entropies")}
        loss, metrics = ops.policy_loss(**{**given, **leaves}, config=config, backend=backend)  # type: ignore[arg-type]
        (3.0 * loss).backward()
        results.append((loss, metrics, {key: leaf.grad for key, leaf in leaves.items()}))
    (loss, metrics, slopes), (truth, true_metrics, true_slopes) = results

    assert metrics.keys() == true_metrics.keys() and slopes.keys() == true_slopes.keys()
    assert_close(loss, truth.detach(), epsilon=2e-6, what="loss")
    for key, value in true_metrics.items():
        assert_close(metrics[key], value, epsilon=2e-6, what=key)
        assert not metrics[key].requires_grad
    for key, slope in true_slopes.items():
        assert slope is not None and slope.abs().max() > 1e-4
        assert_close(slopes[key], slope, epsilon=2e-6, what=f"gradient of {key}")


def test_operators_are_registered_properly() -> None:
    """Schemas, fake tensors and autograd registration, by torch's own checks."""
    registered = torch.ops.maestro_fast
    log, advantages, bounds = (-rand(T).abs()).requires_grad_(), rand(B), BOUNDS.to(DEVICE)
    config = as_text(PolicyLossConfig("dapo"))
    loss = (log, advantages, bounds, *[None] * 7, 40.0, None, config)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(registered.triton_policy_loss, loss, test_utils=checks)
    for given in ((bounds, None, True, None), (bounds, bounds.diff(), False, None), (None, bounds.diff(), True, 4)):
        torch.library.opcheck(registered.triton_pool_hidden, (rand(T, D), *given), test_utils=checks)


@pytest.mark.parametrize("name", ["group", "counterfactual", "weights", "pool"])
def test_what_is_compiled_is_one_graph(name: str) -> None:
    op, arguments = CASES[name]
    groups = arguments.get("groups")
    given = arguments if groups is None else {**arguments, "groups": ops.Groups.of(groups, B)}
    if groups is not None:
        given["groups"].to(torch.device(DEVICE))
    compiled = torch.compile(lambda: op(**given, backend="triton"), fullgraph=True, backend="aot_eager")

    for one, other in zip(compiled(), op(**given, backend="triton"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rewards": rewards().double()}, "'triton' cannot serve group_advantages here: got float64"),
        ({"weights": rand(B, K).requires_grad_()}, "a gradient is wanted, which it does not compute"),
    ],
)
def test_what_triton_cannot_do_is_refused(changes: dict[str, Any], complaint: str) -> None:
    op, arguments = CASES["group"]
    with pytest.raises(ValueError, match=complaint):
        op(**{**arguments, **changes}, backend="triton")


def test_the_interpreter_never_serves_unasked() -> None:
    loss = LOSSES["dapo"][0]
    arguments = (-torch.rand(T), torch.randn(B), BOUNDS)
    by_default = ops.policy_loss(*arguments, normalizer=1.0, config=loss).loss
    by_torch = ops.policy_loss(*arguments, normalizer=1.0, config=replace(loss), backend="torch").loss
    assert torch.equal(by_default, by_torch)


@pytest.mark.parametrize("profile", ops.PROFILES)
def test_without_an_epsilon_no_spread_is_zero(profile: str) -> None:
    check_no_epsilon_and_no_spread(profile, "triton", DEVICE)


@pytest.mark.parametrize("profile", ["maestro", "grpo", "verl_grpo"])
def test_a_weight_that_is_not_a_number_shows(profile: str) -> None:
    check_a_weight_that_is_not_a_number(profile, "triton", DEVICE)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("profile", ops.PROFILES)
def test_poison_reaches_only_what_is_compared(profile: str, poison: str) -> None:
    check_poison_reaches_only_what_is_compared(profile, poison, "triton", DEVICE)


@pytest.mark.parametrize("size", MAGNITUDES)
@pytest.mark.parametrize("profile", ops.PROFILES)
def test_rewards_of_any_magnitude(profile: str, size: float) -> None:
    check_any_magnitude(profile, size, "triton", DEVICE)


@pytest.mark.parametrize(
    ("name", "allocations", "expected"),
    [
        ("group", 6, ["_groups"]),
        ("weights", 6, ["_linear", "_weights"]),
        ("weights, MLP, soft", 6, ["_hidden", "_weights"]),
        ("contexts", 12, ["_linear", "_groups"]),
        ("last states", 12, ["_linear", "_groups"]),
        ("means, soft", 13, ["_sums", "_linear", "_groups"]),
    ],
)
def test_the_host_only_allocates_outputs_and_launches(
    name: str, allocations: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy, no fill, no arithmetic of torch, in the second call as in all later ones; so nothing waits either."""
    if name in STEP:
        given = {**STEP[name], "rewards": rewards(), "conductor": params(), "backend": "triton"}
        run = partial(ops.maestro_advantages, **given)
    else:
        run = partial(CASES[name][0], **CASES[name][1], backend="triton")
    for module in ("pool_hidden", "group_advantages"):
        monkeypatch.setattr(sys.modules[f"maestro_fast.ops.{module}"], "readable", lambda x: False)  # as on a device
    monkeypatch.setattr(pool_kernel, "CHUNK_TOKENS", 4)
    launches = counted_launches(monkeypatch, start=False)
    run()
    launches.clear()
    with Operations() as counted:
        run()
    calls = [name.removesuffix("_like") for name in counted.calls]
    assert launches == expected and calls == ["empty"] * allocations
