"""Makes the transformers.TrainingArguments of a run, with our defaults, and refuses those that cannot be served."""

from __future__ import annotations

import logging
import math
from dataclasses import fields
from enum import Enum, EnumType
from functools import cache
from typing import Any, get_args, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SaveStrategy
from transformers.utils import is_torch_bf16_gpu_available

from maestro_fast.model.load import ModelConfig, trains_adapter
from maestro_fast.settings import SettingsError, convert, near
from maestro_fast.training.config import TrainConfig, known_elsewhere

logger = logging.getLogger(__name__)

# The defaults of transformers suit supervised training. These suit policy gradients and our run directory. Beside
# each default stands the sentence about it in the config reference.
TRAINER_DEFAULTS: dict[str, tuple[Any, str]] = {
    "learning_rate": (
        1e-6,
        "The learning rate of the policy, as in TRL's ``GRPOConfig``; 1e-5 if an adapter trains, because LoRA takes "
        "about ten times the rate of full training (LoRA Without Regret, Schulman et al. 2025).",
    ),
    "bf16": (
        False,
        "Mixed precision: matrix products in bfloat16 while the weights that train stay float32; true by default on "
        "GPUs that can, unless ``fp16`` or a ``model.dtype`` in half precision is set.",
    ),
    "lr_scheduler_type": ("constant", "The schedule of the learning rate."),
    "num_train_epochs": (1, "The number of passes over the prompts."),
    "logging_steps": (1, "The number of optimiser steps between two lines of the log."),
    "logging_nan_inf_filter": (False, "Leaves NaN and inf out of the logged loss; here they have to show."),
    "save_strategy": ("steps", "Says when checkpoints are written."),
    "save_steps": (100, "The number of optimiser steps between two checkpoints."),
    "save_total_limit": (2, "The number of checkpoints that are kept."),
    "report_to": ("none", "The trackers that get the log too; the run directory always gets it."),
}
ADAPTER_LEARNING_RATE = 1e-5  # The guide "LoRA Without Regret" in TRL's documentation has 1e-5 for 1e-6 of full GRPO.
_DERIVED = {  # the settings from which these fields follow
    "output_dir": "run_dir",
    "per_device_train_batch_size": "batch.micro_batch and batch.prompts_per_batch",
    "gradient_accumulation_steps": "batch.micro_batch and batch.updates_per_batch",
    "seed": "seed",
}
_REFUSED = {
    "save_only_model": "a run could not go on from such a checkpoint, which lacks the optimiser",
    "ignore_data_skip": "a resumed run would train on the first prompts of the epoch again",
    "auto_find_batch_size": "sizes follow from batch.*, lower batch.micro_batch where memory is short",
    "push_to_hub": "it uploads checkpoints that are not whole yet, upload the folder final/ after the run",
}


# Transformers would look at these fields only when the run has begun.
_AT_LEAST_0 = {
    "learning_rate", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps",
    "num_train_epochs", "save_steps", "save_total_limit", "eval_steps", "dataloader_num_workers",
}  # fmt: skip
_BELOW_1 = {"adam_beta1", "adam_beta2"}
_LOWER_IS_BETTER = ("kl", "/abstained", "/clipped_ratio")  # what the names of such metrics end with
MEDIA_TRACKERS = {"tensorboard", "wandb"}  # the trackers of the section ``trackers``
_OF_EVALUATION = ("eval_strategy", "eval_steps", "eval_on_start", "eval_delay")


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """Makes the ``TrainingArguments`` of a config.

    Raises:
        SettingsError: a field is unknown, of the wrong type, is set by another section, or cannot be served.
    """
    given = {name: _checked(name, value) for name, value in config.trainer.items()}
    defaults = {name: value for name, (value, _) in TRAINER_DEFAULTS.items()}
    defaults["learning_rate"] = default_learning_rate(config.model)
    full = config.model.dtype in ("auto", "float32") and not given.get("fp16") and not given.get("use_cpu")
    defaults["bf16"] = full and is_torch_bf16_gpu_available()
    values = {**defaults, **given, "output_dir": config.run_dir, "seed": config.seed}
    if config.evaluation is not None:
        values = {"eval_strategy": "steps", "eval_steps": values["save_steps"], **values}
    else:
        for name in _OF_EVALUATION:
            if values.get(name) and str(values[name]) != "no":
                raise SettingsError(f"trainer.{name}: there are no prompts for it, expected a section evaluation")
    by_training = bool(given.get("load_best_model_at_end")) and config.evaluation is None
    if given.get("load_best_model_at_end") and given.get("metric_for_best_model") is None:
        raise SettingsError("trainer.load_best_model_at_end: expected trainer.metric_for_best_model, such as reward")
    if str(given.get("metric_for_best_model")).endswith(_LOWER_IS_BETTER):
        values.setdefault("greater_is_better", False)  # transformers would only think so of a loss.
    if by_training:  # transformers knows no other judge than an evaluation.
        values["load_best_model_at_end"] = False
    try:
        args = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise SettingsError(f"trainer: {' '.join(str(error).split())}") from error
    args.load_best_model_at_end |= by_training
    check_arguments(args)
    if args.load_best_model_at_end and args.save_strategy == SaveStrategy.NO:
        raise SettingsError("trainer.load_best_model_at_end: needs checkpoints, expected trainer.save_strategy: steps")
    _check_media(config, args)
    return args


