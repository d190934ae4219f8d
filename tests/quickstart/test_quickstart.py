"""A shortened quickstart: every part runs and leaves the files that it promises."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from maestro_fast.functions import load_function
from maestro_fast.quickstart.arms import EXAMPLE, example_config
from maestro_fast.quickstart.held_out import Utilities, split, utility_table, verdict
from maestro_fast.quickstart.model import build_tokenizer, read_pairs
from maestro_fast.quickstart.reward_model import HeldOut, Pair, make_reward_model, margins, read_preferences
from maestro_fast.quickstart.run import quickstart
from maestro_fast.records import RewardBatch
from maestro_fast.rewards import build_rewards

FAMILIES = {"fact", "opening", "format", "rewrite"}


def test_bundled_prompts_are_of_four_balanced_families() -> None:
    rows = [json.loads(line) for line in (EXAMPLE / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    counts = Counter(row["family"] for row in rows)

    assert len(rows) >= 300
    assert set(counts) == FAMILIES
    assert max(counts.values()) == min(counts.values())
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert all(len(row["drafts"]) == 5 and row["reference"] for row in rows)


def test_tags_are_whole_tokens_that_stay_in_the_text() -> None:
    tokenizer = build_tokenizer([text for pair in read_pairs(EXAMPLE / "prompts.jsonl") for text in pair])
    text = "<think> I know this. </think> <answer> Athens. </answer>"
    ids = tokenizer(text)["input_ids"]

    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert {"<think>", "</think>", "<answer>", "</answer>"} <= set(tokenizer.convert_ids_to_tokens(ids))


PROGRAM = """
import sys
from pathlib import Path
from maestro_fast.quickstart.run import quickstart
settings = {"trainer.max_steps": 5, "trainer.save_steps": 3}
quickstart(Path(sys.argv[1]), resume="--resume" in sys.argv, epochs=1, reward_epochs=1, limit=40, settings=settings)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    """Starts a quickstart of five steps in its own process group."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        printed, _ = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, printed[-3000:]
    return printed


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a quickstart that ran to its end, and what it printed."""
    out = tmp_path_factory.mktemp("quickstart") / "whole"
    return out, finish(start(str(out)))


@pytest.mark.long
def test_quickstart_runs_to_its_end(uninterrupted: tuple[Path, str]) -> None:
    out, printed = uninterrupted
    run = out / "anchored"
    first, *_, last = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    found = json.loads((out / "held_out_utilities.json").read_text())

    for name in ("config.yaml", "metrics.jsonl", "timings.jsonl", "rollouts.jsonl", "report/report.html", "final"):
        assert (run / name).exists(), name
    assert len((run / "rollouts.jsonl").read_text().splitlines()) == 40 * 8
    means = {label: sum(one["utility"]) / 5 for label, one in found.items()}
    assert list(means) == ["warm start", "equal weights", "labelled prompts alone", "anchored"]
    printed = " ".join(printed.split())
    for label, mean in means.items():
        assert re.search(rf"{label} {mean:.3f} ± 0\.", printed), label
    for label in ("equal weights", "labelled prompts alone"):
        assert f"Anchored minus {label}: {means['anchored'] - means[label]:+.3f} ±" in printed
    assert "conductor show" in printed and "report.html" in printed and "held-out pairs" in printed
    names = ("format", "brevity", "entropy", "perplexity", "preference", "richness")
    assert all(first[f"rewards/{name}/mean"] is not None for name in names)
    assert first["rewards/preference/std"] > 0
    assert first["anchor/labelled"] == 1.0 and first["weights/format"] == pytest.approx(1 / 7)
    assert abs(last["weights/format"] - 1 / 7) > 1e-3 and last["eval_utility_count"] == 5
    with pytest.raises(FileExistsError, match=r"--out: .* is not empty"):
        quickstart(out)


@pytest.mark.long
def test_quickstart_killed_in_the_middle_goes_on_bit_by_bit(uninterrupted: tuple[Path, str], tmp_path: Path) -> None:
    whole, killed = uninterrupted[0], tmp_path / "killed"
    # It is as if an earlier quickstart had been killed behind the models, and one of the control runs were over.
    for part in ("model", "reward_model", "labelled"):
        shutil.copytree(whole / part, killed / part)
    process = start(str(killed), "--resume")
    deadline = time.monotonic() + 300
    while not (killed / "anchored" / "checkpoint-3").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "anchored" / "final").exists()
    finish(start(str(killed), "--resume"))

    name = "held_out_utilities.json"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
    for run in ("anchored", "equal"):
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            assert (killed / run / name).read_bytes() == (whole / run / name).read_bytes(), f"{run}/{name}"
        for name in ("model.safetensors", "weight_policy.safetensors"):
            ours, theirs = (load_file(out / run / "final" / name) for out in (killed, whole))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), f"{run}/{name}"


