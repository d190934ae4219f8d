"""Saves and loads our part of a checkpoint: all that the next step depends on and transformers does not save itself.

transformers saves the model, the optimiser, the scheduler, the random state of every process and the position in the
data. ``Checkpoints`` saves the weight policy, the best policy, and the step in progress: the responses that have not
been trained on yet, those of the next batch where it is sampled ahead, and the figures that have not been logged yet.
So a resumed run goes on bit by bit.

The step in progress is one file per process, because each process has its own responses. Tensors are stored as they
are, and numbers as JSON, in which a float keeps all its bits.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from maestro_fast.manifest import MANIFEST, check_manifest, tensors_of
from maestro_fast.model.rows import Sequences
from maestro_fast.pickles import check_pickles
from maestro_fast.records import Prompts, Rollouts
from maestro_fast.training.batches import BatchPlan, MicroBatch, Processes, TokenLogprobs
from maestro_fast.training.best_policy import BestPolicy
from maestro_fast.training.metrics import MetricMeans
from maestro_fast.training.overlap import Started
from maestro_fast.weighting import WeightPolicy
from maestro_fast.weighting.saved import load_weight_policy, save_weight_policy

logger = logging.getLogger(__name__)


class Checkpoints:
    """Saves and loads what belongs into a checkpoint beside transformers' part."""

    def __init__(
        self,
        weights: WeightPolicy,
        reward_names: tuple[str, ...],
        best: BestPolicy | None,
        sizes: dict[str, int],
        args: TrainingArguments,
    ) -> None:
        """
        Args:
            weights, reward_names: the weight policy, and the names of the rewards that it weighs.
            best: the best policy so far; None where the run does not keep it.
            sizes: the result of ``batch_sizes``.
            args: the arguments that say which process this is, and whether it writes.
        """
        self._weights, self._best, self._sizes = weights, best, sizes
        self._reward_names, self._args = reward_names, args

    def save(self, folder: Path, published: Path, step: StepState, state: TrainerState) -> None:
        """Writes our part into ``folder``, on every process.

        Args:
            folder: the folder in which transformers has written its part; it will be renamed to ``published``.
            step: the step in progress.
            state: transformers' state. If this checkpoint is the best, it is named there as ``published``.
        """
        save_step_state(folder, replace(step, sizes=self._sizes), self._args.process_index, self._args.world_size)
        is_best = state.best_model_checkpoint == str(folder)
        if is_best:  # This is done on every process, because each loads the best checkpoint at the end.
            state.best_model_checkpoint = str(published)
        if self._args.should_save:
            self.save_weights(folder)
            if self._best is not None:
                self._best.save(folder)
            if is_best:
                state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def load(self, folder: Path, step: int) -> StepState | None:
        """Loads our part of the checkpoint ``folder``, made after ``step`` optimiser steps.

        Returns:
            The step in progress; None if another number of processes has saved the checkpoint, between two batches.

        Raises:
            ValueError: a part is missing, or this run divides its batches in another way.
        """
        self.load_weights(folder)
        if self._best is not None:
            self._best.load(folder)
        state = load_step_state(folder, self._args.process_index, self._args.world_size, self._args.device)
        if state is not None:
            state.check_sizes(self._sizes)
        updates = self._sizes["batch.updates_per_batch"]
        if step % updates and (state is None or not state.micro_batches):
            raise ValueError(
                f"batch.updates_per_batch: {updates}, but {folder} lies between two generation batches, after "
                f"step {step}, expected a divisor of {step}"
            )
        return state

    def save_weights(self, folder: Path) -> None:
        """Writes the state of the weight policy alone."""
        save_weight_policy(folder, self._weights, self._reward_names)

    def load_weights(self, folder: Path) -> None:
        """Loads the state of the weight policy alone."""
        load_weight_policy(folder, self._weights, self._reward_names)


