"""``maestro-fast check``: everything that a run checks before its first step, and one step tried, without training.

The run is prepared, loaded and built by the functions that ``training.run.train`` calls. Nothing is written: what
transformers wants to write goes to a folder that is removed at the end. The check prints as it goes:

    the data         rows, columns, families, lengths, and the first prompt as the policy reads it
    the rewards      each on real responses of the policy to a few prompts, and two responses in full
    the memory       what a step holds, part by part, and which micro-batch fits
    the time         how long a step may take

and then says "ready", or what has to change.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from maestro_fast.generation import TransformersConfig
from maestro_fast.model.head import causal_lm
from maestro_fast.reporting.tables import Table, format_table
from maestro_fast.settings import SettingsError
from maestro_fast.starting.activations import Shape, measure
from maestro_fast.starting.facts import can_write, data_table, positions_of, prompt_lengths, shown_prompt, skeleton
from maestro_fast.starting.memory import SHARE, About, Room, StepMemory, gib, step_memory
from maestro_fast.starting.pace import duration, pace_table, stages
from maestro_fast.starting.trial import Trial, try_step, try_training
from maestro_fast.training.config import TrainConfig, parse_config
from maestro_fast.training.run import Prepared, built_trainer, check_loaded, load, prepare
from maestro_fast.training.run_directory import holds_run
from maestro_fast.training.trainer import MaestroTrainer

_SHARDING = ("fsdp", "fsdp_config", "deepspeed")


@dataclass
class Findings:
    """What the check has to say at the end.

    Attributes:
        say: prints a text or a table as soon as it is known.
        wrong: what has to change before the run.
        notes: what is worth a look.
    """

    say: Callable[[str | Table], None]
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def verdict(self) -> str:
        """The last lines: what has to change, or that the run is ready, and what is worth a look."""
        notes = [f"- {note}" for note in self.notes]
        if self.wrong:
            lines = ["What has to change before this run:", *(f"- {problem}" for problem in self.wrong)]
            return "\n".join([*lines, *(["Worth a look:", *notes] if notes else [])])
        return "\n".join([*(["Worth a look:", *notes, ""] if notes else []), "ready"])


@dataclass(frozen=True)
class CheckOptions:
    """How much is tried.

    Attributes:
        prompts: the number of prompts that are answered.
        tokens: the largest number of tokens of a response where the policy samples itself; vLLM takes the run's own.
        width: the columns of the terminal.
    """

    prompts: int = 4
    tokens: int = 64
    width: int = 100


def check(raw: dict[str, Any], options: CheckOptions) -> bool:
    """Checks a run, and prints what it finds.

    Args:
        raw: the mapping of the run's config, with absolute paths.
        options: how much is tried.

    Returns:
        Whether the run is ready.

    Raises:
        SettingsError, ValueError, FileNotFoundError, ImportError: the run cannot even be built, as ``train`` would say.
    """
    width = min(max(80, options.width), 120)
    findings = Findings(lambda text: print(f"{format_table(text, width) if isinstance(text, Table) else text}\n"))
    config = parse_config(raw)
    _check_run_dir(Path(config.run_dir), findings)
    folder = tempfile.mkdtemp(prefix="maestro-fast-check-")
    try:
        prepared = _prepared(config, folder, options, findings)
        _check(prepared, options, findings)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(findings.verdict())
    return not findings.wrong


def fitting_micro_batch(raw: dict[str, Any], most: int) -> int:
    """The largest micro-batch, of at most ``most`` responses, with which a step of a run fits; 1 if none does."""
    folder = tempfile.mkdtemp(prefix="maestro-fast-check-")
    try:
        return _fitting(_prepared(parse_config(raw), folder, CheckOptions(), Findings(lambda text: None)), most)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        gc.collect()  # A trainer refers to itself. The check that follows is to find the memory as a run does.


def _fitting(prepared: Prepared, most: int) -> int:
    room = Room.now(prepared.args.device)
    model, tokenizer = load(prepared)
    longest = check_loaded(prepared, model, tokenizer)
    with built_trainer(prepared, model, tokenizer, longest) as trainer:
        plan = trainer.step.plan
        memory = _memory(trainer, prepared, model, longest, room)
        return memory.largest_micro_batch(plan.responses // plan.updates, most) or 1


def _check_run_dir(run_dir: Path, findings: Findings) -> None:
    if holds_run(run_dir):
        findings.wrong.append(f"run_dir: {run_dir} holds a run already, take a new directory, or train with --resume")
    elif not can_write(run_dir):
        findings.wrong.append(f"run_dir: cannot write to {run_dir}")


def _prepared(config: TrainConfig, folder: str, options: CheckOptions, findings: Findings) -> Prepared:
    """The run as ``train`` prepares it, but in another directory, without trackers, and with short responses."""
    trainer = {name: value for name, value in config.trainer.items() if name not in _SHARDING or not value}
    if trainer.keys() != config.trainer.keys():
        findings.notes.append("trainer: weights are sharded in the run; the check has them whole, in one process")
    prepared = prepare(replace(config, run_dir=folder, trainer=trainer))
    args, sampling = prepared.args, prepared.method.sampling
    if args.world_size > 1:
        raise SettingsError(f"check: started as {args.world_size} processes, expected one, without torchrun")
    args.report_to, args.disable_tqdm = [], True
    if isinstance(prepared.generation, TransformersConfig):
        sampling = replace(sampling, max_new_tokens=min(options.tokens, sampling.max_new_tokens))
    return replace(prepared, method=replace(prepared.method, sampling=sampling))


def _check(prepared: Prepared, options: CheckOptions, findings: Findings) -> None:
    config, room = prepared.config, Room.now(prepared.args.device)
    weights = 4.0 * sum(p.numel() for p in skeleton(config.model.path).parameters())
    if weights / 4 > room.free:  # Not even one byte for a parameter.
        raise SettingsError(f"model.path: {gib(weights)} GiB of float32 weights, there are {gib(room.free)} GiB in all")
    model, tokenizer = load(prepared)
    try:
        longest = check_loaded(prepared, model, tokenizer)  # This may drop or cut prompts that are too long.
    finally:
        _show_data(prepared, model, tokenizer, findings)
    with built_trainer(prepared, model, tokenizer, longest) as trainer:
        if trainer.args.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)  # type: ignore
        prompts = _some_prompts(prepared, tokenizer, options.prompts)
        trial = try_step(trainer, model, prompts)
        _show_trial(trial, findings, options)
        memory = _memory(trainer, prepared, model, longest, room)
        findings.say(memory.table())
        _judge_memory(memory, trainer, findings)
        if trial.micro_batches and memory.fits:
            try_training(trainer, model, trial)
        if any(each.error for each in trial.judged):
            return  # How long a reward takes to fail says nothing about the run.
        found = stages(trainer.step, trial, memory.batch)
        findings.say(pace_table(found, memory.batch))
        _show_length(
            trainer, len(prepared.dataset.rows), (sum(x.least for x in found), sum(x.most for x in found)), findings
        )


def _show_data(prepared: Prepared, model: nn.Module, tokenizer: PreTrainedTokenizerBase, findings: Findings) -> None:
    dataset, sampling = prepared.dataset, prepared.config.sampling
    lengths = prompt_lengths(dataset, tokenizer)
    findings.say(data_table(dataset, lengths, sampling, positions_of(causal_lm(model).config)))
    findings.say(shown_prompt(dataset.prompts(dataset.rows[:1], tokenizer), tokenizer))


def _some_prompts(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, count: int) -> Any:
    """The first prompts of each task family in turn."""
    dataset, of_family = prepared.dataset, dict[str, list[int]]()
    for i, family in enumerate(dataset.families):
        of_family.setdefault(family, []).append(i)
    turns = [i for turn in zip_longest(*of_family.values()) for i in turn if i is not None]
    return dataset.prompts([dataset.rows[i] for i in turns[:count]], tokenizer)


def _show_trial(trial: Trial, findings: Findings, options: CheckOptions) -> None:
    findings.say(trial.rewards_table())
    for response in trial.shown_responses():
        findings.say(response)
    findings.wrong += [f"rewards: {each.name!r} failed: {each.error}" for each in trial.judged if each.error]
    lengths, cut = trial.rollouts.completion_lengths_B, int(trial.rollouts.truncated_B.sum())
    findings.say(
        f"Responses have {int(lengths.min())} to {int(lengths.max())} tokens, {lengths.double().mean():.0f} on "
        f"average; {cut} of {len(lengths)} were cut off."
    )
    for each in trial.judged:
        if each.values_B is not None and bool(each.values_B.isnan().all()):
            findings.notes.append(f"rewards: {each.name!r} abstained from all {len(lengths)} responses")
    if trial.scores:
        groups = len(lengths) // trial.group_size
        findings.say(f"{groups - trial.silent} of {groups} groups have a signal: their responses differ in score.")
        if trial.silent == groups:
            longer = f"; the check lets responses have {options.tokens} tokens, see --tokens" if cut else ""
            findings.notes.append(f"rewards: no group has a signal, so nothing would be learnt{longer}")


def _memory(trainer: MaestroTrainer, prepared: Prepared, model: nn.Module, longest: int, room: Room) -> StepMemory:
    step, config = trainer.step, prepared.config
    shape = Shape(longest, config.sampling.max_new_tokens, step.plan.micro_batch, config.sampling.group_size)
    samples = isinstance(prepared.generation, TransformersConfig)
    with step.reference() if step.reference is not None else nullcontext((model, None)) as (reference, _):
        own = None if reference is model else reference
    judges = prepared.rewards.rewards + (() if prepared.anchor is None else prepared.anchor.rewards)
    about = About(prepared.args, prepared.generation, own, judges)
    passes = measure(step, model, shape, samples=samples, progress=True)
    return step_memory(step, model, passes, (shape, replace(shape, responses=step.plan.responses)), about, room)


def _judge_memory(memory: StepMemory, trainer: MaestroTrainer, findings: Findings) -> None:
    plan = trainer.step.plan
    largest = memory.largest_micro_batch(plan.responses // plan.updates)
    if memory.fits:
        findings.say(
            f"That is {100 * memory.peak / memory.room.free:.0f} % of the room. The largest batch.micro_batch that "
            f"fits into {100 * SHARE:.0f} % of it is {largest} (now {plan.micro_batch})."
        )
        return
    there = f"{100 * SHARE:.0f} % of {gib(memory.room.free)} GiB are there"
    found = f"{gib(memory.peak)} GiB are needed at the longest, {there}"
    training = sum(part.training for part in memory.parts)
    if largest is not None:
        advice = f"batch.micro_batch: {largest} fits"
    elif training <= SHARE * memory.room.free:
        advice = "sampling needs most: lower batch.prompts_per_batch, sampling.max_new_tokens, or take generation: vllm"
    else:
        advice = (
            "not even batch.micro_batch: 1 fits: take model.lora, a shorter sampling.max_new_tokens, or more memory"
        )
    findings.wrong.append(f"memory: {found}; {advice}")


def _show_length(trainer: MaestroTrainer, rows: int, seconds: tuple[float, float], findings: Findings) -> None:
    """How long the whole run may take."""
    plan, args = trainer.step.plan, trainer.args
    batches = args.max_steps / plan.updates
    if args.max_steps <= 0:
        batches = args.num_train_epochs * (rows // trainer.method.batch.prompts_per_batch)
    findings.say(
        f"The run has {batches:,.0f} such batches: {duration(batches * seconds[0])} to "
        f"{duration(batches * seconds[1])}."
    )
