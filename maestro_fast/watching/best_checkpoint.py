"""Picks the best checkpoint by a figure of training, as transformers does by a figure of an evaluation.

A checkpoint is judged by the mean of the figure over the lines of the log since the checkpoint before, so over steps
whose policies led to it. The verdict stands where transformers has its own: in ``best_metric``, ``best_global_step``
and ``best_model_checkpoint`` of its state. So the best checkpoint outlives the rotation, and
``load_best_model_at_end`` finds it.

A checkpoint that a signal or an error makes between two regular ones is not judged, and what has been added up goes on
behind it: which checkpoint is the best does not depend on interruptions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from maestro_fast.watching.log_lines import EVALUATION, LogMetric, keep, kept

logger = logging.getLogger(__name__)
SETTING = "trainer.metric_for_best_model"
_STATE = "maestro_fast.best_checkpoint"  # under this name the sums stand in transformers' state of a run


class BestCheckpoint(TrainerCallback):
    """Adds up the figure between checkpoints. The trainer calls ``judge`` where it makes a regular one.

    Every process does the same on the same figures, because each of them loads the best checkpoint at the end.
    """

    def __init__(self, metric: str, *, greater_is_better: bool) -> None:
        self._name, self._greater = metric, greater_is_better
        self._begin()

    def _begin(self) -> None:
        self._metric = LogMetric(self._name, SETTING)
        self._sum, self._lines = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin()
        saved = kept(state, _STATE)
        if saved is not None and saved["metric"] == self._name:
            self._sum, self._lines, self._metric.looked = saved["sum"], saved["lines"], saved["looked"]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        value = self._metric.value(logs or {}, state)
        if value is not None:
            self._sum, self._lines = self._sum + value, self._lines + 1
        self._keep(state)

    def judge(self, state: TrainerState) -> None:
        """Judges the checkpoint that is about to be written, and begins a new sum."""
        if not self._lines:
            if state.best_global_step != state.global_step and state.is_world_process_zero:
                logger.warning(
                    "%s: checkpoint-%d is not judged, no line of the log since the one before has %s",
                    SETTING,
                    state.global_step,
                    self._name,
                )
            return
        mean, best = self._sum / self._lines, state.best_metric
        self._sum, self._lines = 0.0, 0
        if best is None or (mean > best if self._greater else mean < best):
            state.best_metric, state.best_global_step = mean, state.global_step
        self._keep(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is None and state.is_world_process_zero:
            logger.warning("trainer.load_best_model_at_end: final/ holds the last policy, no checkpoint was judged")

    def _keep(self, state: TrainerState) -> None:
        numbers = {"metric": self._name, "sum": self._sum, "lines": self._lines, "looked": self._metric.looked}
        keep(state, _STATE, numbers)


def is_of_evaluation(metric: str, evaluation_names: list[str]) -> bool:
    """Whether an evaluation gives a metric. A name that training has as well means the held-out prompts."""
    return metric.startswith(EVALUATION) or metric in evaluation_names
