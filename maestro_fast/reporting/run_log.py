"""What a run writes into its directory: metrics, rollouts, stage times. Attach these on the main process.

Metrics hold no wall-clock figure: two runs of one seed, or a run that was killed and resumed, leave the same bytes.

A resumed run repeats the steps since its checkpoint. Each log drops its old lines of those steps first, so that no step
stands in a file twice; a new run in an old directory starts the files anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import TrainerCallback

from maestro_fast.records import StepRecord, plain_text
from maestro_fast.reporting.json_lines import (
    METRICS_FILE,
    ROLLOUTS_FILE,
    TIMINGS_FILE,
    JsonLines,
    iter_jsonl,
    read_jsonl,
)

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["JsonLines", "MetricsCallback", "RolloutsLog", "TimingsLog", "iter_jsonl", "read_jsonl"]


_OF_THE_PROCESS = re.compile(r".*_runtime|.*_per_second|total_flos|train_loss")


class MetricsCallback(TrainerCallback):
    """Writes what a Hugging Face trainer logs to ``run_dir``/metrics.jsonl, one line per step.

    A line holds ``step`` and the logged values, apart from those that tell of this process rather than the policy: run
    times and rates (timings.jsonl has the times), and the summary that transformers logs at the end of training. What
    is logged later at the same step, an evaluation, joins that step's line. Only the main process
    (``state.is_world_process_zero``) writes.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._path = Path(run_dir) / METRICS_FILE
        self._lines: JsonLines | None = None
        self._last: dict[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._open().drop_from(state.global_step + 1)
            self._last = self._open().last() or {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        values = {name: value for name, value in (logs or {}).items() if not _OF_THE_PROCESS.fullmatch(name)}
        if not state.is_world_process_zero or not values:
            return
        row = {"step": state.global_step} | {name: value for name, value in values.items() if name != "step"}
        if self._last.get("step") == state.global_step:
            row = self._last | row
            self._open().replace_last(row)
        else:
            self._open().append(row)
        self._last = row

    def _open(self) -> JsonLines:
        if self._lines is None:
            self._lines = JsonLines(self._path)
        return self._lines


class RolloutsLog:
    """An observer of step records: one line per response in ``run_dir``/rollouts.jsonl.

    A line holds step, family, prompt, completion, rewards {name: value, null where it abstained},
    weights {name: value}, advantage, score, length (tokens), truncated, degenerate.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._log = _StepLog(Path(run_dir) / ROLLOUTS_FILE)

    def __call__(self, record: StepRecord) -> None:
        self._log.append(record.step, *rollout_rows(record))


class TimingsLog:
    """Writes {"step", <stage>: seconds, ..., "total": seconds} lines to ``run_dir``/timings.jsonl."""

    def __init__(self, run_dir: str | Path) -> None:
        self._log = _StepLog(Path(run_dir) / TIMINGS_FILE)

    def __call__(self, timings: Mapping[str, float]) -> None:
        """
        Raises:
            ValueError: ``timings`` has no step.
        """
        if "step" not in timings:
            raise ValueError(f"timings: got the keys {', '.join(timings) or 'none'}, expected step among them")
        step = int(timings["step"])
        self._log.append(step, {"step": step, **{k: v for k, v in timings.items() if k != "step"}})


class _StepLog:
    """Lines of ascending steps; the first rows written drop the old lines of their step and later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: JsonLines | None = None

    def append(self, step: int, *rows: Mapping[str, Any]) -> None:
        if self._lines is None:
            self._lines = JsonLines(self._path)
            self._lines.drop_from(step)
        self._lines.append(*rows)


def rollout_rows(record: StepRecord) -> list[dict[str, Any]]:
    """The lines of one step record, as plain Python values."""
    names = record.reward_names
    rewards, weights = record.rewards_BK.tolist(), record.weights_BK.tolist()
    columns = {
        "advantage": record.advantages_B.tolist(),
        "score": record.scores_B.tolist(),
        "length": record.lengths_B.tolist(),
        "truncated": record.truncated_B.tolist(),
        "degenerate": record.degenerate_B.tolist(),
    }
    return [
        {
            "step": record.step,
            "family": record.families[row],
            "prompt": plain_text(record.prompts[row]),
            "completion": plain_text(record.completions[row]),
            "rewards": dict(zip(names, rewards[row], strict=True)),
            "weights": dict(zip(names, weights[row], strict=True)),
            **{name: values[row] for name, values in columns.items()},
        }
        for row in range(len(record.completions))
    ]
