"""C++ on rows of logits: against float64 beside the reference in float32, and what must not reach a result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import PolicyLossConfig, head, linear_policy_loss, token_logprobs
from maestro_fast.ops.head_rows import cpp_dlogits_, cpp_row_statistics, dlogits_, row_statistics
from maestro_fast.specs import HeadSpec, RowStatistics
from tests.ops.helpers import assert_as_accurate

NAN, INF = float("nan"), float("inf")
PLAIN = HeadSpec(1.0, None, 1.0, -100, "grad")
SPECS = {
    "plain": PLAIN,
    "temperature": replace(PLAIN, temperature=0.7),
    "scale": replace(PLAIN, scale=-0.3),
    "softcap": replace(PLAIN, softcap=5.0),
    "everything": HeadSpec(1.7, 9.0, 0.6, -100, "grad"),
    "no entropy": replace(PLAIN, entropy="none"),
}


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


class Rows:
    """Logits [C, V] with targets, a bias, and gradients by log-probs and entropies."""

    def __init__(self, V: int, *, C: int = 9, scale: float = 4.0, bias: bool = False) -> None:
        self.x, self.bias = draw(C, V, scale=scale), draw(V, seed=1) if bias else None
        self.targets = torch.randint(0, V, (C,), generator=torch.Generator().manual_seed(2))
        self.targets[C // 2] = -100
        self.dlogprobs, self.dentropies = draw(C, seed=3), draw(C, seed=4)
        self.dlogprobs[-1] = self.dentropies[-1] = self.dlogprobs[0] = 0.0

    def gradient(self, write: Any, stats: RowStatistics, spec: HeadSpec, x: Tensor, bias: Tensor | None) -> Tensor:
        dlp, dent = (y.to(x.dtype) for y in (self.dlogprobs, self.dentropies))
        out = x.clone()
        write(out, self.targets, bias, stats, dlp, dent if spec.entropy == "grad" else None, spec)
        return out

    def assert_accurate(self, spec: HeadSpec) -> None:
        """Each result is as near to float64 as that of PyTorch in float32."""
        exact_bias = None if self.bias is None else self.bias.double()
        ours = cpp_row_statistics(self.x, self.targets, self.bias, spec)
        plain = row_statistics(self.x, self.targets, self.bias, spec)
        truth = row_statistics(self.x.double(), self.targets, exact_bias, spec)
        for name in ("logprobs", "entropies"):
            mine, theirs, true = (getattr(stats, name) for stats in (ours, plain, truth))
            assert_as_accurate(mine, theirs, true, epsilon=2e-6)
        mine = self.gradient(cpp_dlogits_, ours, spec, self.x, self.bias)
        theirs = self.gradient(dlogits_, plain, spec, self.x, self.bias)
        true = self.gradient(dlogits_, truth, spec, self.x.double(), exact_bias)
        assert_as_accurate(mine, theirs, true, epsilon=1e-6 * float(true.abs().max()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 63, 64, 65, 511, 513, 8211])
def test_every_width_and_option_is_as_accurate_as_the_reference(V: int, spec: HeadSpec, bias: bool) -> None:
    Rows(V, bias=bias).assert_accurate(spec)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 60.0, 1e4, 1e30])
def test_flat_and_peaked_rows(scale: float) -> None:
    for spec in (PLAIN, SPECS["softcap"]):
        Rows(300, scale=scale).assert_accurate(spec)


def test_the_vocabulary_of_qwen() -> None:
    Rows(151_936, C=3).assert_accurate(PLAIN)


def test_the_soft_cap_is_exact_where_it_bends_and_where_it_does_not() -> None:
    """All of the tanh's range: steps of 1e-3 around 0, where it changes its formula, and far out."""
    rows = Rows(3000, C=2)
    rows.x = torch.linspace(-60, 60, 3000).repeat(2, 1) * torch.tensor([[1.0], [0.02]])
    rows.targets = torch.tensor([5, 2990])
    rows.assert_accurate(SPECS["softcap"])


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-9])
def test_a_soft_cap_and_a_tiny_temperature_give_no_log_prob_above_0(temperature: float) -> None:
    """The last bit of the tanh may fall where its argument rises: 0.69355440 has a larger one than 0.69355446."""
    x = torch.tensor([0.69355440, 0.69355446]).repeat(1, 50) * 50
    spec = replace(PLAIN, softcap=50.0, temperature=temperature)
    for target in (0, 1):
        stats = cpp_row_statistics(x, torch.tensor([target]), None, spec)
        assert stats.logprobs.isfinite().all() and stats.logprobs <= 0 and stats.totals >= 1


