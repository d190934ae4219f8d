"""Runs a training with its logs, samples and trackers attached, and writes its report.

``run_log`` has the logs alone, for other trainers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from maestro_fast.records import StepRecord
from maestro_fast.reporting.console import ConsoleSamples
from maestro_fast.reporting.json_lines import ALARMS_FILE, iter_jsonl
from maestro_fast.reporting.report import write_report
from maestro_fast.reporting.run_log import AlarmsLog, CostsCallback, MetricsCallback, RolloutsLog, TimingsLog
from maestro_fast.reporting.trackers import TrackerMedia
from maestro_fast.training import MaestroTrainer, parse_config, train
from maestro_fast.training.run_directory import check_room

if TYPE_CHECKING:
    from transformers import TrainerCallback


def recorded_train(
    raw: dict[str, Any],
    *,
    resume: bool = False,
    observers: Sequence[Callable[[StepRecord], None]] = (),
    callbacks: Sequence[TrainerCallback] = (),
    attach: Callable[[MaestroTrainer], None] = lambda trainer: None,
) -> MaestroTrainer:
    """Trains the run that the mapping ``raw`` describes, and logs to its directory, and to what else it names.

    Args:
        raw: the config of the run.
        resume: go on from the last checkpoint of its directory.
        observers, callbacks, attach: what else watches the run, see ``training.train``.

    Raises:
        SettingsError, ValueError, FileNotFoundError: See ``training.train``.
    """
    config = parse_config(raw)
    alarms, sizes = AlarmsLog(config.run_dir), (config.sampling.group_size, config.batch.updates_per_batch)
    watching: list[Callable[[StepRecord], None]] = [*observers, RolloutsLog(config.run_dir)]
    media = None if config.trackers is None else TrackerMedia(config.trackers, *sizes)
    watching += [] if media is None else [media]
    watching += [] if config.console is None else [ConsoleSamples(config.console, *sizes)]

    def attach_all(trainer: MaestroTrainer) -> None:
        attach(trainer)
        if trainer.is_world_process_zero() and isinstance(trainer.model, nn.Module):
            check_room(Path(config.run_dir), trainer.model, trainer.args)
        if media is not None:
            media.attach(trainer.callback_handler.callbacks)

    return train(
        config,
        raw,
        resume=resume,
        observers=watching,
        timing_observers=[TimingsLog(config.run_dir)],
        callbacks=[*callbacks, MetricsCallback(config.run_dir), CostsCallback(config.run_dir), alarms],
        alarm_observers=[alarms],
        attach=attach_all,
    )


def ended_by_alarm(run_dir: Path, step: int) -> list[str]:
    """The sentence on the alarm that ended a run after ``step``; none if no alarm did."""
    path = run_dir / ALARMS_FILE
    rows = [row for row in iter_jsonl(path) if (row["step"], row["action"]) == (step, "stop")] if path.exists() else []
    return [
        f"The alarm on {row['metric']} ended the run after step {step}: it was {row['value']:.4g} ({row['condition']})."
        for row in rows[:1]
    ]


def try_report(
    run_dir: Path, *, summary: Sequence[str] = (), compare: Mapping[str, Path] | None = None, **options: Any
) -> str:
    """Writes the report if matplotlib is installed. Returns a sentence on where the report is, or why there is none.

    The training has ended well by then, so a disk that is full is no error.
    """
    try:
        return f"Report: {write_report(run_dir, summary=summary, compare=compare, **options)}"
    except (ImportError, OSError) as error:
        return f"No report was written: {error}"
