from __future__ import annotations

import builtins
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from maestro_fast.reporting import figure, plots
from maestro_fast.reporting.history import History
from maestro_fast.reporting.json_lines import iter_jsonl
from maestro_fast.reporting.stage_times import stage_seconds, stage_times

PLOTS: dict[str, Callable[[History], Figure]] = {
    "family_weights": plots.family_weights,
    "rewards": plots.rewards,
    "family_rewards": plots.family_rewards,
    "advantages": plots.advantages,
    "response_length": plots.response_length,
    "conductor": plots.conductor,
    "policy": plots.policy,
    "advantage_shares": plots.advantage_shares,
    "diagnostics": plots.diagnostics,
}


@pytest.fixture(scope="module")
def history(run_dir: Path) -> History:
    return History.of(iter_jsonl(run_dir / "metrics.jsonl"))


@pytest.fixture(scope="module")
def timings(run_dir: Path) -> History:
    return History.of(iter_jsonl(run_dir / "timings.jsonl"))


def labels_of(fig: Figure) -> tuple[set[str], set[str]]:
    return ({ax.get_xlabel() for ax in fig.axes}, {ax.get_ylabel() for ax in fig.axes})


def legend(fig: Figure) -> dict[str, str]:
    """Maps the labels of the legend to their colours."""
    (box,) = fig.legends
    handles = (box.get_lines() + box.get_patches()) if box else []
    by_label = dict(zip((t.get_text() for t in box.get_texts()), box.legend_handles, strict=True))
    assert len(handles) == len(by_label)
    return {label: to_hex(h.get_color()) for label, h in by_label.items() if hasattr(h, "get_color")}


def test_utility_on_held_out_prompts_has_a_panel_of_its_own() -> None:
    lines = [
        {"step": step, "rewards/tone/mean": 0.1, "eval_rewards/tone/mean": 0.2}
        | ({"anchor/utility": 0.3} if step != 2 else {})
        | ({"eval_utility": step / 10} if step == 3 else {})
        for step in (1, 2, 3)
    ]
    tone, utility = plots.evaluation(History.of(lines)).axes
    assert (tone.get_title("left"), utility.get_title("left")) == ("tone", "utility")
    training, held_out = utility.lines
    assert list(held_out.get_xdata()) == [3] and list(held_out.get_ydata()) == [0.3]
    assert list(training.get_xdata()) == [1, 3]


@pytest.mark.parametrize("name", PLOTS)
def test_every_axis_has_a_label_with_a_unit(name: str, history: History) -> None:
    fig = PLOTS[name](history)
    axes = fig.axes
    columns = axes[0].get_gridspec().ncols
    for index, ax in enumerate(axes):
        if index + columns >= len(axes):
            assert ax.get_xlabel() == "step (optimiser updates)"
        if index % columns == 0 or name in ("advantages", "response_length", "conductor", "policy"):
            assert re.search(r"\(.+\)", ax.get_ylabel()), ax.get_title(loc="left")


def test_stage_times_have_labels_with_units(timings: History) -> None:
    left, right = stage_times(timings).axes
    assert (left.get_xlabel(), left.get_ylabel()) == ("step (optimiser updates)", "time (seconds per batch)")
    assert right.get_xlabel().startswith("share of the time (%)")
    assert "weight_sync" in [tick.get_text() for tick in right.get_yticklabels()]


def test_a_reward_keeps_its_colour_everywhere(history: History) -> None:
    weights = legend(plots.family_weights(history))
    panels = {ax.get_title(loc="left").split(" (")[0]: ax for ax in plots.rewards(history).axes}
    for name in history.rewards:
        assert to_hex(panels[name].lines[-1].get_color()) == weights[name]
    assert len({weights[name] for name in history.rewards}) == 5


def test_a_family_keeps_its_colour_everywhere(history: History) -> None:
    rewards, lengths = legend(plots.family_rewards(history)), legend(plots.response_length(history))
    assert {f: rewards[f] for f in history.families} == {f: lengths[f] for f in history.families}


