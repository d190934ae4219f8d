"""Gates, masks and labels: rewards on some rows of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml

from maestro_fast.data.conditions import check_conditions
from maestro_fast.data.dataset import PromptDataset
from maestro_fast.ops import group_advantages
from maestro_fast.records import RewardBatch
from maestro_fast.rewards import FunctionReward, LabelsConfig, Where, build_anchor, build_rewards, gate
from maestro_fast.settings import SettingsError
from maestro_fast.weighting.fixed import Equal
from tests.rewards.conftest import MakeBatch

seen: list[list[str]] = []


def length(completions: list[str], **columns: Any) -> list[float]:
    seen.append(list(completions))
    return [float(len(text)) for text in completions]


async def slow_length(completions: list[str], **columns: Any) -> list[float]:
    return length(completions)


def good(completions: list[str], **columns: Any) -> list[float | None]:
    return [None if "?" in text else float(text.count("!")) for text in completions]


async def slow_good(completions: list[str], **columns: Any) -> list[float | None]:
    return good(completions)


TEXTS = ["a!", "bb", "ccc!!", "dd?"]
NAN = float("nan")


def values(reward: Any, batch: RewardBatch) -> list[float]:
    seen.clear()
    return build_rewards([reward])(batch)[:, 0].tolist()


@pytest.mark.parametrize("inner", [length, slow_length])
@pytest.mark.parametrize("on", [good, slow_good])
@pytest.mark.parametrize("closed", [None, -1.0])
def test_a_gate(make_batch: MakeBatch, inner: Any, on: Any, closed: float | None) -> None:
    gated = gate(FunctionReward(inner), on=FunctionReward(on), threshold=1, closed=closed)
    found = values(gated, make_batch(TEXTS))
    shut = NAN if closed is None else closed
    assert found == pytest.approx([2.0, shut, 5.0, shut], nan_ok=True)
    assert seen == [["a!", "ccc!!"]]  # nothing is computed for the others
    assert gated.name == inner.__name__


def test_a_gate_that_none_passes_calls_nothing(make_batch: MakeBatch) -> None:
    gated = gate(FunctionReward(length), on=FunctionReward(good), threshold=9)
    assert values(gated, make_batch(TEXTS)) == pytest.approx([NAN] * 4, nan_ok=True) and seen == []


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        ("reference", [True, False, True, False]),
        ({"family": "poem"}, [True, True, False, False]),
        ({"family": ["poem", "essay"], "hard": True}, [False, True, True, False]),
    ],
)
def test_a_mask(make_batch: MakeBatch, mask: Any, kept: list[bool]) -> None:
    columns = {
        "reference": ["x", "", "y", None],
        "family": ["poem", "poem", "essay", "code"],
        "hard": [False, True, True, True],
    }
    found = values(Where(FunctionReward(length), mask), make_batch(TEXTS, columns=columns))
    assert [value == value for value in found] == kept
    assert seen == [[text for text, keep in zip(TEXTS, kept, strict=True) if keep]]


def test_they_compose_and_abstentions_reach_the_advantages(make_batch: MakeBatch) -> None:
    entry = {
        "function": f"{__name__}:length",
        "gate": {"on": f"{__name__}:good", "threshold": 1},
        "where": {"family": "poem"},
    }
    batch = make_batch(TEXTS, columns={"family": ["poem", "poem", "essay", "poem"]})
    rewards_BK = build_rewards([entry, good])(batch)
    torch.testing.assert_close(
        rewards_BK, torch.tensor([[2.0, 1.0], [NAN, 0.0], [NAN, 2.0], [NAN, NAN]]), equal_nan=True
    )
    advantages = group_advantages(rewards_BK, torch.tensor([0.5, 0.5]), 4)
    assert advantages.advantages[3] == 0.0 and advantages.advantages.isfinite().all()


def test_a_gate_from_yaml(make_batch: MakeBatch) -> None:
    """YAML 1.1 reads the key ``on`` as true."""
    entry = yaml.safe_load(
        f"{{function: '{__name__}:length', gate: {{on: '{__name__}:good', threshold: 1, closed: 0}}}}"
    )
    assert True in entry["gate"]
    assert build_rewards([entry])(make_batch(TEXTS))[:, 0].tolist() == [2.0, 0.0, 5.0, 0.0]


def test_what_they_need_is_what_their_parts_need(make_batch: MakeBatch) -> None:
    (reward,) = build_rewards([{"type": "format", "gate": {"on": "entropy", "threshold": 1}, "where": "x"}]).rewards
    assert reward.needs_entropy and not reward.needs_policy and reward.name == "format"
    batch = make_batch(TEXTS, columns={"x": [1, 0, 1, 1]}, mean_entropies_B=torch.tensor([0.0, 1.0, 2.0, 3.0]))
    found = batch.select([2, 0])
    assert found.completions == ["ccc!!", "a!"] and found.columns == {"x": [1, 1]}
    assert found.mean_entropies_B is not None and found.mean_entropies_B.tolist() == [2.0, 0.0]


def test_labels_come_early_and_then_by_share() -> None:
    labels = LabelsConfig(share=0.25, early=10, over=80)
    assert labels.chance(9) == 1.0 and labels.chance(10) == pytest.approx((20 - 10) / 70)
    chosen = sum(labels.chosen(step, f"prompt {i}") for step in range(80) for i in range(50))
    assert chosen / 4000 == pytest.approx(0.25, abs=0.02)
    assert LabelsConfig(share=0.25).chance(0) == 0.25
    assert LabelsConfig(share=0.05, early=10, over=80).chance(50) == 0.0
    picks = [labels.chosen(20, f"prompt {i}") for i in range(200)]
    assert picks != [labels.chosen(21, f"prompt {i}") for i in range(200)]
    assert picks != [LabelsConfig(share=0.25, early=10, over=80, seed=1).chosen(20, f"prompt {i}") for i in range(200)]


def test_an_anchor_labels_whole_groups(make_batch: MakeBatch) -> None:
    anchor = build_anchor({"function": f"{__name__}:length", "labels": {"share": 0.5, "seed": 3}})
    prompts = [f"prompt {i // 2}" for i in range(40)]
    found_B = anchor(make_batch(["word"] * 40, prompts=prompts, step=7))[:, 0]
    labelled = found_B.isfinite().view(20, 2)
    assert torch.equal(labelled[:, 0], labelled[:, 1]) and 4 < labelled[:, 0].sum() < 16
    with pytest.raises(ValueError, match=r"^batch\.step: missing"):
        anchor(make_batch(["word"]))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"type": "format", "gate": {"on": "entropy"}}, r"rewards\[0\]\.gate\.threshold: missing, it has no default"),
        ({"type": "format", "gate": "length"}, r"rewards\[0\]\.gate: got str 'length', expected a mapping"),
        (
            {"type": "format", "gate": {"on": "taste", "threshold": 1}},
            r"rewards\[0\]\.gate\.on\.type: 'taste', expected",
        ),
        ({"type": "format", "gate": {"on": "length", "threshold": 1}}, r"rewards\[0\]\.gate\.on\.target: missing"),
        (
            {"type": "format", "gate": {"on": "entropy", "threshold": "x"}},
            r"rewards\[0\]\.gate\.threshold: got str 'x'",
        ),
        ({"type": "format", "gate": {"on": "entropy", "threshold": ".nan"}}, r"rewards\[0\]\.gate\.threshold: "),
        (
            {"type": "format", "gate": {"on": "entropy", "threshold": NAN}},
            r"rewards\[0\]\.gate\.threshold: nan, expected",
        ),
        ({"type": "format", "where": {}}, r"rewards\[0\]\.where: \{\}, expected a column"),
        ({"type": "format", "where": {"family": {}}}, r"rewards\[0\]\.where\.family: got dict \{\}, expected "),
    ],
)
def test_errors_name_the_entry(entry: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{words}"):
        build_rewards([entry])


def test_a_missing_column_is_named(make_batch: MakeBatch) -> None:
    with pytest.raises(ValueError, match=r"^where: no column 'x', the columns are none"):
        values(Where(FunctionReward(length), "x"), make_batch(TEXTS))


ROWS = [
    {"prompt": "a", "family": "poem", "level": "1", "hard": False, "solution": None},
    {"prompt": "b", "family": "fact", "level": "2", "hard": 0, "solution": ""},
]
HELD_OUT = [{"prompt": "c", "family": "essay", "level": "1", "hard": None, "solution": "x"}]


def check(entry: Any, *, anchor: Any = None) -> None:
    rewards = build_rewards(["entropy", entry])
    utility = None if anchor is None else build_anchor(anchor)
    check_conditions(rewards, utility, Equal(), PromptDataset(ROWS), PromptDataset(HELD_OUT))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            {"where": {"family": ["poem", "typo"]}},
            r"rewards\[1\]\.where\.family: 'typo' \(str\) is in no row .*, expected one of 'poem', 'fact', 'essay'$",
        ),
        ({"where": {"family": "Fact"}}, r"rewards\[1\]\.where\.family: 'Fact'"),
        ({"where": {"level": [1]}}, r"rewards\[1\]\.where\.level: 1 \(int\) .*; write '1' \(str\) for 1$"),
        ({"where": "hard"}, r"rewards\[1\]\.where: 'hard' is met by none of the 3 rows"),
        ({"where": {"family": "fact", "level": "1"}}, r"rewards\[1\]\.where: \{.*\} is met by none of the 3 rows"),
        (
            {"where": "mask"},
            r"rewards\[1\]: 'length' reads the column 'mask', the columns of the training data are family, hard, level",
        ),
        ({"where": "prompt"}, r"rewards\[1\]: 'length' reads the column 'prompt', "),
        (
            {"gate": {"on": {"type": "format", "where": {"family": "typo"}}, "threshold": 1}},
            r"rewards\[1\]\.gate\.on\.where\.family: 'typo'",
        ),
    ],
)
def test_a_mask_that_no_prompt_meets_is_refused_before_the_run(entry: Any, words: str) -> None:
    """Such a reward would abstain for ever, without a word."""
    with pytest.raises(SettingsError, match=f"^{words}"):
        check({"type": "length", "target": 3, **entry})


def test_the_mask_of_the_anchor_is_checked_too() -> None:
    anchor = {"type": "length", "target": 3, "labels": {"share": 0.5}, "where": {"family": "typo"}}
    with pytest.raises(SettingsError, match=r"^anchor\.where\.family: 'typo'"):
        check("format", anchor=anchor)


@pytest.mark.parametrize("where", [{"family": ["essay"]}, {"family": "poem", "level": "1"}, "solution", {"hard": [0]}])
def test_a_mask_may_fit_held_out_prompts_alone(where: Any) -> None:
    check({"type": "length", "target": 3, "where": where})


def needs_solution(completions: list[str], solution: list[str]) -> list[float]:
    return [float(text == wanted) for text, wanted in zip(completions, solution, strict=True)]


NEEDS = {"function": f"{__name__}:needs_solution"}


@pytest.mark.parametrize(
    "entry",
    [
        NEEDS,
        {"type": "length", "target": 3, "where": "solution"},
        {"type": "length", "target": 3, "gate": {"on": f"{__name__}:needs_solution", "threshold": 1}},
        {"type": "nover", "reference": "solution"},
        {"type": "perplexity", "reference": "solution"},
    ],
)
@pytest.mark.parametrize("kind", ["training", "held-out"])
def test_a_column_that_only_one_of_the_data_sets_has_is_refused_before_the_run(entry: Any, kind: str) -> None:
    """The run would end at its first batch, or at its first evaluation."""
    both = [{"prompt": "a", "solution": "x", "family": "poem"}], [{"prompt": "a", "family": "poem"}]
    training, held_out = both if kind == "held-out" else both[::-1]
    rewards = build_rewards([entry])
    with pytest.raises(
        SettingsError, match=rf"^rewards\[0\]: .* reads the column 'solution', .* {kind} data are family$"
    ):
        check_conditions(rewards, None, Equal(), PromptDataset(training), PromptDataset(held_out))


def test_what_no_row_of_a_data_set_calls_needs_no_column_there() -> None:
    training, held_out = [{"prompt": "a", "solution": "x", "family": "qa"}], [{"prompt": "a", "family": "poem"}]
    rewards = build_rewards([NEEDS | {"where": {"family": "qa"}}])
    check_conditions(rewards, None, Equal(), PromptDataset(training), PromptDataset(held_out))


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [1.0] * 5])
def test_what_opens_a_gate_gives_one_number_for_each_completion(values: list[float], make_batch: MakeBatch) -> None:
    """With fewer numbers the gate stayed closed for the last completions."""
    gated = gate(FunctionReward(length), on=FunctionReward(lambda completions: values, "on"), threshold=1)
    with pytest.raises(ValueError, match=rf"reward 'on': returned {len(values)} values for 4 completions"):
        build_rewards([gated])(make_batch(TEXTS))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share": 0}, "share: 0"),
        ({"early": -1}, "early: -1"),
        ({"early": 5, "over": 5}, "over: 5, expected more than"),
    ],
)
def test_labels_are_checked(options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        LabelsConfig(**options)


def test_an_anchor_that_reads_entropies_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^anchor 'entropy': reads the policy's entropy"):
        build_anchor("entropy")


@pytest.mark.parametrize(
    "value", [{0: 1.0, 1: 2.0}, {1.0, 2.0}, b"12", iter([1.0, 2.0]), None], ids=lambda x: type(x).__name__
)
def test_a_masked_reward_returns_what_any_other_may(value: Any, make_batch: MakeBatch) -> None:
    """The keys of a dict and the bytes of a text were taken for rewards behind a mask alone."""
    reward = Where(FunctionReward(lambda completions: value, "mine"), "flag")
    with pytest.raises(TypeError, match=rf"^reward 'mine': returned {type(value).__name__}, expected 2 numbers"):
        build_rewards([reward])(make_batch(["a", "b", "c"], columns={"flag": [1, 0, 1]}))


@pytest.mark.parametrize("kind", [list, torch.tensor], ids=["numbers", "float32"])
def test_a_reward_that_equals_the_threshold_opens_the_gate(kind: Any, make_batch: MakeBatch) -> None:
    """In float32 0.7 is a little less than 0.7."""
    on = FunctionReward(lambda completions: kind([0.7, 0.6999, 0.7001]), "on")
    found = values(gate(FunctionReward(length), on=on, threshold=0.7, closed=-1.0), make_batch(["a", "bb", "ccc"]))
    assert found == [1.0, -1.0, 3.0]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"threshold": "1"}, TypeError, "threshold: got str, expected a number"),
        ({"threshold": 1.0, "closed": NAN}, ValueError, "closed: nan, expected a finite number, or null to abstain"),
        ({"threshold": 1.0, "closed": 1e300}, ValueError, r"closed: 1e\+300, expected a finite number"),
        ({"threshold": 1.0, "closed": "0"}, TypeError, "closed: got str, expected a number"),
    ],
)
def test_wrong_options_of_a_gate_are_named(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gate(FunctionReward(length), on=FunctionReward(good), **given)