def default_learning_rate(model: ModelConfig) -> float:
    """The learning rate where the config sets none."""
    full: float = TRAINER_DEFAULTS["learning_rate"][0]
    return ADAPTER_LEARNING_RATE if trains_adapter(model) else full


def mixed_precision(args: TrainingArguments) -> torch.dtype | None:
    """The dtype of autocast in a run; None without mixed precision."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def check_arguments(args: TrainingArguments) -> None:
    """Refuses arguments that the trainer cannot serve.

    Raises:
        SettingsError: an argument cannot be served, a tracker is not installed, or the process sees several GPUs.
    """
    for name, reason in _REFUSED.items():
        if getattr(args, name):
            raise SettingsError(f"trainer.{name}: {getattr(args, name)} is not supported: {reason}")
    _check_trackers(args)
    if args.n_gpu > 1:
        raise SettingsError(
            f"trainer: one process sees {args.n_gpu} GPUs, expected one each: start the run with "
            f"torchrun --nproc_per_node={args.n_gpu}, or name one GPU in CUDA_VISIBLE_DEVICES"
        )


def _check_trackers(args: TrainingArguments) -> None:
    """Makes the callback of each tracker, which finds out whether its package is installed, and drops it."""
    for name in args.report_to or []:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(["none", "all", *INTEGRATION_TO_CALLBACK])
            raise SettingsError(
                f"trainer.report_to: {name!r}, expected one of {known}{near(name, INTEGRATION_TO_CALLBACK)}"
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise SettingsError(
                f"trainer.report_to: {name} cannot serve: {' '.join(str(error).split())} Or report to none."
            ) from error


def _check_media(config: TrainConfig, args: TrainingArguments) -> None:
    """Says which trackers ``all`` stands for, since they may send data elsewhere, and looks for those of histograms."""
    found = ", ".join(args.report_to or []) or "none, because no tracker is installed"
    if config.trainer.get("report_to") in ("all", ["all"]) and args.process_index == 0:
        logger.warning("trainer.report_to: all is %s here", found)
    if config.trackers is not None and not set(args.report_to or []) & MEDIA_TRACKERS:
        raise SettingsError(f"trackers: trainer.report_to is {found}, expected {' or '.join(sorted(MEDIA_TRACKERS))}")


@cache
def _hints() -> dict[str, Any]:
    """The type of each field. That of ``fsdp`` leaves out what transformers takes, because of its command line."""
    hints = get_type_hints(TrainingArguments) | {"fsdp": bool | str | list[str] | None}
    return {item.name: hints[item.name] for item in fields(TrainingArguments) if item.init}


def _checked(name: str, value: Any) -> Any:
    """The value of a field, with text such as "1e-5", which YAML 1.1 does not read as a number, turned into one.

    Raises:
        SettingsError: there is no such field, another section sets it, or the value is of the wrong type or too small.
    """
    path = f"trainer.{name}"
    if name in _DERIVED:
        raise SettingsError(f"{path}: is set by {_DERIVED[name]}")
    if name not in _hints():
        hint = known_elsewhere(path, value) or near(name, _hints()).removeprefix("; ")
        raise SettingsError(f"{path}: transformers.TrainingArguments has no such field{f'; {hint}' if hint else ''}")
    hint = _hints()[name]
    kinds: list[Any] = [kind for kind in get_args(hint) if isinstance(kind, EnumType)]
    options = [item.value for kind in kinds for item in kind]
    if options and value is False and "no" in options:  # YAML 1.1 reads a plain `no` as false.
        value = "no"
    if name == "report_to" and value is None:  # transformers takes the word alone.
        value = "none"
    found = convert(value, hint, path)
    if options and (found.value if isinstance(found, Enum) else found) not in options:
        raise SettingsError(f"{path}: {value!r}, expected one of {', '.join(options)}{near(value, options)}")
    if isinstance(found, int | float):
        if name in _AT_LEAST_0 and not 0 <= found < math.inf:
            raise SettingsError(f"{path}: {value}, expected a finite number of at least 0")
        if name in _BELOW_1 and not found < 1:
            raise SettingsError(f"{path}: {value}, expected a number below 1")
        if name == "max_steps" and found < 1 and found != -1:
            raise SettingsError(f"{path}: {value}, expected at least 1, or -1 to train for num_train_epochs")
    return value if isinstance(value, int) else found  # A whole number stays one: some fields are a count or a share.
