"""The Conductor's update equals autograd and torch.optim.AdamW in float64, and refuses what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import ConductorBatch, ConductorParams, ConductorState, ConductorUpdateConfig, conductor_update
from maestro_fast.ops.conductor_update import meta_gradient
from tests.ops.helpers import assert_as_accurate, assert_same_compiled, assert_same_fake

N, D, H, K = 9, 6, 5, 3
CONFIG = ConductorUpdateConfig(tau=0.7, min_prob=0.02, learning_rate=0.01, weight_decay=0.05)
KINDS = ["drawn", "drawn before", "all actions"]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def head(*, mlp: bool = False, dtype: torch.dtype = torch.float64) -> ConductorParams:
    inner = (normal(H, D, seed=5), normal(H, seed=6)) if mlp else (None, None)
    parts = (normal(D, seed=1), normal(D, seed=2).exp(), normal(K, H if mlp else D, seed=3), normal(K, seed=4), *inner)
    return ConductorParams(*(None if x is None else x.to(dtype) for x in parts))  # type: ignore[arg-type]


def experience(kind: str = "drawn", *, seed: int = 0, dtype: torch.dtype = torch.float64) -> ConductorBatch:
    h = (normal(N, D, seed=10 + seed) * 2 + 0.5).to(dtype)
    if kind == "all actions":
        return ConductorBatch(h, normal(N, K, seed=20 + seed).to(dtype))
    actions = torch.randint(K, (N,), generator=torch.Generator().manual_seed(seed))
    before = 0.05 + normal(N, seed=30 + seed).abs().clamp(max=0.9).to(dtype) if kind == "drawn before" else None
    return ConductorBatch(h, normal(N, seed=20 + seed).to(dtype), actions, before)


def objective(params: ConductorParams, batch: ConductorBatch, config: ConductorUpdateConfig) -> Tensor:
    """Computes J by its formula, so that autograd can differentiate it."""
    p = (1 - K * config.min_prob) * (params.logits(batch.h) / config.tau).softmax(-1) + config.min_prob
    log = torch.where(p > 0, p, 1.0).log()
    if batch.actions is None:
        gain = (p * batch.meta).sum(-1)
    else:
        chosen = torch.arange(len(p)), batch.actions.long()
        meta = batch.meta
        if batch.drawn_probs is not None:
            meta = meta * (p[chosen].detach() / batch.drawn_probs).clamp(max=config.max_ratio)
        gain = meta * log[chosen]
    value = gain - config.entropy_coef * (p * log).sum(-1)
    return value[batch.live].mean() if batch.live is not None else value.mean()


def leaves_of(params: ConductorParams) -> dict[str, Tensor]:
    return {name: x.detach().clone().requires_grad_() for name, x in params.learned.items()}


def copied(params: ConductorParams) -> ConductorParams:
    return replace(params, **{name: x.detach().clone() for name, x in params.learned.items()})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("min_prob", [0.0, 0.02])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mlp", [False, True], ids=["linear", "MLP"])
def test_the_closed_form_is_the_gradient(mlp: bool, kind: str, min_prob: float, masked: bool) -> None:
    params, config = head(mlp=mlp), replace(CONFIG, min_prob=min_prob)
    batch = replace(experience(kind), live=torch.arange(N) % 3 > 0 if masked else None)
    leaves = leaves_of(params)
    value = objective(replace(params, **leaves), batch, config)
    slopes = torch.autograd.grad(value, list(leaves.values()))

    found, gradients = meta_gradient(params, batch, config)

    torch.testing.assert_close(found, value.detach(), rtol=1e-12, atol=1e-12)
    assert gradients.keys() == leaves.keys()
    for name, slope in zip(leaves, slopes, strict=True):
        assert slope.abs().max() > 1e-3
        torch.testing.assert_close(gradients[name], slope, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mlp", [False, True], ids=["linear", "MLP"])
def test_three_steps_are_those_of_adamw(mlp: bool) -> None:
    leaves = leaves_of(head(mlp=mlp))
    truth = replace(head(mlp=mlp), **leaves)
    groups = [{"params": [x], "weight_decay": 0.0 if name.endswith("bias") else 0.05} for name, x in leaves.items()]
    optimizer = torch.optim.AdamW(groups, lr=CONFIG.learning_rate)
    state = ConductorState.start(copied(head(mlp=mlp)))
    for step in range(3):
        batch = experience(seed=step)
        value = objective(truth, batch, CONFIG)
        optimizer.zero_grad()
        (-value).backward()
        optimizer.step()
        norm = torch.cat([x.grad.flatten() for x in leaves.values() if x.grad is not None]).norm()

        state, metrics = conductor_update(state, batch, CONFIG)

        assert state.step == step + 1
        torch.testing.assert_close(metrics["objective"], value.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(metrics["grad_norm"], norm, rtol=1e-12, atol=0)
        for name, x in leaves.items():
            torch.testing.assert_close(state.params.learned[name], x.detach(), rtol=1e-11, atol=1e-12)
            for moments, key in ((state.first, "exp_avg"), (state.second, "exp_avg_sq")):
                torch.testing.assert_close(moments[name], optimizer.state[x][key], rtol=1e-10, atol=1e-15)


def test_the_tensors_of_the_state_change_in_place() -> None:
    start = ConductorState.start(copied(head()))
    mean, weight = start.params.mean.clone(), start.params.weight.clone()
    after, _ = conductor_update(start, experience(), CONFIG)
    assert after.params is start.params and after.first is start.first and start.step == 0
    assert not torch.equal(after.params.weight, weight) and torch.equal(after.params.mean, mean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mlp", [False, True], ids=["linear", "MLP"])
def test_what_is_not_live_may_hold_anything(mlp: bool, kind: str) -> None:
    live, whole = torch.arange(N) % 2 == 0, experience(kind)
    names = [name for name, x in vars(whole).items() if x is not None]
    kept = ConductorBatch(**{name: getattr(whole, name)[live] for name in names})
    poison = {name: getattr(whole, name).clone() for name in names if name != "actions"}
    for x in poison.values():
        x[~live] = torch.nan
    expected, _ = conductor_update(ConductorState.start(copied(head(mlp=mlp))), kept, CONFIG)
    ours, metrics = conductor_update(
        ConductorState.start(copied(head(mlp=mlp))), replace(whole, **poison, live=live), CONFIG
    )
    for name, x in expected.params.learned.items():
        torch.testing.assert_close(ours.params.learned[name], x, rtol=1e-11, atol=1e-13)
    assert all(x.isfinite() for x in metrics.values())


def test_without_a_live_row_nothing_changes() -> None:
    state, batch = ConductorState.start(copied(head(mlp=True))), experience()
    conductor_update(state, batch, CONFIG)
    before = [x.clone() for x in (*state.params.learned.values(), *state.first.values(), *state.second.values())]
    _, metrics = conductor_update(state, replace(batch, live=torch.zeros(N, dtype=torch.bool)), CONFIG)
    after = (*state.params.learned.values(), *state.first.values(), *state.second.values())
    assert all(torch.equal(x, y) for x, y in zip(after, before, strict=True))
    assert metrics["objective"] == 0 and metrics["grad_norm"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_impossible_action_leaves_finite_parameters(kind: str) -> None:
    params = ConductorParams(
        torch.zeros(D), torch.ones(D), torch.zeros(K, D), torch.tensor([0.0, 300.0, -300.0])
    )  # p = [0, 1, 0]
    batch = experience(kind, dtype=torch.float32)
    if batch.actions is not None:
        batch = replace(batch, actions=torch.zeros(N, dtype=torch.int64))
    config = replace(CONFIG, min_prob=0.0, tau=1.0)
    state, metrics = conductor_update(ConductorState.start(params), batch, config)
    assert all(x.isfinite().all() for x in (*state.params.learned.values(), *metrics.values()))
    assert metrics["grad_norm"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mlp", [False, True], ids=["linear", "MLP"])
def test_float32_is_as_accurate_as_autograd_in_float32(mlp: bool, dtype: torch.dtype) -> None:
    batch = experience()
    batch = replace(batch, h=batch.h.to(dtype), meta=batch.meta.float())
    params = head(mlp=mlp, dtype=torch.float32)
    wide = ConductorParams(*(None if x is None else x.double() for x in params.tensors))  # type: ignore[arg-type]
    _, truth = meta_gradient(wide, replace(batch, h=batch.h.double(), meta=batch.meta.double()), CONFIG)
    leaves = leaves_of(params)
    plain = torch.autograd.grad(objective(replace(params, **leaves), batch, CONFIG), list(leaves.values()))
    _, ours = meta_gradient(params, batch, CONFIG)
    for name, slope in zip(leaves, plain, strict=True):
        assert ours[name].dtype == torch.float32
        assert_as_accurate(ours[name], slope, truth[name], epsilon=1e-6)


def test_autocast_and_a_wish_for_gradients_change_nothing() -> None:
    def run(params: ConductorParams) -> ConductorState:
        return conductor_update(ConductorState.start(params), experience(dtype=torch.float32), CONFIG)[0]

    expected = run(head(mlp=True, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        within = run(head(mlp=True, dtype=torch.float32))
    leaf = head(mlp=True, dtype=torch.float32)
    for x in leaf.learned.values():
        x.requires_grad_()
    for other in (within, run(leaf)):
        for name, x in expected.params.learned.items():
            assert torch.equal(other.params.learned[name], x)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_to_one_graph_and_runs_on_fake_tensors(kind: str) -> None:
    batch, params = experience(kind, dtype=torch.float32), head(dtype=torch.float32)

    def op(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        mine = replace(params, mean=h[0], rstd=h[1], weight=weight.clone(), bias=bias.clone())
        actions = None if batch.actions is None else (h[:, 0] > 0).long()
        before = None if batch.drawn_probs is None else h[:, 1].abs()
        given = ConductorBatch(h, h[:, :K] if actions is None else h[:, 2], actions, before)
        state, metrics = conductor_update(ConductorState.start(mine), given, CONFIG)
        return *state.params.learned.values(), *state.second.values(), *metrics.values()

    assert_same_compiled(op, batch.h, params.weight, params.bias)
    assert_same_fake(op, batch.h, params.weight, params.bias)


def wrong(**changes: Any) -> Callable[[], Any]:
    def run() -> Any:
        state, batch, config = ConductorState.start(head()), experience(), dict(vars(CONFIG))
        for name, value in changes.items():
            if name in config:
                config[name] = value
            elif name in vars(batch):
                batch = replace(batch, **{name: value})
            elif name == "weight":
                state = replace(state, params=replace(state.params, weight=value))
            else:
                state = replace(state, **{name: value})
        return conductor_update(state, batch, ConductorUpdateConfig(**config))

    return run


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (wrong(h=torch.ones(N, D, dtype=torch.int64)), TypeError, "h: dtype torch.int64, expected a floating dtype"),
        (wrong(h=torch.ones(N, D + 1).double()), ValueError, r"h: shape \(9, 7\), expected \[B, d\] with d = 6"),
        (wrong(h=torch.ones(0, D).double()), ValueError, r"h: shape \(0, 6\), expected at least one row"),
        (wrong(meta=torch.ones(N, K)), ValueError, r"meta: shape \(9, 3\), expected \(9,\) with actions"),
        (wrong(actions=None), ValueError, r"meta: shape \(9,\), expected \(9, 3\) without actions"),
        (wrong(actions=torch.ones(N)), TypeError, "actions: dtype torch.float32, expected a signed integer dtype"),
        (wrong(actions=torch.full((N,), 3)), ValueError, "actions: from 3 to 3, expected 0 <= action < 3"),
        (wrong(actions=torch.zeros(2).long()), ValueError, r"actions: shape \(2,\), expected \(9,\)"),
        (
            wrong(actions=None, meta=torch.ones(N, K), drawn_probs=torch.ones(N)),
            ValueError,
            "drawn_probs: given without actions",
        ),
        (wrong(live=torch.ones(N)), TypeError, "live: dtype torch.float32, expected bool"),
        (wrong(meta=torch.ones(N, device="meta")), ValueError, "meta: on meta, expected cpu as h"),
        (wrong(weight=normal(D, K, seed=0).T), ValueError, r"state.params.weight: strides \(1, 3\), expected a contig"),
        (wrong(first={}), ValueError, "state.first: of nothing, expected weight, bias"),
        (
            wrong(second={"weight": torch.zeros(K, D), "bias": torch.zeros(K)}),
            ValueError,
            r"state.second.weight: torch.float32 \(3, 6\) on cpu, expected torch.float64 \(3, 6\) on cpu",
        ),
        (wrong(step=-1), ValueError, "state.step: -1"),
        (wrong(min_prob=0.4), ValueError, "min_prob: 0.4, expected 0 <= min_prob < 1 / K"),
        (wrong(tau=0.0), ValueError, "tau: 0.0, expected a positive number"),
        (wrong(learning_rate=-1.0), ValueError, "learning_rate: -1.0"),
        (wrong(beta2=1.0), ValueError, "beta2: 1.0, expected 0 <= beta2 < 1"),
        (wrong(max_ratio=float("nan")), ValueError, "max_ratio: nan"),
        (wrong(max_ratio=1e300), ValueError, r"max_ratio: 1e\+300, expected a number that float32 can hold"),
        (wrong(tau=1e-300), ValueError, "tau: 1e-300, expected a positive number that float32 can hold"),
        (wrong(learning_rate=10**400), ValueError, "learning_rate: an integer, expected a number that float32"),
        (wrong(beta1="0.9"), TypeError, "beta1: got str '0.9', expected a number"),
        (wrong(h=[1.0]), TypeError, "h: got list, expected a tensor"),
        (wrong(live=torch.ones(N).to_sparse()), TypeError, "live: layout torch.sparse_coo, expected a dense tensor"),
        (wrong(first=None), TypeError, "state.first: got NoneType, expected tensors by name"),
        (wrong(step=1.5), TypeError, "state.step: got float, expected an int"),
        (lambda: conductor_update(None, experience()), TypeError, "state: got NoneType, expected a ConductorState"),  # type: ignore[arg-type]
        (
            lambda: conductor_update(ConductorState.start(head()), torch.ones(2)),  # type: ignore[arg-type]
            TypeError,
            "batch: got Tensor, expected a ConductorBatch",
        ),
        (
            lambda: conductor_update(ConductorState.start(head()), experience(), {"tau": 1}),  # type: ignore[arg-type]
            TypeError,
            "config: got dict, expected a ConductorUpdateConfig",
        ),
    ],
)
def test_errors_name_the_argument(run: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run()


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("triton", "backend: 'triton' cannot serve conductor_update here: got a tensor on cpu, expected a CUDA"),
        ("cpp", "backend: 'cpp' does not serve conductor_update, expected one of triton, torch"),
    ],
)
def test_a_backend_is_obeyed_or_refused_and_nothing_is_lost(backend: Any, message: str) -> None:
    state = ConductorState.start(copied(head(dtype=torch.float32)))
    with pytest.raises(ValueError, match=message):
        conductor_update(state, experience(dtype=torch.float32), CONFIG, backend=backend)
    assert torch.equal(state.params.weight, head(dtype=torch.float32).weight)
