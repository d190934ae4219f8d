"""Trains on fixed responses and saves the results; test_trl_distributed.py runs this in one process or two."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import GRPOConfig

from maestro_fast.integrations.trl import MaestroGRPOTrainer
from maestro_fast.weighting import build_weight_policy

PAD = 1
GROUP, GROUPS = 4, 3  # With two processes, each of them has half of the second group.
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def generate(self: Any, input_ids: Tensor, **_options: Any) -> Tensor:
    """Computes each response from its prompt and its place in the group, so that it does not depend on the process."""
    rows = []
    for i, prompt in enumerate(input_ids.tolist()):
        place, number = (RANK * len(input_ids) + i) % GROUP, sum(t for t in prompt if t != PAD) % 11
        length = 2 + (3 * number + place) % 6
        rows.append([20 + (7 * number + 5 * place + 3 * t) % 200 for t in range(length)] + [0] + [PAD] * (8 - length))
    return torch.cat([input_ids, torch.tensor(rows)], dim=1)


class Recording(MaestroGRPOTrainer):
    """Keeps rewards, weights and advantages of every generation batch, over all processes."""

    def _weigh(self, batch: Any, rewards_BK: Tensor) -> None:
        super()._weigh(batch, rewards_BK)
        assert self._row_weights is not None
        self.records.append({"rewards": rewards_BK, "weights": self._row_weights.weights_BK})

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        self.records[-1]["advantages"] = self.accelerator.gather(output["advantages"])
        return output


def parity(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [float(sum(ids) % 5) for ids in completion_ids]


def brevity(completion_ids: list[list[int]], **columns: object) -> list[float | None]:
    return [None if sum(ids) % 7 == 0 else -float(len(ids)) for ids in completion_ids]


CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)
SETTINGS: dict[str, Any] = {  # of every run in two processes
    "per_device_train_batch_size": GROUP // PROCESSES,
    "steps_per_generation": GROUPS,
    "gradient_accumulation_steps": GROUPS,
    "num_generations": GROUP,
    "max_completion_length": 9,
    "lr_scheduler_type": "constant",
    "loss_type": "grpo",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    CHECKPOINTING: False,
}


def main(checkpoint: str, out: Path, iterations: int, profile: str, loss: Any) -> None:
    """Trains. With two ``iterations`` TRL scores old log-probs, and the hidden states come from that forward."""
    args = GRPOConfig(
        str(out / "run"),
        num_iterations=iterations,
        max_steps=4,
        logging_steps=1,
        learning_rate=0.05,
        optim="sgd",
        save_strategy="no",
        **SETTINGS,
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    type(model).generate = generate
    policy: Any = build_weight_policy(
        {"type": "conductor", "period": 1, "learning_rate": 0.1}, ("parity", "brevity"), 32
    )
    torch.manual_seed(RANK)  # TRL seeds its processes like this, so the policies start out different.
    policy.weight.data.normal_(std=0.1)
    trainer: Any = Recording(
        model,
        [parity, brevity],
        args,
        Dataset.from_list([{"prompt": f"prompt {i}" + " and so on" * (i % 3)} for i in range(24)]),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        weights=policy,
        profile=profile,
        loss=loss,
    )
    trainer.records = []
    trainer.train()
    parameters = {name: value.detach() for name, value in trainer.model.named_parameters()}
    tokens = [
        (line["tokens/computed"], line["tokens/of_sequences"])
        for line in trainer.state.log_history
        if "tokens/computed" in line
    ]
    result = {
        "records": trainer.records,
        "conductor": policy.state_dict(),
        "policy": parameters,
        "tokens": tokens,
        "regroups": trainer._regroups,
    }
    torch.save(result, out / f"rank{RANK}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
