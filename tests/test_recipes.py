"""The bundled recipes: each config parses, builds, and trains two steps on prompts of the quickstart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maestro_fast.records import Prompts, Rollouts, StepRecord
from maestro_fast.training import parse_config, read_config, train
from tests.tiny import tiny_checkpoint, tiny_tokenizer

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RECIPES = EXAMPLES / "recipes"


class Drafts:
    """Answers with the drafts of the bundled prompts, of which some have the format, and their reference in it."""

    concurrent_parts = 0

    def __init__(self, *arguments: object, **options: object) -> None:
        """Takes what the trainer gives its own generator."""

    def generate(self, model: nn.Module, prompts: Prompts, *, seed: int) -> Rollouts:
        texts = []
        for row, (drafts, reference) in enumerate(zip(*map(prompts.columns.get, ("drafts", "reference")), strict=True)):
            own = [
                *drafts,
                f"<think> I know. </think> <answer> {reference} </answer>",
                f"<answer> {reference} </answer>",
            ]
            texts.append(own[row % len(own)])
        ids = [[*tiny_tokenizer()(text)["input_ids"], 0] for text in texts]
        return Rollouts(prompts, ids, texts, torch.zeros(len(ids), dtype=torch.bool))


def run(recipe: str, folder: Path, changes: Sequence[str]) -> tuple[list[StepRecord], Any]:
    """Two steps of a recipe with a tiny model on the CPU; what was recorded, and the trainer."""
    overrides = ["--run_dir", str(folder / "run"), "--model.path", str(tiny_checkpoint(folder / "model"))]
    overrides += ["--data.path", str(EXAMPLES / "quickstart" / "prompts.jsonl"), "--trainer.max_steps", "2"]
    overrides += ["--trainer.disable_tqdm", "true", "--trainer.use_cpu", "true", *changes]
    raw = read_config(RECIPES / recipe, overrides)
    records: list[StepRecord] = []
    return records, train(parse_config(raw), raw, observers=[records.append])


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_every_recipe_is_understood_and_names_its_source(recipe: str) -> None:
    text = (RECIPES / recipe).read_text(encoding="utf-8")
    config = parse_config(read_config(RECIPES / recipe))

    assert "arXiv" in text
    assert f"examples/recipes/{recipe}" in text, "the command that runs it is missing"
    assert (EXAMPLES.parent / config.data.path).exists()


def test_nover_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of eight, with and without the format; the gate gives 0, never an abstention."""
    monkeypatch.setattr("maestro_fast.training.build.TransformersGenerator", Drafts)
    records, trainer = run("nover.yaml", tmp_path, ["--trainer.learning_rate", "0.01"])

    assert len(records) == 2
    for record in records:
        assert record.reward_names == ("format", "nover")
        formed, nover = record.rewards_BK.T
        assert set(formed.tolist()) == {0.0, 1.0}
        assert (nover[formed == 0] == 0).all()
        assert (nover[formed == 1] >= 1 / formed.sum()).all() and (nover <= 2).all()
        assert nover.sum() >= (formed.sum() + 1) / 2 - 1e-6, "the ranks alone sum to (V + 1) / 2"
        scores = formed + nover
        torch.testing.assert_close(record.advantages_B, scores - scores.mean())
    adapters = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert len(adapters) == 2 * 7 and all(parameter.abs().sum() > 0 for parameter in adapters)


@pytest.mark.parametrize("rewards", [None, "{name: entropy, reduction: sum}", "{name: entropy, estimate: sampled}"])
def test_em_grpo_trains(rewards: str | None, tmp_path: Path) -> None:
    """As it is, and in the two forms that its comments name."""
    changes = ["--sampling.max_new_tokens", "6", "--trainer.learning_rate", "0.01", "--batch.prompts_per_batch", "4"]
    if rewards is not None:
        changes += ["--rewards", f"[{rewards}]", "--advantages.profile", "rloo"]
    records, trainer = run("em_grpo.yaml", tmp_path, changes)

    assert len(records) == 2
    for record in records:
        assert record.reward_names == ("entropy",)
        assert record.rewards_BK.shape == (16, 1) and (record.rewards_BK < 0).all()
        groups, advantages = record.rewards_BK.view(4, 4), record.advantages_B.view(4, 4)
        assert (groups.argmax(1) == advantages.argmax(1)).all(), "the most certain response has the largest advantage"
    before = dict(type(trainer.model).from_pretrained(tmp_path / "model").named_parameters())
    assert any(not torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())
