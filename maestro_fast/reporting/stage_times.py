"""The plot of where the time of a generation batch goes: seconds of each stage over the run, and their shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maestro_fast.records import TOKEN_COUNTS
from maestro_fast.reporting.figure import GREY, INK, STEP_LABEL, panels, short, step_axis
from maestro_fast.reporting.history import FloatArray, History
from maestro_fast.reporting.plots import MissingData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_AREAS = 120
_COLOURS = {  # The stages stand in the order in which the data flow through them.
    "sync": "#3B4B8C",
    "generate": "#0072B2",
    "score": "#56B4E9",
    "reference": "#A6D8F0",
    "rewards": "#E69F00",
    "weights": "#CC79A7",
    "advantages": "#F0E442",
    "train": "#009E73",
    "conductor_update": "#D55E00",
    "evaluate": "#8C6D9E",
    "save": "#7A4B2A",
}
_MORE = ("#5E7F3A", "#B08BB5")
_OUTSIDE = "outside the stages"


def stage_times(timings: History) -> Figure:
    """Draws stacked areas of seconds per generation batch, and beside them each stage's mean time and share.

    Raises:
        MissingData: ``timings`` has no stage.
    """
    seconds = stage_seconds(timings)
    unknown = [name for name in seconds if name not in _COLOURS]
    palette = {**_COLOURS, **{n: _MORE[i % len(_MORE)] for i, n in enumerate(unknown)}, _OUTSIDE: "#CFCFCF"}
    areas = min(len(timings), MAX_AREAS)
    per_area = -(-len(timings) // areas)
    left = "Seconds per batch" if per_area == 1 else f"Seconds per batch (means over {per_area})"
    usual, without = _usual_steps(timings.steps, seconds)
    figure = panels([left, f"Mean per batch, share of time{without}"], height=1.6 + 0.19 * len(seconds))
    _stack(figure.axes[0], timings.steps, seconds, palette, per_area)
    _shares(figure.axes[1], {name: values[usual] for name, values in seconds.items()}, palette)
    return figure.finish()


def stage_seconds(timings: History) -> dict[str, FloatArray]:
    """The seconds of each stage, float64 [S] each, in the order of the data flow; stages of other names come last.

    If a step lacks a stage, the stage took 0 s there. If ``total`` exceeds the sum of the stages by more than 1 % over
    the run, the rest is added as the stage "outside the stages".
    """
    found = [name for name in timings.columns if name not in ("total", *TOKEN_COUNTS) and timings.has(name)]
    if not found:
        raise MissingData("no line holds the seconds of a stage")
    ordered = [*(n for n in _COLOURS if n in found), *(n for n in found if n not in _COLOURS)]
    seconds = {name: np.nan_to_num(timings.get(name)) for name in ordered}
    total = timings.get("total")
    measured = np.sum(list(seconds.values()), axis=0)
    rest = np.maximum(np.nan_to_num(total - measured), 0.0)
    if rest.sum() > 0.01 * np.nansum(total):
        seconds[_OUTSIDE] = rest
    return seconds


def _stack(
    ax: Axes, steps: FloatArray, seconds: Mapping[str, FloatArray], palette: Mapping[str, str], per_area: int
) -> None:
    """Stacks the stages' areas, each a mean over ``per_area`` steps."""
    starts = np.arange(0, len(steps), per_area)
    counts = np.diff(np.append(starts, len(steps)))
    x = np.add.reduceat(steps, starts) / counts
    edges = _edges(x)
    bottom = np.zeros(len(x))
    for name, values in seconds.items():
        top = bottom + np.add.reduceat(values, starts) / counts
        ends = (np.append(bottom, bottom[-1]), np.append(top, top[-1]))
        ax.fill_between(edges, *ends, step="post", color=palette[name], linewidth=0)
        bottom = top
    step_axis(ax, edges, STEP_LABEL, margin=0.0)
    ax.set_ylim(0, ax.get_ylim()[1])
    ax.set_ylabel("time (seconds per batch)")
    _cap(ax, x, bottom)


def _edges(x: FloatArray) -> FloatArray:
    """Where each step's area begins and ends, which is half-way to its neighbours."""
    if len(x) == 1:
        return np.array([x[0] - 0.5, x[0] + 0.5])
    between = (x[1:] + x[:-1]) / 2
    return np.concatenate([[2 * x[0] - between[0]], between, [2 * x[-1] - between[-1]]])


def _usual_steps(steps: FloatArray, seconds: Mapping[str, FloatArray]) -> tuple[NDArray[np.bool_], str]:
    """Finds the steps whose total time is usual, and describes in a few words which steps are left out.

    A step that takes several times as long as the others, like a first one that compiles, would spoil the means.
    """
    totals = np.sum(list(seconds.values()), axis=0)
    usual = totals < 3 * np.quantile(totals, 0.9)
    if len(totals) < 10 or usual.all() or not usual.any():
        return np.ones(len(totals), dtype=np.bool_), ""
    out = np.flatnonzero(~usual)
    return usual, f" (without step {steps[out[0]]:.0f})" if len(out) == 1 else f" (without {len(out)} outliers)"


def _cap(ax: Axes, x: FloatArray, tops: FloatArray) -> None:
    """Cuts the axis off above the usual steps if a few are far higher, and writes how high the highest is."""
    usual = float(np.quantile(tops, 0.9))
    if len(tops) < 10 or tops.max() < 3 * usual or usual == 0:
        return
    ax.set_ylim(0, 1.6 * usual)
    high = int(tops.argmax())
    right = high > len(tops) / 2
    ax.annotate(
        f"step {x[high]:.0f}: {tops[high]:.3g} s, cut off",
        (x[high], 1.6 * usual),
        xytext=(-8 if right else 8, -4),
        textcoords="offset points",
        ha="right" if right else "left",
        va="top",
        fontsize=9,
        color=INK,
    )


def _shares(ax: Axes, seconds: Mapping[str, FloatArray], palette: Mapping[str, str]) -> None:
    """Draws a bar for each stage, labelled with its mean time and its share."""
    names = list(seconds)
    means = np.array([seconds[name].mean() for name in names])
    whole = means.sum() or 1.0
    rows = np.arange(len(names))[::-1]
    ax.barh(rows, 100 * means / whole, 0.72, color=[palette[name] for name in names], linewidth=0)
    ends = 100 * means / whole
    for i, (row, mean) in enumerate(zip(rows, means, strict=True)):
        share = 100 * mean / whole
        if (values := seconds[names[i]]).min() > 0:  # A stage that does not run in every batch has no usual time.
            low, ends[i] = 100 * np.quantile(values, (0.05, 0.95)) / whole
            ax.plot((low, ends[i]), (row, row), color=INK, linewidth=1.0, alpha=0.7)
        text = f" {_seconds(mean)} · {f'{share:.1f}' if share >= 0.05 else '< 0.1'} %"
        ax.text(max(share, ends[i]), row, text, va="center", fontsize=9, color=INK)
    ax.set_yticks(rows, [short(name, 24) for name in names])
    ax.set_xlabel("share of the time (%); lines: middle 90 % of the batches")
    ax.set_xlim(0, 1.5 * float(ends.max()) or 1)
    ax.set_xticks([tick for tick in range(0, 101, 20) if tick <= ax.get_xlim()[1]])
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_color(GREY)


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 99.95 else f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
