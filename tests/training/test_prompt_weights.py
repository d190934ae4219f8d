"""Weights of single prompts from a saved Conductor: the contexts are those that it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.model.rows import Sequences
from maestro_fast.training import MaestroTrainer, load_prompts, parse_config, train
from maestro_fast.training.plan import context_mode
from maestro_fast.training.prompt_weights import PromptWeights, load_conductor, prompt_weights, sample_responses
from maestro_fast.weighting import save_pretrained

MINE = """
def first(completion_ids, **k): return [float(ids[0] % 7) for ids in completion_ids]
def last(completion_ids, **k): return [float(ids[-1] % 5) for ids in completion_ids]
"""
SAMPLES, SEED = 3, 5


def trained(raw: dict[str, Any], tmp_path: Path, weights: dict[str, Any]) -> tuple[MaestroTrainer, Path]:
    (tmp_path / "mine.py").write_text(MINE)
    raw |= {"rewards": [f"{tmp_path}/mine.py:{name}" for name in ("first", "last")], "weights": weights}
    if weights["type"] == "anchored":
        raw["anchor"] = f"{tmp_path}/mine.py:first"
    return train(parse_config(raw), raw), Path(raw["run_dir"])


def shown(raw: dict[str, Any], folder: Path, **options: Any) -> PromptWeights:
    return prompt_weights(load_conductor(folder), load_prompts(parse_config(raw).data), **options)


def test_of_the_anchored_policy_bit_by_bit(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """The policy reads the reference, from which the trained model differs by now."""
    trainer, run_dir = trained(raw_config, tmp_path, {"type": "anchored", "steps": 2, "guard": {}})
    step = trainer.step
    assert step.reference is not None
    ids = [trainer.processing_class(row["prompt"])["input_ids"] for row in trainer.train_dataset.rows]
    with step.reference() as (reference, _):
        states = step.prompt_contexts(reference, ids)
    expected = step.weights.policy.weights_of(states)  # type: ignore[attr-defined]

    found = shown(raw_config, run_dir)  # final/ is found in it
    assert torch.equal(found.weights_NK, expected) and expected.std() > 0
    assert found.policy == "anchored" and found.reward_names == ("first", "last")
    assert found.families[:2] == ["fact", "opening"] and found.prompts[0] == "Name a colour."
    assert raw_config["model"]["path"] in found.source[0] and "frozen reference" in found.source[0]
    assert torch.equal(shown(raw_config, run_dir / "checkpoint-2").weights_NK, expected)


def test_one_weighting_for_all_prompts_needs_no_model(raw_config: dict[str, Any], tmp_path: Path) -> None:
    weights = {"type": "anchored", "steps": 2, "context": "none", "residual": True}
    trainer, run_dir = trained(raw_config, tmp_path, weights)
    found = shown(raw_config, run_dir, model="nowhere")
    expected_K = trainer.step.weights.params.bias.detach().softmax(0)  # type: ignore[attr-defined]
    torch.testing.assert_close(found.weights_NK, expected_K.expand_as(found.weights_NK))
    assert expected_K.std() > 0 and found.source == ["It reads no context: every prompt weighs alike."]


def responses(trainer: MaestroTrainer) -> Sequences:
    parts = sample_responses(
        trainer.model, trainer.processing_class, trainer.train_dataset, trainer.method.sampling, SAMPLES, SEED
    )  # type: ignore[arg-type]
    return Sequences(
        [ids for part in parts for ids in part.prompts.token_ids],
        [ids for part in parts for ids in part.completion_ids],
    )


@pytest.mark.parametrize("context", ["response", "prompt_mean", "prompt_last"])
def test_of_a_conductor_by_the_trainers_own_forward(raw_config: dict[str, Any], tmp_path: Path, context: str) -> None:
    options = {"type": "conductor", "period": 1, "learning_rate": 0.1, "context": context, "estimator": "all_actions"}
    trainer, run_dir = trained(raw_config, tmp_path, options)
    trainer.model.eval()  # type: ignore[union-attr]
    policy = trainer.step.weights
    sequences = responses(trainer)
    states: Tensor = trainer.step.scorer(trainer.model, sequences, context=context_mode(policy)).context_Bd  # type: ignore[arg-type,assignment]
    expected_BK = policy.expected(policy.probs(states))  # type: ignore[attr-defined]
    expected_NK = expected_BK.view(-1, SAMPLES, 2).mean(1)

    found = shown(raw_config, run_dir / "final", samples=SAMPLES, seed=SEED)
    torch.testing.assert_close(found.weights_NK, expected_NK, rtol=0, atol=2e-6)
    assert (expected_NK - 0.5).abs().max() > 1e-4
    assert f"{run_dir}/final, the policy" in found.source[0]
    assert (f"{SAMPLES} to each prompt" in " ".join(found.source)) == (context == "response")
    if context == "response":
        again = shown(raw_config, run_dir / "final", samples=SAMPLES, seed=SEED)
        other = shown(raw_config, run_dir / "final", samples=SAMPLES, seed=SEED + 1)
        assert torch.equal(again.weights_NK, found.weights_NK) and not torch.equal(other.weights_NK, found.weights_NK)


def test_a_folder_of_save_pretrained_needs_the_model(raw_config: dict[str, Any], tmp_path: Path) -> None:
    options = {"type": "conductor", "period": 1, "learning_rate": 0.1, "context": "prompt_last"}
    trainer, run_dir = trained(raw_config, tmp_path, options)
    save_pretrained(trainer.step.weights, tmp_path / "alone")
    with pytest.raises(ValueError, match=r"^--model: missing; .*alone does not tell where the policy, is"):
        shown(raw_config, tmp_path / "alone")
    found = shown(raw_config, tmp_path / "alone", model=str(run_dir / "final"))
    assert torch.equal(found.weights_NK, shown(raw_config, run_dir / "final").weights_NK)


def test_a_run_whose_config_has_relative_paths_is_shown(
    raw_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 0.1 wrote them as they were given, so they start where that run was started."""
    options = {"type": "conductor", "period": 1, "learning_rate": 0.1, "context": "prompt_last"}
    _, run_dir = trained(raw_config, tmp_path, options)
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace(f"{tmp_path}/", ""))
    monkeypatch.chdir(tmp_path)

    assert load_conductor(Path(run_dir)).policy.reward_names == ("first", "last")


