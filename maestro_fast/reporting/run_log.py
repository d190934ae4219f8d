"""The logs that a run writes into its directory: metrics, rollouts, stage times and alarms.

A trainer attaches them on its main process. metrics.jsonl holds no wall-clock time, so two runs of one seed, or a run
that was killed and resumed, leave the same bytes.

A resumed run repeats the steps since its checkpoint. Each log first drops its old lines of these steps, so that no step
stands in a file twice. A new run in an old directory starts the files anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import TrainerCallback

from maestro_fast.records import StepRecord, plain_text
from maestro_fast.reporting.json_lines import (
    ALARMS_FILE,
    COSTS_FILE,
    METRICS_FILE,
    ROLLOUTS_FILE,
    TIMINGS_FILE,
    JsonLines,
    iter_jsonl,
    read_jsonl,
)

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from maestro_fast.watching import Alarm

__all__ = [
    "AlarmsLog",
    "CostsCallback",
    "JsonLines",
    "MetricsCallback",
    "RolloutsLog",
    "TimingsLog",
    "iter_jsonl",
    "read_jsonl",
]

# These keys describe the process and not the policy.
_OF_THE_PROCESS = re.compile(r".*_runtime|.*_per_second|total_flos|train_loss")
# So do the costs of a judge: a resumed run finds answers in the cache that the run before it has paid for.
_COSTS = re.compile(r".*/cost/(?:requests|cached|retries|prompt_tokens|completion_tokens|seconds)")


class MetricsCallback(TrainerCallback):
    """Writes what a Hugging Face trainer logs to ``run_dir``/metrics.jsonl, one line for each step.

    A line holds ``step`` and the logged values. Run times, rates and the summary that transformers logs at the end of
    training are left out, because they describe the process and not the policy; timings.jsonl has the times. Values
    that are logged later at the same step, for example by an evaluation, are added to that step's line. Only the main
    process (``state.is_world_process_zero``) writes.
    """

    file = METRICS_FILE

    def __init__(self, run_dir: str | Path) -> None:
        self._path = Path(run_dir) / self.file
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
        values = {name: value for name, value in (logs or {}).items() if self.takes(name)}
        if not state.is_world_process_zero or not values:
            return
        row = {"step": state.global_step} | {name: value for name, value in values.items() if name != "step"}
        if self._last.get("step") == state.global_step:
            row = self._last | row
            self._open().replace_last(row)
        else:
            self._open().append(row)
        self._last = row

    def takes(self, name: str) -> bool:
        """Whether a logged value belongs into the file."""
        return not _OF_THE_PROCESS.fullmatch(name) and not _COSTS.fullmatch(name)

    def _open(self) -> JsonLines:
        if self._lines is None:
            self._lines = JsonLines(self._path)
        return self._lines


class CostsCallback(MetricsCallback):
    """Writes what judges cost (requests, tokens, seconds) to ``run_dir``/costs.jsonl, which a run without judges lacks.

    The values are means for a generation batch and a process, as in metrics.jsonl.
    """

    file = COSTS_FILE

    def takes(self, name: str) -> bool:
        """Whether a logged value belongs into the file."""
        return _COSTS.fullmatch(name) is not None


class RolloutsLog:
    """Observes step records, and writes one line for each response to ``run_dir``/rollouts.jsonl.

    A line holds step, family, prompt, completion, rewards {name: value, or null if the reward abstained}, weights
    {name: value}, advantage, score, length (in tokens), truncated and degenerate. A run with an anchor adds utility,
    null where it is unknown, and a policy with a learnt reward adds residual, in that reward's own unit. The step is
    the first optimiser step that trains on the response; the line of that step in metrics.jsonl has the means of its
    batch.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._log = _StepLog(Path(run_dir) / ROLLOUTS_FILE, counts_from_one=True)

    def __call__(self, record: StepRecord) -> None:
        self._log.append(record.step, *rollout_rows(record))


class TimingsLog:
    """Writes the seconds by stage of each generation batch to ``run_dir``/timings.jsonl.

    A line is {"step", <stage>: seconds, ..., "total": seconds, "tokens/computed", "tokens/of_sequences"}. ``step`` is
    the first optimiser step that trains on the batch, as in rollouts.jsonl. The tokens are those of the main process's
    forwards: fewer are computed than the sequences have where they share their prompts.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._log = _StepLog(Path(run_dir) / TIMINGS_FILE)

    def __call__(self, timings: Mapping[str, float]) -> None:
        """Writes the line of one batch.

        Raises:
            ValueError: ``timings`` has no step.
        """
        if "step" not in timings:
            raise ValueError(f"timings: got the keys {', '.join(timings) or 'none'}, expected step among them")
        step = int(timings["step"])
        self._log.append(step, {"step": step, **{k: v for k, v in timings.items() if k != "step"}})


class AlarmsLog(TrainerCallback):
    """Writes a line for each alarm that rings to ``run_dir``/alarms.jsonl.

    A line holds step, metric, value, bound, action and condition. The value is that of the metric, the bound what it
    went beyond (for ``no_better_for`` the best value so far), the action "warn" or "stop", and the condition says in
    words when such an alarm rings. A run without alarms has no file.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._path = Path(run_dir) / ALARMS_FILE

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self._path.exists():
            JsonLines(self._path).drop_from(state.global_step + 1)

    def __call__(self, alarm: Alarm) -> None:
        JsonLines(self._path).append(asdict(alarm))


class _StepLog:
    """Appends lines of ascending steps. Before the first ones it drops old lines of their step and of later steps."""

    def __init__(self, path: Path, *, counts_from_one: bool = False) -> None:
        self._path, self._counts_from_one = path, counts_from_one
        self._lines: JsonLines | None = None

    def append(self, step: int, *rows: Mapping[str, Any]) -> None:
        if self._lines is None:
            self._lines = JsonLines(self._path)
            if self._counts_from_one:
                self._lines.count_from_one()
            self._lines.drop_from(step)
        self._lines.append(*rows)


def rollout_rows(record: StepRecord) -> list[dict[str, Any]]:
    """The lines of rollouts.jsonl for one step record, one for each response."""
    names = record.reward_names
    rewards, weights = record.rewards_BK.tolist(), record.weights_BK.tolist()
    columns = {
        "advantage": record.advantages_B.tolist(),
        "score": record.scores_B.tolist(),
        "length": record.lengths_B.tolist(),
        "truncated": record.truncated_B.tolist(),
        "degenerate": record.degenerate_B.tolist(),
    }
    for name, known_B in {"utility": record.utilities_B, "residual": record.residuals_B}.items():
        columns |= {} if known_B is None else {name: known_B.tolist()}
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
