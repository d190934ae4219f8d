"""Statistics and gradients of rows of logits by the kernels against float64, and what a row must not depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.kernels import head_rows as kernel
from maestro_fast.ops import head_rows as reference
from maestro_fast.specs import HeadSpec, RowStatistics
from tests.kernels.helpers import DEVICE, INTERPRETED, assert_close, runs

VALUES = 1e-6  # beyond the plain op's error, of the largest true value
GRADIENTS = {torch.float32: 1e-6, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}  # the interpreter truncates
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 5.0},
    "everything": {"bias": True, "scale": 1.7, "softcap": 9.0, "temperature": 1.3},
}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 32 columns, so that short rows have several, and a part of one."""
    monkeypatch.setattr(kernel, "_LANES", 16)
    monkeypatch.setattr(kernel, "_FOLDS", 2)


def spec(entropy: Any = "grad", **options: Any) -> HeadSpec:
    return HeadSpec(
        **{"scale": 1.0, "softcap": None, "temperature": 1.0, **options}, ignore_index=-100, entropy=entropy
    )


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(rows: int, vocabulary: int, *, bias: bool = False) -> dict[str, Any]:
    """Logits of about +-10, one row in five ignored, one without a gradient."""
    targets = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(1))
    targets[4::5] = -100
    dlogprobs, dentropies = draw(rows, seed=2), draw(rows, seed=3)
    dlogprobs[3::5] = dentropies[3::5] = dlogprobs[2::5] = 0.0
    return {
        "x": draw(rows, vocabulary) * 4,
        "targets": targets,
        "bias": draw(vocabulary, seed=4) if bias else None,
        "dlogprobs": dlogprobs,
        "dentropies": dentropies,
    }


def there(given: dict[str, Any]) -> dict[str, Any]:
    """Copies, since gradients take the place of logits."""
    return {name: None if value is None else value.to(DEVICE, copy=True) for name, value in given.items()}


def ours(given: dict[str, Any], s: HeadSpec, dtype: torch.dtype) -> tuple[RowStatistics, Tensor]:
    """Statistics, and the gradient: float32 in the place of the logits, 16-bit apart from them."""
    x, targets, bias, dlogprobs, dentropies = there(given).values()
    before = x.clone()
    stats = kernel.row_statistics(x, targets, bias, s)
    assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))
    out = place(x, dtype)
    kernel.dlogits(x, targets, bias, stats, dlogprobs, dentropies if s.entropy == "grad" else None, s, out)
    if out is not x:
        assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))
    return stats, out