def test_lines_show_the_weights_and_the_equal_ones(history: History) -> None:
    fig = plots.family_weights(history)
    ax = fig.axes[history.families.index("story")]
    drawn = [np.asarray(line.get_ydata()) for line in ax.lines]
    raw = history.get("families/story/weights/format")
    raw = raw[np.isfinite(raw)]
    assert any(len(y) == len(raw) and np.array_equal(y, raw) for y in drawn)
    assert any(np.array_equal(y, [0.2, 0.2]) for y in drawn)
    assert "equal weights, 1/5" in legend(fig)


def test_another_run_is_laid_over(history: History) -> None:
    other = History(history.steps[:10], {k: v[:10] for k, v in history.columns.items()})
    fig = plots.family_weights(history, {"shuffled": other})
    assert "shuffled" in legend(fig)
    assert len(fig.axes[0].lines) == len(plots.family_weights(history).axes[0].lines) + 5
    with pytest.raises(ValueError, match="at most 3"):
        plots.family_weights(history, dict.fromkeys("abcd", other))


def test_the_lines_of_another_run_stay_behind(history: History) -> None:
    lines = plots.family_weights(history, {"shuffled": history}).axes[0].lines
    dotted = [line for line in lines if line.get_alpha() == 0.6]
    assert len(dotted) == 5
    assert all(line.get_linewidth() < 1.8 for line in dotted)


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 1), (4, 2, 2), (6, 2, 3), (7, 2, 4), (8, 2, 4), (9, 3, 3)]
)
def test_panels_fill_their_rows(count: int, rows: int, columns: int) -> None:
    """Six rewards and their total are seven panels, in two rows of four instead of three rows of three."""
    drawn = figure.panels([str(i) for i in range(count)])
    grid = drawn.axes[0].get_gridspec()
    assert (grid.nrows, grid.ncols, drawn.columns) == (rows, columns, columns)


def test_the_band_is_one_standard_deviation(history: History) -> None:
    steps = History(history.steps[:5], {k: v[:5] for k, v in history.columns.items()})  # too few to smooth
    ax = plots.rewards(steps).axes[1]
    low, high = (ax.collections[0].get_paths()[0].vertices[:, 1].min(), ax.lines[0].get_ydata())
    assert low == pytest.approx((np.asarray(high) - steps.get("rewards/format/std")).min())


def test_abstentions_are_named(history: History) -> None:
    titles = [ax.get_title(loc="left") for ax in plots.rewards(history).axes]
    assert titles[:2] == ["perplexity (12% abstained)", "format"]


def test_the_token_limit_is_drawn(history: History) -> None:
    fig = plots.response_length(history, 256)
    assert "token limit, 256" in legend(fig)
    assert any(np.array_equal(line.get_ydata(), [256, 256]) for line in fig.axes[0].lines)


def test_the_healthy_band_of_self_flattery_is_drawn(history: History) -> None:
    ax = next(ax for ax in plots.conductor(history).axes if ax.get_title(loc="left") == "Self-flattery")
    box = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    assert (box.y0, box.y1) == pytest.approx((-0.05, 0.05))


@pytest.mark.parametrize("name", PLOTS)
def test_missing_keys_are_named(name: str) -> None:
    with pytest.raises(plots.MissingData, match="no line holds"):
        PLOTS[name](History.of([{"step": 1, "other": 1.0, "loss": None}]))


def test_stages_that_a_step_lacks_took_no_time_and_the_rest_is_shown() -> None:
    rows = [{"step": s, "odd": 1.0, "train": 2.0, "total": 4.0} for s in range(4)]
    seconds = stage_seconds(History.of([*rows, {"step": 4, "generate": 3.0, "total": 3.0}]))
    assert list(seconds) == ["generate", "train", "odd", "outside the stages"]
    assert [values.tolist() for values in seconds.values()] == [
        [0, 0, 0, 0, 3.0],
        [2.0] * 4 + [0],
        [1.0] * 4 + [0],
        [1.0] * 4 + [0],
    ]
    with pytest.raises(plots.MissingData, match="a stage"):
        stage_times(History.of([{"step": 1, "total": 1.0}]))


