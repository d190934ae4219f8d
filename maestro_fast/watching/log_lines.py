"""Reads one metric off the lines that a trainer logs, and names a metric that they do not have."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainerState

from maestro_fast.settings import SettingsError, near

logger = logging.getLogger(__name__)
EVALUATION = "eval_"  # what the names of an evaluation's figures begin with


class LogMetric:
    """One metric of the log.

    A line that lacks the metric says nothing about it, nor does one where it is not a number. So the figures of an
    evaluation, which come every so many steps, are lines of their own. The summary at the end of a run is no line.

    Attributes:
        name: the name of the metric.
        looked: whether a line has come that could hold it.
    """

    def __init__(self, name: str, setting: str) -> None:
        """
        Args:
            setting: the setting that names the metric, for the message.
        """
        self.name, self.looked, self._setting = name, False, setting

    def value(self, logs: Mapping[str, Any], state: TrainerState) -> float | None:
        """The metric in a line; None if the line does not tell it.

        The first line that could hold it and does not is worth a warning: it may be a slip. Some metrics come later,
        such as those of a Conductor that has not learnt yet, so it is no error.
        """
        if "train_loss" in logs:
            return None
        of_evaluation = self.name.startswith(EVALUATION)
        could_hold = any(name.startswith(EVALUATION) for name in logs) if of_evaluation else "loss" in logs
        if not self.looked and (could_hold or self.name in logs):
            self.looked = True
            if self.name not in logs and state.is_world_process_zero:
                logger.warning(
                    "%s: the first line of %s has no %r, which counts from where it comes, if it does%s",
                    self._setting,
                    "an evaluation" if of_evaluation else "the log",
                    self.name,
                    near(self.name, logs),
                )
        value = logs.get(self.name)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def keep(state: TrainerState, name: str, values: dict[str, Any]) -> None:
    """Lets ``values`` be part of the checkpoints of a run: transformers writes its state into each of them."""
    callbacks: Any = state.stateful_callbacks
    callbacks[name] = values


def kept(state: TrainerState, name: str) -> dict[str, Any] | None:
    """What the checkpoint that a run goes on from holds under ``name``; None where it holds nothing."""
    callbacks: Any = state.stateful_callbacks
    return dict(callbacks[name]) if state.global_step and name in callbacks else None


def check_metric(name: str, setting: str, reward_names: tuple[str, ...], *, evaluates: bool) -> None:
    """Refuses a metric that no line of this run can hold, as far as its name tells.

    Args:
        setting: the setting that names the metric.
        reward_names: the rewards of the run.
        evaluates: whether there are held-out prompts.

    Raises:
        SettingsError: it belongs to an evaluation and there is none, or to a reward and there is no such one.
    """
    if name.startswith(EVALUATION) and not evaluates:
        raise SettingsError(f"{setting}: {name!r}, but nothing is evaluated, expected a section evaluation")
    section, _, rest = name.removeprefix(EVALUATION).partition("/")
    if section in ("rewards", "weights") and not any(f"{rest}/".startswith(f"{own}/") for own in reward_names):
        prefix = EVALUATION if name.startswith(EVALUATION) else ""
        known = ", ".join(f"{prefix}{section}/{own}{'/mean' * (section == 'rewards')}" for own in reward_names)
        raise SettingsError(f"{setting}: {name!r}, expected one of {known}, or another figure of these rewards")
