"""What is said of a suite: figures that agree with counts by hand, and verdicts that claim no more than they show."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from maestro_fast.evals.results import Result
from maestro_fast.evals.searches import search_tables
from maestro_fast.evals.standings import Standings, standings
from maestro_fast.evals.summary import all_tables, main_table, name_of, sentences, short_tables
from maestro_fast.reporting.tables import Table, format_table, markdown_table
from tests.evals.invented import FREE, READERS, SHARES, invented


@pytest.fixture(scope="module")
def found() -> Standings:
    return standings(invented(), others=("labelled",))


def utilities(arm: str, share: float) -> np.ndarray:
    seeds = {r.seed: r.utility for r in invented() if r.arm == arm and r.condition.get("share", share) == share}
    return np.array([seeds[seed] for seed in sorted(seeds)])


def rows_of(table: Table) -> dict[str, tuple]:
    return {str(row[0]): row[1:] for row in table.rows}


def test_each_share_is_a_condition_and_arms_without_labels_count_in_all(found: Standings) -> None:
    assert [standing.share for standing in found.each] == list(SHARES)
    assert all({row.arm for row in standing.rows} == {*FREE, *READERS} for standing in found.each)
    assert len({standing.row("equal").utility for standing in found.each}) == 1
    assert found.subject == "anchored_residual" and found.reference == "equal"


def test_the_figures_of_an_arm_are_those_of_scipy(found: Standings) -> None:
    standing = found.each[1]
    ours, equal = utilities("static", 0.05), utilities("equal", 0.05)
    row, test = standing.row("static"), standing.tests["equal"]["static"]
    assert row.utility.mean == pytest.approx(ours.mean()) and row.utility.n == 10
    assert test.difference.mean == pytest.approx((ours - equal).mean())
    assert test.p == pytest.approx(stats.ttest_rel(ours, equal).pvalue)
    p = [stats.ttest_rel(utilities(arm, 0.05), equal).pvalue for arm in standing.tests["equal"]]
    assert test.p_holm >= test.p and min(t.p_holm for t in standing.tests["equal"].values()) == pytest.approx(
        17 * min(p)
    )
    subject = standing.subject["static"]
    assert subject.difference.mean == pytest.approx((utilities("anchored_residual", 0.05) - ours).mean())
    assert standing.tests["labelled"]["static"].difference.mean == pytest.approx(
        (ours - utilities("labelled", 0.05)).mean()
    )


def test_tables_stand_in_the_order_of_utility_and_fit_the_terminal(found: Standings) -> None:
    table = main_table(found, found.each[0])
    means = [float(str(row[1]).split(" ")[0]) for row in table.rows]
    assert means == sorted(means, reverse=True) and len(means) == 18
    for table in all_tables(found):
        assert max(map(len, format_table(table).splitlines())) <= 100
    main = format_table(main_table(found, found.each[0])).splitlines()
    assert sum(line.startswith("arm ") for line in main) == 1, "it is not broken into two blocks"
    assert rows_of(main_table(found, found.each[0]))["labelled"][4] == "no evidence"


def test_what_holm_does_not_confirm_is_no_verdict(found: Standings) -> None:
    """At 2.5 % the interval of "global" leaves zero out, but one of 17 arms does so by chance more often than not."""
    test = found.each[0].tests["equal"]["global"]
    assert test.difference.low > 0 and test.p_holm > 0.05
    assert rows_of(main_table(found, found.each[0]))["global"][4] == "not by Holm"
    said = next(text for text in sentences(found) if "above equal" in text)
    assert "global at 5 %, 10 % and 25 %" in said and "anchored at every share" in said


def test_sentences_name_wins_losses_and_what_cannot_be_told(found: Standings) -> None:
    first, *rest = sentences(found)
    assert first.startswith("Strong, 80 steps: at 2.5 % labels anchored_residual beats static (+0.042 ± 0.016)")
    assert "is WORSE than router (an oracle, -0.095 ± 0.029) and static_oracle" in first
    assert "no evidence of benefit or harm against anchored (+0.003 ± 0.017)" in first
    assert any("MAESTRO as published (conductor) against equal: no evidence of benefit" in text for text in rest)
    assert any("no evidence of benefit over equal at any share: dvao, saw" in text for text in rest)
    assert any("WORSE than equal at one share of labels at least: single:richness" in text for text in rest)


def test_an_arm_that_helps_nowhere_is_said_to_help_nowhere() -> None:
    """The subject is equal weights and noise."""
    results = [r for r in invented() if r.arm in ("equal", "labelled")]
    noise = np.random.default_rng(0)
    results += [
        replace(r, arm="anchored_residual", condition={**r.condition, "share": share}, utility=r.utility + gap)
        for r in results
        if r.arm == "equal"
        for share in SHARES
        for gap in [0.01 * noise.normal()]
    ]
    said = " ".join(sentences(standings(results)))
    assert "anchored_residual beats" not in said
    assert "no evidence of benefit over equal at any share: anchored_residual" in said
    assert "at 25 % labels anchored_residual is WORSE than labelled" in said


def test_one_seed_gives_no_interval_and_no_verdict() -> None:
    found = standings(invented(seeds=1))
    said = sentences(found)
    assert any("without an interval against" in text for text in said)
    assert any("There is one seed for each arm, so there are no intervals" in text for text in said)
    assert not any("beats" in text or "WORSE" in text or "above equal" in text for text in said)
    assert all("±" not in str(cell) for row in main_table(found, found.each[0]).rows for cell in row)


def test_a_seed_without_a_utility_is_left_out_and_counted() -> None:
    few = [r for r in invented(shares=(0.1,)) if r.arm in ("equal", "saw", "labelled")]
    results = [replace(r, utility=math.nan) if (r.arm, r.seed) == ("saw", 3) else r for r in few]
    found = standings(results)
    row, test = found.each[0].row("saw"), found.each[0].tests["equal"]["saw"]
    kept = [seed != 3 for seed in range(1, 11)]
    assert (row.utility.n, row.lost, test.difference.n) == (9, 1, 9)
    assert row.utility.mean == pytest.approx(utilities("saw", 0.1)[kept].mean())
    assert rows_of(main_table(found, found.each[0]))["saw"][-1] == "9 of 10"
    assert any("left out of the figures: 1 of saw. That flatters" in text for text in sentences(found))
    more = [r for r in invented(shares=(0.05, 0.1)) if r.arm in ("equal", "labelled")]
    lost = {(0.05, 2), (0.05, 3), (0.1, 3)}
    more = [replace(r, utility=math.nan) if (r.condition.get("share"), r.seed) in lost else r for r in more]
    assert any("figures: up to 2 of labelled. That" in text for text in sentences(standings(more)))
    json.dumps(found.as_json(), allow_nan=False)


def test_arms_with_different_seeds_are_compared_over_those_that_both_have() -> None:
    few = [r for r in invented(shares=(0.1,)) if r.arm in ("equal", "saw", "labelled")]
    results = [r for r in few if r.arm != "saw" or r.seed > 4]
    found = standings(results)
    test = found.each[0].tests["equal"]["saw"]
    assert test.difference.mean == pytest.approx((utilities("saw", 0.1) - utilities("equal", 0.1))[4:].mean())
    assert any("do not all have the same number of seeds" in text for text in sentences(found))


def test_unknown_arms_and_no_results_are_named() -> None:
    with pytest.raises(ValueError, match=r"^reference: 'mine' has no results, expected one of equal, random"):
        standings(invented(seeds=1), reference="mine")
    with pytest.raises(ValueError, match=r"^others: 'mine'"):
        standings(invented(seeds=1), others=("equal", "mine"))
    with pytest.raises(ValueError, match=r"^results: none"):
        standings([])
    assert standings([Result("a", 1, {}, 0.5), Result("b", 1, {}, 0.5)]).reference == "a"


def test_profiles_and_worlds_are_conditions_of_their_own() -> None:
    results = [
        Result("equal", 1, {"world": "mild", "profile": "gdpo", "split": "test"}, 0.5),
        Result("equal", 1, {"world": "mild", "profile": "rloo", "split": "test"}, 0.4),
        Result("anchored", 1, {"world": "mild", "profile": "rloo", "split": "test", "share": 0.05}, 0.6),
    ]
    found = standings(results)
    assert [name_of(standing.condition) for standing in found.each] == ["mild, gdpo", "mild, rloo, 5 % labels"]
    assert [len(standing.rows) for standing in found.each] == [1, 2]
    assert [len(table.rows) for table in short_tables(found)] == [1, 2]


def test_diagnostics_go_from_the_first_value_to_the_last() -> None:
    results = [
        Result("a", seed, {}, 0.5, figures={"kept_step": 10.0 * seed}, history={"entropy": history})
        for seed, history in ((1, [(0, 1.6), (10, 1.0)]), (2, [(0, None), (5, 1.2), (10, 0.8)]))
    ]
    (table,) = [table for table in all_tables(standings(results)) if table.caption.startswith("Diagnostics")]
    assert table.header == ("arm", "entropy", "kept step")
    assert table.rows == (("a", "1.4 to 0.9", "15"),)


def test_a_search_is_reported_whole() -> None:
    suite = {
        "validation_seeds": 2,
        "tried": [
            {"steps": 80, "weighting": 0, "values": {"a": 0.5, "b": 0.5}, "utility": 0.3, "labelled_utility/0.05": 0.2},
            {
                "steps": 80,
                "weighting": 1,
                "values": {"a": 1.0, "b": 0.0},
                "utility": 0.4,
                "labelled_utility/0.05": None,
            },
        ],
        "taken": [
            {"arm": "static", "steps": 80, "share": 0.05, "weighting": 0},
            {"arm": "static_oracle", "steps": 80, "weighting": 1},
        ],
    }
    (table,) = search_tables(suite)
    assert table.header == ("weights", "steps", "utility", "labels 5 %", "taken by")
    assert table.rows == (("a 0.5, b 0.5", 80, 0.3, 0.2, "static at 5 %"), ("a 1", 80, 0.4, None, "static_oracle"))
    worlds = {
        "rewards": ["a", "b"],
        "settings": {
            "saw": {"tried": [{"lr": 0.1, "utility": 0.3}, {"lr": 0.2, "utility": 0.4}], "taken": {"lr": 0.2}}
        },
        "static": {"mild": {"tried": [{"values": [0.5, 0.5], "utility": 0.1}], "taken": {"static at 0.05": 0}}},
    }
    settings, static = search_tables(worlds)
    assert settings.rows == (("saw", "lr 0.1", 0.3, None), ("saw", "lr 0.2", 0.4, "yes"))
    assert static.rows == (("a 0.5, b 0.5", 0.1, "static at 5 %"),)


def test_a_table_in_markdown_has_the_cells_of_the_terminal() -> None:
    table = Table("Caption", ("arm", "a|b"), (("x", 0.25), ("y", None)))
    assert markdown_table(table).splitlines() == [
        "Caption",
        "",
        r"| arm | a\|b |",
        "| --- | ---: |",
        "| x | 0.250 |",
        "| y | - |",
    ]
