"""Runs whose chat template shows tools, ends in ``<think>``, and whose tags are special tokens."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_fast.data.dataset import PromptDataset
from maestro_fast.generation.sampling import completion_texts
from maestro_fast.generation.transformers import TransformersGenerator
from maestro_fast.model.rows import Sequences
from maestro_fast.records import Prompts, Rollouts
from maestro_fast.reporting import prompt_weights as shown_page
from maestro_fast.reporting.run_log import RolloutsLog
from maestro_fast.training import parts
from maestro_fast.training.config import parse_config
from maestro_fast.training.prompt_weights import SavedConductor
from maestro_fast.training.run import train
from maestro_fast.weighting.fixed import Equal
from tests.chat_templates import QWEN3, R1, chat_tokenizer
from tests.tiny import tiny_model

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ANSWER = "why</think> <answer>blue</answer>"
ASK = [{"role": "user", "content": "Name a colour."}]
TOOL = {"type": "function", "function": {"name": "paint"}}


@pytest.fixture
def chat_config(raw_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """One step on conversations, and an evaluation. The model opens no ``<think>`` of its own."""
    tokenizer, model = chat_tokenizer(R1, *TAGS), tiny_model()
    model.resize_token_embeddings(len(tokenizer))
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "chat")
    (tmp_path / "prompts.jsonl").write_text(
        "\n".join(json.dumps({"prompt": ASK, "reference": "red"}) for _ in range(4)), encoding="utf-8"
    )
    return raw_config | {
        "model": {"path": str(tmp_path / "chat")},
        "rewards": ["format", {"type": "nover"}],
        "weights": "equal",
        "chat": {"system_prompt": "Be brief."},
        "sampling": {"group_size": 2, "max_new_tokens": 40, "skip_special_tokens": False},
        "batch": {"prompts_per_batch": 2, "micro_batch": 4},
        "evaluation": {"data": copy.deepcopy(raw_config["data"])},
        "trainer": raw_config["trainer"] | {"max_steps": 1},
    }


@pytest.fixture
def perfect(monkeypatch: pytest.MonkeyPatch) -> list[Prompts]:
    """Every response is ``ANSWER``. Returns the prompts of all calls."""
    asked: list[Prompts] = []

    def generate(self: TransformersGenerator, model: Any, prompts: Prompts, *, seed: int) -> Rollouts:
        asked.append(prompts)
        ids = [[*self.tokenizer(ANSWER)["input_ids"], self.tokenizer.eos_token_id] for _ in prompts.texts]
        texts = completion_texts(
            self.tokenizer, prompts, ids, skip_special_tokens=self.sampling.skip_special_tokens, stop_ids=()
        )
        return Rollouts(prompts, ids, texts, torch.zeros(len(ids), dtype=torch.bool))

    monkeypatch.setattr(TransformersGenerator, "generate", generate)
    return asked


def test_a_perfect_answer_has_the_format_in_training_and_in_the_evaluation(
    chat_config: dict[str, Any], perfect: list[Prompts], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scored: list[Sequences] = []
    original = parts.score_forward

    def spy(model: Any, sequences: Sequences, *rest: Any, **options: Any) -> Any:
        scored.append(sequences)
        return original(model, sequences, *rest, **options)

    monkeypatch.setattr(parts, "score_forward", spy)
    trainer = train(parse_config(chat_config), chat_config, observers=[RolloutsLog(tmp_path / "run")])
    log = trainer.state.log_history
    tokenizer = trainer.processing_class

    shown = "<|begin|>Be brief.<|User|>Name a colour.<|Assistant|><think>\n"
    assert len(perfect) == 1 + 2  # one batch, and two calls for the evaluation
    for prompts in perfect:
        assert {tokenizer.decode(ids) for ids in prompts.token_ids} == {shown}
        assert set(prompts.prefills) == {"<think>\n"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert {row["rewards"]["format"] for row in rows} == {1.0}
    assert {row["completion"] for row in rows} == {ANSWER}
    assert {row["prompt"] for row in rows} == {"Be brief.\nName a colour."}
    assert [line["eval_rewards/format/mean"] for line in log if "eval_rewards/format/mean" in line] == [1.0]
    contexts = {tokenizer.decode(ids) for sequences in scored for ids in sequences.prompt_ids}
    assert f"{shown}why</think>" in contexts  # NOVER scores the reference there, and <think> stands once.


def test_tags_that_are_special_tokens_and_skipped_are_refused_before_the_first_step(
    chat_config: dict[str, Any], perfect: list[Prompts]
) -> None:
    chat_config["sampling"] |= {"skip_special_tokens": True}
    with pytest.raises(
        ValueError, match=r"'format' looks for <think>, .* expected sampling\.skip_special_tokens: false"
    ):
        train(parse_config(chat_config), chat_config)
    assert not perfect


def test_a_reward_that_scores_a_prompt_of_the_batch_reads_it_with_its_tools(
    chat_config: dict[str, Any], perfect: list[Prompts]
) -> None:
    config = parse_config(chat_config | {"evaluation": None, "rewards": ["format"]})
    trainer = train(config, chat_config)
    judges, tokenizer = trainer.step.judges, trainer.processing_class
    tokenizer.chat_template = QWEN3
    dataset = type(trainer.train_dataset)([{"prompt": ASK, "tools": [TOOL]}, {"prompt": ASK, "tools": None}])
    tooled, both = dataset.prompts(dataset.rows[:1], tokenizer), dataset.prompts(dataset.rows, tokenizer)

    def score(prompts: Prompts | None, asked: Any) -> torch.Tensor:
        return judges.text_scorer(trainer.model, prompts)([asked], [""], ["red"])[0]

    assert "paint" in tokenizer.decode(tooled.token_ids[0])
    assert torch.equal(score(tooled, ASK), score(None, tooled.token_ids[0]))
    assert torch.equal(score(None, ASK), score(None, both.token_ids[1]))
    assert not torch.equal(score(tooled, ASK), score(None, ASK))
    with pytest.raises(
        ValueError, match=r"several sets of tools or template options, expected its entry of batch\.prompt"
    ):
        score(both, ASK)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"score_texts: text 0, 'red', has a token beyond the policy's 324"):
        score(None, [{"role": "user", "content": "<new>"}])


def test_the_weights_of_prompts_are_shown_for_prompts_as_the_run_read_them(
    chat_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    seen: list[PromptDataset] = []

    def stop(saved: SavedConductor, dataset: PromptDataset, **options: Any) -> None:
        seen.append(dataset)
        raise KeyboardInterrupt

    saved = SavedConductor(tmp_path, Equal(), parse_config(chat_config))
    monkeypatch.setattr(shown_page, "load_conductor", lambda folder: saved)
    monkeypatch.setattr(shown_page, "prompt_weights", stop)
    with pytest.raises(KeyboardInterrupt):
        shown_page.show_conductor(tmp_path, parse_config(chat_config).data, out=tmp_path / "a.png", rows=3)
    assert seen[0].rows[0]["prompt"] == [{"role": "system", "content": "Be brief."}, *ASK]
