"""Checkpoints from which a run goes on bit by bit: a Trainer that saves all that its next step depends on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints

from maestro_fast.training.batches import MicroBatch
from maestro_fast.training.best import BestPolicy
from maestro_fast.training.checkpoint import staged
from maestro_fast.training.metrics import MetricMeans
from maestro_fast.training.pipeline import Pipeline, Sampled
from maestro_fast.training.sampler import GroupSampler
from maestro_fast.training.snapshot import Snapshot
from maestro_fast.training.step_state import StepState, load_step_state, save_step_state
from maestro_fast.training.timing import StageClock
from maestro_fast.weighting.saved import load_weight_policy, save_weight_policy


class ExactCheckpoints(Trainer):
    """Saves whole checkpoints or none, with the weight policy and the step in progress beside transformers' part.

    The random state of every process, the optimiser and the position in the data are transformers' own.
    """

    pipeline: Pipeline
    clock: StageClock
    best: BestPolicy | None
    _sampler: GroupSampler

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._micro_batches: list[MicroBatch | Sampled] = []  # of the generation batch, not trained on yet
        self._means = MetricMeans()
        self._restored: StepState | None = None
        self._staging: Path | None = None
        self._before: Snapshot | None = None  # of what may fail
        super().__init__(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self.learn()
        with self.clock.stage("save"), staged(run_dir, self.accelerator) as self._staging:
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
        state = StepState(unused, self._means, self._tr_loss.item(), self._globalstep_last_logged, self._sizes)
        save_step_state(folder, state, self.args.process_index, self.args.world_size)
        is_best = self.state.best_model_checkpoint == str(folder)
        if is_best:  # on every process: each loads it at the end
            self.state.best_model_checkpoint = str(published)
        if self.args.should_save:
            self.save_weight_policy(folder)
            if self.best is not None:
                self.best.save(folder)
            if is_best:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    @property
    def _sizes(self) -> dict[str, int]:
        """What decides how a generation batch divides, by the names of a config."""
        plan, sampling = self.pipeline.plan, self.pipeline.sampling
        return {
            "batch.prompts_per_batch": plan.prompts * self.args.world_size,
            "sampling.group_size": sampling.group_size,
            "batch.micro_batch": plan.responses // plan.micro_steps,
            "batch.updates_per_batch": plan.updates,
        }

    def save_weight_policy(self, folder: Path) -> None:
        """Writes the state of the weight policy to ``folder``."""
        save_weight_policy(folder, self.pipeline.weights, self.pipeline.rewards.names)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._check_complete(Path(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._load_weight_policy(Path(checkpoint))
        if self.best is not None:
            self.best.load(Path(checkpoint))
        state = load_step_state(Path(checkpoint), self.args.process_index, self.args.world_size, self.args.device)
        if state is not None:
            state.check_sizes(self._sizes)
        step, updates = self.state.global_step, self.pipeline.plan.updates
        if step % updates and (state is None or not state.micro_batches):
            raise ValueError(
                f"batch.updates_per_batch: {updates}, but {checkpoint} lies between two generation batches, after "
                f"step {step}, expected a divisor of {step}"
            )
        self._restored = state

    def _check_complete(self, checkpoint: Path) -> None:
        """transformers goes on without a word where these are missing, with a new optimiser."""
        for pattern in ("optimizer*", SCHEDULER_NAME):
            if not self.is_deepspeed_enabled and not any(checkpoint.glob(pattern)):
                raise ValueError(f"resume_from_checkpoint: {checkpoint} holds no {pattern}, it is incomplete")

    def _load_weight_policy(self, folder: Path) -> None:
        load_weight_policy(folder, self.pipeline.weights, self.pipeline.rewards.names)

    def _load_best_model(self) -> None:
        """The weight policy goes with the policy that it was trained beside."""
        self.learn()  # of the policy that it replaces
        super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        self._load_weight_policy(Path(self.state.best_model_checkpoint))

    def restore_step(self) -> None:
        """Takes over what a checkpoint held of the step in progress, once transformers has set its own counters."""
        state, self._restored = self._restored, None
        self.pipeline.lessons.forget()  # of a ``train`` that failed
        if state is None:  # nothing of an earlier ``train`` may reach this one
            self._micro_batches, self._means = [], MetricMeans()
            return
        self._micro_batches, self._means = [*state.micro_batches], state.means
        self._tr_loss = torch.full_like(self._tr_loss, state.loss)
        self._globalstep_last_logged = state.logged_step

    def begin_epoch(self) -> None:
        """Gives the sampler its epoch: with several processes transformers cannot reach it when it resumes."""
        steps = self._sampler.blocks * self.pipeline.plan.updates
        self._sampler.set_epoch(self.state.global_step // steps)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Not past ``max_steps``: transformers compares after a step only, so a finished run would make one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def learn(self) -> None:
        """Lets the weight policy catch up with the last batch. Its figures go to the next line of the log."""
        if not self.pipeline.lessons.waiting:
            return
        if self._saves_failures:
            self._before = self._snapshot()  # without this lesson, if it is that which fails
        with self._saved_if_it_fails(self.model_wrapped), self.clock.stage("conductor_update"):
            learnt = self.pipeline.lessons.learn()
        self.pipeline.watch.see(learnt)
        self._means.add(learnt)

    def _remember(self) -> None:
        """Before something that may fail: what ``_saved_if_it_fails`` is to put back."""
        self.learn()
        if self._saves_failures:
            self._before = self._snapshot()

    def _snapshot(self) -> Snapshot:
        return Snapshot.take(self.pipeline.weights, self._means, self.args.device)

    @property
    def _saves_failures(self) -> bool:
        """With several processes, the others are not there to take part in saving."""
        return self.is_in_train and self.args.world_size == 1 and self.args.save_strategy != SaveStrategy.NO

    @contextlib.contextmanager
    def _saved_if_it_fails(self, model: nn.Module) -> Iterator[None]:
        """A faulty reward late in a run must not cost the steps since the last checkpoint.

        What is saved is the state at the last ``_remember``. One process only, see ``_saves_failures``.
        """
        try:
            yield
        except Exception as error:
            step = self.state.global_step
            if step > 0 and self._saves_failures and self._before is not None:
                folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{step}"
                if not folder.exists():
                    self._means = self._before.restore(self.pipeline.weights, self.args.device)
                    self._save_checkpoint(model, None)
                error.add_note(
                    f"The run as it was after step {step} is in {folder}; mend the cause and go on with --resume."
                )
            raise
