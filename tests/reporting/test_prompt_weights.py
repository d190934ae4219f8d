"""Weights per prompt as tables, a sentence and a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maestro_fast.reporting.prompt_weights import (
    family_table,
    prompt_picture,
    prompt_table,
    residual_sentence,
    spread_sentence,
)
from maestro_fast.reporting.tables import format_table
from maestro_fast.training.prompt_weights import PromptWeights
from maestro_fast.weighting.families import spread_between_families

NAMES = ("format", "brevity", "entropy")
FAMILIES = ["fact", "story"] * 6


def weights(apart: float) -> Tensor:
    """The families differ by ``apart`` in the first two rewards; the rest is noise."""
    noise = 0.02 * torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
    rows = 1 / 3 + noise - noise.mean(1, keepdim=True)
    sign = torch.tensor([1.0, -1.0] * 6)
    return rows + apart / 2 * torch.stack([sign, -sign, 0 * sign], 1)


def found(apart: float = 0.2, families: list[str] = FAMILIES) -> PromptWeights:
    prompts = [f"Prompt {i}: {'so many words ' * 20}" for i in range(12)]
    return PromptWeights("anchored", NAMES, prompts, families, weights(apart), ["Contexts: of a model."])


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_row_per_prompt_that_fits_the_terminal(width: int) -> None:
    table = prompt_table(found(), rows=5, width=width)
    lines = format_table(table, width).splitlines()
    assert table.header == ("prompt", "family", *NAMES, "H (nats)")
    assert [row[1] for row in table.rows] == [
        "fact",
        "fact",
        "fact",
        "story",
        "story",
    ]  # Both are shown.
    assert [row[0][:9] for row in table.rows] == ["Prompt 0:", "Prompt 2:", "Prompt 4:", "Prompt 1:", "Prompt 3:"]  # type: ignore[index]
    assert max(map(len, lines)) <= width and (width < 80 or len(lines) == 5 + 3)
    expected = weights(0.2)[1]
    assert table.rows[3][2:5] == pytest.approx(expected.tolist())
    assert table.rows[3][5] == pytest.approx(-(expected * expected.log()).sum().item())


def test_means_by_family_and_over_all() -> None:
    table = family_table(found())
    assert table is not None
    fact, story, everything = table.rows
    assert (fact[:2], story[:2], everything[:2]) == (("fact", 6), ("story", 6), ("all", 12))
    assert fact[2:5] == pytest.approx(weights(0.2)[::2].mean(0).tolist())
    assert everything[2:5] == pytest.approx(weights(0.2).mean(0).tolist())
    assert family_table(found(families=[""] * 12)) is None
    assert prompt_table(found(families=[""] * 12), rows=3, width=80).header == ("prompt", *NAMES, "H (nats)")


def test_spread_is_that_of_the_family_means_and_chance_is_not() -> None:
    measured = spread_between_families(weights(0.2), FAMILIES, shuffles=200, seed=1)
    assert measured is not None
    spread, chance = measured
    means = torch.stack([weights(0.2)[::2].mean(0), weights(0.2)[1::2].mean(0)]).double()
    gap = means[0] - means[1]  # Each of two families lies half the gap from the middle.
    assert spread == pytest.approx((gap / 2).norm().item())
    assert chance.shape == (200,) and chance.mean() < spread / 2
    assert spread_between_families(weights(0.2), ["fact"] * 12, shuffles=3, seed=1) is None
    without = spread_between_families(weights(0.2), ["fact", "", "story"] * 4, shuffles=3, seed=1)
    kept = [i for i in range(12) if i % 3 != 1]
    alone = spread_between_families(weights(0.2)[kept], ["fact", "story"] * 4, shuffles=3, seed=1)
    assert without is not None and alone is not None and without[0] == alone[0] and torch.equal(without[1], alone[1])


def test_the_sentence_claims_no_more_than_chance_allows() -> None:
    beyond, within = spread_sentence(found(0.2)), spread_sentence(found(0.0))
    assert beyond is not None and "NOT" not in beyond and beyond.endswith("beyond chance.")
    assert within is not None and within.endswith("NOT beyond chance.")
    equal = PromptWeights("anchored", NAMES, ["p"] * 12, FAMILIES, torch.full((12, 3), 1 / 3), [])
    assert "NOT beyond chance" in (spread_sentence(equal) or "")
    assert spread_sentence(found(families=[""] * 12)) is None


def test_the_residuals_share_is_that_of_the_last_logged_steps(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert f"{file} does not have it" in residual_sentence(file)
    shares = [None, 0.9, *[0.25] * 20]
    rows = [
        {"step": i, "loss": 1.0} | ({} if x is None else {"conductor/residual_share": x}) for i, x in enumerate(shares)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = residual_sentence(file)
    assert "made 25% of the scores' variance within groups" in said and "mean of the last 20 logged steps" in said


def test_the_picture_shows_every_weight_where_it_says() -> None:
    figure = prompt_picture(found())
    left, right, bar = figure.axes
    order = [*range(0, 12, 2), *range(1, 12, 2)]
    assert torch.equal(torch.tensor(left.images[0].get_array().data), weights(0.2)[order])  # type: ignore[union-attr]
    assert [label.get_text() for label in left.get_xticklabels()] == list(NAMES)
    assert [label.get_text() for label in right.get_yticklabels()] == ["fact", "story"]
    assert [text.get_text() for text in right.texts] == [
        f"{value:.2f}" for row in (weights(0.2)[::2].mean(0), weights(0.2)[1::2].mean(0)) for value in row.tolist()
    ]
    assert left.get_xlabel() == "reward" and left.get_ylabel() == "prompt, by family"
    assert "weight" in bar.get_ylabel() and f"{1 / 3:.3f}" in bar.get_ylabel()
    assert math.isclose(left.images[0].get_clim()[0], 0.0) and left.images[0].get_clim() == right.images[0].get_clim()
