"""Runs a training from its config: everything is checked, the cheapest first, then built, then trained."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from maestro_fast.config_file import absolute_paths
from maestro_fast.data.conditions import check_conditions
from maestro_fast.data.dataset import PromptDataset
from maestro_fast.data.load import load_prompts
from maestro_fast.generation import (
    Engine,
    GenerationConfig,
    SamplingConfig,
    Served,
    TransformersConfig,
    build_engine,
    check_generation,
    generation_config,
)
from maestro_fast.generation.transformers import stop_ids
from maestro_fast.model.head import causal_lm, vocabulary_of
from maestro_fast.model.load import Checkpoint, load_policy
from maestro_fast.model_path import check_model_path, loading_model
from maestro_fast.records import StepRecord
from maestro_fast.rewards import RewardSet, build_anchor, build_rewards, check_tags_are_seen
from maestro_fast.settings import SettingsError
from maestro_fast.training.arguments import default_learning_rate, mixed_precision, training_arguments
from maestro_fast.training.best_policy import ABOUT_FILE
from maestro_fast.training.config import TrainConfig
from maestro_fast.training.evaluation import check_best_metric, keep_subset
from maestro_fast.training.health import NonFiniteError
from maestro_fast.training.plan import Method
from maestro_fast.training.rescue import how_to_go_on
from maestro_fast.training.run_directory import open_run_directory, staged
from maestro_fast.training.trainer import MaestroTrainer
from maestro_fast.training.weight_sync import check_room
from maestro_fast.watching import Alarm, Alarms, check_alarms
from maestro_fast.weighting import build_weight_policy

logger = logging.getLogger(__name__)
MERGED = "merged"  # base + adapter, where model.adapter: merge and model.lora train a new adapter on them


def train(
    config: TrainConfig,
    raw: dict[str, Any],
    *,
    resume: bool = False,
    observers: Sequence[Callable[[StepRecord], None]] = (),
    timing_observers: Sequence[Callable[[dict[str, float]], None]] = (),
    callbacks: Sequence[TrainerCallback] = (),
    alarm_observers: Sequence[Callable[[Alarm], None]] = (),
    attach: Callable[[MaestroTrainer], None] = lambda trainer: None,
) -> MaestroTrainer:
    """Trains, and leaves config.yaml, checkpoints and the final policy (``final/``) in the run directory.

    Args:
        config: the run.
        raw: the mapping that ``config`` was read from; it is written to config.yaml, with absolute paths.
        resume: go on from the last checkpoint of the run directory.
        observers, timing_observers, callbacks: as ``MaestroTrainer`` takes them.
        alarm_observers: functions that get each alarm that rings, on the main process.
        attach: called with the trainer before it trains.
    """
    prepared = prepare(config)
    callbacks = [*callbacks, Alarms(config.alarms, alarm_observers)] if config.alarms else callbacks
    with open_run_directory(Path(config.run_dir), prepared.args, resume=resume) as run_dir:
        merged = run_dir / MERGED if prepared.args.process_index == 0 else None
        loaded = load(prepared, merged)
        longest = check_loaded(prepared, *loaded)
        with built_trainer(prepared, *loaded, longest, observers, timing_observers, callbacks) as trainer:
            attach(trainer)
            if trainer.is_world_process_zero():
                written = yaml.safe_dump(absolute_paths(raw, Path.cwd()), sort_keys=False)
                (run_dir / "config.yaml").write_text(written, encoding="utf-8")
                (run_dir / "data.txt").write_text("\n".join(about_data(prepared)) + "\n", encoding="utf-8")
            with trainer.interrupts.caught(f"Training had ended; its policy is in {run_dir / 'final'}."):
                trainer.train(resume_from_checkpoint=resume or None)
                _save_final(trainer, run_dir)
    return trainer


@dataclass(frozen=True)
class Prepared:
    """What of a run was made and checked before a model is loaded. Training and ``maestro-fast check`` begin with it.

    Attributes:
        config: the run.
        args, method: the options of ``transformers.Trainer``, and what is done in a step.
        dataset, evaluation: the prompts, and the held-out ones or None.
        rewards, anchor: the rewards, and the utility or None.
        keep_best: whether the best policy is kept.
        generation: what samples the responses.
    """

    config: TrainConfig
    args: TrainingArguments
    method: Method
    dataset: PromptDataset
    evaluation: PromptDataset | None
    rewards: RewardSet
    anchor: RewardSet | None
    keep_best: bool
    generation: GenerationConfig


def prepare(config: TrainConfig) -> Prepared:
    """Checks everything of a run that can be checked without its model, and makes it. Nothing is written.

    Raises:
        SettingsError, ValueError, FileNotFoundError, ImportError: something is wrong; the message names the setting.
    """
    args = training_arguments(config)
    check_model_path(config.model.path)
    method = config.method  # A loss of the user's own is loaded here, before a model is.
    dataset, evaluation = load_prompts(config.data, config.chat), None
    dataset.check_enough(config.batch.prompts_per_batch)
    if config.evaluation is not None:
        evaluation = load_prompts(config.evaluation.data, config.chat, field="evaluation.data")
        keep_subset(evaluation, config.evaluation.prompts, config.seed)
    rewards = build_rewards(config.rewards)
    anchor = None if config.anchor is None else build_anchor(config.anchor)
    policy = build_weight_policy(config.weights, rewards.names, 1)  # This finds unknown names before a model is loaded.
    check_conditions(rewards, anchor, policy, dataset, evaluation)
    keep_best = _keeps_best(config, args)
    check_best_metric(args, rewards.names, evaluation, anchor is not None)
    check_alarms(config.alarms, rewards.names, evaluates=evaluation is not None)
    generation = generation_config(config.generation)
    check_generation(generation, args.device, args.world_size)
    return Prepared(config, args, method, dataset, evaluation, rewards, anchor, keep_best, generation)


def load(prepared: Prepared, merged: Path | None = None) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Loads the policy and its tokenizer.

    Args:
        merged: as ``load_policy`` takes it.
    """
    config, args = prepared.config, prepared.args
    set_seed(config.seed)  # New adapters are drawn at random.
    with loading_model(config.model.path):
        found = load_policy(config.model, args.device, mixed=mixed_precision(args), merged=merged)
    if "learning_rate" not in config.trainer:  # Only now is it known whether a hub name stands for an adapter.
        args.learning_rate = default_learning_rate(config.model)
    return found


