"""Three steps of the update kernel against autograd and torch.optim.AdamW in float64, from the same parameters each."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from maestro_fast.kernels import conductor_update as kernel
from maestro_fast.kernels import conductor_weights
from maestro_fast.ops import ConductorParams
from maestro_fast.weighting.conductor.estimators import reinforce
from tests.kernels.helpers import DEVICE, DTYPES, assert_close
from tests.kernels.test_conductor_weights import head, moved

EPSILON = 1e-5  # of a parameter: lr 0.01 times a relative error of 1e-3 where a gradient all but vanishes
SETTINGS = {"tau": 0.7, "min_prob": 0.02, "entropy_coef": 0.3}
RATE, DECAY = 1e-2, 0.05


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_ROWS", 16), ("_COLUMNS", 32)):
        monkeypatch.setattr(kernel, name, value)
    monkeypatch.setattr(conductor_weights, "_SPLIT", 64)


def learned(params: ConductorParams) -> dict[str, Tensor]:
    names = [item.name for item in fields(params) if item.name not in ("mean", "rstd")]
    return {name: getattr(params, name) for name in names if getattr(params, name) is not None}


def batch_of(number: int, size: int, rewards: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contexts, actions, advantages, and which rows count."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(number, size, generator=generator) * 2 + 0.5
    actions = torch.randint(0, rewards, (number,), generator=generator)
    return h, actions, torch.randn(number, generator=generator), torch.rand(number, generator=generator) < 0.7


class Truth:
    """The same head in float64 under torch.optim.AdamW."""

    def __init__(self, params: ConductorParams) -> None:
        self.params = moved(params, dtype=torch.float64)
        self.leaves = {name: x.requires_grad_() for name, x in learned(self.params).items()}
        weights = [x for name, x in self.leaves.items() if name.endswith("weight")]
        biases = [x for name, x in self.leaves.items() if name.endswith("bias")]
        groups = [{"params": weights, "weight_decay": DECAY}, {"params": biases, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE)

    def step(self, h: Tensor, actions: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.params.logits(h.double())
        objective = reinforce(logits, actions, advantages.double(), *SETTINGS.values())
        self.optimizer.zero_grad()
        (-objective).backward()
        norm = torch.cat([x.grad.flatten() for x in self.leaves.values()]).norm()
        self.optimizer.step()
        return objective.detach(), norm


def stepped(
    params: ConductorParams, moments: dict[str, kernel.Moments], batch: tuple[Tensor | None, ...], step: int
) -> kernel.Update:
    h, actions, advantages, live = (None if x is None else x.to(DEVICE) for x in batch)
    made = kernel.activations(h, params)
    adamw = kernel.AdamW(step, RATE, DECAY)
    return kernel.conductor_update(h, actions, advantages, params, moments, made, adamw=adamw, live=live, **SETTINGS)


def on_device(params: ConductorParams) -> tuple[ConductorParams, dict[str, kernel.Moments]]:
    """A copy of the parameters there, and moments of 0."""
    there = ConductorParams(*(None if x is None else x.detach().clone().to(DEVICE) for x in vars(params).values()))
    return there, {name: kernel.Moments(torch.zeros_like(x), torch.zeros_like(x)) for name, x in learned(there).items()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("units", [None, 40])
@pytest.mark.parametrize(("number", "rewards", "size"), [(1, 3, 32), (45, 1, 50), (40, 8, 130)])
def test_three_steps(number: int, rewards: int, size: int, units: int | None, masked: bool) -> None:
    params = head(size, rewards, units)
    truth = Truth(params)
    (ours, moments), (again, other) = on_device(params), on_device(params)
    for step in (1, 2, 3):
        h, actions, advantages, live = batch_of(number, size, rewards, step)
        if masked:
            live[0] = True
        given = (h, actions, advantages, live if masked else None)
        update, same = stepped(ours, moments, given, step), stepped(again, other, given, step)
        kept = live if masked else torch.ones_like(live)
        objective, norm = truth.step(h[kept], actions[kept], advantages[kept])
        assert_close(update.objective, objective, epsilon=EPSILON, what="objective")
        assert_close(update.grad_norm, norm, epsilon=EPSILON, what="grad_norm")
        assert torch.equal(update.squares, same.squares)
        for name, x in learned(ours).items():
            assert_close(x, truth.leaves[name].detach(), epsilon=EPSILON, what=f"{name} after step {step}")
            assert torch.equal(x, learned(again)[name]), f"{name} differs between two runs"
            state = truth.optimizer.state[truth.leaves[name]]
            for mine, key in zip(moments[name], ("exp_avg", "exp_avg_sq"), strict=True):
                scale = state[key].abs().max().clamp(min=1e-12)
                if scale > 1e-6:  # K = 1 has no gradient, only rounding
                    assert_close(mine / scale.float().item(), state[key] / scale, epsilon=EPSILON, what=f"{name} {key}")


@pytest.mark.parametrize("units", [None, 40])
def test_without_a_live_row_nothing_changes(units: int | None) -> None:
    params = head(50, 3, units)
    ours, moments = on_device(params)
    h, actions, advantages, _ = batch_of(20, 50, 3, 0)
    update = stepped(ours, moments, (h, actions, advantages, torch.zeros(20, dtype=torch.bool)), 1)
    assert update.objective == 0 and update.grad_norm == 0
    for name, x in learned(ours).items():
        assert torch.equal(x.cpu(), getattr(params, name))
        assert not moments[name].first.any() and not moments[name].second.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_contexts_of_other_dtypes_with_a_stride(dtype: torch.dtype) -> None:
    params = head(50, 4, None)
    truth = Truth(params)
    ours, moments = on_device(params)
    wide, actions, advantages, _ = batch_of(20, 64, 4, 5)
    h = wide.to(dtype)[:, :50]
    stepped(ours, moments, (h, actions.int(), advantages, None), 1)
    truth.step(h, actions, advantages)
    assert_close(ours.weight, truth.leaves["weight"].detach(), epsilon=EPSILON)
