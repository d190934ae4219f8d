"""The hidden states that a weight policy asked for reach it in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_fast.model.forward import last_hidden
from maestro_fast.model.rows import Sequences
from maestro_fast.settings import SettingsError
from maestro_fast.training import parse_config, train
from maestro_fast.weighting import Conductor, Outcome, WeightContext
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("kind", "micro_batch", "kl_coef"),
    [
        ("response", 8, 0.0),
        ("prompt_last", 8, 0.0),
        ("prompt_mean", 8, 0.0),
        ("prompt_mean", 16, 0.0),  # With one micro-batch the training forward itself is read.
        ("reference_prompt_mean", 8, 0.0),
        ("reference_prompt_mean", 16, 0.1),
    ],
)
def test_the_conductor_reads_what_it_asked_for(
    raw_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    micro_batch: int,
    kl_coef: float,
) -> None:
    seen: list[WeightContext] = []
    observe = Conductor.observe

    def spy(policy: Conductor, outcome: Outcome) -> None:
        seen.append(outcome.context)
        observe(policy, outcome)

    monkeypatch.setattr(Conductor, "observe", spy)
    raw_config["weights"] |= {"context": kind}
    raw_config["loss"] = {"kl_coef": kl_coef}
    raw_config["batch"]["micro_batch"] = micro_batch
    (tmp_path / "mine.py").write_text("def f(completion_ids, **k): return [float(sum(i) % 5) for i in completion_ids]")
    raw_config["rewards"] = [f"{tmp_path}/mine.py:f", "format"]  # Neither reward asks for a forward.
    records: list[Any] = []
    trainer = train(parse_config(raw_config), raw_config, observers=[records.append])
    reference = tiny_model()  # This is the checkpoint before training.
    first, second = seen[0].context_Bd, seen[1].context_Bd
    assert first is not None and second is not None and first.shape == second.shape == (16, 32)
    for context, record in zip((first, second), records, strict=True):
        prompts = [list(trainer.processing_class(text)["input_ids"]) for text in record.prompts]
        states = [last_hidden(reference, Sequences([ids], [[]]), "padded").packed().detach() for ids in prompts]
        pooled = torch.stack([state[-1] if kind == "prompt_last" else state.mean(0) for state in states])
        close = torch.allclose(context, pooled, rtol=1e-4, atol=1e-4)
        # The reference never changes; the policy has moved by the second batch.
        assert close == (kind == "reference_prompt_mean" or (kind != "response" and context is first))
    if kind == "reference_prompt_mean" and kl_coef == 0:
        assert trainer.step.scoring.source == "none"


def test_a_profile_that_compares_over_the_batch_is_refused(raw_config: dict[str, Any]) -> None:
    raw_config["weights"] |= {"estimator": "all_actions"}
    raw_config["advantages"] = {"profile": "gdpo"}
    with pytest.raises((SettingsError, ValueError), match=r"^advantages\.profile: compares scores over batch"):
        train(parse_config(raw_config), raw_config)


def test_columns_reach_the_policy_in_training(raw_config: dict[str, Any], tmp_path: Path) -> None:
    rows = {name: dict.fromkeys(("format", "brevity", "entropy"), v) for name, v in (("fact", 1.0), ("opening", 2.0))}
    records: list[Any] = []
    raw = raw_config | {"weights": {"type": "router", "column": "family", "routes": rows}}
    train(parse_config(raw), raw, observers=[records.append])
    for record in records:
        assert record.weights_BK[:, 0].tolist() == [1.0 if family == "fact" else 2.0 for family in record.families]
    raw = raw | {"run_dir": str(tmp_path / "other"), "weights": raw["weights"] | {"column": "kind"}}
    with pytest.raises(ValueError, match=r"^weights: policy 'router' reads the column 'kind', the data has family"):
        train(parse_config(raw), raw)
