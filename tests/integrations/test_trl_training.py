"""The trainer really trains, in the configurations in which TRL's forwards differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from trl import GRPOTrainer

from maestro_fast.integrations.trl import MaestroGRPOTrainer
from tests.integrations.conftest import abstaining, checkpointing_field, parity

CONDUCTOR = {"type": "conductor", "period": 1, "learning_rate": 0.1}
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


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # TRL uses the old name.
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_lora_with_gradient_checkpointing_a_reference_and_evaluation(
    settings: Make, ingredients: Make, reentrant: bool
) -> None:
    peft = pytest.importorskip("peft")
    checkpointing = checkpointing_field()
    args = settings(
        **{checkpointing: True, f"{checkpointing}_kwargs": {"use_reentrant": reentrant}},
        beta=0.05,
        num_iterations=2,
        eval_strategy="steps",
        eval_steps=2,
        num_generations_eval=2,
        **FREE,
    )
    parts = ingredients()
    trainer = MaestroGRPOTrainer(
        args=args,
        weights=CONDUCTOR,
        profile="maestro",
        eval_dataset=parts["train_dataset"].select(range(4)),
        peft_config=peft.LoraConfig(r=4, task_type="CAUSAL_LM"),
        **parts,
    )
    trainer.train()

    assert weights_of(trainer).abs().max() > 0
    assert history(trainer, "eval_weights/parity") and history(trainer, "eval_reward") and history(trainer, "kl")
    assert trainer._batches == 1, "two updates of two micro-batches come from one generation batch"


def test_rewards_that_abstain(settings: Make, ingredients: Make) -> None:
    parts = {**ingredients(), "reward_funcs": [abstaining, parity]}
    trainer = MaestroGRPOTrainer(args=settings(), weights=CONDUCTOR, profile="maestro", **parts)
    trainer.train()

    assert any(0 < share < 1 for share in history(trainer, "rewards/abstaining/abstained"))
    assert history(trainer, "rewards/parity/abstained") == [0.0, 0.0]
    assert all(torch.tensor(history(trainer, "loss")).isfinite())


def test_a_killed_run_goes_on_with_the_same_conductor(settings: Make, ingredients: Make) -> None:
    def trainer(**changes: Any) -> Any:
        args = settings(max_steps=4, save_strategy="steps", save_steps=2, **changes)
        weights = {**CONDUCTOR, "period": 3}  # The checkpoint is written while the buffer is half full.
        return MaestroGRPOTrainer(args=args, weights=weights, **ingredients())

    whole = trainer()
    whole.train()
    again = trainer()
    again.train(resume_from_checkpoint=f"{again.args.output_dir}/checkpoint-2")

    assert weights_of(whole).abs().max() > 0
    assert again._batches == whole._batches == 4
    for name, value in whole.weight_policy.state_dict().items():
        assert torch.equal(again.weight_policy.state_dict()[name], value), name
    for (name, ours), theirs in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_checkpoint_of_trls_own(settings: Make, ingredients: Make) -> None:
    args = settings(save_strategy="steps", save_steps=1)
    GRPOTrainer(args=args, **ingredients()).train()
    folder = f"{args.output_dir}/checkpoint-1"

    MaestroGRPOTrainer(args=args, weights="equal", **ingredients()).train(resume_from_checkpoint=folder)
    with pytest.raises(ValueError, match="holds no weight_policy"):
        MaestroGRPOTrainer(args=args, weights="conductor", **ingredients()).train(resume_from_checkpoint=folder)


def test_two_rewards_of_one_name_are_two_rewards(settings: Make, ingredients: Make) -> None:
    parts = {**ingredients(), "reward_funcs": [lambda completion_ids, **_: [1.0] * len(completion_ids)] * 2}
    trainer = MaestroGRPOTrainer(args=settings(max_steps=1), weights="random", **parts)
    trainer.train()

    first, second = (history(trainer, f"weights/<lambda>{number}") for number in ("", "_2"))
    assert first == second == [0.5]


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("adapter", [False, True], ids=["whole model", "adapter loaded for inference"])
def test_a_model_of_which_nothing_trains_is_refused(
    settings: Make, ingredients: Make, tmp_path: Path, beta: float, adapter: bool
) -> None:
    parts = ingredients()
    if adapter:
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        peft.get_peft_model(ingredients()["model"], lora).save_pretrained(tmp_path / "adapter")
        parts["model"] = peft.PeftModel.from_pretrained(parts["model"], tmp_path / "adapter")
    else:
        parts["model"].requires_grad_(False)

    with pytest.raises(ValueError, match=r"^model: none of the parameters of \w+ that the policy uses requires a grad"):
        MaestroGRPOTrainer(args=settings(beta=beta), **parts)


def test_training_in_half_precision_is_said(
    settings: Make, ingredients: Make, caplog: pytest.LogCaptureFixture
) -> None:
    parts = ingredients()
    MaestroGRPOTrainer(args=settings(learning_rate=1e-6), **parts)
    assert "rounds away" not in caplog.text
    parts["model"].bfloat16()
    MaestroGRPOTrainer(args=settings(learning_rate=1e-6), **parts)
    assert "trained in bfloat16, which rounds away a step of the learning rate 1e-06" in caplog.text


class Counting:
    """A reward function that has figures of its own."""

    __name__ = "counting"

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        self.asked += len(completions)
        return [float(len(text)) for text in completions]

    def metrics(self) -> dict[str, float]:
        found, self.asked = {"asked": float(self.asked)}, 0
        return found


def test_figures_of_a_reward_function_are_in_the_log(settings: Make, ingredients: Make) -> None:
    """Each batch has its own: training has eight responses in a batch, and the evaluation 24."""
    parts = {**ingredients(), "reward_funcs": [parity, Counting()]}
    args = settings(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=24)
    trainer = MaestroGRPOTrainer(args=args, eval_dataset=parts["train_dataset"].select(range(6)), **parts)
    trainer.train()

    assert history(trainer, "rewards/counting/asked") == [8.0, 8.0]
    assert history(trainer, "eval_rewards/counting/asked") == [24.0, 24.0]
