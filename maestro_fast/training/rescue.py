"""Saves a run that an error or a signal ends, as it was before the step or the evaluation in which it ended.

``Rescue.remember`` keeps what a step changes apart from the policy itself. If the step fails before its gradient is
applied, that state is put back and saved with the policy. So a faulty reward late in a run does not cost the steps
since the last checkpoint, and a resumed run makes the step again bit by bit.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy, get_last_checkpoint

from maestro_fast.training.checkpoint import StepState
from maestro_fast.training.health import NonFiniteError, broken_parameter
from maestro_fast.training.overlap import Lessons
from maestro_fast.weighting import Outcome, WeightPolicy


class Rescued(Protocol):
    """What ``Rescue`` reads of a trainer and calls."""

    args: TrainingArguments
    state: TrainerState
    is_in_train: bool
    saved_at: int | None

    def step_state(self) -> StepState: ...

    def take_over(self, state: StepState) -> None: ...

    def save_checkpoint(self) -> None: ...


class Rescue:
    """Keeps the state before each optimiser step and each evaluation, and saves it if they fail."""

    def __init__(self, trainer: Rescued, model: nn.Module, weights: WeightPolicy, lessons: Lessons) -> None:
        """
        Args:
            trainer: whose run it is.
            model: the policy.
            weights: the weight policy.
            lessons: the outcomes from which the weight policy has still to learn.
        """
        self._trainer, self._model, self._weights, self._lessons = trainer, model, weights, lessons
        self._before: Snapshot | None = None
        self._waiting: tuple[Outcome, ...] = ()  # the lessons that waited then
        self._at = 0  # the number of optimiser steps done then
        self._told: BaseException | None = None  # the last error that got its note

    def remember(self, lessons: Sequence[Outcome] | None = None) -> None:
        """Keeps the state before something that may fail.

        Args:
            lessons: the outcomes that wait in the state; None takes those that do wait.
        """
        if self._saves:
            self._before = Snapshot.take(self._weights, self._trainer.step_state(), self._trainer.args.device)
            self._waiting = tuple(self._lessons.waiting if lessons is None else lessons)
            self._at = self._trainer.state.global_step

    @property
    def _saves(self) -> bool:
        """Whether the run is saved when something fails. Several processes cannot: the others do not take part then."""
        args = self._trainer.args
        return self._trainer.is_in_train and args.world_size == 1 and args.save_strategy != SaveStrategy.NO

    @contextlib.contextmanager
    def saved_if_it_fails(self) -> Iterator[None]:
        """Saves the run as it was at the last ``remember`` if the body of the ``with`` fails or is interrupted.

        The error gets a note on where the run is and how to go on.

        Raises:
            NonFiniteError: the body failed, and a parameter is not finite: this is the cause, and nothing is saved.
        """
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if not self._trainer.is_in_train or error is self._told:
                raise
            step, broken = self._trainer.state.global_step, broken_parameter(self._model)
            if broken is None:
                try:
                    self._save(step)
                except Exception as failed:  # The disk is full, say. What ended the run is told first.
                    error.add_note(f"The run could not be saved either: {failed}")
            cause: BaseException = error
            if broken is not None and not isinstance(error, NonFiniteError):
                cause = NonFiniteError.of_parameter(broken, step, self._trainer.args.learning_rate)
            cause.add_note(self._note(cause, step))
            self._told = cause
            if cause is error:
                raise
            raise cause from error

    def _save(self, step: int) -> None:
        """Puts the state back and saves it, unless there is nothing to save or it has been saved already.

        What was remembered before a gradient was applied does not belong to the parameters after that.
        """
        if step == 0 or self._trainer.saved_at == step or not self._saves or self._before is None or self._at != step:
            return
        self._before.restore(self._weights, self._trainer.args.device)
        self._lessons.restore(self._waiting)
        self._trainer.take_over(self._before.step.copy())
        self._trainer.save_checkpoint()

    def _note(self, error: BaseException, step: int) -> str:
        run_dir = Path(str(self._trainer.args.output_dir))
        saved = str(run_dir / f"checkpoint-{step}") if self._trainer.saved_at == step else None
        return how_to_go_on(error, step, saved, get_last_checkpoint(str(run_dir)) if run_dir.is_dir() else None)


def how_to_go_on(error: BaseException, step: int, saved: str | None, last: str | None) -> str:
    """The note that an error gets which ended a run after ``step`` optimiser steps.

    Args:
        saved: the checkpoint of this step; None if there is none.
        last: the last checkpoint before; None if there is none.
    """
    if isinstance(error, KeyboardInterrupt):
        then = "go on with --resume"
    elif isinstance(error, NonFiniteError):
        then = f"a plain --resume would come to the same place, so first {error.remedy}, then go on with --resume"
    else:
        then = "mend the cause and go on with --resume"
    if saved is not None:
        return f"The run as it was after step {step} is in {saved}; {then}."
    if last is not None:
        return f"Nothing was saved after step {step}. The last checkpoint is {last}; {then}."
    before = f"first {error.remedy}, then " if isinstance(error, NonFiniteError) else ""
    where = " in a new directory" if step else ""  # One with the log of a step holds a run already.
    return f"The run has no checkpoint to go on from; {before}start it again{where}."


@dataclass(frozen=True)
class Snapshot:
    """The state that an optimiser step changes apart from the policy itself, as it was before the step.

    If something fails in the step, the run is saved as it was then. The fields hold the state of the weight policy,
    the step in progress, and the state of this process's random generators.
    """

    weights: dict[str, Tensor]
    step: StepState
    python: Any
    numpy: Any
    host: Tensor
    device: Tensor | None

    @staticmethod
    def take(weights: WeightPolicy, step: StepState, device: torch.device) -> Snapshot:
        """Copies the state; ``device`` is where the policy's random numbers are drawn."""
        return Snapshot(
            weights.state_dict(),
            step.copy(),
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        )

    def restore(self, weights: WeightPolicy, device: torch.device) -> None:
        """Puts back the state of the weight policy and of the random generators."""
        weights.load_state_dict(self.weights)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.host)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)
