"""The files that a suite leaves, and its figures."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from maestro_fast.evals import figures
from maestro_fast.evals.figures import arm_styles, differences, over_share, pictures, utility_over_time
from maestro_fast.evals.page import ARMS_FILE, as_text, read_arms, write_summary
from maestro_fast.evals.results import Result
from maestro_fast.evals.standings import Standings, standings
from maestro_fast.reporting.tables import Table
from tests.evals.invented import FREE, invented

ARMS = ("equal", "static_oracle", "conductor", "labelled", "anchored_residual")
RESULTS = [r for r in invented(shares=(0.05, 0.1)) if r.arm in ARMS]


@pytest.fixture(scope="module")
def found() -> Standings:
    return standings(RESULTS)


class Page(HTMLParser):
    """The texts and tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_whole_and_needs_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "DPI", 40)
    results = [r for r in RESULTS if r.arm in ("equal", "static_oracle", "anchored_residual")]
    found = standings(results)
    path = write_summary(found, results, tmp_path, title="Suite <mine>", tables=[Table("First", ("a",), (("b & c",),))])
    page = Page(path.read_text())
    sources = [values["src"] for tag, values in page.tags if tag == "img"]

    assert len(sources) == 4 and all(str(source).startswith("data:image/png;base64,") for source in sources)
    assert not [values for _, values in page.tags for name in ("href", "src") if "://" in str(values.get(name))]
    assert {"script", "link"}.isdisjoint(tag for tag, _ in page.tags)
    assert "Suite <mine>" in page.texts and "b & c" in page.texts
    gap = found.each[0].tests["equal"]["static_oracle"].difference
    assert f"{gap.mean:+.3f} ± {gap.half_width:.3f}" in page.texts
    markdown = (tmp_path / "summary.md").read_text()
    assert markdown.startswith("# Suite <mine>\n") and "| static_oracle |" in markdown
    assert all((tmp_path / name).exists() for name in ("differences.png", "utility_over_share.png"))

    summary = json.loads((tmp_path / "summary.json").read_text())
    arm = next(one for one in summary["conditions"][0]["arms"] if one["arm"] == "static_oracle")
    assert arm["minus"]["equal"]["mean"] == gap.mean and arm["minus"]["equal"]["n"] == 10
    again = read_arms(tmp_path)
    assert [one.as_json() for one in again] == [json.loads(json.dumps(one.as_json())) for one in results]
    few = [replace(one, history={}) for one in RESULTS[:3]]
    write_summary(standings(few), few, tmp_path, title="Again")
    assert len((tmp_path / ARMS_FILE).read_text().splitlines()) == 3


def test_lines_over_shares_have_the_means_of_the_arms(found: Standings) -> None:
    figure = over_share(found, found.each, arm_styles(found))
    left, right = figure.axes
    means = [standing.row("labelled").utility.mean for standing in found.each]
    assert any(np.allclose(line.get_ydata(), means) for line in left.lines)
    gaps = [standing.tests["equal"]["labelled"].difference.mean for standing in found.each]
    assert any(np.allclose(line.get_ydata(), gaps) for line in right.lines)
    assert list(left.lines[0].get_xdata()) == [0.05, 0.1] and left.get_xscale() == "log"
    named = {text.get_text(): text.get_position()[1] for text in left.texts}
    assert set(named) == {"equal", "static_oracle", "conductor"}
    assert "n = 10" in left.get_title(loc="left") and "n = 10" in right.get_title(loc="left")


def test_names_of_levels_do_not_overlap() -> None:
    """All 12 arms without labels have names, at least a line of text apart, in the order of their levels."""
    found = standings(invented())
    left = over_share(found, found.each, arm_styles(found)).axes[0]
    heights = [text.get_position()[1] for text in left.texts]
    low, high = left.get_ylim()
    assert len(heights) == len(FREE)
    assert min(np.diff(heights)) > 0.03 * (high - low)
    assert low <= min(heights) and max(heights) <= high
    names = [text.get_text() for text in left.texts]
    assert names == sorted(names, key=lambda arm: found.each[0].row(arm).utility.mean)


def test_bars_are_coloured_where_holm_agrees(found: Standings) -> None:
    first = differences(found, found.each).axes[0]
    names = [label.get_text() for label in first.get_yticklabels()]
    widths = dict(zip(names, (bar.get_width() for bar in first.patches), strict=True))
    colours = dict(zip(names, (bar.get_facecolor()[:3] for bar in first.patches), strict=True))
    tests = found.each[0].tests["equal"]
    assert widths == pytest.approx({arm: test.difference.mean for arm, test in tests.items()})
    assert tests["static_oracle"].holds and not tests["conductor"].holds
    assert colours["conductor"] == pytest.approx((0xBB / 255,) * 3) and colours["static_oracle"][2] > 0.6


def test_curves_are_means_over_the_seeds_at_common_steps() -> None:
    results = [
        Result("equal", 1, {}, 0.2, history={"utility": [(0, 0.1), (5, 0.3), (10, 0.2)]}),
        Result("equal", 2, {}, 0.4, history={"utility": [(0, 0.3), (10, 0.4), (12, 0.9)]}),
    ]
    found = standings(results)
    (ax,) = utility_over_time(found, found.each[0], arm_styles(found)).axes
    assert [list(ax.lines[0].get_xdata()), list(ax.lines[0].get_ydata())] == [[0, 10], pytest.approx([0.2, 0.3])]


def test_what_is_not_there_is_not_drawn() -> None:
    found = standings([Result("a", 1, {}, 0.5), Result("b", 1, {}, float("nan"))])
    assert [picture.name for picture in pictures(found)] == []
    assert "There is one seed for each arm" in as_text(found)
