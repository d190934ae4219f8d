"""Where hidden states come from: three cases, the same numbers."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maestro_fast.records import PolicyOutputs
from maestro_fast.training import MaestroTrainer
from maestro_fast.training.pipeline import Pipeline
from maestro_fast.training.rewarding import policy_text_scorer
from maestro_fast.training.scoring import has_dropout
from tests.training.test_trainer import parameters, run

CASES = {
    "training": {"batch": {"micro_batch": 16}},
    "an extra forward": {"batch": {"micro_batch": 8}},
    "2 updates per batch": {"batch": {"micro_batch": 8, "updates_per_batch": 2}},
}


def case(raw: dict[str, Any], name: str, **sections: dict[str, Any]) -> tuple[MaestroTrainer, Any]:
    raw = copy.deepcopy(raw) | {"run_dir": f"{raw['run_dir']}-{name}"}
    for section, values in {**CASES[name], **sections}.items():
        raw[section] = {**raw.get(section, {}), **values}
    return run(raw)


@pytest.mark.parametrize("name", CASES)
def test_the_case_is_logged_with_its_reason(
    raw_config: dict[str, Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "maestro_fast"):
        trainer, _ = case(raw_config, name, trainer={"max_steps": 1})
    source = "training" if name == "training" else "scoring"

    assert trainer.pipeline.scoring.source == source
    (line,) = [record.message for record in caplog.records if record.message.startswith("log-probs and hidden states")]
    assert f": {source}, " in line and name in line and "the weight policy and an entropy reward" in line


@pytest.fixture
def steady(raw_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Rewards that are functions of the tokens: nothing amplifies the last bit in which two forwards differ."""
    (tmp_path / "own.py").write_text(
        "def mine(completion_ids, **columns):\n    return [float(sum(ids) % 7) for ids in completion_ids]\n",
        encoding="utf-8",
    )
    raw_config["rewards"] = [f"{tmp_path}/own.py:mine", {"name": "brevity", "kind": "length", "target": 2}]
    raw_config["trainer"] |= {"optim": "sgd"}
    return raw_config


def test_the_three_cases_give_the_same_numbers(steady: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs, entropies, contexts, weights and advantages of the first batch, to 1e-5."""
    seen: list[PolicyOutputs] = []
    judge = Pipeline.judge

    def spy(pipeline: Pipeline, model: Any, sampled: Any, outputs: PolicyOutputs) -> Any:
        seen.append(outputs)
        return judge(pipeline, model, sampled, outputs)

    monkeypatch.setattr(Pipeline, "judge", spy)
    results = []
    for name in CASES:
        seen.clear()
        _, records = case(steady, name, trainer={"max_steps": 1})
        results.append((seen[0], records[0]))
    (outputs, record), *others = results

    assert outputs.context_Bd is not None and outputs.context_Bd.std() > 0.1
    for other, other_record in others:
        for key in ("logprobs_C", "entropies_C", "context_Bd"):
            torch.testing.assert_close(getattr(other, key), getattr(outputs, key), rtol=1e-5, atol=1e-5, msg=key)
        for key in ("rewards_BK", "weights_BK", "advantages_B"):
            ours, theirs = getattr(other_record, key), getattr(record, key)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=key)


def test_policy_and_conductor_learn_the_same_from_either_forward(steady: dict[str, Any]) -> None:
    """Perplexity scores the reference in a forward of its own, between the training forward and its backward."""
    steady["rewards"].append({"name": "perplexity", "require_format": False})
    both = [case(steady, name)[0] for name in ("training", "an extra forward")]
    one, other = (trainer.pipeline.weights.state_dict() for trainer in both)

    assert one["weight"].abs().max() > 1e-3
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-4, msg=key)
    for (key, ours), theirs in zip(parameters(both[0]).items(), parameters(both[1]).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=key)


def test_nothing_is_scored_for_nobody(raw_config: dict[str, Any]) -> None:
    raw_config |= {"weights": "equal", "rewards": ["format"]}
    trainer, _ = case(raw_config, "an extra forward")

    assert trainer.pipeline.scoring.source == "none"


def test_one_forward_per_step_is_one(raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    from maestro_fast.model import forward
    from maestro_fast.training import trainer

    original = forward.last_hidden

    def spy(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(forward, "last_hidden", spy)
    monkeypatch.setattr(trainer, "last_hidden", spy)
    case(raw_config, "training", trainer={"max_steps": 3})

    assert len(calls) == 3 + 2  # two are the probe of the layout


def test_dropout_keeps_the_forwards_apart(raw_config: dict[str, Any]) -> None:
    trainer, _ = case(raw_config, "training", model={"lora": {"r": 2, "dropout": 0.5}})

    assert trainer.pipeline.scoring.source == "scoring"
    assert "dropout" in trainer.pipeline.scoring.reason


def test_dropout_is_found() -> None:
    attention = nn.Module()
    attention.attention_dropout = 0.0  # type: ignore[assignment]
    model = nn.Sequential(nn.Dropout(0.0), attention)
    assert not has_dropout(model)
    attention.attention_dropout = 0.1  # type: ignore[assignment]
    assert has_dropout(model)
    assert has_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout1d(0.1)))


def test_texts_are_scored_in_as_many_forwards_as_on_the_process_with_most(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharded models need the same number of forwards everywhere, from a process without a text to score as well."""
    trainer, _ = case(raw_config, "an extra forward", trainer={"max_steps": 1})
    texts = (["Name a colour.", "Sing."], ["it is", ""], [" red", "la la"])
    alone = policy_text_scorer(trainer.pipeline, trainer.model)(*texts)
    calls: list[int] = []
    trainer.model.register_forward_pre_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(Pipeline, "gather", lambda pipeline, own: torch.cat([own, torch.tensor([17])]))
    together = policy_text_scorer(trainer.pipeline, trainer.model)(*texts)

    assert len(calls) == 3  # 17 rows, 8 at a time
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert policy_text_scorer(trainer.pipeline, trainer.model)([], [], []) == []
    assert len(calls) == 6