def test_a_towering_first_step_is_cut_off_and_left_out_of_the_means(timings: History) -> None:
    left, right = stage_times(timings).axes
    assert left.get_ylim()[1] < 10 < stage_seconds(timings)["generate"][0]
    assert [text.get_text() for text in left.texts] == ["step 0: 28.4 s, cut off"]
    assert "without step 0" in right.get_title(loc="left")
    assert max(bar.get_width() for bar in right.patches) == pytest.approx(51.5, abs=0.5)


def shown_ticks(axis: Axis) -> list[Text]:
    low, high = sorted(axis.get_view_interval())
    return [
        tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_visible()
    ]


def overlaps(fig: Figure) -> list[str]:
    """Finds texts that touch each other or leave the figure, and a legend that covers data."""
    fig.draw_without_rendering()
    texts = [t for ax in fig.axes for t in (ax.xaxis.label, ax.yaxis.label, *ax.texts, ax._left_title)]
    texts += [t for ax in fig.axes for t in (*shown_ticks(ax.xaxis), *shown_ticks(ax.yaxis))]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text()]
    boxes += [("legend", box.get_window_extent()) for box in fig.legends]
    page = fig.bbox.padded(1)
    faults = [
        name for name, b in boxes if not (page.x0 <= b.x0 < b.x1 <= page.x1 and page.y0 <= b.y0 < b.y1 <= page.y1)
    ]
    for i, (name, a) in enumerate(boxes):
        faults += [f"{name} on {other}" for other, b in boxes[i + 1 :] if a.overlaps(b)]
    areas = [box.get_window_extent() for box in fig.legends]
    return faults + ["legend on data" for area in areas for ax in fig.axes if area.overlaps(ax.get_window_extent())]


def long_named(steps: int) -> History:
    rewards = ["perplexity_under_the_reference", "$cost$ per token", "_hidden", *(f"reward {k}" for k in range(5))]
    families = [f"family number {f} of a name that is too long for its panel" for f in range(8)]
    keys = [f"families/{f}/{what}/{k}" for f in families for what in ("weights", "rewards") for k in rewards]
    keys += [f"rewards/{k}/mean" for k in rewards] + [f"families/{f}/completion_length" for f in families]
    values = np.random.default_rng(0).random((len(keys), steps))
    return History(1.0 + np.arange(steps), dict(zip(keys, values, strict=True)))


@pytest.mark.parametrize("name", ["family_weights", "rewards", "response_length"])
def test_eight_families_and_rewards_with_long_names_fit(name: str) -> None:
    assert overlaps(PLOTS[name](long_named(30))) == []


@pytest.mark.parametrize("name", ["advantages", "conductor", "policy", "advantage_shares", "diagnostics"])
def test_the_other_plots_fit(name: str, history: History) -> None:
    assert overlaps(PLOTS[name](history)) == []


def test_stage_times_fit(timings: History) -> None:
    assert overlaps(stage_times(timings)) == []


def test_a_hundred_thousand_steps_are_thinned_out() -> None:
    steps = np.arange(100_000.0)
    fig = plots.policy(History(steps, {"loss": np.sin(steps)}))
    assert all(len(line.get_xdata()) <= 1000 for line in fig.axes[0].lines)
    assert max(line.get_xdata()[-1] for line in fig.axes[0].lines) == steps[-1]
    fig.draw_without_rendering()
    assert "50k" in [tick.get_text() for tick in fig.axes[0].get_xticklabels()]


