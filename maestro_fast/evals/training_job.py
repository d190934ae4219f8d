"""One training of a suite, from its payload to its results: it trains, and measures the policy on held-out prompts.

The true utility of held-out responses is measured after the steps that the suite names, and at a few points between
them. Its random draws are keyed by the seed and the prompts, so two arms of a seed are measured with the same draws.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from maestro_fast.config_file import absolute_paths
from maestro_fast.data.config import DataConfig, check_held_out_data
from maestro_fast.data.dataset import PromptDataset
from maestro_fast.data.load import load_prompts
from maestro_fast.evals.results import Result
from maestro_fast.functions import load_function
from maestro_fast.model.head import causal_lm, vocabulary_of
from maestro_fast.records import RewardBatch, StepRecord
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.rewards import RewardSet, build_anchor
from maestro_fast.rewards.conditional import LabelsConfig
from maestro_fast.settings import convert, override
from maestro_fast.training import MaestroTrainer, parse_config, train
from maestro_fast.training.health import NonFiniteError

logger = logging.getLogger(__name__)

# What is kept over time: the meta-reward, whether the Conductor is stable, and what its weights are like.
HISTORY = (
    "conductor/objective",
    "conductor/correlation",
    "conductor/self_flattery",
    "conductor/residual_share",
    "conductor/entropy",
    "diagnostics/self_flattery",
    "diagnostics/entropy",
    "diagnostics/family_spread",
    "diagnostics/family_spread_shuffled",
    "diagnostics/argmax_agreement",
    "completions/mean_length",
    "anchor/labelled",
    "anchor/utility",
    "kl",
)
_POINTS = 16  # Of each figure this many values are kept, each a mean over the steps since the one before.
_AT_ONCE = 256  # the number of held-out responses that are sampled at a time
# What of a run's own settings would get in the way of a job.
QUIET = {
    "trainer.disable_tqdm": True,
    "trainer.save_strategy": "no",
    "trainer.eval_strategy": "no",
    "trainer.eval_steps": None,
    "trainer.eval_delay": 0,
    "trainer.eval_on_start": False,
    "trainer.load_best_model_at_end": False,
    "trainer.metric_for_best_model": None,
    "evaluation": None,
    "alarms": [],  # They would end the training of an arm before it is measured.
    "console": None,
    "final": "last",
}


def run_training(payload: dict[str, Any]) -> list[Result]:
    """Trains, and measures the policy.

    Args:
        payload: what ``suite.training_jobs`` made. The keys are

            name, arm, seed, condition, settings: for the results.
            config: the config of a run; relative paths start in the folder "base".
            world: "package.module:function", called with that folder and the seed to fill it; None: it is there.
            changes: dotted settings and their values.
            labels: the options of ``LabelsConfig``; None takes the anchor away.
            steps: the steps after which there is a result, in ascending order.
            test, utility, samples: the held-out prompts (a section ``data``), what says how good a response is (an
                entry as ``anchor``), and the number of responses to each prompt.
            points: how often it is measured over the training, see ``SuiteConfig``.
            watched: label options by the name of a figure: the mean utility of the responses that these would have
                labelled in the second half of the training.
            folder, base, keep: where the training works, where its files are, and whether its run directory stays.

    Returns:
        One result for each of "steps". Where the training diverged before, the utility is NaN.

    Raises:
        SettingsError, ValueError: a setting is wrong, a held-out prompt is a training prompt, too, or a family has no
            utility.
        RuntimeError: the training ended before the last of "steps".
    """
    disable_progress_bar()
    base = made_world(payload["world"], Path(payload["base"]), payload["seed"])
    raw = _config(payload, base)
    config = parse_config(raw)
    run_dir = Path(config.run_dir)
    shutil.rmtree(run_dir, ignore_errors=True)  # An interrupted training of a suite begins anew.
    data, field = absolute_paths({"data": payload["test"]}, base)["data"], payload["name"].partition("/")[0]
    held_out = load_prompts(held_out_data(data, field), config.chat, field=field)
    utility = build_anchor(absolute_paths({"anchor": payload["utility"]}, base)["anchor"])
    measure = Measure(held_out, utility, payload)
    watching: dict[str, Any] = {"observers": [measure.see], "callbacks": [measure], "attach": measure.attach}
    try:
        _ = recorded_train(raw, **watching) if payload["keep"] else train(config, raw, **watching)
    except NonFiniteError as error:
        logger.warning("%s: the training diverged, so it has no utility: %s", payload["name"], error)
        measure.diverge()
    if not payload["keep"]:
        shutil.rmtree(run_dir)
    if len(measure.results) < len(payload["steps"]):
        raise RuntimeError(f"the training ended before step {payload['steps'][len(measure.results)]}")
    return measure.results


def held_out_data(entry: Any, field: str) -> DataConfig | list[DataConfig]:
    """The data sets of held-out prompts, from a section as ``data``, which ``field`` names.

    Raises:
        SettingsError: a setting is wrong.
    """
    found: DataConfig | list[DataConfig] = convert(entry, DataConfig | list[DataConfig], field)
    check_held_out_data(found, field)
    return found


def _config(payload: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """The config of the training, with absolute paths."""
    raw = absolute_paths(payload["config"], base)
    labels = payload["labels"]
    if labels is None:
        raw.pop("anchor", None)
    changes = QUIET | {"seed": payload["seed"], "trainer.max_steps": payload["steps"][-1]}
    changes |= {"run_dir": str(Path(payload["folder"]).absolute() / "runs" / payload["name"].replace("/", "-"))}
    changes |= {} if labels is None else {"anchor.labels": labels, "final": "best"}
    for dotted, value in {**changes, **payload["changes"]}.items():
        override(raw, dotted, value)
    return absolute_paths(raw, base)


def made_world(function: str | None, base: Path, seed: int) -> Path:
    """The folder of the files of a seed, which ``function`` fills when it is asked for the first time.

    The folder gets its name only when it is whole. Two workers may both fill one, and then the second one is dropped.
    """
    if function is None:
        return base
    folder = base / f"seed-{seed}"
    if not folder.exists():
        unfinished = base / f".seed-{seed}-{os.getpid()}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        load_function(function, field="world")(unfinished, seed)
        try:
            unfinished.rename(folder)
        except OSError:  # Another worker was faster, and a folder with files cannot be replaced.
            shutil.rmtree(unfinished)
    return folder


class Measure(TrainerCallback):
    """Measures the policy of a training while it goes on.

    Attributes:
        results: what was found so far, one for each of the payload's steps.
    """

    def __init__(self, held_out: PromptDataset, utility: RewardSet, payload: Mapping[str, Any]) -> None:
        self.results: list[Result] = []
        self._held_out, self._utility, self._payload = held_out, utility, payload
        self._steps: list[int] = payload["steps"]
        last = self._steps[-1]
        count = payload["points"]
        self._points = sorted({*self._steps, *(max(1, last * i // count) for i in range(1, count + 1))})
        self._trainer: MaestroTrainer | None = None
        self._tokens, self._batches = 0, 0
        self._logs: dict[str, list[tuple[int, float]]] = {}
        self._utilities: list[tuple[int, float]] = []
        self._watched = {name: LabelsConfig(**labels) for name, labels in payload["watched"].items()}
        self._seen: dict[str, list[tuple[int, float]]] = {name: [] for name in self._watched}

    def attach(self, trainer: MaestroTrainer) -> None:
        """Takes the trainer, checks the held-out prompts with it, and takes away what prints its log.

        Raises:
            ValueError: the policy cannot read a held-out prompt, or it is a training prompt, too.
        """
        self._trainer = trainer
        trainer.remove_callback(PrinterCallback)
        assert isinstance(trainer.model, nn.Module) and isinstance(trainer.train_dataset, PromptDataset)
        check_apart(self._held_out, trainer.train_dataset)
        vocabulary = vocabulary_of(causal_lm(trainer.model))
        self._held_out.check_prompts(trainer.step.judges.tokenizer, vocabulary)

    def diverge(self) -> None:
        """Adds a result without a utility for each step that was not reached."""
        for step in self._steps[len(self.results) :]:
            self.results.append(self._result(step, math.nan, {}, math.nan, {}))

    def see(self, record: StepRecord) -> None:
        """Counts tokens, and keeps the utilities that the watched label options would have shown."""
        self._tokens += int(record.lengths_B.sum())
        number, self._batches = self._batches, self._batches + 1
        for name, labels in self._watched.items():
            assert record.utilities_B is not None
            rows = [i for i, prompt in enumerate(record.prompts) if labels.chosen(number, prompt)]
            self._seen[name] += [(record.step, value) for value in record.utilities_B[rows].tolist()]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measures the policy that training starts from.

        Raises:
            ValueError: a family has no utility. Its mean would be unknown, and so would that over families.
        """
        utility, families = self._measured()[:2]
        if silent := [name for name, mean in families.items() if math.isnan(mean)]:
            raise ValueError(
                f"utility: unknown for every response to the held-out prompts of the family {silent[0]!r}, expected a "
                "number for some of them"
            )
        self._utilities.append((0, utility))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Keeps the figures of a step."""
        for name in HISTORY:
            if logs and isinstance(logs.get(name), int | float):
                self._logs.setdefault(name, []).append((state.global_step, float(logs[name])))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measures the policy where it is due.

        Raises:
            NonFiniteError: a parameter is not finite.
        """
        step = state.global_step
        if step not in self._points:
            return
        assert self._trainer is not None
        self._trainer.health.check_parameters(step)  # Nothing can be sampled from a policy that diverged.
        utility, families, length = self._measured()
        self._utilities.append((step, utility))
        if step in self._steps:
            figures = self._figures(step) | {"utility_last": utility}
            best = self._trainer.best
            if best is not None and best.step is not None:
                figures["kept_step"] = float(best.step)
                with self._best_parameters():
                    utility, families, length = self._measured()
            self.results.append(self._result(step, utility, families, length, figures))

    def _result(
        self, step: int, utility: float, families: dict[str, float], length: float, figures: dict[str, float]
    ) -> Result:
        payload = self._payload
        history = {name: _thinned(values) for name, values in self._logs.items()}
        return Result(
            payload["arm"],
            payload["seed"],
            {**payload["condition"], "steps": step},
            utility,
            families,
            length,
            self._tokens,
            figures,
            {"utility": list(self._utilities), **history},
            payload["settings"],
        )

    def _figures(self, step: int) -> dict[str, float]:
        """Each figure as a mean over the last quarter of the steps so far, and the watched utilities over the half."""
        found = {name: _mean(values, step * 3 // 4) for name, values in self._logs.items()}
        watched = {name: _mean(values, step // 2) for name, values in self._seen.items()}
        return {name: value for name, value in (found | watched).items() if value is not None}

    @contextlib.contextmanager
    def _best_parameters(self) -> Iterator[None]:
        """Lets the model be the best policy so far, inside the context."""
        trainer = self._trainer
        assert trainer is not None and trainer.best is not None and isinstance(trainer.model, nn.Module)
        own = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        try:
            trainer.best.load_into(trainer.model, trainer.accelerator)
            yield
        finally:
            with torch.no_grad():
                for name, parameter in trainer.model.named_parameters():
                    if name in own:
                        parameter.copy_(own[name])

    @torch.no_grad()
    def _measured(self) -> tuple[float, dict[str, float], float]:
        """The mean utility over families, that of each family, and the mean length of a response in tokens."""
        trainer, samples = self._trainer, self._payload["samples"]
        assert trainer is not None and isinstance(trainer.model, nn.Module)
        # No more responses are sampled at a time than in training, for which the memory is enough.
        size = max(1, min(_AT_ONCE, trainer.step.plan.responses) // samples)
        values: list[Tensor] = []
        lengths: list[Tensor] = []
        for i in range(0, len(self._held_out), size):
            rows = self._held_out.rows[i : i + size]
            prompts = self._held_out.prompts(rows, trainer.step.judges.tokenizer).repeat(samples)
            rollouts = trainer.step.sampler(trainer.model, prompts, -1 - i)  # Training's numbers are 0 and more.
            batch = RewardBatch.of(rollouts, -1)
            if self._utility.needs_policy:
                scorer = trainer.step.judges.text_scorer(trainer.model, prompts)
                batch = replace(batch, score_texts=scorer, device=trainer.args.device)
            values.append(self._utility(batch).view(-1, samples).nanmean(1))
            lengths.append(rollouts.completion_lengths_B.float())
        utility_N, families = torch.cat(values), self._held_out.families
        members = {name: [i for i, own in enumerate(families) if own == name] for name in sorted(set(families))}
        means = {name: utility_N[rows].nanmean().item() for name, rows in members.items()}
        return sum(means.values()) / len(means), means, torch.cat(lengths).mean().item()


def check_apart(held_out: PromptDataset, trained: PromptDataset) -> None:
    """Checks that no held-out prompt is trained on. The prompts of a stream are not looked at.

    Raises:
        ValueError: there is one.
    """
    if trained.streaming:
        return
    seen = {json.dumps(row[trained.prompt_column], sort_keys=True) for row in trained.rows}
    own = [json.dumps(row[held_out.prompt_column], sort_keys=True) for row in held_out.rows]
    if both := [prompt for prompt in own if prompt in seen]:
        raise ValueError(
            f"{held_out.field}: {len(both)} of {len(own)} prompts are training prompts, too, such as {both[0][:80]}, "
            "expected prompts that are held out"
        )


def _mean(values: list[tuple[int, float]], after: int) -> float | None:
    """The mean of the values of the steps behind ``after`` that are known, or None if there is none."""
    found = [value for step, value in values if step > after and value == value]
    return sum(found) / len(found) if found else None


def _thinned(values: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most ``_POINTS`` means of neighbouring values, each with the last step that it covers."""
    size = -(-len(values) // _POINTS)
    parts = [values[i : i + size] for i in range(0, len(values), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]
