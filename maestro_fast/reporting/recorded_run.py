"""Runs a training with its logs attached, and writes its report. ``run_log`` has the logs alone, for other trainers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maestro_fast.reporting.report import write_report
from maestro_fast.reporting.run_log import MetricsCallback, RolloutsLog, TimingsLog
from maestro_fast.training import MaestroTrainer, parse_config, train


def recorded_train(raw: dict[str, Any], *, resume: bool = False) -> MaestroTrainer:
    """Trains the run that the mapping ``raw`` describes, and logs metrics, responses and stage times to its directory.

    Raises:
        SettingsError, ValueError, FileNotFoundError: See ``training.train``.
    """
    config = parse_config(raw)
    return train(
        config,
        raw,
        resume=resume,
        observers=[RolloutsLog(config.run_dir)],
        timing_observers=[TimingsLog(config.run_dir)],
        callbacks=[MetricsCallback(config.run_dir)],
    )


def try_report(
    run_dir: Path, *, summary: Sequence[str] = (), compare: Mapping[str, Path] | None = None, **options: Any
) -> str:
    """Writes the report if matplotlib is installed. Returns a sentence on where the report is, or why there is none."""
    try:
        return f"Report: {write_report(run_dir, summary=summary, compare=compare, **options)}"
    except ImportError as error:
        return f"No report was written: {error}"
