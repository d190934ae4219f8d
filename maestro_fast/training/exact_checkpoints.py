"""Checkpoints from which a run goes on bit by bit: a Trainer that saves all that its next step depends on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints

from maestro_fast.training.batches import MicroBatch
from maestro_fast.training.checkpoint import load_weight_policy, save_weight_policy, staged
from maestro_fast.training.metrics import MetricMeans
from maestro_fast.training.pipeline import Pipeline, Sampled
from maestro_fast.training.step_state import StepState, load_step_state, save_step_state


class ExactCheckpoints(Trainer):
    """Saves whole checkpoints or none, with the weight policy and the step in progress beside transformers' part.

    The random state of every process, the optimiser and the position in the data are transformers' own.
    """

    pipeline: Pipeline

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._micro_batches: list[MicroBatch | Sampled] = []  # of the generation batch, not trained on yet
        self._means = MetricMeans()
        self._restored: StepState | None = None
        self._staging: Path | None = None
        super().__init__(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        with staged(run_dir, self.accelerator) as self._staging:
            try:
                super()._save_checkpoint(model, trial)
                self._save_own(self._staging / name, run_dir / name)
            finally:
                self._staging = None
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _save_own(self, folder: Path, published: Path) -> None:
        """What a checkpoint holds beside transformers' part."""
        unused = [batch for batch in self._micro_batches if isinstance(batch, MicroBatch)]
        state = StepState(unused, self._means, self._tr_loss.item(), self._globalstep_last_logged)
        save_step_state(folder, state, self.args.process_index, self.args.world_size)
        if not self.args.should_save:
            return
        self.save_weight_policy(folder)
        if self.state.best_model_checkpoint == str(folder):
            self.state.best_model_checkpoint = str(published)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def save_weight_policy(self, folder: Path) -> None:
        """Writes the state of the weight policy to ``folder``."""
        save_weight_policy(folder, self.pipeline.weights, self.pipeline.rewards.names)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_weight_policy(Path(checkpoint), self.pipeline.weights, self.pipeline.rewards.names)
            self._restored = load_step_state(
                Path(checkpoint), self.args.process_index, self.args.world_size, self.args.device
            )

    def restore_step(self) -> None:
        """Takes over what a checkpoint held of the step in progress, once transformers has set its own counters."""
        state, self._restored = self._restored, None
        if state is not None:
            self._micro_batches, self._means = [*state.micro_batches], state.means
            self._tr_loss = torch.full_like(self._tr_loss, state.loss)
            self._globalstep_last_logged = state.logged_step

    @contextlib.contextmanager
    def _saved_if_it_fails(self, model: nn.Module) -> Iterator[None]:
        """A faulty reward late in a run must not cost the steps since the last checkpoint.

        One process only: with several, the others are not here to take part in saving.
        """
        try:
            yield
        except Exception as error:
            step = self.state.global_step
            if step > 0 and self.args.world_size == 1 and self.args.save_strategy != SaveStrategy.NO:
                folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{step}"
                if not folder.exists():
                    self._save_checkpoint(model, None)
                error.add_note(
                    f"The run as it was after step {step} is in {folder}; mend the cause and go on with --resume."
                )
            raise