def batch_sizes(plan: BatchPlan, group_size: int, processes: int) -> dict[str, int]:
    """The sizes by which a generation batch is divided, by their names in a config."""
    return {
        "batch.prompts_per_batch": plan.prompts * processes,
        "sampling.group_size": group_size,
        "batch.micro_batch": plan.micro_batch,
        "batch.updates_per_batch": plan.updates,
    }


def check_resumed(resumed: str | bool | None, args: TrainingArguments, processes: Processes) -> None:
    """Checks the checkpoint that a run goes on from, before any of it is loaded.

    The first process of each node reads the files, and all processes raise what one has found.

    Args:
        resumed: the folder; True for the last one of the run directory; None and False for none.
        args: the run's arguments.
        processes: those of the run.

    Raises:
        ValueError: there is no such folder, or a file is missing or damaged.
    """
    folder = get_last_checkpoint(args.output_dir) if resumed is True else resumed
    if not folder:
        return
    problem = None
    if args.local_process_index == 0:
        try:
            _check_files(Path(folder), deepspeed=processes.accelerator.distributed_type == DistributedType.DEEPSPEED)
        except ValueError as error:
            problem = str(error)
        except OSError as error:  # The others would wait for this process, were it to end here.
            problem = f"resume_from_checkpoint: {error.filename or folder} cannot be read: {error.strerror}"
        except Exception as error:
            problem = f"resume_from_checkpoint: {folder} cannot be read: {type(error).__name__}: {error}"
    for words in filter(None, processes.gather_objects([problem])):
        raise ValueError(words)


def _check_files(checkpoint: Path, *, deepspeed: bool) -> None:
    """Checks the files of a checkpoint by its manifest.

    One of an older version has none. There it checks for the files without which transformers would silently go on with
    a new optimiser; DeepSpeed has files of its own instead, which it unpickles whatever they hold.
    """
    if not checkpoint.is_dir():
        raise ValueError(f"resume_from_checkpoint: {checkpoint}, expected the folder of a checkpoint")
    if not check_manifest(checkpoint):
        logger.warning("%s has no %s, so its files are not checked", checkpoint, MANIFEST)
        for pattern in ("optimizer*", SCHEDULER_NAME):
            if not deepspeed and not any(checkpoint.glob(pattern)):
                raise ValueError(f"resume_from_checkpoint: {checkpoint} holds no {pattern}, it is incomplete")
    if not deepspeed:
        check_pickles(checkpoint)


@dataclass(frozen=True)
class StepState:
    """The step in progress.

    Attributes:
        micro_batches: the micro-batches of the current generation batch that are still to be trained on.
        means: the figures since the last log line.
        loss: the sum of the losses since the last log line.
        logged_step: the step of that line.
        evaluation_due: whether the evaluation after the last step was broken off, so that it has to be made again.
        sizes: the ``batch_sizes`` of the run that made ``micro_batches``.
        rows: the data set's indices of the prompts of the current generation batch, over all processes.
        ahead: the batch that is sampled ahead, or was and is not trained on yet; None where there is none. In a step
            that was loaded it has no prompts but their token ids.
        save_due: whether a checkpoint was due behind that evaluation; one that is made only because it was broken off
            does not count when the best is chosen.
    """

    micro_batches: list[MicroBatch] = field(default_factory=list)
    means: MetricMeans = field(default_factory=MetricMeans)
    loss: float = 0.0
    logged_step: int = 0
    evaluation_due: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    ahead: Started | None = None
    save_due: bool = True

    def copy(self) -> StepState:
        """A copy that training does not change."""
        return replace(self, micro_batches=[*self.micro_batches], means=MetricMeans.of(self.means.state()))

    def check_sizes(self, expected: dict[str, int]) -> None:
        """Checks that this run may train on ``micro_batches``.

        Raises:
            ValueError: there are micro-batches, and they were divided by other sizes than ``expected``.
        """
        for name, size in expected.items() if self.micro_batches else ():
            if self.sizes.get(name) != size:
                raise ValueError(
                    f"{name}: {size}, but the checkpoint holds responses that had still to be trained on, made with "
                    f"{self.sizes.get(name)}, expected the same"
                )


