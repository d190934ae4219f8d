from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.layout_engine import ConstrainedLayoutEngine

from maestro_fast.reporting import Table, family_spread, printed_verdict, read_jsonl, report, write_report
from maestro_fast.reporting.history import History
from maestro_fast.reporting.json_lines import JsonLines

SCRIPT = "<script>alert('x')</script><img src=http://x.example/a.png>"
PICTURES = {
    "weights_by_family",
    "rewards",
    "rewards_by_family",
    "evaluation",
    "advantages",
    "response_length",
    "stage_times",
    "advantage_shares",
    "diagnostics",
    "conductor",
    "policy",
}


@pytest.fixture(scope="module", autouse=True)
def coarse_pictures() -> Iterator[None]:
    """Pictures are coarse and have no layout, since that is slow; test_plots checks the layout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "DPI", 40)
        patch.setattr(ConstrainedLayoutEngine, "execute", lambda engine, figure: None)
        yield


@pytest.fixture(scope="module")
def page(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The full report of a run whose every text holds markup."""
    copy = tmp_path_factory.mktemp("module") / "hostile"
    copy.mkdir()
    for name in ("metrics.jsonl", "timings.jsonl"):
        (copy / name).write_bytes((run_dir / name).read_bytes())
    (copy / "config.yaml").write_text(f"name: {SCRIPT}\nmax_completion_length: 256\n")
    rollouts = read_jsonl(run_dir / "rollouts.jsonl")
    changes = {"completion": SCRIPT + "y" * 3000, "family": SCRIPT}
    JsonLines(copy / "rollouts.jsonl").append(
        *({**row, **changes, "prompt": SCRIPT + row["prompt"]} for row in rollouts)
    )
    path = write_report(
        copy,
        title=f"Title {SCRIPT}",
        summary=["It did not help.", SCRIPT],
        tables=[
            family_spread(read_jsonl(run_dir / "metrics.jsonl")).table(),
            Table(f"Caption {SCRIPT}", ("method", SCRIPT), (("equal", 0.54), (SCRIPT, 0.61))),
        ],
        compare={f"shuffled {SCRIPT}": run_dir},
    )
    return Page(path)


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def ids(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.tags if "id" in attributes}


def test_the_page_holds_every_plot_and_section(page: Page) -> None:
    sections = {"summary", "verdict", "tables", "samples", "configuration", "versions"}
    assert page.ids() == PICTURES | sections
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert links == {f"#{name}" for name in page.ids()}
    assert "It did not help." in page.text
    seconds = sum(row["total"] for row in read_jsonl(page.path.parents[1] / "timings.jsonl"))
    assert f"60 logged steps, up to step 60, in {report._duration(seconds)}." in page.text
    saved = "Shared prompts saved 75% of the forwards' tokens: 90,000 computed for 360,000 in the sequences."
    assert saved in page.text
    assert "maestro-fast" in page.text[page.text.index("Where this page was written") :]


def test_the_page_says_what_dynamic_sampling_cost() -> None:
    costs = (
        {"no_signal": 0.5, "refills": 2.0, "extra_tokens": 3000.0},
        {"no_signal": 0, "refills": 1, "extra_tokens": 1},
    )
    rows = [{"step": i + 1} | {f"dynamic_sampling/{name}": x for name, x in c.items()} for i, c in enumerate(costs)]
    _, said = report._facts(History.of(rows), None)
    assert said == (
        "Dynamic sampling: 25% of the groups had no signal at first; each batch was refilled 1.5 times on average, for "
        "1,500 more sampled tokens."
    )


def test_pictures_lie_beside_the_page_and_in_it(page: Page) -> None:
    assert page.path.name == "report.html"
    assert {path.stem for path in page.path.parent.glob("*.png")} == PICTURES
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    embedded = {base64.b64decode(src.removeprefix("data:image/png;base64,")) for src in sources}
    assert embedded == {path.read_bytes() for path in page.path.parent.glob("*.png")}


def test_the_page_loads_nothing_and_runs_nothing(page: Page) -> None:
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.tags:
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    style = re.search(r"<style>(.*?)</style>", page.source, re.S)
    assert style and not re.search(r"url\(|@import|http", style[1])


def test_markup_in_any_text_is_shown_not_obeyed(page: Page) -> None:
    assert "<script" not in page.source
    assert "<img src=http" not in page.source
    shown = page.text.count("<script>alert('x')</script>")
    # It is in the title twice, in summary, table and configuration, and in prompts, completions, families of 8 pairs.
    assert shown >= 5 + 8 * 4


def test_long_responses_are_cut_and_the_page_says_so(page: Page) -> None:
    assert "y" * 2001 not in page.source
    assert f"({len(SCRIPT) + 3000 - 2000} more characters)" in page.text


