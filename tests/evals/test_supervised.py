"""SFT trains on the reference answers alone, on the prompts of the GRPO run, by the loss of transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from maestro_fast.data.dataset import PromptDataset
from maestro_fast.evals import suite as suites
from maestro_fast.evals import supervised
from maestro_fast.evals.supervised import run_arm, supervised_examples, train_supervised
from maestro_fast.settings import SettingsError
from maestro_fast.training import parse_config, train
from tests.evals.test_suite import write
from tests.tiny import tiny_checkpoint, tiny_tokenizer

ROWS = [{"prompt": f"Name {'a ' * i}colour.", "reference": "red " * (1 + i % 4)} for i in range(8)]


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    """A run on eight prompts, whose micro-batches have references of different lengths."""
    tiny_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "model")},
        "data": {"path": str(tmp_path / "prompts.jsonl")},
        "rewards": [{"type": "length", "target": 2}],
        "sampling": {"group_size": 2, "max_new_tokens": 12},
        "batch": {"prompts_per_batch": 8, "micro_batch": 3},
        "trainer": {"learning_rate": 0.1, "max_steps": 1, "optim": "sgd", "use_cpu": True, "disable_tqdm": True}
        | {"max_grad_norm": 1e9},
    }


def test_a_step_is_that_of_the_models_own_loss_with_masked_labels(raw: dict[str, Any]) -> None:
    """The token mean runs over the whole optimiser step: micro-batches of other sizes give the same step."""
    final = train_supervised(parse_config(raw), raw)
    trained = AutoModelForCausalLM.from_pretrained(final)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(raw["model"]["path"]), tiny_tokenizer()
    total, tokens = torch.zeros(()), 0
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["reference"])["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        total = total + model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss * len(answer)
        tokens += len(answer)
    (total / tokens).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    for (name, ours), theirs in zip(trained.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)
    log = json.loads((final.parent / "trainer_state.json").read_text())["log_history"]
    assert log[0]["loss"] == pytest.approx((total / tokens).item(), rel=1e-4)


def test_the_policy_learns_to_give_the_reference_and_to_stop(raw: dict[str, Any]) -> None:
    """Every prompt has the same answer here, which a few steps teach."""
    Path(raw["data"]["path"]).write_text("".join(json.dumps({**row, "reference": "red"}) + "\n" for row in ROWS))
    raw["trainer"] |= {"max_steps": 8, "learning_rate": 0.05, "optim": "adamw_torch"}
    raw["batch"]["micro_batch"] = 8
    final = train_supervised(parse_config(raw), raw, steps=[1, 8])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    given = tokenizer(ROWS[2]["prompt"], return_tensors="pt")
    out = model.generate(**given, max_new_tokens=12, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == "red<|end|>"
    first, last = (AutoModelForCausalLM.from_pretrained(final.parent / f"step-{n}") for n in (1, 8))
    assert torch.equal(last.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("updates", [1, 2])
def test_the_prompts_come_as_in_a_grpo_run(
    raw: dict[str, Any], updates: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of seven prompts an epoch has three batches, and the fourth one is of the next epoch."""
    Path(raw["data"]["path"]).write_text("".join(json.dumps(row) + "\n" for row in ROWS[:7]))
    raw["batch"] = {"prompts_per_batch": 2, "micro_batch": 4 // updates, "updates_per_batch": updates}
    raw["trainer"] |= {"max_steps": 4 * updates, "learning_rate": 0.0}
    theirs: list[Any] = []
    train(parse_config(raw), raw, observers=[lambda record: theirs.extend(record.prompts[::2])])
    ours: list[Any] = []
    last_hidden, tokenizer = supervised.last_hidden, tiny_tokenizer()

    def spy(model: Any, sequences: Any, layout: Any) -> Any:
        ours.extend(tokenizer.batch_decode(sequences.prompt_ids))
        return last_hidden(model, sequences, layout)

    monkeypatch.setattr(supervised, "last_hidden", spy)
    raw["run_dir"] = str(tmp_path / "sft")
    train_supervised(parse_config(raw), raw)
    assert ours == theirs and len(ours) == 8


def test_examples_end_and_are_cut_as_responses_are(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    examples = supervised_examples(PromptDataset(ROWS), tokenizer, 3)
    full = supervised_examples(PromptDataset(ROWS), tokenizer, 99)
    for (prompt, answer), (same, whole), row in zip(examples, full, ROWS, strict=True):
        assert prompt == same == tokenizer(row["prompt"])["input_ids"]
        assert whole == [*tokenizer(row["reference"])["input_ids"], tokenizer.eos_token_id] and answer == whole[:3]
    cut = sum(len(answer) > 3 for _, answer in full)
    assert cut > 0 and caplog.messages == [f"{cut} of 8 reference answers are cut after 3 tokens"]


def test_what_cannot_be_learnt_is_named(raw: dict[str, Any]) -> None:
    for missing in (None, "", 3):
        rows = [*ROWS[:3], {"prompt": "Go on.", "reference": missing}]
        with pytest.raises(
            ValueError, match=rf"^data\.path: row 3 has {missing!r} in the column 'reference', expected"
        ):
            supervised_examples(PromptDataset(rows), tiny_tokenizer(), 9)
    endless = tiny_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match=r"^model\.path: its tokenizer has no end token"):
        supervised_examples(PromptDataset(ROWS), endless, 9)
    raw["batch"] = {"prompts_per_batch": 3, "updates_per_batch": 2}
    with pytest.raises(SettingsError, match=r"^batch\.prompts_per_batch: 3, expected a multiple of 2"):
        train_supervised(parse_config(raw), raw)


def test_in_a_suite_it_is_measured_as_the_others_are(tmp_path: Path) -> None:
    """With the learning rate 0 it is worth what every arm is worth before it trains."""
    path = write(tmp_path, arms=["equal", "sft"])
    # Few responses have the same reward here, so that a step has a gradient.
    own = "def vowels(completions, **columns):\n    return [float(sum(map(ord, text)) % 7) for text in completions]\n"
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text() + own)
    suite = suites.read_suite(path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({**row, "reference": "a e"}) + "\n" for row in rows))
    job, supervised = suites.test_jobs(suite, ())
    payload = {**supervised.payload, **supervised.places}
    assert payload["changes"] == {"trainer.learning_rate": 2e-5}
    (equal,) = run_arm({**job.payload, **job.places, "steps": [1]})
    before = equal.history["utility"][0][1]
    (still,) = run_arm({**payload, "steps": [1], "changes": {"trainer.learning_rate": 0.0}})
    assert still.utility == before
    found = run_arm({**payload, "keep": False, "changes": {"trainer.learning_rate": 0.05}})
    assert [(r.arm, r.seed, dict(r.condition), r.tokens) for r in found] == [
        ("sft", 1, {"steps": steps}, 0) for steps in (1, 2)
    ]
    assert found[0].utility not in (before, found[1].utility)
    assert found[1].history["utility"] == [(step, found[i].utility) for i, step in enumerate((1, 2))]
    assert set(found[0].families) == {"wide", "short"}
    assert not (suite.folder / "runs" / "test-sft-seed-1").exists()