def check_loaded(prepared: Prepared, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Checks data and rewards against the model and its tokenizer.

    Returns:
        The number of tokens of the longest prompt.
    """
    config, anchor = prepared.config, prepared.anchor
    longest = _check_prompts(config, model, tokenizer, prepared.dataset, prepared.evaluation)
    for sentence in about_data(prepared):
        logger.info("%s", sentence)
    judges = prepared.rewards.rewards + (() if anchor is None else anchor.rewards)
    check_tags_are_seen(judges, tokenizer, config.sampling.skip_special_tokens)
    return longest


def about_data(prepared: Prepared) -> list[str]:
    """Sentences on the prompts of a run: how many there are, and what has become of those that were too long."""
    return [line for data in (prepared.dataset, prepared.evaluation) if data is not None for line in data.describe()]


@contextlib.contextmanager
def built_trainer(
    prepared: Prepared,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    longest_prompt: int,
    observers: Sequence[Callable[[StepRecord], None]] = (),
    timing_observers: Sequence[Callable[[dict[str, float]], None]] = (),
    callbacks: Sequence[TrainerCallback] = (),
) -> Iterator[MaestroTrainer]:
    """Gives the trainer of a run, with its engine if there is one, which is closed at the end.

    Args:
        longest_prompt: the number of tokens of the longest prompt, from ``check_loaded``.
        observers, timing_observers, callbacks: as ``MaestroTrainer`` takes them.
    """
    config, generation = prepared.config, prepared.generation
    width = model.config.get_text_config().hidden_size  # type: ignore[union-attr,operator]
    with _engine(config, generation, model, tokenizer, prepared.args, longest_prompt) as engine:
        if engine is not None:
            check_room(engine, longest_prompt, config.sampling)
        trainer = MaestroTrainer(
            model,
            tokenizer,
            prepared.dataset,
            prepared.rewards,
            build_weight_policy(config.weights, prepared.rewards.names, int(width)),
            prepared.args,
            prepared.method,
            evaluation=prepared.evaluation,
            anchor=prepared.anchor,
            keep_best=prepared.keep_best,
            engine=engine,
            probe=None if isinstance(generation, TransformersConfig) else generation.probe,
            observers=observers,
            timing_observers=timing_observers,
            callbacks=list(callbacks),
        )
        yield trainer


@contextlib.contextmanager
def _engine(
    config: TrainConfig,
    generation: GenerationConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    longest_prompt: int,
) -> Iterator[Engine | None]:
    """Gives the engine that ``generation`` asks for, or None, and closes it at the end."""
    engine = build_engine(
        generation,
        Served(
            path=Checkpoint.at(config.model.path).base,  # An engine cannot load an adapter; it gets merged weights.
            tokenizer=tokenizer,
            sampling=config.sampling,
            stop_ids=frozenset(stop_ids(causal_lm(model), tokenizer)),
            dtype=mixed_precision(args) or next(model.parameters()).dtype,
            device=args.device,
            processes=args.world_size,
            longest_prompt=longest_prompt,
            positions=getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None),
        ),
    )
    try:
        yield engine
    finally:
        if engine is not None:
            engine.close()


def _check_prompts(
    config: TrainConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PromptDataset,
    evaluation: PromptDataset | None,
) -> int:
    """Checks that the model can read all prompts, and that these and the responses fit into it.

    Returns:
        The number of tokens of the longest prompt.
    """
    vocabulary = vocabulary_of(causal_lm(model))
    longest = 0
    for data in (dataset, evaluation):
        if data is not None:
            longest = max(longest, data.check_prompts(tokenizer, vocabulary))
    dataset.check_enough(config.batch.prompts_per_batch)  # Some prompts may have been left out as too long.
    check_positions(model, longest, config.sampling)
    return longest


def check_positions(model: nn.Module, longest_prompt: int, sampling: SamplingConfig) -> None:
    """Checks that the longest prompt, in tokens, and the longest response fit into the model's positions.

    For a model with rotary positions it only warns, because such a model computes something past the positions that it
    was trained on.

    Raises:
        ValueError: they do not fit, and the model has no rotary positions.
    """
    language_model = causal_lm(model)
    config = language_model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or longest_prompt + sampling.max_new_tokens <= positions:
        return
    complaint = (
        f"sampling.max_new_tokens: {sampling.max_new_tokens} after the longest prompt of {longest_prompt} tokens, "
        f"expected at most {positions} together, the positions of {type(language_model).__name__}"
    )
    if getattr(config, "rope_parameters", None) is None:  # The positions are a table of that length.
        raise ValueError(complaint)
    logger.warning(complaint)


def _keeps_best(config: TrainConfig, args: TrainingArguments) -> bool:
    if config.final == "auto":
        return config.weights.trains_on_utility and not args.load_best_model_at_end
    if config.final == "best" and config.anchor is None:
        raise SettingsError("final: best, but no utility is known, expected a section anchor")
    if config.final == "best" and args.load_best_model_at_end:
        raise SettingsError("final: best, but trainer.load_best_model_at_end picks another one, expected one of them")
    return config.final == "best"


def _save_final(trainer: MaestroTrainer, run_dir: Path) -> None:
    if trainer.best is not None:
        trainer.best.load_into(trainer.model, trainer.accelerator)
    step = trainer.state.global_step
    try:
        trainer.health.check_parameters(step)
    except NonFiniteError as error:
        error.add_note(how_to_go_on(error, step, None, get_last_checkpoint(str(run_dir))))
        raise
    with staged(run_dir, trainer.accelerator) as folder:
        trainer.save_model(str(folder / "final"))
        if trainer.is_world_process_zero():
            trainer.checkpoints.save_weights(folder / "final")
            if trainer.best is not None:
                (folder / "final" / ABOUT_FILE).write_text(json.dumps(trainer.best.about) + "\n", encoding="utf-8")