def test_adapters_come_with_the_policy(raw_config: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    raw_config["model"] |= {"lora": {"r": 4}}
    raw_config["trainer"] |= {"learning_rate": 0.1}
    options = {"type": "conductor", "period": 1, "learning_rate": 0.1, "context": "prompt_mean"}
    trainer, run_dir = trained(raw_config, tmp_path, options)
    save_pretrained(trainer.step.weights, tmp_path / "alone")
    own = shown(raw_config, run_dir / "final").weights_NK
    base = shown(raw_config, tmp_path / "alone", model=raw_config["model"]["path"]).weights_NK
    assert (own - base).abs().max() > 1e-4


def test_what_cannot_be_shown_is_named(raw_config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^DIR: .*nowhere holds neither conductor\.json nor weight_policy"):
        load_conductor(tmp_path / "nowhere")
    _, run_dir = trained(raw_config, tmp_path, {"type": "equal"})
    with pytest.raises(ValueError, match=r"^DIR: .*final holds weight policy 'equal', expected conductor or anchored"):
        load_conductor(run_dir)
    (run_dir / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"^DIR: .*final is of a run, but beside it there is no config\.yaml"):
        load_conductor(run_dir)


def test_another_model_is_refused_by_its_width(raw_config: dict[str, Any], tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tests.tiny import tiny_tokenizer

    _, run_dir = trained(raw_config, tmp_path, {"type": "conductor", "context": "prompt_mean"})
    config = Qwen3Config(vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"^--model: .*other has states of width 16, expected 32"):
        shown(raw_config, run_dir, model=str(tmp_path / "other"))
