"""The quickstart, shortened: every part runs and leaves what it promises."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from maestro_fast.quickstart.model import build_tokenizer, read_pairs
from maestro_fast.quickstart.reward_model import HeldOut, Pair, make_reward_model, margins, read_preferences
from maestro_fast.quickstart.run import EXAMPLE, example_config, quickstart, verdict
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


def test_quickstart_runs_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = quickstart(tmp_path / "out", epochs=1, reward_epochs=1, limit=16)
    printed = capsys.readouterr().out
    first, *_ = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    spreads = json.loads((run / "spread.json").read_text())

    assert run == tmp_path / "out" / "conductor"
    for name in ("config.yaml", "metrics.jsonl", "timings.jsonl", "rollouts.jsonl", "report/report.html", "final"):
        assert (run / name).exists(), name
    assert len((run / "rollouts.jsonl").read_text().splitlines()) == 16 * 8
    assert f"{spreads['conductor']:.4f}" in printed
    assert f"{spreads['shuffled']:.4f}" in printed
    assert "Self-flattery" in printed
    assert "report.html" in printed
    assert "held-out pairs" in printed
    names = ("format", "brevity", "entropy", "perplexity", "preference", "richness")
    assert all(first[f"rewards/{name}/mean"] is not None for name in names)
    assert first["rewards/preference/std"] > 0
    with pytest.raises(FileExistsError, match=r"--out: .* is not empty"):
        quickstart(tmp_path / "out")


def test_the_verdict_says_so_when_the_control_is_not_exceeded() -> None:
    assert "above the 0.0100" in verdict(0.02, 0.01, 0.0)[0]
    assert "NOT above" in verdict(0.01, 0.02, 0.0)[0]
    assert "does not show" in verdict(0.01, 0.02, 0.0)[1]
    assert "outside the healthy" in verdict(0.02, 0.01, 0.06)[2]
    assert "within the healthy" in verdict(0.02, 0.01, -0.04)[2]


def words(response: str) -> Counter[str]:
    """Of the answer, without tags and reasoning."""
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
    """Held-out pairs far above chance; the configured reward scores them as training did, as a policy writes them."""
    judged = make_reward_model(EXAMPLE, tmp_path / "reward_model", epochs=2)
    _, held_out = read_preferences(EXAMPLE / "pairs.jsonl")
    (entry,) = [entry for entry in example_config(tmp_path)["rewards"] if entry["name"] == "preference"]
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