def test_the_weights_axis_holds_the_equal_line_and_no_tiny_range() -> None:
    def bounds(*values: float) -> tuple[float, float]:
        line = {f"families/x/weights/{name}": value for name, value in zip("abcd", values, strict=True)}
        (ax,) = plots.family_weights(History.of({"step": step, **line} for step in (1, 2, 3))).axes
        low, high = ax.get_ylim()
        return float(low), float(high)

    low, high = bounds(0.2501, 0.2499, 0.25, 0.25)
    assert -0.05 < low < 0 and 0.5 < high < 0.55
    assert bounds(0.26, 0.24, 0.25, 0.25) == (low, high)
    assert bounds(0.9, 0.1, 0.0, 0.0)[1] > 0.9
    assert bounds(1.2, -0.2, 0.0, 0.0)[0] < -0.2


def test_a_held_axis_ends_at_its_bounds_unless_a_line_leaves_them() -> None:
    def bounds(values: list[float], **held: float) -> tuple[float, float]:
        (ax,) = figure.panels(["a"]).axes
        ax.plot(values)
        figure.hold(ax, **held)
        low, high = ax.get_ylim()
        return float(low), float(high)

    assert bounds([0.0, 0.4], low=0.0, high=1.0) == pytest.approx((-0.03, 1.03))
    low, high = bounds([-2.0, 3.0], low=0.0, high=1.0)
    assert low <= -2.0 and high >= 3.0
    low, high = bounds([5.0, 5.001], least=2.0)
    assert high - low == pytest.approx(2.0) and low < 5.0 < high


def test_the_interval_of_the_running_mean_leaves_the_trend_out() -> None:
    steps = np.arange(300.0)
    values = 5 * steps + np.tile([1.0, -1.0, -1.0, 1.0], 75)  # noise of variance 1 on a trend
    (ax,) = figure.panels(["a"]).axes
    figure.interval(ax, steps, values, figure.PLAIN, 9)
    (area,) = ax.collections
    corners = np.asarray(area.get_paths()[0].vertices)
    assert np.ptp(corners[corners[:, 0] == 150.0, 1]) == pytest.approx(2 * 1.96 / 3, rel=0.01)
    figure.interval(ax, steps, values, figure.PLAIN, 1)
    assert len(ax.collections) == 1  # Without a running mean there is none.


def test_the_running_mean_by_hand() -> None:
    values = np.array([1.0, 2.0, np.nan, 6.0, 4.0, 2.0, 9.0])
    np.testing.assert_allclose(
        figure.running_mean(values, 3), [1.0, 1.5, np.nan, 5.0, 4.0, 5.0, 9.0]
    )  # At the ends the window is shorter, and the gap stays a gap.
    line = np.arange(100.0)
    np.testing.assert_allclose(figure.running_mean(line, 5)[2:-2], line[2:-2])
    assert [figure.smoothing_window(n) for n in (1, 11, 12, 60, 800)] == [1, 1, 3, 5, 53]


def test_names_are_cut_in_the_middle_and_hold_no_mathematics() -> None:
    assert figure.short("abcdefghij", 10) == "abcdefghij"
    assert figure.short("abcdefghijk", 10) == "abcd…ghijk"
    assert figure.short("a$b$", 10) == r"a\$b\$"


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, history: History) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "maestro-fast\[report\]"'):
        plots.rewards(history)


def test_pyplot_is_left_alone(history: History) -> None:
    import sys

    plots.rewards(history)
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("more", "title"), [({"score_std": 0.5}, "weighted sum of rewards"), ({}, "mean score")], ids=["today", "0.1"]
)
def test_the_total_says_what_it_shows(more: dict[str, float], title: str) -> None:
    """Version 0.1 logged the mean of the scores as ``reward``."""
    line = {"rewards/a/mean": 0.5, "rewards/a/std": 0.1, "reward": 0.2, "reward_std": 0.1, **more}
    figure = plots.rewards(History.of({"step": step, **line} for step in (1, 2, 3)))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["a", title]