def save_step_state(folder: Path, state: StepState, rank: int, processes: int) -> None:
    """Writes this process's file of the step in progress. It waits for a batch that is being sampled."""
    tensors, ahead = _ahead_saved(state.ahead)
    for i, batch in enumerate(state.micro_batches):
        tensors |= {f"{i}.{name}": tensor.cpu().contiguous() for name, tensor in _tensors(batch).items()}
    numbers = {
        "normalizers": [(batch.normalizer, batch.entropy_normalizer) for batch in state.micro_batches],
        "means": state.means.state(),
        "loss": state.loss,
        "logged_step": state.logged_step,
        "evaluation_due": state.evaluation_due,
        "sizes": state.sizes,
        "rows": state.rows,
        "ahead": ahead,
        "save_due": state.save_due,
    }
    save_file(tensors, _file(folder, rank, processes), metadata={"numbers": json.dumps(numbers)})


def load_step_state(folder: Path, rank: int, processes: int, device: torch.device) -> StepState | None:
    """Reads this process's file of the step in progress.

    Returns:
        The step, or None if another number of processes has saved the checkpoint between two generation batches.

    Raises:
        ValueError: there is no such file, or another number of processes has left responses to train on.
    """
    file = _file(folder, rank, processes)
    if file.is_file():
        try:
            return _step_state(*_read(file), device)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, IndexError) as error:
            if str(file) in str(error):
                raise
            raise ValueError(
                f"resume_from_checkpoint: {file} does not hold what a step in progress consists of: "
                f"{type(error).__name__}: {error}"
            ) from error
    others = sorted(folder.glob("step_state_*.safetensors"))
    if not others:
        raise ValueError(f"resume_from_checkpoint: {folder} holds no {file.name}, it is incomplete")
    if any(_read(other)[1]["normalizers"] for other in others):
        raise ValueError(
            f"resume_from_checkpoint: {folder} holds responses that {len(others)} processes had still to train on, "
            f"expected as many processes, this run has {processes}"
        )
    logger.warning("resumed with %d processes from a checkpoint of %d", processes, len(others))
    return None


def _step_state(tensors: dict[str, Tensor], numbers: dict[str, Any], device: torch.device) -> StepState:
    batches = [_micro_batch(i, tensors, pair, device) for i, pair in enumerate(numbers["normalizers"])]
    return StepState(
        batches,
        MetricMeans.of(numbers["means"]),
        numbers["loss"],
        numbers["logged_step"],
        bool(numbers.get("evaluation_due")),  # Checkpoints of version 0.1 do not have it.
        numbers["sizes"],
        numbers.get("rows", []),
        _ahead_loaded(tensors, numbers.get("ahead")),
        numbers.get("save_due", True),
    )


