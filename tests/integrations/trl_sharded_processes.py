"""Trains TRL's trainer in two processes under DDP and under FSDP2; test_trl_sharded.py runs this by torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from maestro_fast.weighting import build_weight_policy
from tests.cpu_sharding import shard_on_cpu
from tests.integrations.trl_two_processes import (
    RANK,
    SETTINGS,
    Recording,
    brevity,
    generate,
    parity,
)

LAYER = "Qwen3DecoderLayer"
FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": [LAYER]}
CASES: dict[str, dict[str, Any]] = {
    "trl": {},
    "ours": {"loss": "maestro_fast"},
    "reference": {"beta": 0.1, "iterations": 2, "profile": "maestro", "max_steps": 4},
    "lora": {"loss": "maestro_fast", "lora": True, "learning_rate": 1.0},
    "lora_reference": {"beta": 0.1, "lora": True, "learning_rate": 1.0},
}
SAVED = {"loss": "maestro_fast", "optim": "adamw_torch", "learning_rate": 0.01, "save_steps": 2, "max_steps": 4}


def train(
    checkpoint: str,
    run: Path,
    *,
    fsdp: dict[str, Any] | None = None,
    lora: bool = False,
    loss: Any = "trl",
    profile: str = "gdpo",
    iterations: int = 1,
    resume: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Trains on fixed responses; with ``resume``, from step 2 of the run in this folder."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate sets it, and it would outlive the run.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    args = GRPOConfig(
        str(run),
        num_iterations=iterations,
        max_grad_norm=0.0,  # Clipping would hide a gradient that is too large everywhere.
        save_strategy="steps" if "save_steps" in settings else "no",
        fsdp=fsdp is not None,
        fsdp_config=None if fsdp is None else dict(fsdp),
        **SETTINGS | {"learning_rate": 0.05, "optim": "sgd", "max_steps": 2} | settings,
    )
    torch.manual_seed(RANK)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    policy: Any = build_weight_policy(
        {"type": "conductor", "period": 1, "learning_rate": 0.1}, ("parity", "brevity"), 32
    )
    policy.weight.data.normal_(std=0.1)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
    trainer: Any = Recording(
        model,
        [parity, brevity],
        args,
        Dataset.from_list([{"prompt": f"prompt {i}" + " and so on" * (i % 3)} for i in range(24)]),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        peft_config=adapter if lora else None,
        weights=policy,
        profile=profile,
        loss=loss,
    )
    trainer.records = []
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2") if resume else None)
    trainer.save_model(str(run / "saved"))
    return {
        "sharded": type(next(trainer.model.parameters())).__name__ == "DTensor",
        "one_sweep": trainer._head_in_loss,
        "records": trainer.records,
        "conductor": policy.state_dict(),
        "policy": {name: whole(value.detach()) for name, value in trainer.model.named_parameters()},
        "kl": [line["kl"] for line in trainer.state.log_history if "kl" in line],
    }


def whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def main(checkpoint: str, out: Path) -> None:
    shard_on_cpu()
    type(AutoModelForCausalLM.from_pretrained(checkpoint)).generate = generate  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        for kind, fsdp in (("ddp", None), ("fsdp", FSDP2)):
            found[f"{name}/{kind}"] = train(checkpoint, out / name / kind, fsdp=fsdp, **case)
    for states in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        for kind, resume in (("uninterrupted", False), ("resumed", True)):
            fsdp = {**FSDP2, "state_dict_type": states}
            found[f"{states}/{kind}"] = train(checkpoint, out / states, fsdp=fsdp, resume=resume, **SAVED)
    try:
        train(checkpoint, out / "head", fsdp={**FSDP2, "transformer_layer_cls_to_wrap": [LAYER, "Linear"]})
    except ValueError as error:
        found["head"] = str(error)
    torch.save(found, out / f"rank{RANK}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