def test_tables_are_shown_with_numbers_at_the_right(page: Page) -> None:
    assert '<td class="number">0.610</td>' in page.source
    # The report makes the table that was also handed in, but it is shown only once.
    assert page.text.count("std over families") == 1
    assert "Between-family spread of the weights, against the other runs" in page.text


def test_the_verdict_stands_before_the_plots_that_it_points_to(page: Page) -> None:
    assert "Rose: perplexity" in page.text
    verdict = page.source[page.source.index('id="verdict"') : page.source.index('id="tables"')]
    targets = set(re.findall(r'href="#(\w+)"', verdict))
    assert {"rewards", "evaluation", "response_length", "policy"} <= targets <= PICTURES
    assert verdict.index("To look at next") < verdict.index("self_flattery ended at") < verdict.index("The rest")


def test_alarms_and_the_policy_reach_the_verdict(tmp_path: Path) -> None:
    rows = [{"step": s, "kl": 1.0, "rewards/a/mean": 0.5, "rewards/b/mean": 0.5} for s in (1, 2)]
    JsonLines(tmp_path / "metrics.jsonl").append(*(row | {"weights/a": 0.5, "weights/b": 0.5} for row in rows))
    (tmp_path / "config.yaml").write_text("weights: {type: equal}\n")
    alarm = {"step": 2, "metric": "kl", "value": 1.0, "bound": 0.5, "action": "stop", "condition": "kl above 0.5"}
    JsonLines(tmp_path / "alarms.jsonl").append(alarm)
    printed = printed_verdict(tmp_path).splitlines()
    assert printed[0].startswith("2 logged steps are too few")
    assert printed[-1] == "1. An alarm rang at step 2: kl was 1 (kl above 0.5). It ended the run."
    page = Page(write_report(tmp_path)).text
    assert "It ended the run." in page and "The weights were equal by configuration." in page


def test_a_run_of_one_step(make_run: Callable[..., Path]) -> None:
    page = Page(write_report(make_run("Erster Lauf", steps=1, families=("story",), rewards=("length",))))
    assert "Training run Erster Lauf" in page.text
    assert "1 logged step, up to step 1" in page.text
    assert page.ids() >= PICTURES - {"evaluation"}
    assert "No later response" in page.text


def test_what_is_not_there_is_left_out_and_named(tmp_path: Path) -> None:
    JsonLines(tmp_path / "metrics.jsonl").append({"step": 1, "loss": 0.5}, {"step": 2, "loss": None})
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "rewards.png").write_bytes(b"of an earlier report")
    page = Page(write_report(tmp_path))
    assert [path.stem for path in (tmp_path / "report").glob("*.png")] == ["policy"]
    left_out = page.text[page.text.index("Left out\n") :]
    for reason in (
        "Reward weights by task family: no line holds families/<family>/weights/<name>.",
        "Rewards: no line holds rewards/<name>/mean.",
        "Advantages: no line holds advantages/std or advantages/abs_mean or frac_reward_zero_std.",
        "Time per stage: there is no timings.jsonl, or nothing in it.",
        "Sample responses: there is no rollouts.jsonl, or nothing in it.",
        "Configuration: there is no config.yaml.",
    ):
        assert reason in left_out


def test_a_missing_file_is_named(tmp_path: Path, run_dir: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/metrics\.jsonl: there is no such run directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl: there is no metrics\.jsonl"):
        write_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="control"):
        write_report(run_dir, compare={"control": tmp_path / "control"})
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"metrics\.jsonl: holds no lines"):
        write_report(tmp_path)


def test_more_than_three_other_runs_are_refused(run_dir: Path) -> None:
    with pytest.raises(ValueError, match="compare: got 4 runs, expected at most 3"):
        write_report(run_dir, compare=dict.fromkeys("abcd", run_dir))


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ("max_completion_length: 64", 64),
        ("a:\n  b:\n    max_completion_length: 32\n", 32),
        ("loss: {max_completion_length: 9}\nsampling: {max_new_tokens: 40}\n", 40),
        ("max_completion_length: null", None),
        ("other: 1", None),
        ("not: [yaml", None),
        (None, None),
    ],
)
def test_the_token_limit_is_found_in_the_configuration(config: str | None, limit: Any) -> None:
    assert report.token_limit(config) == limit


@pytest.mark.parametrize(("seconds", "text"), [(3.14, "3.1 s"), (61, "1 min 1 s"), (3600 * 5 + 59, "5 h 0 min")])
def test_durations(seconds: float, text: str) -> None:
    assert report._duration(seconds) == text
