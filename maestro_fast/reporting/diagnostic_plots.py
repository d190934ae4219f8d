"""Plots of what the weights do: every diagnostic with its healthy range, and each reward's share of the advantage."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from maestro_fast.reporting.figure import GREY, PLAIN, REWARD_COLOURS, panels, series, styles
from maestro_fast.reporting.history import History
from maestro_fast.reporting.plots import Curve, MissingData
from maestro_fast.weighting.diagnostics import healthy_ranges

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEALTHY = "#009E73"
CURVES = (
    Curve("diagnostics/self_flattery", "Self-flattery", "mean w · r (group std)"),
    Curve("diagnostics/argmax_agreement", "Heaviest is best", "share of responses"),
    Curve("diagnostics/entropy", "Entropy of the weights", "entropy / ln K"),
    Curve("diagnostics/between_prompts", "Between prompts", "share of weight variance"),
    Curve("diagnostics/pareto_inversions", "Pareto inversions", "share of pairs"),
    Curve("rewards_correlation/min", "Most opposed pair", "correlation"),
    Curve("conductor/gradient_snr", "Meta-gradient", "signal to noise"),
    Curve("diagnostics/family_spread", "Between families", "spread of weights"),
    Curve("anchor/utility", "Known utility", "utility (its own units)"),
    Curve("guard/utility", "Held-back utility", "utility (its own units)"),
)


def diagnostics(history: History) -> Figure:
    """One panel per figure that was logged; its healthy range, where it has one, is green."""
    shown = [curve for curve in CURVES if history.has(curve.key)]
    if not shown:
        raise MissingData("no line holds diagnostics/*")
    ranges = healthy_ranges(history.rewards or ("",))
    figure = panels([curve.title for curve in shown], steps=history.steps)
    for ax, curve in zip(figure.axes, shown, strict=True):
        series(ax, history.steps, history.get(curve.key), PLAIN, figure.window)
        ax.set_ylabel(curve.label)
        if (healthy := ranges.get(curve.key)) is not None:
            low, high = ax.get_ylim()
            low, high = min(low, healthy.low), max(high, healthy.high if math.isfinite(healthy.high) else low + 1)
            ax.axhspan(healthy.low, min(healthy.high, high), color=HEALTHY, alpha=0.16, linewidth=0, zorder=0)
            ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        if curve.key == "diagnostics/family_spread":
            control = history.get("diagnostics/family_spread_shuffled")
            ax.plot(history.steps, control, color=GREY, linewidth=1.0, linestyle=(0, (4, 3)))
    figure.patch("healthy", color=HEALTHY, alpha=0.25)
    if any(curve.key == "diagnostics/family_spread" for curve in shown):
        figure.entry("families shuffled", color=GREY, linewidth=1.0, linestyle=(0, (4, 3)))
    return figure.finish()


def advantage_shares(history: History) -> Figure:
    """What each reward contributes to the advantage, over time, a line per reward; the lines add up to 100 %."""
    names = [name for name in history.rewards if history.has(f"advantage_share/{name}")]
    if not names:
        raise MissingData("no line holds advantage_share/<name>")
    style = styles(history.rewards, REWARD_COLOURS)
    figure = panels(["Share of the advantage"], steps=history.steps)
    (ax,) = figure.axes
    for name in names:
        series(ax, history.steps, 100 * history.get(f"advantage_share/{name}"), style[name], figure.window)
        figure.entry(name, **style[name].line())
    ax.axhline(100 / len(names), color=GREY, linestyle=(0, (4, 3)), linewidth=1.0, zorder=1)
    figure.entry("equal shares", color=GREY, linestyle=(0, (4, 3)), linewidth=1.0)
    ax.set_ylabel("share (%)")
    return figure.finish()
