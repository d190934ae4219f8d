"""test_distributed.py runs this in one process or two: it trains on fixed responses and writes the results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

from maestro_fast.generation import SamplingConfig
from maestro_fast.ops import PolicyLossConfig
from maestro_fast.records import Prompts, Rollouts, StepRecord
from maestro_fast.rewards import build_rewards
from maestro_fast.training import BatchConfig, MaestroTrainer, Method, PromptDataset
from maestro_fast.training.best_policy import BestPolicy
from maestro_fast.weighting import build_weight_policy

GROUP = 4
METRIC = "rewards/parity/mean"  # a figure of training that judges checkpoints


class FixedGenerator:
    """Responses that follow from the prompt and the place in the group, so that they do not depend on the process."""

    concurrent_parts = 0

    def generate(self, model: Any, prompts: Prompts, *, seed: int) -> Rollouts:
        del model, seed
        completions = []
        for i, text in enumerate(prompts.texts):
            number = int(str(text).split()[-1])
            length = 2 + (3 * number + i % GROUP) % 7
            completions.append([20 + (7 * number + 5 * (i % GROUP) + 3 * t) % 200 for t in range(length)])
        texts = [" ".join(map(str, ids)) for ids in completions]
        logprobs = torch.tensor([-float(token % 6) for ids in completions for token in ids])
        return Rollouts(prompts, completions, list(texts), torch.zeros(len(texts), dtype=torch.bool), logprobs)


def parity(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [float(sum(ids) % 5) for ids in completion_ids]


def brevity(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [-float(len(ids)) for ids in completion_ids]


class Killed(BaseException):
    """No ``Exception``, so that nothing tidies up after it."""


class KillAt(TrainerCallback):
    """Dies in a step, before the checkpoint of that step is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def build(
    checkpoint: str,
    run_dir: Path,
    micro_batches: int,
    records: list[StepRecord],
    *,
    batch: dict[str, Any] | None = None,
    rewards: Sequence[Any] = (parity, brevity),
    prompts: int = 16,
    generator: Any = None,
    dtype: torch.dtype = torch.float32,
    kind: type[MaestroTrainer] = MaestroTrainer,
    **changes: Any,
) -> MaestroTrainer:
    """A trainer with ``micro_batches`` per batch and process; with one, it judges in the training forward."""
    rows = [{"prompt": f"prompt {i}", "family": f"family {i % 2}"} for i in range(prompts)]
    settings: dict[str, Any] = {"max_steps": 3, "save_strategy": "no", **changes}
    args = TrainingArguments(
        output_dir=str(run_dir),
        learning_rate=0.05,
        optim="sgd",
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **settings,
    )
    reward_set = build_rewards([*rewards])
    model = AutoModelForCausalLM.from_pretrained(checkpoint).to(dtype)
    width, conductor = model.config.hidden_size, {"type": "conductor", "period": 1, "learning_rate": 0.1}
    return kind(
        model,
        AutoTokenizer.from_pretrained(checkpoint),
        PromptDataset(rows),
        reward_set,
        build_weight_policy(conductor, reward_set.names, width),
        args,
        Method(
            SamplingConfig(group_size=GROUP),
            BatchConfig(4, 4 * GROUP // args.world_size // micro_batches, **(batch or {})),
            PolicyLossConfig(kl_coef=0.05),
        ),
        evaluation=PromptDataset(rows[:4]) if settings.get("eval_strategy") else None,
        generator=generator or FixedGenerator(),
        observers=[records.append],
    )


def policy(trainer: MaestroTrainer) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def compare(checkpoint: str, out: Path, micro_batches: int) -> None:
    """Trains for three steps and writes the results."""
    records: list[StepRecord] = []
    trainer = build(checkpoint, out / "run", micro_batches, records)
    assert trainer.step.scoring.source == ("training" if micro_batches == 1 else "scoring")
    trainer.train()
    figures = [line for line in trainer.state.log_history if "loss" in line]
    state = {"conductor": trainer.step.weights.state_dict(), "policy": policy(trainer), "logs": figures}
    torch.save(state, out / f"rank{trainer.args.process_index}.pt")
    if trainer.is_world_process_zero():
        keys = ("weights_BK", "advantages_B", "rewards_BK", "lengths_B")
        torch.save([{key: getattr(record, key) for key in keys} for record in records], out / "records.pt")


def resume(checkpoint: str, out: Path, micro_batches: int) -> None:
    """Trains for two epochs of four steps, and again, killed in the second epoch's second step and resumed."""
    settings = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    evaluated = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "rewards/brevity/mean",  # always the same: the first is the best
    }
    results: dict[str, Any] = {}
    judged = {"metric_for_best_model": METRIC}
    for name, changes, killed_at in (("whole", evaluated, 0), ("killed", judged, 6), ("resumed", judged, 0)):
        run_dir = out / ("whole" if name == "whole" else "killed")
        trainer = build(checkpoint, run_dir, micro_batches, [], **settings, **changes)
        prompts: list[list[str]] = []
        note_prompts(trainer, prompts)
        trainer.add_callback(KillAt(killed_at))
        last: dict[str, torch.Tensor] = {}
        trainer.add_callback(Last(trainer, last))
        try:
            trainer.train(resume_from_checkpoint=name == "resumed" or None)
        except Killed:
            continue
        results[name] = {
            "prompts": prompts,
            "best": trainer.state.best_model_checkpoint,
            "means": [line[METRIC] for line in trainer.state.log_history if METRIC in line],
            "policy": policy(trainer),
            "last": last,
        }
    torch.save(results, out / f"rank{trainer.args.process_index}.pt")


