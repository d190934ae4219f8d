"""The progress bar: stage, time left and two figures, instead of the whole log line."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from maestro_fast.training.timing import StageClock


def show_stages(trainer: Trainer, clock: StageClock) -> None:
    """Puts ``StageProgress`` in the place of transformers' bar."""
    trainer.remove_callback(ProgressCallback)
    progress = StageProgress()
    clock.on_stage = progress.show
    trainer.add_callback(progress)


class StageProgress(ProgressCallback):
    """transformers' bar (done, time taken, time left), with the current stage in front."""

    def show(self, stage: str) -> None:
        if self.training_bar is not None:
            self.training_bar.set_description(f"{stage:>16}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or not logs or "reward" not in logs:
            return
        self.training_bar.set_postfix(
            reward=f"{logs['reward']:.3f}", tokens=f"{logs['completions/mean_length']:.0f}", refresh=False
        )
