"""The first loss, gradient or parameter that is not finite stops a run; nothing of it is saved; the message helps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from maestro_fast.model.rows import Sequences
from maestro_fast.records import StepRecord
from maestro_fast.training import parse_config, train
from maestro_fast.training.batches import MicroBatch, TokenLogprobs
from maestro_fast.training.health import Health, NonFiniteError, Origins, broken_parameter
from tests.training.test_trainer import run

LOSS = """
calls = 0
def loss(inputs):
    global calls
    calls += 1
    value = (inputs.logprobs * inputs.advantages.repeat_interleave(inputs.cu_seqlens.diff())).sum() / inputs.normalizer
    if calls == {call}:
        value = {broken}
    return value, {{}}
"""
INFINITE = "value * float('inf')"
# This adds 0, whose gradient is 0 * inf.
NAN_GRADIENT = "value + (inputs.logprobs - inputs.logprobs.detach()).abs().sum().sqrt()"


def broken_loss(raw: dict[str, Any], path: Path, broken: str, call: int) -> None:
    path.write_text(LOSS.format(broken=broken, call=call), encoding="utf-8")
    raw["loss"] = {"type": "function", "function": f"{path}:loss"}


def finite(folder: Path) -> bool:
    files = [path for path in folder.rglob("*.safetensors") if "step_state" not in path.name]
    assert files
    return all(
        bool(value.isfinite().all())
        for file in files
        for value in load_file(file).values()
        if value.is_floating_point()
    )


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (INFINITE, r"the loss of a micro-batch is not finite\. Log-probs and advantages are finite: the loss makes"),
        (
            NAN_GRADIENT,
            r"the norm of the gradient \(nan\) is not finite\. The losses are finite: the gradient overflows",
        ),
    ],
    ids=["loss", "gradient"],
)
def test_the_last_good_step_is_saved_and_the_responses_are_named(
    raw_config: dict[str, Any], tmp_path: Path, broken: str, what: str
) -> None:
    """It happens in the third step, in the second of two micro-batches; the optimiser does not apply the gradient."""
    broken_loss(raw_config, tmp_path / "own.py", broken, call=6)
    raw_config["trainer"]["max_steps"] = 4
    records: list[StepRecord] = []
    with pytest.raises(NonFiniteError, match=rf"^step 3: {what}") as caught:
        train(parse_config(raw_config), raw_config, observers=[records.append])
    run_dir = Path(raw_config["run_dir"])
    text, (note,) = str(caught.value), caught.value.__notes__

    assert note.startswith(
        f"The run as it was after step 2 is in {run_dir}/checkpoint-2; a plain --resume would come to"
    )
    assert finite(run_dir / "checkpoint-2") and not (run_dir / "final").exists()
    named = re.findall(
        r"data row (\d+), response (\d) to '(.*)': format (\S+), brevity (\S+), entropy .*; advantage (\S+);", text
    )
    assert len(named) == 8
    rows = [json.loads(line) for line in Path(raw_config["data"]["path"]).read_text(encoding="utf-8").splitlines()]
    record = records[-1]
    known = {
        (
            str(record.prompts[i]),
            f"{record.rewards_BK[i, 0]:.4g}",
            f"{record.rewards_BK[i, 1]:.4g}",
            f"{record.advantages_B[i]:.4g}",
        )
        for i in range(16)
    }
    for row, _, prompt, form, brevity, advantage in named:
        assert rows[int(row)]["prompt"] == prompt and (prompt, form, brevity, advantage) in known

    (tmp_path / "own.py").write_text(LOSS.format(broken="value", call=0), encoding="utf-8")
    _, resumed = run(raw_config, resume=True)
    assert [item.step for item in resumed] == [3, 4]
    assert torch.equal(resumed[0].rewards_BK, record.rewards_BK) and torch.equal(
        resumed[0].advantages_B, record.advantages_B
    )


class Spoil(TrainerCallback):
    """Makes a parameter infinite behind a step, as an update that is too large does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step == self.step:
            next(model.parameters()).data.view(-1)[3] = torch.inf


@pytest.mark.parametrize(
    ("save_steps", "last"), [(1, "checkpoint-1"), (100, None)], ids=["while saving", "before sampling"]
)
def test_parameters_that_are_not_finite_are_never_saved(
    raw_config: dict[str, Any], save_steps: int, last: str | None
) -> None:
    raw_config["trainer"] |= {"max_steps": 4, "save_steps": save_steps}
    with pytest.raises(
        NonFiniteError, match=r"^step 2: the parameter model\.embed_tokens\.weight is not finite"
    ) as caught:
        train(parse_config(raw_config), raw_config, callbacks=[Spoil(2)])
    run_dir, (note,) = Path(raw_config["run_dir"]), caught.value.__notes__

    assert [path.name for path in run_dir.glob("checkpoint-*")] == ([last] if last else [])
    assert not (run_dir / "final").exists()
    assert (
        f"The last checkpoint is {run_dir}/{last};" if last else "has no checkpoint to go on from; first lower"
    ) in note
    assert "lower trainer.learning_rate (now 0.001)" in note


def test_the_final_policy_is_finite(raw_config: dict[str, Any]) -> None:
    raw_config["trainer"]["save_strategy"] = "no"
    with pytest.raises(NonFiniteError, match=r"^step 2: the parameter") as caught:
        train(parse_config(raw_config), raw_config, callbacks=[Spoil(2)])
    assert not (Path(raw_config["run_dir"]) / "final").exists()
    (note,) = caught.value.__notes__
    assert (
        "to go on from; first lower trainer.learning_rate (now 0.001), then start it again in a new directory" in note
    )


