"""Alarms: a figure of the log that stays beyond a bound warns, or ends the run.

An alarm counts the lines of the log in a row in which its metric is beyond the bound. When they are as many as
``lines`` says, it rings once, and again only after the metric has been back in between. The counts are part of every
checkpoint, so a resumed run rings where the uninterrupted one does.

A run that an alarm has ended stays ended: resumed with the same alarm, it trains no further step, so that one that was
killed while it ended leaves the same files. Without that alarm, or with another bound, it goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from maestro_fast.watching.log_lines import LogMetric, check_metric, keep, kept

logger = logging.getLogger(__name__)
_STATE = "maestro_fast.alarms"  # under this name the counts stand in transformers' state of a run


@dataclass(frozen=True)
class AlarmConfig:
    """A bound on a figure of the log, and what happens beyond it. It has one of above, below and no_better_for.

    Attributes:
        metric: the name of the figure in ``metrics.jsonl``, such as ``kl``, ``entropy``, ``rewards/<name>/mean`` or, of
            held-out prompts, ``eval_rewards/<name>/mean``. Lines without it do not count.
        above: it rings where the metric is above this.
        below: it rings where the metric is below this.
        no_better_for: it rings when the best value so far is this many lines old.
        better: the values that are better for ``no_better_for``, "higher" or "lower".
        lines: the number of lines in a row that the metric has to be ``above`` or ``below``.
        then: "warn" tells it; "stop" also ends the run behind the step, with a checkpoint and ``final/``.
    """

    metric: str
    above: float | None = None
    below: float | None = None
    no_better_for: int | None = None
    better: Literal["higher", "lower"] = "higher"
    lines: int = 1
    then: Literal["warn", "stop"] = "warn"

    def __post_init__(self) -> None:
        given = [name for name in ("above", "below", "no_better_for") if getattr(self, name) is not None]
        if len(given) != 1:
            bounds = " and ".join(given) or "no bound"
            raise ValueError(f"metric: {self.metric} has {bounds}, expected one of above, below and no_better_for")
        if self.lines < 1:
            raise ValueError(f"lines: {self.lines}, expected at least 1")
        if self.no_better_for is None and self.better != "higher":
            raise ValueError(f"better: {self.better}, but there is no no_better_for that it would belong to")
        if self.no_better_for is not None and self.no_better_for < 1:
            raise ValueError(f"no_better_for: {self.no_better_for}, expected at least 1")
        if self.no_better_for is not None and self.lines != 1:
            raise ValueError(f"lines: {self.lines}, expected no_better_for alone, which is a number of lines")

    @property
    def condition(self) -> str:
        """When it rings, in words. An alarm of another run with the same words has the same counts."""
        if self.no_better_for is not None:
            return f"{self.metric} not {self.better} for {_lines(self.no_better_for)}"
        side, bound = ("above", self.above) if self.above is not None else ("below", self.below)
        return f"{self.metric} {side} {bound}" + (f" for {_lines(self.lines)}" if self.lines > 1 else "")


def _lines(number: int) -> str:
    return "one line of the log" if number == 1 else f"{number} lines of the log"


@dataclass(frozen=True)
class Alarm:
    """One alarm that rang.

    Attributes:
        step: the step of the line.
        metric, value: the figure, and what it was.
        bound: what it went beyond; for ``no_better_for`` the best value so far.
        action: "warn" or "stop".
        condition: when such an alarm rings, in words.
    """

    step: int
    metric: str
    value: float
    bound: float
    action: str
    condition: str

    def __str__(self) -> str:
        then = "; the run ends here" if self.action == "stop" else ""
        return f"alarm at step {self.step}: {self.metric} is {self.value:.4g} ({self.condition}){then}"


class _Count:
    """How far one alarm has come."""

    def __init__(self, config: AlarmConfig, setting: str) -> None:
        self.config, self.metric = config, LogMetric(config.metric, f"{setting}.metric")
        self._count, self._rings = 0, False
        self._best: float | None = None

    def see(self, value: float) -> float | None:
        """Takes in the value of a line. Returns the bound if the alarm begins to ring here."""
        config, bound = self.config, self._best
        if config.no_better_for is not None:
            better = self._best is None or (value > self._best if config.better == "higher" else value < self._best)
            self._best = value if better else self._best
            beyond, needed = not better, config.no_better_for
        else:
            bound = config.above if config.above is not None else config.below
            assert bound is not None
            beyond, needed = (value > bound if config.above is not None else value < bound), config.lines
        self._count = self._count + 1 if beyond else 0
        rang, self._rings = self._rings, self._count >= needed
        return bound if self._rings and not rang else None

    def state(self) -> dict[str, Any]:
        return {"count": self._count, "rings": self._rings, "best": self._best, "looked": self.metric.looked}

    def take_over(self, state: Mapping[str, Any]) -> None:
        self._count, self._rings, self._best = state["count"], state["rings"], state["best"]
        self.metric.looked = state["looked"]


class Alarms(TrainerCallback):
    """Rings the alarms of a run. Every process counts, on the same figures; only the main one tells."""

    def __init__(self, configs: Sequence[AlarmConfig], observers: Sequence[Callable[[Alarm], None]] = ()) -> None:
        """
        Args:
            configs: the alarms.
            observers: functions that get each alarm that rings, on the main process.
        """
        self._configs, self._observers = tuple(configs), tuple(observers)
        self._begin()

    def _begin(self) -> None:
        self._counts = [_Count(config, f"alarms[{i}]") for i, config in enumerate(self._configs)]
        self._ended_by: str | None = None  # the condition of the alarm that ended the run
        self._saved_at: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin()
        saved = kept(state, _STATE)
        if saved is None:
            return
        for count in self._counts:
            if count.config.condition in saved["counts"]:
                count.take_over(saved["counts"][count.config.condition])
        ended_by, self._saved_at = saved["ended_by"], state.global_step
        if any(config.then == "stop" and config.condition == ended_by for config in self._configs):
            self._ended_by, control.should_training_stop = ended_by, True
            if state.is_world_process_zero:
                logger.warning(
                    "alarms: this run was ended after step %d by %s; change that alarm or take it out to go on",
                    state.global_step,
                    ended_by,
                )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for count in self._counts:
            config, value = count.config, count.metric.value(logs or {}, state)
            bound = None if value is None else count.see(value)
            if value is None or bound is None:
                continue
            if config.then == "stop":
                self._ended_by, control.should_training_stop = config.condition, True
            if state.is_world_process_zero:
                alarm = Alarm(state.global_step, config.metric, value, bound, config.then, config.condition)
                logger.warning("%s", alarm)
                for observer in self._observers:
                    observer(alarm)
        counts = {count.config.condition: count.state() for count in self._counts}
        keep(state, _STATE, {"counts": counts, "ended_by": self._ended_by})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved_at = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Asks for a checkpoint of the step behind which an alarm has ended the run, if it was not saved anyway."""
        if self._ended_by and self._saved_at != state.global_step and args.save_strategy != SaveStrategy.NO:
            control.should_save = True


def check_alarms(alarms: Sequence[AlarmConfig], reward_names: tuple[str, ...], *, evaluates: bool) -> None:
    """Refuses alarms on figures that the run cannot log, and two with the same condition.

    Raises:
        SettingsError: see ``check_metric``.
        ValueError: two alarms have the same condition.
    """
    seen: dict[str, int] = {}
    for i, alarm in enumerate(alarms):
        check_metric(alarm.metric, f"alarms[{i}].metric", reward_names, evaluates=evaluates)
        if alarm.condition in seen:
            raise ValueError(f"alarms[{i}]: is alarms[{seen[alarm.condition]}] once more, {alarm.condition}")
        seen[alarm.condition] = i
