"""The figures of a suite: utility over the share of labels, differences from the reference, and figures over time.

Everything is drawn with matplotlib's own objects, so pyplot's global state is never touched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maestro_fast.evals.results import Result
from maestro_fast.evals.standings import Row, Standing, Standings
from maestro_fast.evals.statistics import Difference, mean_interval
from maestro_fast.evals.summary import known_values, name_of, share_name
from maestro_fast.reporting.figure import (
    DPI,
    GREY,
    INK,
    STEP_LABEL,
    Panels,
    Style,
    panels,
    short,
    step_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

META_REWARD = "conductor/objective"
# What is drawn over time beside the utility, and what the line means.
CURVES = {
    META_REWARD: "meta-reward",
    "conductor/correlation": "correlation of score and utility",
    "diagnostics/self_flattery": "self-flattery",
    "diagnostics/entropy": "entropy of the weights (nats)",
    "diagnostics/family_spread": "spread of the weights between families",
    "conductor/residual_share": "residual's share of the score",
}
# Arms keep their colours in every figure. Each has a dash of its own too, for those who tell no colours apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288", "#882255", "#777777")
_DASHES = ((), (5.0, 1.2), (2.5, 1.0), (6.0, 1.2, 1.5, 1.2))
# These have colours that no other arm has: they stand in one panel wherever labels are read.
_FIRST = (
    "anchored_residual",
    "labelled",
    "anchored",
    "reward_model_hybrid",
    "static",
    "anchored_hybrid",
    "global",
    "reward_model",
    "anchored_shuffled",
)
_BETTER, _WORSE = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class Picture:
    """A figure of the page: its name as a file, its heading, and one sentence that tells how to read it."""

    name: str
    heading: str
    reading: str
    figure: Figure

    def save(self, path: Path) -> None:
        """Writes the figure as PNG."""
        self.figure.savefig(path, dpi=DPI)


def pictures(found: Standings) -> Iterator[Picture]:
    """Every figure that there is data for."""
    style = arm_styles(found)
    for standings in found.places().values():
        place = name_of(standings[0].place)
        at = f": {place}" if place else ""
        suffix = re.sub(r"[^a-z0-9]+", "_", f"_{place.lower()}") if len(found.places()) > 1 else ""
        shares = [standing for standing in standings if standing.share is not None]
        if len(shares) > 1:
            yield Picture(
                f"utility_over_share{suffix}",
                f"Utility over the share of labels{at}",
                "Left: arms that read labels are lines, all others are the grey levels, named at the edge. Right: the "
                f"same arms minus {found.reference}, seed by seed, so what the seeds have in common is out; where a "
                "band leaves the zero line out, the difference is beyond chance (before Holm's procedure).",
                over_share(found, shares, style),
            )
        if any(standing.tests.get(found.reference) for standing in standings):
            yield Picture(
                f"differences{suffix}",
                f"Difference from {found.reference}{at}",
                "A bar is coloured where its interval leaves zero out and Holm's procedure over its panel agrees. A "
                " grey one is no evidence of a difference.",
                differences(found, standings),
            )
        last = standings[-1]
        if any(one.history.get("utility") for seeds in last.results.values() for one in seeds.values()):
            yield Picture(
                f"utility_over_time{suffix}",
                f"Utility over time{f': {name_of(last.condition)}' if last.condition else ''}",
                f"Each panel has one arm, with {found.reference} in grey; bands: 95 % over the seeds.",
                utility_over_time(found, last, style),
            )
        if drawn := diagnostics(last, style):
            yield Picture(
                f"diagnostics{suffix}",
                f"Meta-reward and diagnostics over time{f': {name_of(last.condition)}' if last.condition else ''}",
                "The meta-reward is what an arm's weights are learnt by; its scale differs between kinds of arms. "
                "Bands: 95 % over the seeds.",
                drawn,
            )


def arm_styles(found: Standings) -> dict[str, Style]:
    """A line style for each arm, the same in every figure."""
    rows = dict.fromkeys(row.arm for standing in found.each for row in standing.rows)
    order = [arm for arm in _FIRST if arm in rows] + [arm for arm in rows if arm not in _FIRST]
    return {arm: Style(_COLOURS[i % 9], _DASHES[i // 9 % 4 or (i % 9) // 5]) for i, arm in enumerate(order)}


def over_share(found: Standings, standings: Sequence[Standing], style: Mapping[str, Style]) -> Figure:
    """Utility over the share of labels (log), and the same minus the reference.

    ``standings`` differ by their share alone.
    """
    counts = _seeds(standings)
    drawn = panels(
        [f"utility (mean, {counts})", f"utility minus {found.reference} (paired, {counts})"], height=4.4, columns=2
    )
    left, right = drawn.axes
    arms = list(dict.fromkeys(row.arm for standing in standings for row in standing.rows if row.reads_labels))
    arms.sort(key=list(style).index)
    shares = [standing.share or 0.0 for standing in standings]
    for arm in arms:
        rows = [standing.row(arm) for standing in standings]
        _band(left, shares, [row.utility if row else None for row in rows], style[arm], alpha=0.06)
        tests = [standing.tests.get(found.reference, {}).get(arm) for standing in standings]
        if any(tests):
            _band(right, shares, [test.difference if test else None for test in tests], style[arm])
        drawn.entry(arm, **style[arm].line(marker="o", markersize=4))
    right.axhline(0, color=INK, linewidth=0.9)
    drawn.patch("95 % interval over the seeds", color=GREY, alpha=0.25)
    for ax in drawn.axes:
        _share_axis(ax, shares)
    _levels(left, [row for row in standings[-1].rows if not row.reads_labels])
    return drawn.finish(raw=False)


def _levels(ax: Axes, rows: Sequence[Row]) -> None:
    """Draws arms that read no labels as horizontal lines, named in the right margin without overlap."""
    known = sorted((row for row in rows if math.isfinite(row.utility.mean)), key=lambda row: row.utility.mean)
    if not known:
        return
    for row in known:
        ax.axhline(row.utility.mean, color=GREY, linewidth=0.9, linestyle=(0, (1.5, 2.0)), zorder=1)
    from scipy.optimize import isotonic_regression

    # The names stand as close to their lines as a line of text each allows: least squares with a least distance.
    low, high = ax.get_ylim()
    offsets = 0.034 * (high - low) * np.arange(len(known))
    heights = isotonic_regression(np.array([row.utility.mean for row in known]) - offsets).x + offsets
    ax.set_ylim(min(low, heights[0]), max(high, heights[-1]))
    for row, height in zip(known, heights, strict=True):
        ax.annotate(
            short(row.arm, 20),
            (1.0, row.utility.mean),
            xytext=(1.07, height),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            fontsize=8,
            color=INK,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": GREY,
                "linewidth": 0.5,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def differences(found: Standings, standings: Sequence[Standing]) -> Figure:
    """Bars of every arm minus the reference, with intervals, one panel for each share."""
    standings = [standing for standing in standings if standing.tests.get(found.reference)]
    arms = {arm: 0.0 for standing in standings for arm in standing.tests[found.reference]}
    for arm in arms:
        gaps = [standing.tests[found.reference].get(arm) for standing in standings]
        arms[arm] = float(np.mean([gap.difference.mean for gap in gaps if gap is not None]))
    order = sorted(arms, key=lambda arm: arms[arm])
    titles = [
        f"{share_name(one.share)} labels, {_seeds([one])}" if one.share is not None else _seeds([one])
        for one in standings
    ]
    columns = min(len(standings), 4)
    rows = -(-len(standings) // columns)
    drawn = panels(titles, height=0.19 * len(order) + 0.7, columns=columns)
    drawn.figure.set_figheight(rows * (0.19 * len(order) + 0.7) + 0.5)
    drawn.figure.supxlabel(f"utility minus {found.reference}, with 95 % intervals", fontsize=9)
    for i, (ax, standing) in enumerate(zip(drawn.axes, standings, strict=True)):
        for height, arm in enumerate(order):
            if test := standing.tests[found.reference].get(arm):
                mean, half = test.difference.mean, test.difference.half_width
                colour = (_BETTER if mean > 0 else _WORSE) if test.holds else "#BBBBBB"
                ax.barh(height, mean, color=colour, height=0.7)
                if math.isfinite(half):
                    ax.errorbar(mean, height, xerr=half, color=INK, linewidth=1.0, capsize=2, capthick=1.0)
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.grid(axis="x", color="#E3E3E3", linewidth=0.7)
        ax.grid(visible=False, axis="y")
        ax.set_ylim(-0.6, len(order) - 0.4)
        names = [short(arm, 24) for arm in order] if i % columns == 0 else [""] * len(order)
        ax.set_yticks(range(len(order)), names)
        ax.locator_params(axis="x", nbins=4)
    _same_limits(drawn.axes, "x")
    return drawn.finish(raw=False)


def utility_over_time(found: Standings, standing: Standing, style: Mapping[str, Style]) -> Figure:
    """The utility of each arm in training, in a panel of its own beside the reference."""
    arms = [row.arm for row in standing.rows if _over_time(standing.results[row.arm], "utility")]
    columns = min(len(arms), 4)
    drawn = panels(arms, height=1.5, columns=columns)
    drawn.figure.supylabel("utility", fontsize=9)
    reference = standing.results.get(found.reference)
    for ax, arm in zip(drawn.axes, arms, strict=True):
        if reference is not None and arm != found.reference:
            _curve(ax, reference, "utility", Style(GREY, width=1.2))
        _curve(ax, standing.results[arm], "utility", Style(style[arm].colour))
    _same_limits(drawn.axes, "y")
    for i, ax in enumerate(drawn.axes):
        if i % columns:
            ax.set_yticklabels([])
        if i + columns < len(arms):
            ax.set_xticklabels([])
        else:
            ax.set_xlabel("step")
    if reference is not None:
        drawn.entry(found.reference, color=GREY, linewidth=1.2)
    drawn.entry("the arm of the panel", color=_COLOURS[0], linewidth=1.8)
    return _with_band(drawn, standing)


def diagnostics(standing: Standing, style: Mapping[str, Style]) -> Figure | None:
    """The meta-reward and the diagnostics of the weights, a panel for each; None if nothing was logged."""
    arms = {name: [row.arm for row in standing.rows if _over_time(standing.results[row.arm], name)] for name in CURVES}
    live = [name for name in CURVES if arms[name]]
    if not live:
        return None
    drawn = panels([CURVES[name] for name in live], height=2.4, columns=min(len(live), 3))
    for ax, name in zip(drawn.axes, live, strict=True):
        ax.set_xlabel(STEP_LABEL)
        for arm in arms[name]:
            _curve(ax, standing.results[arm], name, style[arm])
    shown = [arm for arm in style if any(arm in members for members in arms.values())]
    for arm in shown:
        drawn.entry(arm, **style[arm].line())
    return _with_band(drawn, standing)


def _over_time(seeds: Mapping[int, Result], name: str) -> dict[int, list[float]]:
    """The known values of a figure, of all seeds, by the step; steps that only some seeds have are left out."""
    series = [values for one in seeds.values() if (values := dict(known_values(one.history.get(name, []))))]
    steps = set.intersection(*(set(values) for values in series)) if series else set()
    return {step: [values[step] for values in series] for step in sorted(steps)}


def _curve(ax: Axes, seeds: Mapping[int, Result], name: str, style: Style) -> None:
    """Draws the mean of a figure over the seeds with its interval."""
    points = _over_time(seeds, name)
    steps = np.array(list(points), dtype=np.float64)
    if len(steps):
        _band(ax, list(points), [mean_interval(values) for values in points.values()], style, marker=False)
        step_axis(ax, steps, None)


def _band(
    ax: Axes,
    x: Sequence[float],
    values: Sequence[Difference | None],
    style: Style,
    *,
    alpha: float = 0.13,
    marker: bool = True,
) -> None:
    """Draws means over ``x`` with their intervals as a band, which is as dark as ``alpha`` says."""
    mean = np.array([np.nan if one is None else one.mean for one in values])
    half = np.array([np.nan if one is None else one.half_width for one in values])
    points: dict[str, Any] = {"marker": "o", "markersize": 4} if marker else {}
    ax.plot(x, mean, **style.line(**points))
    ax.fill_between(x, mean - half, mean + half, color=style.colour, alpha=alpha, linewidth=0)


def _share_axis(ax: Axes, shares: Sequence[float]) -> None:
    from matplotlib.ticker import NullLocator

    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(shares, [share_name(share) for share in shares])
    ax.set_xlim(shares[0] / 1.15, shares[-1] * 1.15)
    ax.set_xlabel("share of labelled prompts (log scale)")


def _same_limits(axes: Sequence[Axes], which: str) -> None:
    limits = [getattr(ax, f"get_{which}lim")() for ax in axes]
    for ax in axes:
        getattr(ax, f"set_{which}lim")(min(low for low, _ in limits), max(high for _, high in limits))


def _with_band(drawn: Panels, standing: Standing) -> Figure:
    drawn.patch(f"95 % interval over the seeds, {_seeds([standing])}", color=GREY, alpha=0.25)
    return drawn.finish(raw=False)


def _seeds(standings: Sequence[Standing]) -> str:
    """The number of seeds in words, for a title."""
    numbers = sorted({row.utility.n for standing in standings for row in standing.rows})
    return f"n = {numbers[0]}" if len(numbers) == 1 else f"n = {numbers[0]} to {numbers[-1]}"
