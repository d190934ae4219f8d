"""What the plots share: panels, colours, running means and legends.

Everything is drawn with matplotlib's own objects, so pyplot's global state is never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from maestro_fast.reporting.history import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.0  # inches; at 100 dpi this is 900 px, and text of 9 pt is 12.5 px high
DPI = 180
MAX_POINTS = 800  # A line has at most this many points; more could not be told apart at this width.
STEP_LABEL = "step (optimiser updates)"

INK, GREY = "#222222", "#6B6B6B"
# Rewards have the palette of Okabe and Ito without its yellow, which is too light for a line on white; two greys
# replace it. Families have Paul Tol's muted palette.
REWARD_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222", "#999999")
FAMILY_COLOURS = ("#332288", "#CC6677", "#117733", "#88CCEE", "#882255", "#999933", "#44AA99", "#AA4499")
# The second half of a palette is dashed too, so that lines of similar colours can still be told apart.
_DASHES = ((), (5.0, 1.2), (2.5, 1.0), (6.0, 1.2, 1.5, 1.2))


@dataclass(frozen=True)
class Style:
    """How a line is drawn."""

    colour: str
    dash: tuple[float, ...] = ()
    width: float = 1.8
    alpha: float = 1.0

    def line(self, **changes: Any) -> dict[str, Any]:
        """The keyword arguments of ``Axes.plot``."""
        pattern = (0, self.dash) if self.dash else "-"
        drawn = {"color": self.colour, "linestyle": pattern, "linewidth": self.width, "alpha": self.alpha}
        return {**drawn, **changes}


PLAIN = Style(REWARD_COLOURS[0])
SECOND = Style(REWARD_COLOURS[1])


def styles(names: Sequence[str], colours: Sequence[str]) -> dict[str, Style]:
    """Gives each name a line style. The same names in the same order get the same styles in every plot."""
    half = (len(colours) + 1) // 2
    return {name: Style(colours[i % len(colours)], _DASHES[(i // half) % len(_DASHES)]) for i, name in enumerate(names)}


@dataclass
class Panels:
    """A figure that has several panels, and one legend below them.

    Attributes:
        figure: matplotlib's figure.
        axes: The panels, row by row.
        columns: The number of panels in a row.
        count: The number of steps that the run logged.
        window: The number of logged steps in a running mean.
        intervals: Whether the 95 % intervals of running means are drawn.
        handles: The legend's symbols.
        labels: The legend's texts.
    """

    figure: Figure
    axes: list[Axes]
    columns: int
    count: int
    window: int
    intervals: bool = False
    handles: list[Any] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def entry(self, label: str, **line: Any) -> None:
        """Adds a line to the legend."""
        from matplotlib.lines import Line2D

        self.handles.append(Line2D([], [], **line))
        self.labels.append(short(label, 40))

    def patch(self, label: str, **patch: Any) -> None:
        """Adds a coloured area to the legend."""
        from matplotlib.patches import Patch

        self.handles.append(Patch(**patch))
        self.labels.append(label)

    def series(self, ax: Axes, steps: FloatArray, values: FloatArray, style: Style) -> None:
        """Draws the running mean of the values with its 95 % interval, and the values faintly behind it."""
        self.intervals = True
        interval(ax, steps, values, style, self.window)
        series(ax, steps, values, style, self.window)

    def finish(self, raw: bool = True) -> Figure:
        """Draws the legend and returns the figure. With ``raw``, the legend explains single steps and running means."""
        if raw and self.window > 1:
            thinned = ", thinned out" if self.count > MAX_POINTS else ""
            self.entry(f"single logged steps{thinned} (faint)", color=GREY, alpha=0.5, linewidth=0.8)
            self.entry(f"running mean over {self.window:,} of them", color=GREY, linewidth=1.8)
        if self.intervals and self.window > 1:
            self.patch("95 % interval of the running mean", color=GREY, alpha=0.25)
        if self.handles:
            self.figure.legend(
                self.handles,
                self.labels,
                loc="outside lower left",
                ncols=_legend_columns(self.labels),
                frameon=False,
                fontsize=9,
                handlelength=2.4,
                columnspacing=1.6,
            )
        return self.figure


def panels(
    titles: Sequence[str], *, steps: FloatArray | None = None, height: float = 2.1, columns: int | None = None
) -> Panels:
    """Makes a figure with a titled panel for each entry of ``titles``. If ``steps`` are given, they label the x axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = columns or {1: 1, 2: 2, 4: 2, 7: 4, 8: 4}.get(len(titles), 3)
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(WIDTH, rows * height + 0.8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(len(titles))]
    for i, (ax, title) in enumerate(zip(axes, titles, strict=True)):
        _style(ax, short(title, 100 // columns))
        if steps is not None:
            bottom = i + columns >= len(titles)
            step_axis(ax, steps, STEP_LABEL if bottom else None)
    count = 0 if steps is None else len(steps)
    return Panels(figure, axes, columns, count, smoothing_window(count))


def require_matplotlib() -> None:
    """Checks that matplotlib is there.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra that has it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "maestro-fast[report]"') from error


def series(ax: Axes, steps: FloatArray, values: FloatArray, style: Style, window: int, *, raw: bool = True) -> None:
    """Draws the running mean of the values. With ``raw``, the values themselves are drawn faintly behind it."""
    known = np.isfinite(values)
    kept = _decimated(np.flatnonzero(known))
    if window > 1 and raw:
        faint = 0.25 if len(kept) <= 200 else 0.14
        ax.plot(steps[kept], values[kept], color=style.colour, alpha=faint, linewidth=0.7)
    marker = {"marker": "o", "markersize": 4} if known.sum() <= 12 and raw else {}
    ax.plot(steps[kept], running_mean(values, window)[kept], **style.line(**marker))


def interval(ax: Axes, steps: FloatArray, values: FloatArray, style: Style, window: int) -> None:
    """Shades the 95 % interval of the running mean. Its noise is estimated from the differences of neighbouring steps.

    Half the variance of these differences is that of a step about its neighbours, so a trend does not count as noise.
    Nothing is drawn where no running mean is.
    """
    known = np.flatnonzero(np.isfinite(values))
    if window <= 1 or len(known) < 3:
        return
    kept = _decimated(known)
    variance = np.diff(values[known]).var() / 2
    centre, half = running_mean(values, window)[kept], 1.96 * np.sqrt(variance / _counts(values, window)[kept])
    ax.fill_between(steps[kept], centre - half, centre + half, color=style.colour, alpha=0.16, linewidth=0)


def band(ax: Axes, steps: FloatArray, mean: FloatArray, std: FloatArray, style: Style, window: int) -> None:
    """Shades an area from the running mean minus the standard deviation, also smoothed, to the mean plus it."""
    kept = _decimated(np.flatnonzero(np.isfinite(mean) & np.isfinite(std)))
    centre, spread = running_mean(mean, window)[kept], running_mean(std, window)[kept]
    x = steps[kept]
    if len(kept) == 1:  # An area needs two edges.
        x, centre, spread = x + np.array([-0.3, 0.3]), np.repeat(centre, 2), np.repeat(spread, 2)
    ax.fill_between(x, centre - spread, centre + spread, color=style.colour, alpha=0.16, linewidth=0)


def running_mean(values: FloatArray, window: int) -> FloatArray:
    """The centred mean over ``window`` entries. The window is shorter at the ends; NaN entries are skipped and stay."""
    if window <= 1 or not np.isfinite(values).any():
        return values
    known = np.isfinite(values)
    centre = values[known].mean()  # Values are centred before they are summed, which keeps rounding errors small.
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values - centre, 0.0))])
    low, high = _windows(len(values), window)
    return np.where(known, (sums[high] - sums[low]) / _counts(values, window) + centre, np.nan)


def _windows(count: int, window: int) -> tuple[np.ndarray[Any, np.dtype[np.intp]], ...]:
    """Where the window of each entry begins and ends."""
    index, half = np.arange(count), window // 2
    to_end = np.minimum(index, count - 1 - index)  # A lopsided window would bend a trend at its ends.
    reach = np.clip(to_end, half // 3, half)
    return np.maximum(index - reach, 0), np.minimum(index + reach + 1, count)


def _counts(values: FloatArray, window: int) -> FloatArray:
    """The number of finite entries in each window, at least 1."""
    sums = np.concatenate([[0], np.cumsum(np.isfinite(values))])
    low, high = _windows(len(values), window)
    counts: FloatArray = np.maximum(sums[high] - sums[low], 1.0)
    return counts


def smoothing_window(count: int) -> int:
    """The window of a running mean: an odd number of logged steps, about a fifteenth of the run; 1 below 12 steps."""
    return 1 if count < 12 else max(3, count // 30 * 2 + 1)


def short(text: str, limit: int) -> str:
    """Shortens a text to ``limit`` characters by leaving out its middle, and escapes matplotlib's maths sign."""
    text = " ".join(text.split())
    if len(text) > limit:
        text = text[: limit - limit // 2 - 1] + "…" + text[-(limit // 2) :]
    return text.replace("$", r"\$")


def thousands(value: float, _position: int | None = None) -> str:
    """Formats the tick labels of long runs, for example 20000 as 20k."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def step_axis(ax: Axes, steps: FloatArray, label: str | None, margin: float | None = None) -> None:
    """Lets the x axis run from the first step to the last, with ticks at whole steps."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    first, last = float(steps[0]), float(steps[-1])
    if margin is None:
        margin = 0.02 * (last - first) if last > first else 0.5
    ax.set_xlim(first - margin, last + margin)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(thousands))
    if label:
        ax.set_xlabel(label)


def hold(ax: Axes, low: float | None = None, high: float | None = None, *, least: float = 0.0) -> None:
    """Widens the y axis so that it holds ``low`` and ``high`` and is at least ``least`` high.

    An axis that fits the data alone blows the noise of a flat line up to its full height. If no line leaves the range
    from ``low`` to ``high``, the axis ends there, with a little room.
    """
    lines = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in ax.lines] or [np.zeros(0)])
    known = lines[np.isfinite(lines)]
    bottom, top = ax.get_ylim()
    ends_low = low is not None and (not known.size or known.min() >= low)
    ends_high = high is not None and (not known.size or known.max() <= high)
    bottom = bottom if low is None else low if ends_low else min(bottom, low)
    top = top if high is None else high if ends_high else max(top, high)
    room, more = 0.03 * (top - bottom), max(least - (top - bottom), 0.0)  # A line on the edge would not be seen.
    ax.set_ylim(bottom - (room if ends_low else more / 2), top + (room if ends_high else more / 2))


