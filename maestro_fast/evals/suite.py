"""A suite of trainings from one YAML file: do adaptive weights pay for these rewards, and how many labels do they need?

    run: config.yaml                # a run, as maestro-fast train takes it; its anchor is the utility
    test: {path: test.jsonl}        # held-out prompts
    validation: {path: val.jsonl}   # on which the static weights are chosen
    arms: [equal, static, labelled, anchored_residual]
    shares: [0.05, 0.1]             # of the training prompts whose utility is known
    seeds: 5
    steps: [80]

Every arm trains once for each seed, and those that learn from labels once for each share. Static weights come first: a
fixed list of weightings is trained on validation seeds and measured on validation prompts. "static" is the weighting
whose labelled responses had the best utility there, at the same share of labels, and "static_oracle" the one of the
best true utility. A suite that was stopped goes on with the trainings that are missing.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from maestro_fast.config_file import absolute_paths, check_paths, read_plain
from maestro_fast.evals.baselines import baseline_arms
from maestro_fast.evals.jobs import Job, run_jobs
from maestro_fast.evals.results import Result
from maestro_fast.evals.training_arms import CHOSEN, STATIC, STATIC_ORACLE, Arm, named_arms, static, weightings
from maestro_fast.evals.training_job import held_out_data
from maestro_fast.reporting.json_lines import plain
from maestro_fast.rewards import build_anchor, build_rewards
from maestro_fast.settings import SettingsError, build, override
from maestro_fast.training import parse_config
from maestro_fast.training.run_directory import locked

FUNCTION = "maestro_fast.evals.supervised:run_arm"
GRID_FILE = "static.json"
WEIGHTING = "weighting"  # in results.jsonl, the arm of every static weighting; the settings have its number
Pick = tuple[str, int, float | None]  # a static arm, the steps, and the share of labels that chose for it
# The sections of a suite that hold paths, and the section of a run that they are like.
_SECTIONS = {"run": (), "test": ("data",), "validation": ("data",), "utility": ("anchor",)}
_VALIDATION = 100_000  # Seeds from here on are those of validation.


@dataclass(frozen=True)
class SuiteConfig:
    """One suite.

    Attributes:
        run: the config of a run, or the path of its file.
        test: the held-out prompts, a section as ``data``; none of them may be a training prompt.
        out: the directory of the suite.
        arms: names, those of ``baselines`` among them, or arms of your own, see ``training_arms.named_arms``.
        shares: the shares of labelled prompts for the arms that learn from labels, among the prompts of all batches;
            one that is drawn again counts again. They replace ``anchor.labels`` of the run.
        seeds: the number of seeds on which the arms are compared.
        first_seed: the first of them.
        steps: the numbers of optimiser steps after which policies are compared; null takes the run's
            ``trainer.max_steps``. Labels are dealt out over the first of them: half of them in the first batches, the
            rest evenly; behind it they go on as evenly, so a longer training has a smaller share.
        samples: the number of responses to each held-out prompt.
        points: how often they are measured over a training, evenly, beside once before it and after each of ``steps``.
            With a large model a measurement may cost as much as several steps.
        utility: what says how good a held-out response is, an entry as ``anchor``; null takes the run's anchor. The
            mean over families counts each family once, so every family needs a utility.
        validation: the prompts on which static weightings are compared, a section as ``data``.
        validation_seeds: the number of seeds on which they are.
        static: how many static weightings are tried; null takes 12, or all there are where these are fewer.
        world: "package.module:function", called with a folder and a seed to write the files of the run for that seed;
            null means that the files are there. Relative paths in ``run`` then start in that folder.
        keep: whether the run directories stay, with their logs and final policies.
        workers: the number of trainings at a time, each on one thread and, where there are GPUs, on one of these, in
            turns.
    """

    run: str | dict[str, Any]
    test: dict[str, Any] | list[Any]
    out: str = "runs/eval"
    arms: list[Any] = field(default_factory=lambda: ["equal", "labelled", "reward_model_hybrid", "anchored_residual"])
    shares: list[float] = field(default_factory=lambda: [0.05, 0.1])
    seeds: int = 5
    first_seed: int = 1
    steps: list[int] | None = None
    samples: int = 8
    points: int = 8
    utility: str | dict[str, Any] | None = None
    validation: dict[str, Any] | list[Any] | None = None
    validation_seeds: int = 2
    static: int | None = None
    world: str | None = None
    keep: bool = True
    workers: int = 2

    def __post_init__(self) -> None:
        for name in ("seeds", "samples", "validation_seeds", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 1")
        if self.points < 0:
            raise ValueError(f"points: {self.points}, expected at least 0")
        if not 0 <= self.first_seed <= _VALIDATION - self.seeds:
            raise ValueError(f"first_seed: {self.first_seed}, expected 0 to {_VALIDATION - self.seeds}")
        if not self.arms:
            raise ValueError("arms: none, expected at least one")
        for share in self.shares:
            if not 0 < share <= 1:
                raise ValueError(f"shares: {share}, expected 0 < share <= 1")
        if self.steps is not None and (not self.steps or self.steps != sorted({*self.steps}) or self.steps[0] < 1):
            raise ValueError(f"steps: {self.steps}, expected numbers from 1 in ascending order")
        if self.validation is None and not {*CHOSEN}.isdisjoint(arm for arm in self.arms if isinstance(arm, str)):
            raise ValueError("validation: missing, expected the prompts on which static weights are chosen")


@dataclass(frozen=True)
class Suite:
    """A suite whose config was read and checked.

    Attributes:
        config: the config.
        base: the folder in which relative paths of the run start, or that of the worlds.
        raw: the config of the run, as it was written.
        updates: the number of optimiser steps from one generation batch.
        rewards: the names of the K rewards.
        arms: all arms but the static ones that are chosen.
        steps: the steps after which policies are compared.
    """

    config: SuiteConfig
    base: Path
    raw: dict[str, Any]
    updates: int
    rewards: tuple[str, ...]
    arms: tuple[Arm, ...]
    steps: tuple[int, ...]

    @property
    def folder(self) -> Path:
        """The directory of the suite."""
        return Path(self.config.out)

    @property
    def chosen(self) -> list[str]:
        """Which of the static arms are asked for."""
        return [name for name in CHOSEN if name in self.config.arms]

    @property
    def tried(self) -> list[tuple[float, ...]]:
        """The static weightings of a search."""
        return weightings(self.config.static, len(self.rewards))

    @property
    def utility(self) -> str | dict[str, Any]:
        """The entry of what says how good a held-out response is."""
        own = self.raw.get("anchor")
        if isinstance(own, dict):
            own = {name: value for name, value in own.items() if name != "labels"}
        return self.config.utility or own or {}

    @property
    def seeds(self) -> range:
        """The seeds on which arms are compared."""
        return range(self.config.first_seed, self.config.first_seed + self.config.seeds)

    def labels(self, share: float) -> dict[str, Any]:
        """The label options of a share: half of the labels in the first batches, since labels are worth most there."""
        over = -(-self.steps[0] // self.updates)  # Labels are dealt out to generation batches.
        early = int(share * over / 2)
        return {"share": share} | ({"early": early, "over": over} if share < 1 and early else {})


def read_suite(path: Path, overrides: Sequence[tuple[str, Any]] = ()) -> Suite:
    """Reads and checks a suite.

    Args:
        path: its YAML file. The directory ``out`` starts in the working directory, all other paths in the file's
            folder, and those of ``run``, if that is a file, in the folder of that file. With a ``world``, all paths but
            ``out`` start in the folder of a seed.
        overrides: dotted settings and their values, for example ("run.model.path", "models/mine"); paths in them start
            in the working directory.

    Raises:
        SettingsError: something is wrong; the message names the setting.
    """
    values, base = read_plain(path), path.absolute().parent
    if values.get("world") is None:
        sections = [name for name in _SECTIONS if name != "run" and values.get(name) is not None]
        values |= {name: _absolute(name, values[name], base) for name in sections}
    if isinstance(values.get("run"), str):
        file = base / values["run"]
        values["run"], base = read_plain(file), file.parent
    for dotted, value in overrides:
        if dotted == "run" and not isinstance(value, dict):
            raise SettingsError("run: cannot be replaced here, expected one of its settings, as in --run.seed 3")
        section, _, inside = dotted.partition(".")
        value = _absolute(dotted, value, Path.cwd())
        if section == "run" and inside:  # In the mapping of a run, a section may be a mere name.
            values["run"] = values.get("run") or {}
            override(values["run"], inside, value)
        else:
            override(values, dotted, value)
    config = build(SuiteConfig, values)
    if not isinstance(config.run, dict):
        raise SettingsError("run: missing, expected the config of a run, or the path of its file")
    raw = config.run
    return _checked(config, Path(config.out).absolute() / "worlds" if config.world else base, raw)


def _absolute(dotted: str, value: Any, base: Path) -> Any:
    """The value of a setting of a suite with absolute paths; relative ones start at ``base``."""
    section, *parts = dotted.split(".")
    if section not in _SECTIONS:
        return value
    parts = [*_SECTIONS[section], *parts]
    for part in reversed(parts):
        value = {part: value}
    value = absolute_paths(value, base)
    for part in parts:
        value = value[part]
    return value


def _checked(config: SuiteConfig, base: Path, raw: dict[str, Any]) -> Suite:
    with _errors_of("run."):
        located = {"run_dir": config.out, **absolute_paths(raw, base)}
        run = parse_config(located)
        if not config.world:
            check_paths(located)
    rewards = build_rewards(run.rewards).names
    arms = tuple(named_arms(config.arms, rewards, baseline_arms(located)))
    labelled = STATIC in config.arms or any(arm.labels for arm in arms)
    if run.anchor is None and (config.utility is None or labelled):
        raise SettingsError("run.anchor: missing, expected the utility that labels and measurements come from")
    if labelled and not config.shares:
        raise SettingsError("shares: none, but there are arms that learn from labels")
    steps = config.steps or [run.trainer.get("max_steps", 0)]
    if not isinstance(steps[0], int) or steps[0] < 1:
        raise SettingsError("steps: missing, expected them here or as run.trainer.max_steps")
    for arm in arms:
        changed = copy.deepcopy(raw)
        if not arm.labels:
            changed.pop("anchor", None)
        with _errors_of(f"arms: {arm.name}: "):
            for dotted, value in arm.changes.items():
                override(changed, dotted, value)
            parse_config({"run_dir": config.out, **absolute_paths(changed, base)})
    suite = Suite(config, base, raw, run.batch.updates_per_batch, rewards, arms, tuple(steps))
    _check_held_out(suite)
    return suite


def _check_held_out(suite: Suite) -> None:
    """Checks what the trainings read beside the run, before the first of them begins."""
    held_out = {"test": suite.config.test, "validation": suite.config.validation}
    for name, entry in held_out.items():
        if entry is not None:
            held_out_data(entry, name)
            if not suite.config.world:
                with _errors_of(name, "data"):
                    check_paths({"data": entry})
    with _errors_of("utility", "anchor"):
        build_anchor(absolute_paths({"anchor": suite.utility}, suite.base)["anchor"])
    _ = suite.tried  # This refuses a number of weightings that there are not.


@contextlib.contextmanager
def _errors_of(name: str, instead_of: str = "") -> Iterator[None]:
    """Lets the message of an error begin with ``name``, in place of ``instead_of`` where it begins with that."""
    try:
        yield
    except ValueError as error:
        raise SettingsError(f"{name}{str(error).removeprefix(instead_of)}") from error


def run_suite(suite: Suite) -> list[Result]:
    """Runs what is missing of a suite, and returns all its results; "static" and "static_oracle" are among them.

    Beside results.jsonl it writes static.json: every static weighting that was tried, and what chose among them.
    """
    folder, workers = suite.folder, suite.config.workers
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "out"):
        picked: dict[Pick, int] = {}
        if suite.chosen:
            tried = run_jobs(validation_jobs(suite), FUNCTION, folder, workers=workers, title="static weightings")
            found = [result for results in tried.values() for result in results]
            picked = choose(suite, found)
            (folder / GRID_FILE).write_text(
                json.dumps(plain(grid(suite, found, picked)), indent=1) + "\n", encoding="utf-8"
            )
        done = run_jobs(test_jobs(suite, set(picked.values())), FUNCTION, folder, workers=workers, title="trainings")
    return assemble(suite, [result for results in done.values() for result in results], picked)


def validation_jobs(suite: Suite) -> list[Job]:
    """A training for each static weighting and validation seed, in which all utilities are known but not used."""
    seeds = range(_VALIDATION, _VALIDATION + suite.config.validation_seeds)
    return [_job(suite, _weighting(suite, i), seed, weighting=i) for seed in seeds for i in range(len(suite.tried))]


def test_jobs(suite: Suite, chosen: Iterable[int]) -> list[Job]:
    """A training for each arm, share and seed, seed by seed, so that a suite that was stopped has whole seeds."""
    jobs = []
    for seed in suite.seeds:
        for arm in suite.arms:
            jobs += [_job(suite, arm, seed, share) for share in (suite.config.shares if arm.labels else [None])]
        jobs += [_job(suite, _weighting(suite, i), seed, weighting=i) for i in sorted(chosen)]
    return jobs


def _weighting(suite: Suite, i: int) -> Arm:
    return Arm(f"{WEIGHTING}-{i}", "Static weights.", {"weights": static(suite.rewards, suite.tried[i])})


def _job(suite: Suite, arm: Arm, seed: int, share: float | None = None, *, weighting: int | None = None) -> Job:
    """The training of an arm, or of a static weighting, on a seed; seeds of validation train for the choice alone."""
    config, validates = suite.config, seed >= _VALIDATION
    # The utilities of validation are known throughout, and nothing learns from them or keeps a policy by them.
    everything = {"share": 1.0} if "anchor" in suite.raw else None
    labels = everything if validates else None if share is None else suite.labels(share)
    held_out = config.validation if validates else config.test
    watched = config.shares if validates and everything and STATIC in suite.chosen else []
    parts = [
        "validation" if validates else "test",
        arm.name,
        *([] if share is None else [f"{share:g}"]),
        f"seed-{seed}",
    ]
    payload = {
        "name": "/".join(parts),
        "arm": arm.name if weighting is None else WEIGHTING,
        "seed": seed,
        "condition": {} if share is None else {"share": share},
        "settings": {} if weighting is None else {WEIGHTING: weighting},
        "config": _named(suite.raw),
        "world": config.world,
        "changes": {**arm.changes, **({"final": "last"} if validates else {})},
        "labels": labels,
        "steps": list(suite.steps),
        "test": _named(held_out),
        "utility": _named(suite.utility),
        "samples": config.samples,
        "points": config.points,
        "watched": {_figure(s): suite.labels(s) for s in watched},
    }
    places = {"folder": str(suite.folder), "base": str(suite.base), "keep": config.keep}
    places |= {"config": suite.raw, "test": held_out, "utility": suite.utility}
    return Job(payload["name"], payload, suite.steps[-1], places)


def _named(value: Any) -> Any:
    """The value with the mere name in place of every absolute path: a suite may go on where files lie elsewhere."""
    if isinstance(value, Mapping):
        return {name: _named(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_named(item) for item in value]
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value


def _figure(share: float) -> str:
    """The name of the mean utility that labels at this share show in a validation training."""
    return f"labelled_utility/{share:g}"


def choose(suite: Suite, validated: Iterable[Result]) -> dict[Pick, int]:
    """The number of the weighting that each static arm takes at each step and share.

    "static" takes that of the best mean labelled utility in the second half of the validation trainings. If no label
    was dealt out there, all are equal, and it takes the first one, which is equal weights.
    """
    validated = list(validated)
    picked: dict[Pick, int] = {}
    for steps in suite.steps:
        if STATIC in suite.chosen:
            for share in suite.config.shares:
                picked[STATIC, steps, share] = _best(_means(validated, steps, _figure(share)))
        if STATIC_ORACLE in suite.chosen:
            picked[STATIC_ORACLE, steps, None] = _best(_means(validated, steps, None))
    return picked


def _means(validated: Sequence[Result], steps: int, figure: str | None) -> dict[int, float]:
    """The mean over seeds of a figure, or of the true utility, of each weighting; -inf where it is not known."""
    found: dict[int, list[float]] = {}
    for result in validated:
        if result.condition["steps"] == steps:
            value = result.utility if figure is None else result.figures.get(figure)
            known = [] if value is None or not math.isfinite(value) else [value]
            found.setdefault(result.settings[WEIGHTING], []).extend(known)
    return {i: sum(values) / len(values) if values else -math.inf for i, values in sorted(found.items())}


def _best(means: Mapping[int, float]) -> int:
    return max(means, key=lambda i: (means[i], -i))


def grid(suite: Suite, validated: Sequence[Result], picked: Mapping[Pick, int]) -> dict[str, Any]:
    """Every weighting that was tried, what it came to in validation, and which ones were taken, as JSON."""
    rows = []
    for steps in suite.steps:
        columns = {"utility": None, **{_figure(share): _figure(share) for share in suite.config.shares}}
        means = {name: _means(validated, steps, figure) for name, figure in columns.items()}
        for i, values in enumerate(suite.tried):
            found = {name: of[i] if math.isfinite(of[i]) else None for name, of in means.items()}
            rows.append(
                {"steps": steps, WEIGHTING: i, "values": dict(zip(suite.rewards, values, strict=True)), **found}
            )
    taken = [
        {"arm": arm, "steps": steps, **({} if share is None else {"share": share}), WEIGHTING: i}
        for (arm, steps, share), i in picked.items()
    ]
    return {"validation_seeds": suite.config.validation_seeds, "tried": rows, "taken": taken}


def assemble(suite: Suite, results: Iterable[Result], picked: Mapping[Pick, int]) -> list[Result]:
    """The results of all arms. Those of a weighting become the results of each static arm that has taken it."""
    found: list[Result] = []
    for result in results:
        if result.arm != WEIGHTING:
            found.append(result)
            continue
        for (arm, steps, share), i in picked.items():
            if (result.settings[WEIGHTING], result.condition["steps"]) == (i, steps):
                values = dict(zip(suite.rewards, suite.tried[i], strict=True))
                at = dict(result.condition) if share is None else {"share": share, **result.condition}
                found.append(replace(result, arm=arm, condition=at, settings={"values": values}))
    return found
