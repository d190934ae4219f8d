"""Which forward is read, and what the trainer knows of a loss."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from torch import nn

from maestro_fast.training.plan import has_dropout
from tests.training.test_step import CASES, case


@pytest.mark.parametrize("name", CASES)
def test_the_case_is_logged_with_its_reason(
    raw_config: dict[str, Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "maestro_fast"):
        trainer, _ = case(raw_config, name, trainer={"max_steps": 1})
    source = "training" if name == "training" else "scoring"

    assert trainer.step.scoring.source == source
    (line,) = [record.message for record in caplog.records if record.message.startswith("log-probs and hidden states")]
    assert f": {source}, " in line and name in line and "the weight policy and an entropy reward" in line


def test_nothing_is_scored_for_nobody(raw_config: dict[str, Any]) -> None:
    raw_config |= {"weights": "equal", "rewards": ["format"]}
    trainer, _ = case(raw_config, "an extra forward")

    assert trainer.step.scoring.source == "none"


def test_dropout_keeps_the_forwards_apart(raw_config: dict[str, Any]) -> None:
    trainer, _ = case(raw_config, "training", model={"lora": {"r": 2, "dropout": 0.5}})

    assert trainer.step.scoring.source == "scoring"
    assert "dropout" in trainer.step.scoring.reason


def test_dropout_is_found() -> None:
    attention = nn.Module()
    attention.attention_dropout = 0.0  # type: ignore[assignment]
    model = nn.Sequential(nn.Dropout(0.0), attention)
    assert not has_dropout(model)
    attention.attention_dropout = 0.1  # type: ignore[assignment]
    assert has_dropout(model)
    assert has_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout1d(0.1)))