def _ahead_saved(started: Started | None) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors and numbers of a batch that is sampled ahead; where its responses cannot be had, the reason."""
    if started is None:
        return {}, None
    about = {"number": started.number, "step": started.step, "staleness": started.staleness}
    try:
        rollouts = started.responses()
    except Exception as error:  # The run may be saved because of this error.
        logger.warning("generation.ahead: the checkpoint lacks the responses of batch %d: %s", started.number, error)
        return {}, about | {"lost": f"{type(error).__name__}: {error}"}
    named = {
        "prompt_ids": _flat(rollouts.prompts.token_ids),
        "prompt_lengths": _lengths(rollouts.prompts.token_ids),
        "completion_ids": _flat(rollouts.completion_ids),
        "completion_lengths": rollouts.completion_lengths_B,
        "truncated": rollouts.truncated_B.cpu(),
        "sampling_logprobs": rollouts.sampling_logprobs_C,
        # The header of a file, which holds the numbers, is too small for the texts.
        "completions": torch.frombuffer(bytearray(json.dumps(rollouts.completions).encode()), dtype=torch.uint8),
    }
    tensors = {f"ahead.{name}": tensor.cpu().contiguous() for name, tensor in named.items() if tensor is not None}
    return tensors, about | {"metrics": rollouts.metrics}


def _ahead_loaded(tensors: dict[str, Tensor], about: dict[str, Any] | None) -> Started | None:
    if about is None:
        return None
    number, step, staleness = about["number"], about["step"], about["staleness"]
    if "lost" in about:
        logger.warning(
            "batch %d is sampled anew, by the policy as it is now, because the run was saved without its responses: %s",
            number,
            about["lost"],
        )
        return None
    own = {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith("ahead.")}
    rollouts = Rollouts(
        Prompts([], _ragged(own["prompt_ids"], own["prompt_lengths"])),
        _ragged(own["completion_ids"], own["completion_lengths"]),
        json.loads(own["completions"].numpy().tobytes()),
        own["truncated"],
        own.get("sampling_logprobs"),
        about["metrics"],
    )
    return Started.done(rollouts, number, step, staleness)


def _file(folder: Path, rank: int, processes: int) -> Path:
    return folder / f"step_state_{rank}_of_{processes}.safetensors"


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with tensors_of(file) as saved:
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118 - safe_open is no dictionary
        return tensors, json.loads(saved.metadata()["numbers"])


def _tensors(batch: MicroBatch) -> dict[str, Tensor]:
    sequences, logprobs = batch.sequences, batch.logprobs
    named = {
        "prompt_ids": _flat(sequences.prompt_ids),
        "prompt_lengths": _lengths(sequences.prompt_ids),
        "completion_ids": _flat(sequences.completion_ids),
        "completion_lengths": _lengths(sequences.completion_ids),
        "advantages": batch.advantages_B,
        "cu_seqlens": batch.cu_seqlens,
        "old_logprobs": logprobs.old_C,
        "ref_logprobs": logprobs.ref_C,
        "sampling_logprobs": logprobs.sampling_C,
        "members": torch.tensor(batch.members, dtype=torch.int64) if batch.members else None,
        "token_mask": batch.token_mask_C,
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _micro_batch(
    number: int, tensors: dict[str, Tensor], normalizers: tuple[float, float], device: torch.device
) -> MicroBatch:
    own = {name.partition(".")[2]: t for name, t in tensors.items() if name.partition(".")[0] == str(number)}
    logprobs = (own.get(name) for name in ("old_logprobs", "ref_logprobs", "sampling_logprobs"))
    return MicroBatch(
        Sequences(
            _ragged(own["prompt_ids"], own["prompt_lengths"]), _ragged(own["completion_ids"], own["completion_lengths"])
        ),
        own["advantages"],
        own["cu_seqlens"],
        TokenLogprobs(*(None if tensor is None else tensor.to(device) for tensor in logprobs)),
        *normalizers,
        tuple(own["members"].tolist()) if "members" in own else (),
        own.get("token_mask"),
    )


def _flat(rows: list[list[int]]) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.int64)


def _lengths(rows: list[list[int]]) -> Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.int64)


def _ragged(flat: Tensor, lengths: Tensor) -> list[list[int]]:
    return [part.tolist() for part in flat.split(lengths.tolist())]


def use_learning_rate(optimizer: Any, scheduler: Any, rate: float) -> None:
    """Lets a resumed run train with the learning rate of its config, should it differ from that of the checkpoint.

    The optimiser and the schedule of transformers bring the old rate back with their state. A schedule multiplies its
    base rates by a factor, so both are scaled alike. Schedules without base rates keep what they have learnt.
    """
    schedule = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    bases = getattr(schedule, "base_lrs", None)
    if not bases or bases[0] in (0.0, rate):
        return
    logger.warning("trainer.learning_rate: %g from here on, the checkpoint was made with %g", rate, bases[0])
    factor = rate / bases[0]
    schedule.base_lrs = [base * factor for base in bases]
    schedule._last_lr = [last * factor for last in schedule.get_last_lr()]
    for group in optimizer.param_groups:
        for name in ("lr", "initial_lr"):
            if name in group:
                group[name] = group[name] * factor
