"""Gives TensorBoard and Weights & Biases what transformers' callbacks do not: histograms, and a table of samples.

Everything goes to the writer or the run that transformers' own callback has opened, so it stands beside the figures of
the log, and a resumed run goes on where that callback does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from maestro_fast.records import StepRecord
from maestro_fast.reporting.console import visible
from maestro_fast.watching import Sample, TrackersConfig, is_due, pick_samples


class Tracker(Protocol):
    """Where the histograms and samples of a step go."""

    def add(self, step: int, histograms: dict[str, Tensor], samples: Sequence[Sample]) -> None: ...


class TrackerMedia:
    """Observes step records, and gives the trackers of a run what is due.

    Attributes:
        trackers: those that get it; ``attach`` finds them.
    """

    def __init__(self, config: TrackersConfig, group_size: int, updates: int) -> None:
        """
        Args:
            config: how many samples, and how often.
            group_size: the number of responses to a prompt.
            updates: the number of optimiser steps from a batch.
        """
        self._config, self._group_size, self._updates = config, group_size, updates
        self.trackers: list[Tracker] = []

    def attach(self, callbacks: Sequence[TrainerCallback]) -> None:
        """Finds the trackers among the callbacks of a trainer."""
        for callback in callbacks:
            if isinstance(callback, TensorBoardCallback):
                self.trackers.append(TensorBoard(callback))
            elif isinstance(callback, WandbCallback):
                self.trackers.append(WeightsAndBiases(callback))

    def __call__(self, record: StepRecord) -> None:
        if not is_due(record.step, self._config.every, self._updates):
            return
        samples = pick_samples(record, self._group_size, self._config.samples)
        for tracker in self.trackers:
            tracker.add(record.step, dict(histograms(record)), samples)


def histograms(record: StepRecord) -> Iterator[tuple[str, Tensor]]:
    """The values of a batch by name: each reward where it did not abstain, each weight, and the advantages."""
    for k, name in enumerate(record.reward_names):
        yield f"rewards/{name}", record.rewards_BK[:, k]
        yield f"weights/{name}", record.weights_BK[:, k]
    yield "advantages", record.advantages_B


class TensorBoard:
    """The event file of transformers' ``TensorBoardCallback``. TensorBoard has no tables, so samples are text there."""

    def __init__(self, callback: TensorBoardCallback) -> None:
        self._callback = callback

    def add(self, step: int, histograms: dict[str, Tensor], samples: Sequence[Sample]) -> None:
        writer = self._callback.tb_writer
        for name, values in _known(histograms):
            writer.add_histogram(f"distribution/{name}", values, step)
        if samples:
            writer.add_text("samples", as_markdown(samples), step)
        writer.flush()


class WeightsAndBiases:
    """The run of transformers' ``WandbCallback``. Its panels take ``train/global_step`` as their axis."""

    def __init__(self, callback: WandbCallback) -> None:
        self._wandb = callback._wandb

    def add(self, step: int, histograms: dict[str, Tensor], samples: Sequence[Sample]) -> None:
        values: dict[str, Any] = {
            f"distribution/{name}": self._wandb.Histogram(values.tolist()) for name, values in _known(histograms)
        }
        if samples:
            header, rows = as_table(samples)
            values["samples"] = self._wandb.Table(columns=header, data=rows)
        self._wandb.run.log({**values, "train/global_step": step})


def _known(histograms: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Leaves out values that are not known, and names of which none is."""
    for name, values in histograms.items():
        known = values[values.isfinite()]
        if known.numel():
            yield name, known


def as_table(samples: Sequence[Sample]) -> tuple[list[str], list[list[Any]]]:
    """The header and the rows of a table of samples."""
    names = list(samples[0].rewards)
    header = ["group", "of the group", "advantage"]
    header += [f"{kind}/{name}" for name in names for kind in ("rewards", "weights")]
    header += ["tokens", "prompt", "completion"]
    rows = []
    for sample in samples:
        figures = [value for name in names for value in (sample.rewards[name], sample.weights[name])]
        rows.append([sample.group, sample.rank, sample.advantage, *figures, sample.length])
        rows[-1] += [sample.prompt, sample.completion]
    return header, rows


def as_markdown(samples: Sequence[Sample]) -> str:
    """The same table as Markdown. A cell shows its text as it is: no markup in it counts, and line ends stay."""
    header, rows = as_table(samples)
    lines = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, str):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    lines = [visible(line) for line in value.splitlines()]
    # Characters that Markdown or HTML would read are written as their numbers.
    plain = ("".join(c if c.isalnum() or c in " .,:;?()" else f"&#{ord(c)};" for c in line) for line in lines)
    return "<br>".join(plain)