def sparse(completion_ids: list[list[int]], prompts: list[str], **columns: object) -> list[float]:
    """The same for all responses to the first six prompts, so that the processes need different numbers of others."""
    return [float(sum(ids) % 5) * (int(p.split()[-1]) > 5) for ids, p in zip(completion_ids, prompts, strict=True)]


def refill(checkpoint: str, out: Path, micro_batches: int) -> dict[str, Any]:
    """Dynamic sampling over two batches: its figures, and on the main process what was trained on."""
    records: list[StepRecord] = []
    batch = {"no_signal": "refill", "max_refills": 8}
    trainer = build(checkpoint, out / "refill", micro_batches, records, batch=batch, rewards=[sparse], max_steps=2)
    trainer.train()
    figures = [line for line in trainer.state.log_history if "dynamic_sampling/no_signal" in line]
    seen = [(record.degenerate_B, record.prompts) for record in records]
    return {"logs": figures, "seen": seen, "policy": policy(trainer)}


def best(checkpoint: str, out: Path, micro_batches: int) -> None:
    """The main process holds the best parameters, and both get them, whatever their own are by then; and ``refill``."""
    refilled = refill(checkpoint, out, micro_batches)
    accelerator = Accelerator(cpu=True)
    model, empty = torch.nn.Linear(3, 2), torch.zeros(1)
    keeper = BestPolicy(holds=accelerator.is_main_process, window=1, first=0)
    names = ["x"]
    for step, utility in enumerate([0.1, 0.3, 0.2]):
        for parameter in model.parameters():
            parameter.data.fill_(float(step))
        utilities = torch.tensor([utility])
        record = StepRecord(
            step + 1, ("r",), names, names, names, *[empty[:, None]] * 3, *[empty] * 5, utilities_B=utilities
        )
        keeper.see(step, record, model)
    held = len(keeper.parameters)
    for parameter in model.parameters():
        parameter.data.fill_(10.0 + accelerator.process_index)
    keeper.load_into(model, accelerator)
    found = {"held": held, "step": keeper.step, "values": [p.detach().unique().tolist() for p in model.parameters()]}
    torch.save({"best": found, "refill": refilled}, out / f"rank{accelerator.process_index}.pt")


def note_prompts(trainer: MaestroTrainer, prompts: list[list[str]]) -> None:
    """The responses of this process, batch by batch."""
    next_batch = trainer._next_batch

    def noting(model: Any, rows: Any) -> Any:
        prompts.append([row["prompt"] for row in rows])
        return next_batch(model, rows)

    trainer._next_batch = noting  # type: ignore[method-assign]


class Last(TrainerCallback):
    """Keeps the policy of the last step, before the best one is loaded."""

    def __init__(self, trainer: MaestroTrainer, last: dict[str, torch.Tensor]) -> None:
        self.trainer, self.last = trainer, last

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 8:
            self.last.update(policy(self.trainer))


if __name__ == "__main__":
    scenarios = {"compare": compare, "resume": resume, "best": best}
    scenarios[(sys.argv[4:] or ["compare"])[0]](sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