# --- what must not reach a result ---


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("spec", [PLAIN, SPECS["everything"]], ids=["plain", "everything"])
def test_a_dead_row_is_exactly_zero_whatever_it_holds(spec: HeadSpec, with_entropy: bool) -> None:
    rows = Rows(77, bias=True)
    rows.x[4], rows.x[8] = NAN, INF  # ignored, and without a gradient
    stats = cpp_row_statistics(rows.x, rows.targets, rows.bias, spec)
    assert (stats.logprobs[4], stats.entropies[4]) == (0, 0)
    rows.dlogprobs[4] = rows.dentropies[4] = NAN
    spec = spec if with_entropy else replace(spec, entropy="none")
    x = rows.gradient(cpp_dlogits_, stats, spec, rows.x, rows.bias)
    assert (x[[4, 8]] == 0).all() and x.isfinite().all() and (x[[1, 2, 3, 5]] != 0).any(-1).all()
    assert bool((x[0] != 0).any()) is with_entropy


@pytest.mark.parametrize("value", [NAN, INF, "a NaN with other bits"])
@pytest.mark.parametrize("column", [0, 20, 64, 76])
def test_a_logit_that_is_not_finite_shows_in_its_row_alone(column: int, value: Any) -> None:
    rows = Rows(77)
    expected = cpp_row_statistics(rows.x, rows.targets, None, PLAIN)
    rows.x.view(torch.int32)[2, column] = 0x7FC00123
    if not isinstance(value, str):
        rows.x[2, column] = value
    stats = cpp_row_statistics(rows.x, rows.targets, None, PLAIN)
    for mine, wanted in zip(stats, expected, strict=True):
        assert torch.equal(mine[[0, 1, *range(3, 9)]], wanted[[0, 1, *range(3, 9)]])
    assert stats.logprobs[2].isnan() and stats.entropies[2].isnan()
    assert rows.gradient(cpp_dlogits_, stats, PLAIN, rows.x, None)[2].isnan().all()


def test_a_token_that_is_ruled_out_might_as_well_not_exist() -> None:
    """A bias of -inf gives the statistics and the gradient of the vocabulary without the token, and itself 0."""
    rows, kept = Rows(90, bias=True), torch.ones(90, dtype=torch.bool)
    kept[60:] = False
    assert rows.bias is not None
    rows.bias[~kept], rows.targets = -INF, rows.targets.clamp(max=59)
    rows.assert_accurate(PLAIN)
    stats = cpp_row_statistics(rows.x, rows.targets, rows.bias, PLAIN)
    without = row_statistics(rows.x[:, kept], rows.targets, rows.bias[kept], PLAIN)
    torch.testing.assert_close(stats.logprobs, without.logprobs, rtol=1e-6, atol=1e-6)
    assert (rows.gradient(cpp_dlogits_, stats, PLAIN, rows.x, rows.bias)[:, ~kept] == 0).all()


@pytest.mark.parametrize("target", [-1, 33, 2**40])
def test_a_target_out_of_range_gives_nan_and_touches_nothing(target: int) -> None:
    rows = Rows(33)
    rows.targets[1] = target
    stats = cpp_row_statistics(rows.x, rows.targets, None, PLAIN)
    assert stats.logprobs.isnan().nonzero().tolist() == [[1]]
    assert rows.gradient(cpp_dlogits_, stats, PLAIN, rows.x, None).isfinite().all()


