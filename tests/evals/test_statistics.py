"""Paired differences and their confidence intervals."""

from __future__ import annotations

import pytest
import torch

from maestro_fast.evals.statistics import paired_difference


@pytest.mark.parametrize(
    ("freedom", "published"),
    [(1, 12.706205), (2, 4.302653), (4, 2.776445), (9, 2.262157), (30, 2.042272), (1000, 1.962339)],
)
def test_half_widths_have_the_quantiles_of_the_tables(freedom: int, published: float) -> None:
    """The half width in units of the standard error is the 97.5 % quantile of Student's t."""
    gaps = torch.randn(freedom + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = paired_difference(gaps, torch.zeros_like(gaps))
    error = gaps.std().item() / (freedom + 1) ** 0.5
    assert found.half_width / error == pytest.approx(published, rel=1e-6)


def test_a_difference_by_hand() -> None:
    """The gaps 1, 2 and 3 have mean 2 and standard error 1 / sqrt(3)."""
    found = paired_difference(torch.tensor([2.0, 4.0, 6.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert found.mean == 2.0 and found.n == 3
    assert found.half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert (found.low, found.high) == (found.mean - found.half_width, found.mean + found.half_width)


@pytest.mark.parametrize("shape", [(1,), (2, 2)])
def test_bad_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^ours_S, theirs_S: shapes"):
        paired_difference(torch.zeros(shape), torch.zeros(shape))
