"""test_sharded.py runs this in two processes: it trains tiny models with DDP and with FSDP2, and writes the results."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from maestro_fast.generation import Engine, Generator, SamplingConfig
from maestro_fast.model.head import whole
from maestro_fast.ops import PolicyLossConfig
from maestro_fast.records import StepRecord
from maestro_fast.rewards import build_rewards
from maestro_fast.training import BatchConfig, MaestroTrainer, Method, PromptDataset, parse_config, train
from maestro_fast.weighting import build_weight_policy
from tests.cpu_sharding import shard_on_cpu
from tests.training.copy_engine import CopyEngine
from tests.training.two_processes import GROUP, FixedGenerator, KillAt, Killed, brevity, parity, sparse

CASES: dict[str, dict[str, Any]] = {
    "full weights": {},
    "judged in the training forward": {"micro_batches": 1},
    "tied head, groups without a signal left out": {"tied": True, "rewards": [sparse], "batch": {"no_signal": "drop"}},
    "lora": {"lora": True},
    "sampled by the policy, evaluated": {"sampler": "policy", "eval_strategy": "steps", "eval_steps": 2},
    "sampled by an engine": {"sampler": "engine"},
    "sampled by an engine, lora": {"sampler": "engine", "lora": True},
    "bf16": {"bf16": True},
}
STATES = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")


def build(
    checkpoint: Path,
    run_dir: Path,
    *,
    micro_batches: int = 2,
    lora: bool = False,
    sampler: str = "fixed",
    rewards: list[Any] | None = None,
    batch: dict[str, Any] | None = None,
    records: list[StepRecord] | None = None,
    tied: bool = False,
    **changes: Any,
) -> MaestroTrainer:
    """A trainer of three steps, on the checkpoint of a tiny model that stands in ``checkpoint``."""
    torch.manual_seed(0)
    folder = checkpoint / ("tied" if tied else "untied")
    base = AutoModelForCausalLM.from_pretrained(folder)
    model: nn.Module = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")) if lora else base
    settings = {"learning_rate": 0.05, "optim": "sgd", "max_steps": 3, "save_strategy": "no", **changes}
    args = TrainingArguments(
        output_dir=str(run_dir),
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **settings,
    )
    reward_set = build_rewards(rewards or [parity, brevity])
    rows = [{"prompt": f"prompt {i}", "family": f"family {i % 2}"} for i in range(16)]
    sampling = SamplingConfig(group_size=GROUP, max_new_tokens=6)
    engine: Engine | None = None
    generator: Generator | None = FixedGenerator() if sampler == "fixed" else None
    if sampler == "engine":
        engine = CopyEngine(AutoModelForCausalLM.from_pretrained(folder), sampling)
    return MaestroTrainer(
        model,
        AutoTokenizer.from_pretrained(folder),
        PromptDataset(rows),
        reward_set,
        build_weight_policy({"type": "conductor", "period": 1, "learning_rate": 0.1}, reward_set.names, 32),
        args,
        Method(
            sampling,
            BatchConfig(4, 4 * GROUP // args.world_size // micro_batches, **(batch or {})),
            PolicyLossConfig(kl_coef=0.05),
        ),
        evaluation=PromptDataset(rows[:4]) if settings.get("eval_strategy") else None,
        generator=generator,
        engine=engine,
        observers=[] if records is None else [records.append],
    )


def fsdp(state: str = "FULL_STATE_DICT") -> dict[str, Any]:
    return {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": state}}


def policy(trainer: MaestroTrainer) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: whole(value.detach()).clone() for name, value in model.named_parameters()}


def largest_share(model: Any) -> float:
    """The largest share of its own weights that a module which FSDP2 has sharded holds now."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return max(p.to_local().numel() / p.numel() if hasattr(p, "to_local") else 1.0 for p in model.parameters())


def trained(trainer: MaestroTrainer, records: list[StepRecord]) -> dict[str, Any]:
    """What a run leaves, to be compared with another one's."""
    figures = [line for line in trainer.state.log_history if "loss" in line or any("eval_" in name for name in line)]
    timed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return {
        "policy": policy(trainer),
        "conductor": trainer.step.weights.state_dict(),
        "logs": [{name: value for name, value in line.items() if name not in timed} for line in figures],
        "completions": [record.completions for record in records],
        "share": largest_share(trainer.model),
    }


def equal(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Every case, with DDP and with FSDP2."""
    found: dict[str, Any] = {}
    for wrapping, settings in {"ddp": {}, "fsdp": fsdp()}.items():
        for name, case in CASES.items():
            records: list[StepRecord] = []
            trainer = build(checkpoint, out / "run", records=records, **case, **settings)
            trainer.train()
            found[f"{wrapping}: {name}"] = trained(trainer, records)
            if wrapping == "fsdp" and "lora" not in name:
                assert trainer.step.reference is not None
                with trainer.step.reference() as (reference, _):
                    pass
                found[f"reference: {name}"] = largest_share(reference)
    return found


def resume(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Four steps, and four that are killed in the third and resumed: both kinds of states, with and without LoRA."""
    found: dict[str, Any] = {}
    for state in STATES:
        for lora in (False, True):
            for run, step in (("whole", 0), ("killed", 3), ("resumed", 0)):
                run_dir = out / f"{state} {lora}" / ("whole" if run == "whole" else "killed")
                trainer = build(
                    checkpoint, run_dir, lora=lora, optim="adamw_torch", learning_rate=1e-3, max_steps=4,
                    save_strategy="steps", save_steps=1, **fsdp(state),
                )  # fmt: skip
                trainer.add_callback(KillAt(step))
                try:
                    trainer.train(resume_from_checkpoint=run == "resumed" or None)
                except Killed:
                    continue
                trainer.save_model(str(run_dir / "final"))
                found[f"{run}: {state} {lora}"] = trained(trainer, [])
    return found


def configured(checkpoint: Path, out: Path) -> dict[str, Any]:
    """A run from the config that ``checkpoint`` holds as JSON."""
    raw = json.loads(checkpoint.read_text(encoding="utf-8"))
    trainer = train(parse_config(raw), raw)
    return {"policy": policy(trainer), "logs": trainer.state.log_history}


if __name__ == "__main__":
    shard_on_cpu()
    scenarios = {"equal": equal, "resume": resume, "configured": configured}
    results = scenarios[sys.argv[3]](Path(sys.argv[1]), Path(sys.argv[2]))
    torch.save(results, Path(sys.argv[2]) / f"rank{os.environ['RANK']}.pt")
