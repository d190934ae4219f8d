"""A run from its config: everything is checked in order of cost, then built, then trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from maestro_fast.records import StepRecord
from maestro_fast.rewards import build_anchor, build_rewards
from maestro_fast.settings import SettingsError
from maestro_fast.training.attention import attention_choice, use_attention
from maestro_fast.training.checkpoint import staged
from maestro_fast.training.config import ModelConfig, TrainConfig
from maestro_fast.training.data import load_prompts
from maestro_fast.training.trainer import MaestroTrainer
from maestro_fast.weighting import build_weight_policy

logger = logging.getLogger(__name__)

# transformers' own defaults suit supervised training; these suit policy gradients and a run directory of ours
_TRAINER_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "num_train_epochs": 1,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,  # a NaN loss has to show
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 2,
    "report_to": "none",
}
_DERIVED = {
    "output_dir": "run_dir",
    "per_device_train_batch_size": "batch.micro_batch and batch.prompts_per_batch",
    "gradient_accumulation_steps": "batch.micro_batch and batch.updates_per_batch",
    "seed": "seed",
}


def load_policy(config: ModelConfig, device: torch.device | None = None) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model, with adapters if configured, and tokenizer.

    Args:
        device: where it is going to run, which decides on its attention; it is loaded into host memory.

    Raises:
        SettingsError: ``model.attention`` cannot serve on the device, in this dtype, or this model.
    """
    attention_choice(config.attention, device)  # refused before the weights are read
    tokenizer = AutoTokenizer.from_pretrained(config.path)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        config.path,
        dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
        attn_implementation=None if config.attention in ("auto", "varlen") else config.attention,
    )
    _set_attention(model, config.attention, device)
    if config.lora is None:
        return model, tokenizer
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('model.lora: needs peft, pip install "maestro-fast[peft]"') from error
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora), tokenizer


def _set_attention(model: Any, wanted: str, device: torch.device | None) -> None:
    """Settles the attention now that the dtype is known."""
    implementation, reason = attention_choice(wanted, device, model.dtype)
    loaded = model.config._attn_implementation
    if implementation not in (loaded, "sdpa"):  # a model without SDPA was loaded with eager attention
        try:
            use_attention(model, implementation)
        except (ValueError, ImportError) as error:
            if wanted != "auto":
                raise SettingsError(f"model.attention: {wanted} cannot serve: {error}") from error
            reason = f"{implementation} was the choice, but {error}"
    logger.info("attention: %s, %s", model.config._attn_implementation, reason)


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """``TrainingArguments`` of a config.

    Raises:
        SettingsError: an unknown field, or one that follows from another section.
    """
    known = {item.name: item.type for item in fields(TrainingArguments)}
    for name in config.trainer:
        if name in _DERIVED:
            raise SettingsError(f"trainer.{name}: is set by {_DERIVED[name]}")
        if name not in known:
            raise SettingsError(f"trainer.{name}: transformers.TrainingArguments has no such field")
    given = {name: _number(value, str(known[name])) for name, value in config.trainer.items()}
    values = {**_TRAINER_DEFAULTS, **given, "output_dir": config.run_dir, "seed": config.seed}
    if config.evaluation is not None:
        values = {"eval_strategy": "steps", "eval_steps": values["save_steps"], **values}
    elif str(values.get("eval_strategy", "no")) != "no":
        raise SettingsError("trainer.eval_strategy: there are no prompts for it, expected a section evaluation")
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError) as error:
        raise SettingsError(f"trainer: {error}") from error


def _number(value: Any, field_type: str) -> Any:
    """YAML 1.1 reads 1e-5 as text; a field for a float takes it as the number that was meant."""
    if not isinstance(value, str) or "float" not in field_type:
        return value
    try:
        return float(value)
    except ValueError:
        return value


def prepare_run_dir(config: TrainConfig, *, resume: bool) -> Path:
    """Makes the run directory and proves that it can be written to.

    Raises:
        SettingsError: it cannot, or it holds another run (or, to resume, none).
    """
    path = Path(config.run_dir)
    held = (path / "config.yaml").exists()
    if held and not resume:
        raise SettingsError(f"run_dir: {path} holds a run already, expected a new directory, or --resume")
    if resume and get_last_checkpoint(str(path) if path.is_dir() else ".") is None:
        raise SettingsError(f"run_dir: {path} holds no checkpoint to resume from")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise SettingsError(f"run_dir: cannot write to {path}: {error.strerror}") from error
    return path


def train(
    config: TrainConfig,
    raw: dict[str, Any],
    *,
    resume: bool = False,
    observers: Sequence[Callable[[StepRecord], None]] = (),
    timing_observers: Sequence[Callable[[dict[str, float]], None]] = (),
    callbacks: Sequence[TrainerCallback] = (),
) -> MaestroTrainer:
    """Trains, and leaves config.yaml, checkpoints and the final policy (``final/``) in the run directory.

    Args:
        config: the run; ``raw`` is the mapping it came from, written to config.yaml as it is.
        resume: go on from the last checkpoint of the run directory.
        observers, timing_observers, callbacks: as ``MaestroTrainer`` takes them.
    """
    args = training_arguments(config)
    dataset = load_prompts(config.data)
    evaluation = None if config.evaluation is None else load_prompts(config.evaluation.data)
    rewards = build_rewards(config.rewards)
    anchor = None if config.anchor is None else build_anchor(config.anchor)
    build_weight_policy(config.weights, rewards.names, 1)  # unknown names are found before a model is loaded
    run_dir = prepare_run_dir(config, resume=resume)
    set_seed(config.seed)  # fresh adapters are drawn here
    model, tokenizer = load_policy(config.model, args.device)
    dataset.check_lengths(tokenizer, config.data.max_prompt_tokens)
    if config.evaluation is not None and evaluation is not None:
        evaluation.check_lengths(tokenizer, config.evaluation.data.max_prompt_tokens)
    width = model.config.get_text_config().hidden_size  # type: ignore[union-attr,operator]
    trainer = MaestroTrainer(
        model,
        tokenizer,
        dataset,
        rewards,
        build_weight_policy(config.weights, rewards.names, int(width)),
        args,
        config.method,
        evaluation=evaluation,
        anchor=anchor,
        observers=observers,
        timing_observers=timing_observers,
        callbacks=list(callbacks),
    )
    if config.model.attention == "varlen" and trainer.pipeline.layout != "varlen":
        raise SettingsError("model.attention: varlen does not serve this model, for the reason logged as its layout")
    if trainer.is_world_process_zero():
        (run_dir / "config.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    trainer.train(resume_from_checkpoint=resume or None)
    with staged(run_dir, trainer.accelerator) as folder:
        trainer.save_model(str(folder / "final"))
        if trainer.is_world_process_zero():
            trainer.save_weight_policy(folder / "final")
    return trainer