def test_a_lower_learning_rate_takes_effect_at_a_resume(raw_config: dict[str, Any]) -> None:
    """The message advises it. transformers brings the old rate back with the state of optimiser and schedule."""
    raw_config["trainer"] |= {"max_steps": 2, "lr_scheduler_type": "constant"}
    run(raw_config)
    trainer, _ = run(raw_config, resume=True, trainer__max_steps=4, trainer__learning_rate=1e-5)
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-5, 1e-5])


# ---- what is found without a run -----------------------------------------------------------------------------------


def processes(scale: float | None = None, others: list[Any] | None = None) -> Any:
    """One process, or two with what the other one says; ``scale``: that of a gradient scaler."""
    scaler = None if scale is None else SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: scale)
    return SimpleNamespace(
        count=2 if others else 1,
        rank=0,
        device=torch.device("cpu"),
        accelerator=SimpleNamespace(scaler=scaler, mixed_precision="no"),
        gather=lambda flag: torch.cat([flag, torch.ones(1)]),
        gather_objects=lambda values: [*values, *(others or [])],
    )


def micro_batch(advantages: list[float], **logprobs: torch.Tensor) -> MicroBatch:
    count = len(advantages)
    sequences = Sequences([[1]] * count, [[2, 3]] * count)
    bounds = torch.arange(count + 1) * 2
    return MicroBatch(
        sequences, torch.tensor(advantages), bounds, TokenLogprobs(**logprobs), 1.0, 1.0, tuple(range(count))
    )


def message(model: nn.Module, batch: MicroBatch, logprobs_C: list[float], loss: float = float("nan")) -> NonFiniteError:
    health = Health(processes(), model, 1e-3)
    health.see(torch.tensor(loss), batch, torch.tensor(logprobs_C))
    with pytest.raises(NonFiniteError) as caught:
        health.check(torch.tensor(torch.nan), 7, Origins([5, 9], 1, 0))
    return caught.value


def test_the_likely_cause_is_named() -> None:
    model, broken = nn.Linear(2, 2), nn.Linear(2, 2)
    broken.bias.data[0] = torch.nan
    plain = micro_batch([1.0, -2.0])
    far = micro_batch([1.0, -2.0], old_C=torch.tensor([-1.0, -1.0, -101.0, -1.0]))
    cases = {
        r"weights themselves are not finite \(bias\)": message(broken, plain, [-1.0] * 4),
        r"Advantages are not finite": message(model, micro_batch([float("inf"), 1.0]), [-1.0] * 4),
        r"Log-probs of the policy are not finite, but its weights are: .* in float32": message(
            model, plain, [-1.0, torch.nan, -1.0, -1.0]
        ),
        r"up to 100 nats from those of the policy before these updates": message(model, far, [-1.0] * 4),
        r"the gradient overflows on its way back, in float32": message(model, plain, [-1.0] * 4, loss=0.5),
        r"the loss makes such a value": message(model, plain, [-1.0] * 4),
    }
    for words, error in cases.items():
        assert re.search(words, str(error)), str(error)
    remedies = {words: error.remedy for words, error in cases.items()}
    assert "batch.updates_per_batch" in remedies["up to 100 nats from those of the policy before these updates"]


def test_the_response_whose_log_probs_are_not_finite_comes_first() -> None:
    lines = str(message(nn.Linear(2, 2), micro_batch([9.0, 0.5]), [-1.0, -1.0, -2.0, -torch.inf])).splitlines()
    assert lines[-2].startswith("  data row 9, response 0: advantage 0.5; 2 tokens; log-probs -inf to -2")
    assert lines[-1].startswith("  data row 5, response 0: advantage 9;")


@pytest.mark.parametrize(("scale", "stops"), [(None, True), (65536.0, False), (1.0, True)])
def test_the_scaler_of_fp16_may_overflow(scale: float | None, stops: bool) -> None:
    """It leaves the step out and scales by less, until it does not scale up at all: then it is not the scaler."""
    health = Health(processes(scale), nn.Linear(2, 2), 1e-3)
    health.see(torch.tensor(0.5), micro_batch([1.0]), torch.tensor([-1.0, -1.0]))
    if stops:
        with pytest.raises(NonFiniteError):
            health.check(torch.tensor(torch.inf), 1, Origins([0], 1, 0))
    else:
        health.check(torch.tensor(torch.inf), 1, Origins([0], 1, 0))


def test_all_processes_stop_alike() -> None:
    """This process sees nothing wrong; the other one's loss is not finite, and both say what that one found."""
    health = Health(
        processes(others=[(True, "the loss of a micro-batch is not finite.", "less")]), nn.Linear(2, 2), 1e-3
    )
    health.see(torch.tensor(0.5), micro_batch([1.0]), torch.tensor([-1.0, -1.0]))
    with pytest.raises(NonFiniteError, match=r"^step 4: the loss of a micro-batch is not finite\.$") as caught:
        health.check(torch.tensor(1.0), 4, Origins([0], 1, 0))
    assert caught.value.remedy == "less"
    with pytest.raises(NonFiniteError, match="the parameter theirs is not finite"):
        Health(processes(others=["theirs"]), nn.Linear(2, 2), 1e-3).check_parameters(4)


def test_a_large_parameter_is_finite() -> None:
    """A sum of squares would overflow."""
    model = nn.Linear(2, 2)
    model.weight.data.fill_(3e38)
    assert broken_parameter(model) is None
    assert broken_parameter(model.to(torch.float16)) == "weight"