def place(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` itself, or rows of 16-bit numbers that begin at multiples of 32 bytes."""
    if dtype is x.dtype:
        return x
    return torch.empty(len(x), -(-x.shape[1] // 16) * 16, dtype=dtype, device=x.device)[:, : x.shape[1]]


def plain(given: dict[str, Any], s: HeadSpec, dtype: torch.dtype) -> tuple[RowStatistics, Tensor]:
    x, targets, bias, dlogprobs, dentropies = (
        y.to(dtype) if y is not None and y.is_floating_point() else y for y in given.values()
    )
    stats, x = reference.row_statistics(x, targets, bias, s), x.clone()
    reference.dlogits_(x, targets, bias, stats, dlogprobs, dentropies if s.entropy == "grad" else None, s)
    return stats, x


def compare(given: dict[str, Any], s: HeadSpec, dtype: torch.dtype = torch.float32) -> None:
    (mine, slope), *others = runs(lambda: ours(given, s, dtype))  # It looks at the inputs itself.
    (truth, true_slope), (simple, simple_slope) = (plain(given, s, wide) for wide in (torch.float64, torch.float32))
    live = given["targets"] != -100
    for name, one, true, other in zip(RowStatistics._fields, mine, truth, simple, strict=True):
        assert one.shape == true.shape
        kept = live if name in ("peaks", "totals") and len(one) else slice(None)
        assert_close(one[kept], true[kept], other[kept], epsilon=VALUES, what=name)
    assert slope.dtype == dtype
    assert_close(slope, true_slope, simple_slope, epsilon=GRADIENTS[dtype], what="gradient")
    dead = ~live | ((given["dlogprobs"] == 0) & ((given["dentropies"] == 0) | (s.entropy != "grad")))
    assert (slope.cpu()[dead] == 0).all()
    for again, slope_again in others:
        assert torch.equal(slope, slope_again) and all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))


@pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
@pytest.mark.parametrize("entropy", ["none", "value", "grad"])
@pytest.mark.parametrize("head", HEADS)
def test_statistics_and_gradient(head: str, entropy: Any, dtype: torch.dtype) -> None:
    options = dict(HEADS[head])
    compare(inputs(5, 70, bias=options.pop("bias", False)), spec(entropy, **options), dtype)


@pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 31, 32, 33, 64, 97])
def test_one_column_more_or_less_than_a_step(vocabulary: int, dtype: torch.dtype) -> None:
    compare(inputs(3, vocabulary, bias=True), spec(softcap=4.0), dtype)


@pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
def test_steps_as_they_are(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.undo()
    compare(inputs(3, 10_007), spec(temperature=0.9), dtype)


@pytest.mark.parametrize("rows", [0, 1, 3, 7])
def test_a_few_rows_and_none(rows: int) -> None:
    compare(inputs(rows, 50), spec())


@pytest.mark.parametrize("offset", [-1e4, -300.0, 300.0, 1e4])
def test_an_offset_of_all_logits_costs_nothing(offset: float) -> None:
    """Values on a grid of 2^-8 keep every difference, so the same bits come out but for the peak."""
    given = inputs(5, 70)
    given["x"] = (given["x"] * 256).round() / 256
    moved = given | {"x": given["x"] + round(offset * 256) / 256}
    (stats, slope), (other, other_slope) = (ours(y, spec(), torch.float32) for y in (given, moved))
    assert torch.equal(slope, other_slope)
    for name in ("logprobs", "totals", "entropies"):
        assert torch.equal(getattr(stats, name), getattr(other, name))
    compare(moved, spec(temperature=0.7))


def test_peaked_rows() -> None:
    """Hundreds of nats apart, with the peak on the target, off it, and shared."""
    given = inputs(4, 70)
    given["x"] = given["x"] * 40
    peak = given["x"].argmax(-1)
    given["targets"] = torch.stack([peak[0], given["x"][1].argmin(), peak[2], peak[3]])
    given["x"][2, peak[2]] = given["x"][2, (peak[2] + 1) % 70] = 1000.0
    stats, _ = ours(given, spec(), torch.float32)
    assert stats.logprobs[0] == 0 and stats.logprobs[1] < -200 and abs(stats.logprobs[2] + 0.6931472) < 1e-6
    compare(given, spec())


def test_whatever_a_dead_row_holds() -> None:
    given = inputs(5, 70)
    given["x"][[4, 3], 5] = torch.nan  # ignored, and without a gradient
    given["dlogprobs"][4] = given["dentropies"][4] = torch.nan
    stats, slope = ours(given, spec(), torch.float32)
    assert stats.logprobs[4] == 0 and stats.entropies[4] == 0
    assert (slope[[3, 4]] == 0).all() and slope.isfinite().all() and (slope[:3] != 0).all()


def test_what_is_not_finite_in_a_live_row_shows() -> None:
    given = inputs(2, 70)
    given["x"][1, 7] = torch.nan
    stats, slope = ours(given, spec(), torch.float32)
    assert stats.logprobs[0].isfinite() and stats.logprobs[1].isnan() and stats.entropies[1].isnan()
    assert slope[0].isfinite().all() and slope[1].isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter: 0 * inf, not taken
def test_tokens_that_are_ruled_out() -> None:
    """A bias of -inf leaves the others' probabilities, and an entropy that is finite."""
    given = inputs(3, 40, bias=True)
    given["targets"] = torch.tensor([0, 1, 2])
    given["bias"][5:38] = -torch.inf
    kept = [*range(5), 38, 39]
    stats, slope = ours(given, spec(), torch.float32)
    assert (slope[:, 5:38] == 0).all()
    fewer = given | {"x": given["x"][:, kept], "bias": given["bias"][kept]}
    truth, true_slope = plain(fewer, spec(), torch.float64)
    assert_close(stats.logprobs, truth.logprobs, epsilon=VALUES)
    assert_close(stats.entropies, truth.entropies, epsilon=VALUES)
    assert_close(slope[:, kept], true_slope, epsilon=VALUES)


@pytest.mark.parametrize("target", [-1, 70, 2**40])
def test_a_target_out_of_range_gives_nan(target: int) -> None:
    given = inputs(2, 70)
    given["targets"][1] = target
    stats, _ = ours(given, spec(), torch.float32)
    assert stats.logprobs[1].isnan() and stats.logprobs[0].isfinite() and stats.entropies.isfinite().all()


@pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
def test_rows_with_a_stride(dtype: torch.dtype) -> None:
    given = inputs(5, 70)
    wide = torch.full((5, 96), torch.nan)
    wide[:, :70] = given["x"]
    stats, slope = ours(given, spec(), dtype)
    strided = there(given | {"x": wide})
    x = strided["x"][:, :70]
    others = RowStatistics(*kernel.row_statistics(x, strided["targets"], None, spec()))
    out = place(x, dtype)
    kernel.dlogits(
        x, strided["targets"], None, others, strided["dlogprobs"], strided["dentropies"], spec(), out
    )  # fmt: skip
    assert torch.equal(out, slope) and all(torch.equal(a, b) for a, b in zip(stats, others, strict=True))
    assert strided["x"][:, 70:].isnan().all()


def test_the_narrow_gradient_is_the_wide_one_rounded() -> None:
    given = inputs(7, 500)
    (_, wide), (_, narrow) = ours(given, spec(), torch.float32), ours(given, spec(), torch.bfloat16)
    expected = wide.bfloat16()
    if INTERPRETED:
        expected = (wide.view(torch.int32) & -65536).view(torch.float32).bfloat16()
    assert torch.equal(narrow, expected)


def test_a_row_does_not_depend_on_the_others() -> None:
    given = inputs(7, 70, bias=True)
    s = spec(softcap=9.0)
    stats, slope = ours(given, s, torch.float32)
    for rows in ([2], [0, 5, 2], [6, 5, 4, 3, 2, 1, 0]):
        part = {name: y if name == "bias" else y[rows] for name, y in given.items()}
        some, some_slope = ours(part, s, torch.float32)
        assert torch.equal(some_slope, slope[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(some, stats, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="needs 10 GB and a device")
@pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
def test_more_than_2_to_the_31_logits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.undo()
    vocabulary, rows = 151_936, 14_300
    assert vocabulary * rows > 2**31
    x = torch.randn(rows, vocabulary, device=DEVICE)
    last = {**inputs(7, vocabulary), "x": x[-7:].cpu()}
    targets, dlogprobs, dentropies = (
        y.to(DEVICE).repeat(2043)[-rows:] for n, y in last.items() if n not in ("x", "bias")
    )
    stats = RowStatistics(*kernel.row_statistics(x, targets, None, spec()))
    out = place(x, dtype)
    kernel.dlogits(x, targets, None, stats, dlogprobs, dentropies, spec(), out)
    alone, slope = ours(last, spec(), dtype)
    assert torch.equal(out[-7:], slope) and all(torch.equal(a[-7:], b) for a, b in zip(stats, alone, strict=True))
    compare(last, spec(), dtype)