def utilities(*means: float) -> Utilities:
    return Utilities(["fact", "opening"] * (len(means) // 2), torch.tensor(means))


def test_the_verdict_claims_no_more_than_the_intervals() -> None:
    found = {"start": utilities(0.3, 0.3, 0.2, 0.2), "equal": utilities(0.5, 0.5, 0.4, 0.4)}
    rise, helped, last = verdict({**found, "anchored": utilities(0.61, 0.6, 0.5, 0.51)}, "anchored", "start")
    assert "+0.305 ±" in rise and "so it rose" in rise
    assert helped.startswith("Anchored minus equal: +0.105 ±") and helped.endswith(
        "so here the anchored weights helped."
    )
    assert last == "It is one run of each: another seed may say otherwise."
    fell, harm, _ = verdict({**found, "anchored": utilities(0.1, 0.1, 0.02, 0.0)}, "anchored", "start")
    assert "so it FELL" in fell and "did HARM; it is lower in fact (-0.39), opening (-0.40)." in harm
    still, unclear, _ = verdict({**found, "anchored": utilities(0.9, 0.1, 0.8, 0.1)}, "anchored", "start")
    assert "did NOT clearly change" in still
    assert unclear.endswith("do NOT show that the anchored weights help; it is lower in opening (-0.35).")


def test_utilities_stand_with_their_interval_and_by_family() -> None:
    table = utility_table({"equal weights": utilities(0.2, 0.6, 0.4, 0.8)})
    assert table.header == ("policy", "all", "fact", "opening")
    # The t quantile is 3.182, the standard deviation 0.258, and n is 4.
    assert table.rows == (("equal weights", "0.500 ± 0.411", "0.30", "0.70"),)


def test_the_split_is_balanced_and_whole(tmp_path: Path) -> None:
    split(EXAMPLE / "prompts.jsonl", tmp_path, None)
    lines = {name: (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("train", "held_out")}
    rows = {name: list(map(json.loads, text.splitlines())) for name, text in lines.items()}
    for name, count in (("train", 288), ("held_out", 48)):
        assert Counter(row["family"] for row in rows[name]) == dict.fromkeys(FAMILIES, count // 4)
    prompts = {row["prompt"] for row in rows["train"]} | {row["prompt"] for row in rows["held_out"]}
    assert len(prompts) == 336
    split(EXAMPLE / "prompts.jsonl", tmp_path, 56)
    assert [len((tmp_path / f"{n}.jsonl").read_text().splitlines()) for n in ("train", "held_out")] == [56, 8]


utility = load_function(f"{EXAMPLE}/rewards.py:utility", field="function")


@pytest.mark.parametrize(
    ("family", "reference", "answer", "expected"),
    [
        ("fact", "Athens.", " athens", 1.0),
        ("fact", "Athens.", "It is Athens.", 0.75),
        ("fact", "Athens.", "It is Athens, my dear friend.", (2 / 7 + 3 / 6) / 2),
        ("fact", "Athens.", "Rome.", 0.5),
        ("fact", "Athens.", "<think> Athens or Rome? </think> <answer> Athens. </answer>", 1.0),
        ("fact", "Athens.", "<think> Athens, I should say.", 0.0),
        ("fact", "Athens.", "<think> Athens? <answer> Rome.", 0.5),
        ("fact", "Athens.", "", 0.0),
        ("format", "1. hammer 2. saw 3. ladder", "1. saw 2. hammer 3. ladder", 1.0),
        ("format", "1. hammer 2. saw 3. ladder", "hammer; saw; ladder", 1 / 3),  # half of F1 with 3 of 6 and 3 words
        ("format", "name: fox; colour: red; size: small", "name: fire engine; colour: red; size: small", 0.5 + 5 / 13),
        ("format", "no, because a cow has no wings.", "yes, because cows fly.", 0.5 + 1 / 11),
        ("opening", "ignored", "word " * 20, 1 / 20 / 2),
        ("opening", "ignored", " ".join(f"w{i}" for i in range(10)), 10 / 15 / 2),
        ("opening", "ignored", " ".join(f"w{i}" for i in range(50)), 1 / 2 / 2),
        ("opening", "ignored", " ".join(f"w{i}" for i in range(22)), 1 / 2),
        ("opening", "ignored", " W" + " ".join(f"w{i}" for i in range(22)) + ".", 1.0),
        ("opening", "ignored", "One. W" + " ".join(f"w{i}" for i in range(20)) + ".", 1 / 2),  # two sentences
        ("rewrite", "The cat stayed.", "The cat stayed there long.", (6 / 8 + 1) / 2),
        ("rewrite", "The cat stayed.", "The cat stayed there long", 6 / 8 / 2),  # not a sentence
        ("rewrite", "The cat stayed.", "The cat remained there long.", (4 / 8 + 4 / 5) / 2),  # one long word of five
        ("rewrite", "The cat stayed.", "The cat stayed.", (1 + 3 / 5) / 2),
    ],
)
def test_the_utility_by_hand(family: str, reference: str, answer: str, expected: float) -> None:
    found = utility([answer], family=[family], reference=[reference], prompts=["ignored"])
    assert found == [pytest.approx(expected)]


def test_the_rewards_of_the_example_by_hand() -> None:
    richness, faithful = (load_function(f"{EXAMPLE}/rewards.py:{name}") for name in ("richness", "faithful"))
    thought = "<think> Some other words. </think> <answer> The windmill, the old windmill turns. </answer>"
    assert richness(["The windmill, the old windmill turns.", thought, ""]) == [2 / 8, 2 / 8, 0.0]
    assert richness([" ".join(f"word{'abcdefghij'[i]}" for i in range(10))]) == [1.0]
    prompts = ["Fill in a card for a fox: name, colour, size.", "Rewrite plainly: The mill has ceased.", "Fact: is it?"]
    assert faithful(["name: fox; size", "The mill stopped.", "no"], prompts=prompts) == [2 / 3, 1 / 2, 0.0]


def test_references_are_worth_more_than_drafts() -> None:
    rows = [json.loads(line) for line in (EXAMPLE / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        answers = [row["reference"], *row["drafts"]]
        best, *drafts = utility(answers, family=[row["family"]] * 6, reference=[row["reference"]] * 6)
        # A draft may repeat no word while the reference does.
        assert best >= max(drafts) or (row["family"] == "opening" and best > 0.7)
        assert best > sum(drafts) / 5


def words(response: str) -> Counter[str]:
    """Counts the words of the answer, without tags and reasoning."""
    answer = re.sub(r"<think>.*?</think>", "", response).replace("<think>", "")
    return Counter(re.findall(r"[a-z0-9']+", answer.partition("<answer>")[2].lower() or answer.lower()))


def agreement(response: str, reference: str) -> float:
    ours, theirs = words(response.replace("</answer>", "")), words(reference)
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


def test_bundled_preferences_follow_their_rule() -> None:
    rows = [json.loads(line) for line in (EXAMPLE / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    of = {row["prompt"]: row for row in rows}
    training, held_out = read_preferences(EXAMPLE / "pairs.jsonl")

    assert len(training) + len(held_out) == 604
    assert not {pair.prompt for pair in training} & {pair.prompt for pair in held_out}
    assert {of[pair.prompt]["family"] for pair in held_out} == FAMILIES
    for pair in training + held_out:
        reference = of[pair.prompt]["reference"]
        assert pair.rejected in of[pair.prompt]["drafts"]
        assert pair.chosen in [reference, *of[pair.prompt]["drafts"]]
        assert agreement(pair.chosen, reference) > agreement(pair.rejected, reference), pair


def test_the_reward_model_learns_what_the_reward_then_scores(tmp_path: Path) -> None:
    """It does far better than chance on held-out pairs, and the configured reward gives the same scores as training."""
    judged = make_reward_model(EXAMPLE, tmp_path / "reward_model", epochs=2)
    _, held_out = read_preferences(EXAMPLE / "pairs.jsonl")
    (entry,) = [entry for entry in example_config(tmp_path)["rewards"] if entry["type"] == "preference"]
    (reward,) = build_rewards([entry]).rewards

    def scores(which: str) -> torch.Tensor:
        responses = [f" {getattr(pair, which)}" for pair in held_out]
        return torch.as_tensor(reward(RewardBatch([pair.prompt for pair in held_out], responses, [[]] * len(held_out))))

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward_model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward_model").eval()
    with torch.no_grad():
        expected = margins(model, tokenizer, held_out)
    torch.testing.assert_close(scores("chosen") - scores("rejected"), expected, rtol=1e-4, atol=1e-4)
    assert judged.pairs == len(held_out) and judged.right == (expected > 0).sum()
    assert judged.right / judged.pairs > 0.75
    assert str(HeldOut(3, 4, 1, 2)).startswith(
        "prefers the chosen response in 3 of 4 held-out pairs (75%), and a prompt's"
    )


def test_every_fifth_prompt_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"p{i // 2}", "chosen": "a", "rejected": "b"} for i in range(22)]
    path.write_text("\n".join(map(json.dumps, rows)))
    training, held_out = read_preferences(path)
    assert held_out == [Pair(p, "a", "b") for p in ("p4", "p4", "p9", "p9")]
    assert len(training) == 18
