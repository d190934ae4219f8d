"""Run by test_distributed.py, in one process or two: trains on fixed responses and writes what came of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from maestro_fast.generation import SamplingConfig
from maestro_fast.ops import PolicyLossConfig
from maestro_fast.records import Prompts, Rollouts, StepRecord
from maestro_fast.rewards import build_rewards
from maestro_fast.training import BatchConfig, MaestroTrainer, Method, PromptDataset
from maestro_fast.weighting import build_weight_policy

GROUP = 4


class FixedGenerator:
    """Responses that follow from the prompt and the place in the group, so that they do not depend on the process."""

    def generate(self, model: Any, prompts: Prompts, *, seed: int) -> Rollouts:
        del model, seed
        completions = []
        for i, text in enumerate(prompts.texts):
            number = int(str(text).split()[-1])
            length = 2 + (3 * number + i % GROUP) % 7
            completions.append([20 + (7 * number + 5 * (i % GROUP) + 3 * t) % 200 for t in range(length)])
        texts = [" ".join(map(str, ids)) for ids in completions]
        return Rollouts(prompts, completions, list(texts), torch.zeros(len(texts), dtype=torch.bool))


def parity(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [float(sum(ids) % 5) for ids in completion_ids]


def brevity(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [-float(len(ids)) for ids in completion_ids]


def main(checkpoint: str, out: Path, micro_batches: int) -> None:
    """``micro_batches`` per update and process; with one, hidden states come from the training forward."""
    rows = [{"prompt": f"prompt {i}", "family": f"family {i % 2}"} for i in range(16)]
    args = TrainingArguments(
        output_dir=str(out / "run"),
        max_steps=3,
        learning_rate=0.05,
        optim="sgd",
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    rewards = build_rewards([parity, brevity])
    records: list[StepRecord] = []
    trainer = MaestroTrainer(
        model,
        AutoTokenizer.from_pretrained(checkpoint),
        PromptDataset(rows),
        rewards,
        build_weight_policy({"policy": "conductor", "period": 1, "learning_rate": 0.1}, rewards.names, 32),
        args,
        Method(
            SamplingConfig(group_size=GROUP),
            BatchConfig(prompts_per_batch=4, micro_batch=4 * GROUP // args.world_size // micro_batches),
            PolicyLossConfig(kl_coef=0.05),
        ),
        generator=FixedGenerator(),
        observers=[records.append],
    )
    assert trainer.pipeline.scoring.source == ("training" if micro_batches == 1 else "scoring")
    trainer.train()
    state = {name: value.detach() for name, value in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}
    conductor = trainer.pipeline.weights.state_dict()
    torch.save({"conductor": conductor, "policy": state}, out / f"rank{trainer.args.process_index}.pt")
    if trainer.is_world_process_zero():
        keys = ("weights_BK", "advantages_B", "rewards_BK", "lengths_B")
        torch.save([{key: getattr(record, key) for key in keys} for record in records], out / "records.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
