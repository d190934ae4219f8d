"""The plots of a run: each function draws a figure from the run's history. Stage times have their own page.

A reward or a task family has the same colour in every figure. Lines are running means, and the values of single steps
stand faintly behind them. Each function raises ``MissingData`` if the history lacks the keys that it draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from maestro_fast.reporting.figure import (
    FAMILY_COLOURS,
    GREY,
    INK,
    PLAIN,
    REWARD_COLOURS,
    SECOND,
    Panels,
    Style,
    band,
    hold,
    interval,
    panels,
    series,
    styles,
)
from maestro_fast.reporting.history import History
from maestro_fast.weighting.diagnostics import Range, healthy_ranges

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEALTHY = "#009E73"
DASHED = (0, (4, 3))
_OTHER_RUNS = ((1.0, 1.2), (3.0, 1.0, 1.0, 1.0), (1.0, 3.0))  # how the lines of the other runs are dotted
MAX_OTHERS = len(_OTHER_RUNS)


class MissingData(LookupError):
    """The history lacks the keys that a plot shows; the message names them."""


@dataclass(frozen=True)
class Curve:
    """A metric that gets its own panel.

    Attributes:
        key: Its name in the log.
        title: The title of the panel.
        label: The label of the y axis, with the unit.
        scale: A factor for its values.
        low, high: Values that the y axis holds, whatever the values are.
        least: The least height of the y axis.
    """

    key: str
    title: str
    label: str
    scale: float = 1.0
    low: float | None = None
    high: float | None = None
    least: float = 0.0


DIAGNOSTIC_CURVES = (
    Curve("diagnostics/self_flattery", "Self-flattery", "mean w · r (group std)"),
    Curve("diagnostics/argmax_agreement", "Heaviest is best", "share of responses", low=0.0),
    Curve("diagnostics/entropy", "Entropy of the weights", "entropy / ln K", low=0.0, high=1.0),
    Curve("diagnostics/between_prompts", "Between prompts", "share of weight variance", low=0.0, high=1.0),
    Curve("diagnostics/pareto_inversions", "Pareto inversions", "share of pairs", low=0.0),
    Curve("rewards_correlation/min", "Most opposed pair", "correlation", low=-1.0, high=1.0),
    Curve("conductor/gradient_snr", "Meta-gradient", "signal to noise", low=0.0),
    Curve("conductor/residual_share", "Residual's share", "share of the scores' variance", low=0.0, high=1.0),
    Curve("diagnostics/family_spread", "Between families", "spread of weights", low=0.0, high=0.05),
    Curve("anchor/utility", "Known utility", "utility (its own units)"),
    Curve("guard/utility", "Held-back utility", "utility (its own units)"),
)
CONDUCTOR_CURVES = (
    Curve("conductor/entropy", "Entropy of the weights", "entropy (nats)", low=0.0),
    Curve("conductor/self_flattery", "Self-flattery", "mean w · r (group std)"),
    Curve("conductor/objective", "Meta-objective", "objective (its own units)"),
    Curve("conductor/grad_norm", "Conductor gradient", "gradient (L2 norm)", low=0.0),
)
POLICY_CURVES = (
    Curve("loss", "Loss", "loss (objective units)", least=0.02),
    Curve("grad_norm", "Gradient", "gradient (L2 norm)", low=0.0),
    Curve("entropy", "Token entropy", "entropy (nats per token)", low=0.0),
    Curve("kl", "Divergence from the reference", "KL (nats per token)", low=0.0, high=0.01),
    Curve("clip_ratio/low_mean", "Clipped at the lower bound", "share of tokens (%)", 100, low=0.0, high=1.0),
    Curve("clip_ratio/high_mean", "Clipped at the upper bound", "share of tokens (%)", 100, low=0.0, high=1.0),
)


def family_weights(history: History, others: Mapping[str, History] | None = None) -> Figure:
    """The expected weights over time, with a panel for each task family and a line for each reward.

    ``others`` maps labels to up to three other runs, whose weights are drawn dotted in the same panels.
    """
    others = others or {}
    if len(others) > MAX_OTHERS:
        raise ValueError(f"others: got {len(others)} runs, expected at most {MAX_OTHERS}")
    families, rewards = history.families, history.rewards
    keys = [f"families/{f}/weights/{k}" for f in families for k in rewards]
    _need(history, *keys, says="families/<family>/weights/<name>")
    style = styles(rewards, REWARD_COLOURS)
    figure = panels([family or "(no family)" for family in families], steps=history.steps)
    for ax, family in zip(figure.axes, families, strict=True):
        for other, dash in zip(others.values(), _OTHER_RUNS, strict=False):
            for name in rewards:
                line = Style(style[name].colour, dash, 1.1, alpha=0.6)  # thin and pale, so that this run stands out
                series(ax, other.steps, other.get(f"families/{family}/weights/{name}"), line, figure.window, raw=False)
        for name in rewards:
            series(ax, history.steps, history.get(f"families/{family}/weights/{name}"), style[name], figure.window)
        ax.axhline(1 / len(rewards), color=GREY, linestyle=DASHED, linewidth=1.0, zorder=1)
    _share_y(figure, "weight (sum is 1)", min(2 / len(rewards), 1.05))
    _entries(figure, style)
    figure.entry(f"equal weights, 1/{len(rewards)}", color=GREY, linestyle=DASHED, linewidth=1.0)
    for label, dash in zip(others, _OTHER_RUNS, strict=False):
        figure.entry(label, color=GREY, linestyle=(0, dash), linewidth=1.3)
    return figure.finish()


def rewards(history: History) -> Figure:
    """The mean of each reward and of their weighted sum over time, each in a band of one standard deviation."""
    names = [name for name in history.rewards if history.has(f"rewards/{name}/mean")]
    _need(history, *(f"rewards/{name}/mean" for name in names), says="rewards/<name>/mean")
    style = styles(history.rewards, REWARD_COLOURS)
    shown = [(_with_abstentions(history, n), f"rewards/{n}/mean", f"rewards/{n}/std", style[n]) for n in names]
    if history.has("reward"):
        # A run of version 0.1 logged the mean of the scores under this name, and has no score_std.
        title = "weighted sum of rewards" if history.has("score_std") else "mean score"
        shown.append((title, "reward", "reward_std", Style(INK)))
    figure = panels([title for title, *_ in shown], steps=history.steps)
    for ax, (_, mean, std, line) in zip(figure.axes, shown, strict=True):
        band(ax, history.steps, history.get(mean), history.get(std), line, figure.window)
        series(ax, history.steps, history.get(mean), line, figure.window)
    _label_left(figure, "reward (its own units)")
    figure.patch("± 1 standard deviation, as logged", color=GREY, alpha=0.25)
    return figure.finish()


def family_rewards(history: History) -> Figure:
    """The mean of each reward over time, with a panel for each reward and a line for each task family."""
    families = history.families
    names = [k for k in history.rewards if any(history.has(f"families/{f}/rewards/{k}") for f in families)]
    _need(
        history,
        *(f"families/{f}/rewards/{k}" for f in families for k in names),
        says="families/<family>/rewards/<name>",
    )
    style = styles(families, FAMILY_COLOURS)
    figure = panels(names, steps=history.steps)
    for ax, name in zip(figure.axes, names, strict=True):
        for family in families:
            line = style[family]
            series(ax, history.steps, history.get(f"families/{family}/rewards/{name}"), line, figure.window)
        hold(ax, least=_usual_std(history, name))
    _label_left(figure, "reward (its own units)")
    _entries(figure, style)
    return figure.finish()


def evaluation(history: History) -> Figure:
    """The mean of each reward on held-out prompts, a panel for each, with the mean in training behind it.

    If an anchor gives utilities, these have a panel too.
    """
    names = [name for name in history.rewards if history.has(f"eval_rewards/{name}/mean")]
    _need(history, *(f"eval_rewards/{name}/mean" for name in names), says="eval_rewards/<name>/mean")
    style = styles(history.rewards, REWARD_COLOURS)
    shown = [(name, f"rewards/{name}/mean", f"eval_rewards/{name}/mean", style[name]) for name in names]
    if history.has("eval_utility"):
        shown.append(("utility", "anchor/utility", "eval_utility", Style(INK)))
    figure = panels([title for title, *_ in shown], steps=history.steps)
    for ax, (name, training, key, line) in zip(figure.axes, shown, strict=True):
        interval(ax, history.steps, history.get(training), Style(GREY), figure.window)
        series(ax, history.steps, history.get(training), Style(GREY), figure.window, raw=False)
        held_out = history.get(key)
        known = np.isfinite(held_out)
        ax.plot(history.steps[known], held_out[known], **line.line(marker="o", markersize=4))
        hold(ax, least=_usual_std(history, name))
    _label_left(figure, "reward (its own units)")
    figure.entry("held-out prompts", color=INK, marker="o", markersize=4, linewidth=1.8)
    smoothed = f" (mean over {figure.window:,} steps)" if figure.window > 1 else ""
    figure.entry(f"training prompts{smoothed}", color=GREY, linewidth=1.8)
    figure.intervals = True
    return figure.finish(raw=False)


def advantages(history: History) -> Figure:
    """The spread of the advantages, and the share of groups whose responses all score the same."""
    keys = {"advantages/std": PLAIN, "advantages/abs_mean": SECOND}
    _need(history, *keys, "frac_reward_zero_std")
    figure = panels(["Spread of the advantages", "Degenerate groups (no spread, no signal)"], steps=history.steps)
    spread, degenerate = figure.axes
    for key, style in keys.items():
        figure.series(spread, history.steps, history.get(key), style)
    figure.series(degenerate, history.steps, 100 * history.get("frac_reward_zero_std"), Style(INK))
    _from_zero(spread, "advantage (score units)")
    _from_zero(degenerate, "share of groups (%)", 5.0)
    figure.entry("standard deviation", **PLAIN.line())
    figure.entry("mean absolute value", **SECOND.line())
    return figure.finish()


def response_length(history: History, limit: int | None = None) -> Figure:
    """The mean length by task family with the token limit, and the share of responses that the limit cut off."""
    lengths = {f: f"families/{f}/completion_length" for f in history.families}
    _need(history, "completions/mean_length", *lengths.values(), says="completions/mean_length")
    titles = ["Response length", "Cut off by the token limit"]
    figure = panels(titles[: 1 + history.has("completions/clipped_ratio")], steps=history.steps, height=2.6)
    style = styles(history.families, FAMILY_COLOURS)
    for family, key in lengths.items():
        series(figure.axes[0], history.steps, history.get(key), style[family], figure.window)
    everything = Style(INK, width=2.4)
    figure.series(figure.axes[0], history.steps, history.get("completions/mean_length"), everything)
    if limit is not None:
        figure.axes[0].axhline(limit, color=GREY, linestyle=DASHED, linewidth=1.2)
    _from_zero(figure.axes[0], "mean length (tokens)")
    if len(figure.axes) > 1:
        clipped = 100 * history.get("completions/clipped_ratio")
        figure.series(figure.axes[1], history.steps, clipped, Style(INK))
        _from_zero(figure.axes[1], "share of responses (%)", 5.0)
    figure.entry("all responses", **everything.line())
    _entries(figure, {f: s for f, s in style.items() if history.has(lengths[f])})
    if limit is not None:
        figure.entry(f"token limit, {limit:,}", color=GREY, linestyle=DASHED, linewidth=1.2)
    return figure.finish()


def advantage_shares(history: History) -> Figure:
    """What each reward contributes to the advantage over time. There is a line for each; they add up to 100 %."""
    names = [name for name in history.rewards if history.has(f"advantage_share/{name}")]
    _need(history, *(f"advantage_share/{name}" for name in names), says="advantage_share/<name>")
    style = styles(history.rewards, REWARD_COLOURS)
    figure = panels(["Share of the advantage"], steps=history.steps)
    (ax,) = figure.axes
    for name in names:
        series(ax, history.steps, 100 * history.get(f"advantage_share/{name}"), style[name], figure.window)
        figure.entry(name, **style[name].line())
    ax.axhline(100 / len(names), color=GREY, linestyle=DASHED, linewidth=1.0, zorder=1)
    hold(ax, 0.0, min(200 / len(names), 100.0))
    figure.entry("equal shares", color=GREY, linestyle=DASHED, linewidth=1.0)
    ax.set_ylabel("share (%)")
    return figure.finish()


def diagnostics(history: History) -> Figure:
    """What the weights do, with a panel for each diagnostic that was logged. Its healthy range, if any, is green."""
    figure, shown = _curves(history, DIAGNOSTIC_CURVES, "diagnostics/*")
    ranges = healthy_ranges(history.rewards or ("",))
    for ax, curve in zip(figure.axes, shown, strict=True):
        if (healthy := ranges.get(curve.key)) is not None:
            _healthy_band(ax, healthy)
    figure.patch("healthy", color=HEALTHY, alpha=0.25)
    for ax, curve in zip(figure.axes, shown, strict=True):
        if curve.key == "diagnostics/family_spread":
            control = history.get("diagnostics/family_spread_shuffled")
            ax.plot(history.steps, control, color=GREY, linewidth=1.0, linestyle=DASHED)
            figure.entry("families shuffled", color=GREY, linewidth=1.0, linestyle=DASHED)
    return figure.finish()


def conductor(history: History) -> Figure:
    """What the Conductor logs of itself. Its entropy is at most ln K; its self-flattery has a healthy range."""
    figure, shown = _curves(history, CONDUCTOR_CURVES, "conductor/*")
    for ax, curve in zip(figure.axes, shown, strict=True):
        if curve.key == "conductor/entropy" and len(history.rewards) > 1:
            hold(ax, 0.0, math.log(len(history.rewards)))
            ax.axhline(math.log(len(history.rewards)), color=GREY, linestyle=DASHED, linewidth=1.0)
            figure.entry(f"equal weights, ln {len(history.rewards)}", color=GREY, linestyle=DASHED)
        if curve.key == "conductor/self_flattery":
            healthy = healthy_ranges(history.rewards or ("",))["diagnostics/self_flattery"]
            _healthy_band(ax, healthy)
            figure.patch(f"healthy, {healthy.low:g} to {healthy.high:g}", color=HEALTHY, alpha=0.25)
    return figure.finish()


def policy(history: History) -> Figure:
    """Loss, gradient, entropy, divergence and clipping of the policy update, as far as they were logged."""
    return _curves(history, POLICY_CURVES, "loss, grad_norm, entropy, kl, clip_ratio/*")[0].finish()


def _curves(history: History, curves: tuple[Curve, ...], says: str) -> tuple[Panels, list[Curve]]:
    """Draws a panel for each curve that was logged, and returns these curves in the order of their panels."""
    _need(history, *(curve.key for curve in curves), says=says)
    shown = [curve for curve in curves if history.has(curve.key)]
    figure = panels([curve.title for curve in shown], steps=history.steps)
    for ax, curve in zip(figure.axes, shown, strict=True):
        figure.series(ax, history.steps, curve.scale * history.get(curve.key), PLAIN)
        ax.set_ylabel(curve.label)
        hold(ax, curve.low, curve.high, least=curve.least)
    return figure, shown


def _healthy_band(ax: Axes, healthy: Range) -> None:
    """Shades the healthy range of a panel, and widens the panel so that the range and the line are both in sight."""
    low, high = ax.get_ylim()
    high = max(high, healthy.high if math.isfinite(healthy.high) else low + 1)
    room = 0.05 * (high - min(low, healthy.low))
    ax.axhspan(healthy.low, min(healthy.high, high), color=HEALTHY, alpha=0.16, linewidth=0, zorder=0)
    ax.set_ylim(low if healthy.low >= low else healthy.low - room, high + room)


def _need(history: History, *keys: str, says: str | None = None) -> None:
    """Raises ``MissingData`` unless at least one of the keys was logged; ``says`` replaces the keys in its message."""
    if not any(history.has(key) for key in keys):
        raise MissingData(f"no line holds {says or ' or '.join(keys)}")


def _with_abstentions(history: History, name: str) -> str:
    """The name of a reward, with the share of responses on which it abstained if that is 0.5 % or more."""
    abstained = history.get(f"rewards/{name}/abstained")
    share = float(np.nanmean(abstained)) if np.isfinite(abstained).any() else 0.0
    return f"{name} ({share:.0%} abstained)" if share >= 0.005 else name


def _entries(figure: Panels, style: Mapping[str, Style]) -> None:
    """Adds a line to the legend for each name."""
    for name, line in style.items():
        figure.entry(name or "(no family)", **line.line())


def _from_zero(ax: Axes, label: str, least: float = 0.0) -> None:
    """Labels the y axis, and lets it begin at 0, or hardly below it, and reach to ``least`` at least."""
    ax.set_ylabel(label)
    top = max(1.05 * ax.get_ylim()[1], least)
    ax.set_ylim(-0.02 * top, top)  # so that a line at 0 does not hide in the axis


def _usual_std(history: History, name: str) -> float:
    """The median of a reward's standard deviation over the responses of a batch; 0 if it was not logged."""
    spread = history.get(f"rewards/{name}/std")
    known = spread[np.isfinite(spread)]
    return float(np.median(known)) if known.size else 0.0


def _label_left(figure: Panels, label: str) -> None:
    """Labels the y axis of the panels in the leftmost column."""
    for ax in figure.axes[:: figure.columns]:
        ax.set_ylabel(label)


def _share_y(figure: Panels, label: str, least: float) -> None:
    """Gives all panels the same y axis, from 0 to ``least`` or beyond, with its numbers in the leftmost column only."""
    for ax in figure.axes:
        hold(ax, 0.0, least)
    bottom, top = (pick(ax.get_ylim()[end] for ax in figure.axes) for end, pick in ((0, min), (1, max)))
    for index, ax in enumerate(figure.axes):
        ax.set_ylim(bottom, top)
        ax.tick_params(labelleft=index % figure.columns == 0)
    _label_left(figure, label)