def _decimated(index: np.ndarray[Any, np.dtype[np.intp]]) -> np.ndarray[Any, np.dtype[np.intp]]:
    """At most ``MAX_POINTS`` of the indices, evenly spaced, with the first and the last."""
    if len(index) <= MAX_POINTS:
        return index
    return index[np.linspace(0, len(index) - 1, MAX_POINTS).round().astype(np.intp)]


def _style(ax: Axes, title: str) -> None:
    """Sets the title and the colours of a panel."""
    ax.set_title(title, fontsize=10, loc="left", color=INK, y=1.0)  # With a fixed y, matplotlib need not search one.
    ax.grid(axis="y", color="#E3E3E3", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#AAAAAA")
    ax.tick_params(labelsize=9, colors=INK, length=3)
    ax.xaxis.label.set_fontsize(9)
    ax.yaxis.label.set_fontsize(9)


def _legend_columns(labels: Sequence[str]) -> int:
    """The largest number of columns that fits, as every column is as wide as its longest entry."""
    for columns in range(min(len(labels), 6), 1, -1):
        # matplotlib fills the columns of a legend in this way.
        widths = [max(len(label) for label in column) for column in np.array_split(list(labels), columns)]
        if sum(widths) + 7 * columns <= 112:
            return columns
    return 1
