"""What a run tells while it goes on: the progress bar, stage times, and where steps and epochs begin and end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from maestro_fast.model.layouts import TokenCount
from maestro_fast.records import TOKEN_COUNTS
from maestro_fast.training.metrics import StageClock
from maestro_fast.training.step import Step

logger = logging.getLogger(__name__)
LOG_LINES = 500  # about 2 MB in every checkpoint


class StageProgress(ProgressCallback):
    """transformers' progress bar with the current stage in front, and a few figures instead of the whole log line."""

    @classmethod
    def replace_bar(cls, trainer: Trainer, clock: StageClock) -> StageProgress:
        """Puts this bar in the place of transformers' own, if that is to be shown at all."""
        progress = cls()
        if not trainer.args.disable_tqdm:
            trainer.remove_callback(ProgressCallback)
            clock.on_stage = progress.show
            trainer.add_callback(progress)
        return progress

    def close(self) -> None:
        """Closes the bar of a run that was stopped, so that what is printed next stands below it."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    training_bar: Any

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the bar where the run starts: after a resume, the steps of before are done, but not by this process."""
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)
        self.current_step = state.global_step

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
        if self.training_bar is not None and logs and "completions/mean_length" in logs:
            self.training_bar.set_postfix_str(bar_figures(logs), refresh=False)


def bar_figures(logs: Mapping[str, float]) -> str:
    """The figures of a line of the log that the bar shows.

    They are the reward, the mean of each reward where there are several, utility and KL where they are known, and the
    mean length of a response in tokens.
    """
    ends = "rewards/", "/mean"
    names = [name for name in logs if name.startswith(ends[0]) and name.endswith(ends[1])]
    means = {name.removeprefix(ends[0]).removesuffix(ends[1]): logs[name] for name in names}
    shown = {"reward": logs["reward"]} if "reward" in logs else {}
    shown |= means if len(means) > 1 else {}
    shown |= {name: logs[key] for name, key in (("utility", "anchor/utility"), ("kl", "kl")) if key in logs}
    tokens = f"{logs['completions/mean_length']:.0f} tokens"
    return ", ".join([*(f"{name} {value:.3g}" for name, value in shown.items()), tokens])


class Watched(Protocol):
    """What ``StepEvents`` reads of a trainer and calls."""

    step: Step
    clock: StageClock

    def restore_step(self) -> None: ...

    def begin_epoch(self) -> None: ...

    def learn(self) -> None: ...


class StepEvents(TrainerCallback):
    """Tells the trainer where training and epochs begin and end, and observers the timings of each generation batch.

    The seconds of a batch are complete only where the next one begins, because saving and evaluation come after its
    last step. They get the number of the batch's first step, as its responses do. Beside them stand the tokens of its
    forwards, those that were computed and those of the sequences with a prompt each; the difference is what shared
    prompts save.

    transformers keeps every line of the log in ``state.log_history`` and writes all of them into every checkpoint.
    Here the last ``LOG_LINES`` stay, so that memory and checkpoints do not grow with the steps. ``metrics.jsonl`` has
    all lines, and callbacks see each where it is logged.
    """

    def __init__(self, trainer: Watched, timing_observers: Sequence[Callable[[dict[str, float]], None]]) -> None:
        """
        Args:
            trainer: whose run it is.
            timing_observers: functions that get ``step``, the seconds by stage and ``TOKEN_COUNTS``, on the main
                process.
        """
        self._trainer, self._observers = trainer, tuple(timing_observers)
        self._stepped = False
        self._first = 1  # the number of the first step whose seconds have not been emitted yet
        self._run = TokenCount()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stepped, self._first, self._run = False, state.global_step + 1, TokenCount()
        self._trainer.clock.lap()
        self._trainer.step.scorer.layouts.count.pop()
        self._trainer.restore_step()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.begin_epoch()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self._trainer.step.plan.updates == 0:
            self._emit(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stepped = True
        control.should_training_stop |= self._trainer.step.weights.should_stop
        if control.should_training_stop or state.global_step >= state.max_steps:
            self._trainer.learn()  # No later batch would do it, and its figures belong into the last line of the log.

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        del state.log_history[:-LOG_LINES]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.learn()  # A callback may have ended the run after its last step.
        self._emit(state)
        self._tell_savings("the run", self._run)

    def _emit(self, state: TrainerState) -> None:
        if not self._stepped:
            return
        count = self._trainer.step.scorer.layouts.count.pop()
        tokens = dict(zip(TOKEN_COUNTS, map(float, (count.computed, count.of_sequences)), strict=True))
        timings = {"step": float(self._first), **self._trainer.clock.lap(), **tokens}
        if not self._run.computed:
            self._tell_savings("the first batch", count)
        self._run.computed += count.computed
        self._run.of_sequences += count.of_sequences
        self._stepped, self._first = False, state.global_step + 1
        for observer in self._observers if state.is_world_process_zero else ():
            observer(timings)

    def _tell_savings(self, of: str, count: TokenCount) -> None:
        """Logs what shared prompts have saved, where they may be shared."""
        if self._trainer.step.scorer.layouts.sharing != "never" and count.of_sequences:
            saved = 1 - count.computed / count.of_sequences
            words = f"{100 * saved:.0f} % saved by shared prompts" if saved > 0 else "sharing prompts saved nothing"
            logger.info(
                "tokens of %s: %s computed for %s in the sequences, %s",
                of,
                f"{count.computed:,}",
                f"{count.of_sequences:,}",
                words,
            )
