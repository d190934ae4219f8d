"""The trainer really trains, in the configurations in which TRL's forwards differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from maestro_fast.integrations.trl import MaestroGRPOTrainer

CONDUCTOR = {"policy": "conductor", "period": 1, "learning_rate": 0.1}
FREE = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}
Make = Callable[..., Any]


def history(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights_of(trainer: Any) -> torch.Tensor:
    return trainer.weight_policy.state_dict()["weight"]


@pytest.mark.parametrize("context", [FREE, {}], ids=["hidden states are free", "one forward is added"])
def test_ten_steps_with_the_conductor(settings: Make, ingredients: Make, context: dict[str, Any]) -> None:
    trainer = MaestroGRPOTrainer(args=settings(max_steps=10, **context), weights=CONDUCTOR, **ingredients())
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()

    assert trainer.state.global_step == 10
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    assert weights_of(trainer).abs().max() > 0
    assert len(history(trainer, "weights/parity")) == (5 if context else 10)
    assert all(
        a + b == pytest.approx(1)
        for a, b in zip(history(trainer, "weights/parity"), history(trainer, "weights/brevity"), strict=True)
    )
    for name in ("rewards/parity/mean", "conductor/entropy", "conductor/grad_norm", "families/family 1/weights/parity"):
        assert history(trainer, name), name
