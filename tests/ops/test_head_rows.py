"""The maths of a row against autograd in float64, and what a dead row and the output's place must mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.ops.head_rows import dlogits_, row_statistics
from maestro_fast.specs import HeadSpec, RowStatistics

C, V = 6, 41
NAN = float("nan")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, BIAS = draw(C, V, seed=0) * 4, draw(V, seed=1)
TARGETS = torch.tensor([3, 0, -1, 40, 7, 7])
DLP, DENT = draw(C, seed=2), draw(C, seed=3)
DLP[4] = DENT[4] = DENT[5] = 0.0


def spec(**options: Any) -> HeadSpec:
    defaults = {"scale": 1.0, "softcap": None, "temperature": 1.0, "ignore_index": -1, "entropy": "grad"}
    return HeadSpec(**{**defaults, **options})


SPECS = [spec(), spec(scale=0.3), spec(softcap=4.0), spec(scale=1.7, softcap=9.0, temperature=0.6)]


def written(u: Tensor, s: HeadSpec) -> tuple[Tensor, Tensor, Tensor]:
    """z, log-probs and entropies as anyone would write them."""
    z = (u if s.softcap is None else s.softcap * (u / s.softcap).tanh()) / s.temperature
    logp = z.log_softmax(-1)
    return z, logp[torch.arange(C), TARGETS.clamp(min=0)], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("s", SPECS)
@pytest.mark.parametrize("bias", [None, BIAS])
def test_statistics_and_gradient(s: HeadSpec, bias: Tensor | None) -> None:
    u = (s.scale * X + (0 if bias is None else bias)).requires_grad_()
    z, logprobs, entropies = written(u, s)
    x, live = X.clone(), TARGETS >= 0
    stats = row_statistics(x, TARGETS, bias, s)
    assert torch.equal(x, X)
    torch.testing.assert_close(stats.logprobs, torch.where(live, logprobs, 0.0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats.entropies, torch.where(live, entropies, 0.0), rtol=1e-12, atol=1e-12)
    lse = stats.peaks / s.temperature + stats.totals.log()
    torch.testing.assert_close(lse, z.logsumexp(-1), rtol=1e-12, atol=1e-12)

    for dent in (DENT, None):
        loss = (logprobs * DLP + (0 if dent is None else entropies * dent))[live].sum()
        (expected,) = torch.autograd.grad(loss, u, retain_graph=True)
        got = X.clone()
        dlogits_(got, TARGETS, bias, stats, DLP, dent, s)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("s", [spec(), spec(scale=1.7, temperature=0.6)])
def test_a_token_that_is_ruled_out_might_as_well_not_exist(s: HeadSpec) -> None:
    """A bias of -inf gives the statistics and the gradient of the vocabulary without the token, and itself 0."""
    bias, kept = BIAS.clone(), torch.ones(V, dtype=torch.bool)
    kept[20:30] = False
    bias[~kept] = -torch.inf
    targets = torch.where(TARGETS > 30, TARGETS - 10, TARGETS)
    stats = row_statistics(X, TARGETS, bias, s)
    without = row_statistics(X[:, kept], targets, bias[kept], s)
    for ours, expected in zip(stats, without, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    gradient, expected = X.clone(), X[:, kept]
    dlogits_(gradient, TARGETS, bias, stats, DLP, DENT, s)
    dlogits_(expected, targets, bias[kept], without, DLP, DENT, s)
    torch.testing.assert_close(gradient[:, kept], expected, rtol=1e-12, atol=1e-12)
    assert (gradient[:, ~kept] == 0).all()


@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_dead_row_is_exactly_zero_whatever_it_holds(with_entropy: bool) -> None:
    s = SPECS[-1]
    x = X.clone()
    x[2], x[4] = NAN, torch.inf  # ignored, and without a gradient
    stats = row_statistics(x, TARGETS, BIAS, s)
    assert stats.logprobs[2] == 0 and stats.entropies[2] == 0
    dlp, dent = DLP.clone(), DENT.clone()
    dlp[2] = dent[2] = NAN
    dlogits_(x, TARGETS, BIAS, stats, dlp, dent if with_entropy else None, s)
    assert (x[[2, 4]] == 0).all() and x.isfinite().all()
    assert (x[[0, 1, 3, 5]] != 0).all()


def test_a_gradient_of_the_entropy_alone_keeps_its_row() -> None:
    x, dent = X.clone(), torch.ones(C, dtype=torch.float64)
    dlogits_(x, TARGETS, None, row_statistics(x, TARGETS, None, spec()), torch.zeros_like(dent), dent, spec())
    assert (x != 0).any(-1).tolist() == [True, True, False, True, True, True]


def test_the_gradient_may_go_elsewhere_in_another_dtype() -> None:
    x, out = X.float(), torch.full((C, V), NAN, dtype=torch.bfloat16)
    stats = row_statistics(x, TARGETS, None, spec())
    dlogits_(x, TARGETS, None, stats, DLP.float(), DENT.float(), spec(), out)
    assert torch.equal(x, X.float())
    dlogits_(x, TARGETS, None, stats, DLP.float(), DENT.float(), spec())
    assert torch.equal(out, x.bfloat16())


def test_the_size_of_the_logits_costs_the_gradient_nothing() -> None:
    """All logits 2^17 higher, where float32 has steps of 2^-6: values on that grid keep every probability."""
    x = (X * 64).round().div(64).float()

    def gradient(x: Tensor) -> tuple[RowStatistics, Tensor]:
        stats = row_statistics(x, TARGETS, None, spec())
        dlogits_(x, TARGETS, None, stats, DLP.float(), DENT.float(), spec())
        return stats, x

    (stats, low), (shifted, high) = gradient(x.clone()), gradient(x + 2.0**17)
    assert torch.equal(low, high) and torch.equal(stats.logprobs, shifted.logprobs)
