"""Where training, an epoch and a generation batch begin and end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from maestro_fast.training.trainer import MaestroTrainer


class Bounds(TrainerCallback):
    """Tells the trainer of them.

    The seconds of a batch are complete only where the next one begins: saving and evaluation come after its last step.
    """

    def __init__(self, trainer: MaestroTrainer) -> None:
        self._trainer = trainer
        self._stepped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stepped = False
        self._trainer.clock.lap()
        self._trainer.restore_step()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.begin_epoch()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self._trainer.method.batch.updates_per_batch == 0:
            self._emit()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stepped = True
        control.should_training_stop |= self._trainer.pipeline.weights.should_stop
        if control.should_training_stop or state.global_step >= state.max_steps:
            self._trainer.learn()  # no later batch would, and its figures belong into the last line

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.learn()  # where a callback ended the run after its last step
        self._emit()

    def _emit(self) -> None:
        if self._stepped:
            self._stepped = False
            self._trainer.emit_timings()