def test_the_gap_between_two_rows_is_left_alone() -> None:
    rows = Rows(61)
    apart = torch.full((9, 80), NAN)
    apart[:, :61] = rows.x
    stats = cpp_row_statistics(apart[:, :61], rows.targets, None, PLAIN)
    assert torch.equal(stats.logprobs, cpp_row_statistics(rows.x, rows.targets, None, PLAIN).logprobs)
    cpp_dlogits_(apart[:, :61], rows.targets, None, stats, rows.dlogprobs, rows.dentropies, PLAIN)
    assert apart[:, 61:].isnan().all()
    assert torch.equal(apart[:, :61], rows.gradient(cpp_dlogits_, stats, PLAIN, rows.x, None))


def test_no_rows() -> None:
    stats = cpp_row_statistics(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), None, PLAIN)
    assert [len(x) for x in stats] == [0] * 4


# --- the ops that it serves ---


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit(threads: Any) -> None:
    rows = Rows(40_000)

    def everything() -> list[Tensor]:
        stats = cpp_row_statistics(rows.x, rows.targets, None, PLAIN)
        return [*stats, rows.gradient(cpp_dlogits_, stats, PLAIN, rows.x, None)]

    threads(1)
    alone = everything()
    for count in (2, 3, 4):
        threads(count)
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(everything(), alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cpp_serves_the_head_on_the_cpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a gradient; the reference is not called."""
    hidden, lm_head, targets = draw(20, 16).to(dtype), draw(50, 16, seed=1).to(dtype), torch.arange(20)
    leaves = [hidden.requires_grad_(), lm_head.requires_grad_()]
    given = hidden, lm_head, targets

    def results(backend: Any) -> list[Tensor]:
        with torch.no_grad():
            scored = token_logprobs(*given, backend=backend).logprobs
        trained = token_logprobs(*given, backend=backend).logprobs
        advantages, bounds = torch.tensor([1.0, -1.0]), torch.tensor([0, 8, 20])
        config = PolicyLossConfig("dapo")
        loss = linear_policy_loss(*given, advantages, bounds, normalizer=20.0, config=config, backend=backend).loss
        found = (torch.autograd.grad(y, leaves) for y in (trained.sum(), loss))
        return [scored, trained.detach(), loss.detach(), *(x for pair in found for x in pair)]

    expected = results("torch")
    for name in ("row_statistics", "dlogits_"):
        monkeypatch.delattr(f"maestro_fast.ops.head_rows.{name}")
    monkeypatch.delitem(head._STATISTICS, "torch")
    for mine, wanted, again in zip(results(None), expected, results("cpp"), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-2 if dtype is not torch.float32 else 1e-5, atol=1e-5)
        assert torch.equal(mine, again)


def test_cpp_refuses_what_it_cannot_serve() -> None:
    hidden, lm_head, targets = draw(3, 4).double(), draw(5, 4).double(), torch.arange(3)
    with pytest.raises(ValueError, match=r"backend: 'cpp' cannot serve token_logprobs here: got float64"):
        token_logprobs(hidden, lm_head, targets, backend="cpp")
    assert token_logprobs(hidden, lm_head, targets).logprobs.dtype is torch.float64
    with pytest.raises(ValueError, match="strategy: 'fused' is served by backend 'triton' alone, here by 'cpp'"):
        token_logprobs(hidden.float(), lm_head.float(), targets, strategy="fused")
    bias = draw(5).double()  # is converted, and is no reason to be refused
    converted = token_logprobs(hidden.float(), lm_head.float(), targets, bias=bias, backend="cpp").logprobs
    same = token_logprobs(hidden.float(), lm_head.float(), targets, bias=bias.float(), backend="cpp").logprobs
    assert torch.equal(converted, same)
