"""The suite of the conflict worlds: are adaptive weights worth anything where the truth is known, and at which labels?

It goes on in three phases, and each run of a phase is a job that a killed suite does not repeat:

1. Every arm tries its 12 settings (see ``conflict_arms``) in validation worlds, which have seeds of their own, of the
   kinds strong and mild at 5 % labels. The setting of the best mean true utility is taken for all worlds, shares and
   advantage profiles; to tune in each of these would take hours and suit no user, who has one run to tune on.
2. 36 static weightings are tried in the validation worlds of every kind. "static_oracle" is the one of the best true
   utility there. "static" is the one whose labelled responses had the best mean utility in the second half of the
   training, at the same share of labels; each of the 36 runs has labels of its own.
3. All arms are compared in the test worlds, which share all random draws. Arms that learn from labels run at every
   share. Half of their labels come in the first batches. Some arms run under other advantage profiles as well, in the
   kinds of worlds, and at the share, that settings were chosen on; so do the controls.

The folder then holds results.jsonl, with the validation runs too, and grid.json: all that was tried, what it came to,
and what was taken.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maestro_fast.evals.conflict import POSITIONS, REWARDS, WATCHED, WORLDS, ConflictConfig, run_conflict
from maestro_fast.evals.conflict_arms import ARMS, STATICS, WEIGHTINGS, Arm, Setting, static_arm
from maestro_fast.evals.jobs import Job, run_jobs
from maestro_fast.evals.results import Result
from maestro_fast.evals.training_arms import STATIC, STATIC_ORACLE, weightings
from maestro_fast.reporting.json_lines import plain

FUNCTION = "maestro_fast.evals.conflict_suite:run_training"
GRID_FILE = "grid.json"
HISTORY = (
    "utility",
    "kl",
    "conductor/objective",
    "conductor/residual_share",
    "diagnostics/self_flattery",
    "diagnostics/entropy",
    "diagnostics/family_spread",
    "diagnostics/family_spread_shuffled",
)
_VALIDATION = 100_000  # Seeds from here on are those of validation worlds.


@dataclass(frozen=True)
class SuiteSize:
    """What the suite runs. The defaults take under 20 minutes on two cores.

    Attributes:
        worlds: the kinds of worlds in which arms are compared.
        tuned_on: the kinds of validation worlds on which settings are chosen.
        arms: the arms, "static" and "static_oracle" among them.
        shares: the shares of labels.
        tuned_share: the share at which settings are chosen.
        profiles: the advantage profiles under which ``profile_arms`` run beside maestro.
        profile_arms: these arms.
        steps: the number of batches of a training.
        prompts: the number of prompts in a batch, with 8 responses to each.
        evaluation: the number of held-out prompts of a world.
        test_seeds: the number of test worlds of each kind.
        validation_seeds: the number of validation worlds of each kind.
    """

    worlds: tuple[str, ...] = tuple(WORLDS)
    tuned_on: tuple[str, ...] = ("strong", "mild")
    arms: tuple[str, ...] = (*ARMS, *STATICS)
    shares: tuple[float, ...] = (0.025, 0.05, 0.1, 0.25)
    tuned_share: float = 0.05
    profiles: tuple[str, ...] = ("dr_grpo", "gdpo", "rloo")
    profile_arms: tuple[str, ...] = ("equal", STATIC_ORACLE, "conductor", "anchored_residual")
    steps: int = 50
    prompts: int = 16
    evaluation: int = 64
    test_seeds: int = 10
    validation_seeds: int = 3

    def __post_init__(self) -> None:
        for name, known in (("worlds", WORLDS), ("tuned_on", WORLDS), ("arms", (*ARMS, *STATICS))):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"{name}: {value!r}, expected some of {', '.join(known)}")
        if needed := next((arm.like for arm in self.named() if arm.like and arm.like not in self.arms), None):
            raise ValueError(f"arms: without {needed!r}, whose settings another arm takes over")
        if not {*STATICS}.isdisjoint(self.arms) and "equal" not in self.arms:
            raise ValueError("arms: without 'equal', whose settings static weights take over")

    def named(self) -> list[Arm]:
        """The arms, but for the static ones."""
        return [ARMS[name] for name in self.arms if name in ARMS]


def run_suite(folder: Path, *, workers: int = 2, size: SuiteSize | None = None) -> list[Result]:
    """Runs what is missing of the suite.

    Args:
        folder: where results.jsonl and grid.json are; it is created.
        workers: the number of processes; with 0, all runs in this one.
        size: what is run.

    Returns:
        The results of the test worlds, arm by arm. Their conditions are "world", "profile" and, for arms that learn
        from labels, "share".

    Raises:
        SettingsError: another process works in the folder.
        ValueError: the folder holds results of another size.
        RuntimeError: runs failed, see ``run_jobs``.
    """
    from maestro_fast.training.run_directory import locked  # The workers import this file, and need no trainer.

    size = size or SuiteSize()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "out"):
        tried = tuning_jobs(size)
        found = run_jobs([job for _, _, job in tried], FUNCTION, folder, workers=workers, title="settings")
        means = _mean_utilities((arm, i, found[job.name]) for arm, i, job in tried)
        chosen = {arm: ARMS[arm].settings[_best(values)] for arm, values in means.items()}
        weighed: dict[str, dict[int, list[Result]]] = {}
        if not {*STATICS}.isdisjoint(size.arms):
            static_tried = static_jobs(size, chosen["equal"])
            jobs = [job for _, _, job in static_tried]
            found = run_jobs(jobs, FUNCTION, folder, workers=workers, title="static weightings")
            for world, i, job in static_tried:
                weighed.setdefault(world, {})[i] = found[job.name]
        picked = pick_static(size, weighed)
        grid = _grid(size, means, chosen, weighed, picked)
        (folder / GRID_FILE).write_text(json.dumps(plain(grid), indent=1) + "\n", encoding="utf-8")
        done = run_jobs(comparison_jobs(size, chosen, picked), FUNCTION, folder, workers=workers, title="test worlds")
    return [result for results in done.values() for result in results]


# --- the jobs ---


def tuning_jobs(size: SuiteSize) -> list[tuple[str, int, Job]]:
    """The runs that choose settings: of each arm that is tuned, the number of each setting, in each kind of world."""
    return [
        (arm.name, i, _job(size, arm, setting, world, _share(size, arm), validates=f"setting-{i}"))
        for arm in size.named()
        if not arm.like
        for i, setting in enumerate(arm.settings)
        for world in size.tuned_on
    ]


def static_jobs(size: SuiteSize, setting: Setting) -> list[tuple[str, int, Job]]:
    """The runs that choose static weights: in each kind of world, the number of each weighting."""
    return [
        (world, i, _job(size, static_arm("weighting", i), setting, world, None, validates=f"weighting-{i}"))
        for world in size.worlds
        for i in range(WEIGHTINGS)
    ]


def comparison_jobs(
    size: SuiteSize, chosen: Mapping[str, Setting], picked: Mapping[tuple[str, float | None], int]
) -> list[Job]:
    """The runs on test worlds.

    Args:
        size: what is run.
        chosen: the setting of each arm that was tuned.
        picked: the number of the static weighting for a world and a share of labels, or for a world and None, where
            all utilities chose it.
    """

    def arms_of(world: str, names: Sequence[str]) -> Iterator[tuple[Arm, float | None]]:
        for name in names:
            if name == STATIC_ORACLE:
                yield static_arm(name, picked[world, None]), None
            elif name == STATIC:
                yield from ((static_arm(name, picked[world, share]), share) for share in size.shares)
            elif not ARMS[name].control:
                yield from ((ARMS[name], share) for share in (size.shares if ARMS[name].labels else (None,)))
            elif world in size.tuned_on:
                yield ARMS[name], _share(size, ARMS[name])

    jobs = []
    for world in size.worlds:
        for arm, share in arms_of(world, size.arms):
            jobs.append(_job(size, arm, chosen[arm.like or arm.name], world, share))
        if world in size.tuned_on:
            named = [name for name in size.profile_arms if name in size.arms]
            for profile in size.profiles:
                for arm, share in arms_of(world, named):
                    if share in (None, size.tuned_share):
                        jobs.append(_job(size, arm, chosen[arm.like or arm.name], world, share, profile=profile))
    return jobs


def _share(size: SuiteSize, arm: Arm) -> float | None:
    return size.tuned_share if arm.labels else None


def _job(
    size: SuiteSize,
    arm: Arm,
    setting: Setting,
    world: str,
    share: float | None,
    *,
    profile: str = "maestro",
    validates: str = "",
) -> Job:
    """The training of an arm in the test worlds of a kind, or in validation worlds if it ``validates`` something."""
    split = "validation" if validates else "test"
    first, count = (_VALIDATION, size.validation_seeds) if validates else (1, size.test_seeds)
    condition: dict[str, Any] = {"world": world, "profile": profile, "split": split}
    training = {"steps": size.steps, "prompts": size.prompts, "evaluation": size.evaluation, "profile": profile}
    training |= {**setting["training"], "shuffled": arm.shuffled, "labelled": 0.0}
    if share is not None:
        condition["share"] = share
        training |= {"labelled": share, "early": round(share * size.steps / 2)}
    if validates and arm.name == "weighting":
        training["watched"] = list(size.shares)
    parts = [split, world, profile, arm.name, *([] if share is None else [f"{share:g}"]), *filter(None, [validates])]
    payload = {
        "arm": arm.name,
        "world": world,
        "weights": arm.entry(world, setting),
        "training": training,
        "seeds": list(range(first, first + count)),
        "condition": condition,
        "settings": {"training": setting["training"], "weights": arm.entry(world, setting)},
    }
    return Job("/".join(parts), payload, arm.cost * size.steps * count)


def run_training(payload: dict[str, Any]) -> list[Result]:
    """Trains an arm in the worlds of some seeds, side by side.

    Args:
        payload: "arm", "condition" and "settings" for the results; "world", "weights" and "seeds" for ``run_conflict``,
            and "training", the options of ``ConflictConfig``.

    Returns:
        One result for each seed. The figure "alarms" counts the diagnostics that left their healthy range.
    """
    options = {**payload["training"], "watched": tuple(payload["training"].get("watched", ()))}
    config, validates = ConflictConfig(**options), payload["condition"]["split"] == "validation"
    with _without_warnings():
        found = run_conflict(payload["world"], payload["weights"], payload["seeds"], config)
    results = []
    for s, seed in enumerate(payload["seeds"]):
        history = {} if validates else {name: found.history_S[s].get(name, []) for name in HISTORY}
        figures = found.figures_S[s] | {"start": found.start_S[s].item(), "alarms": len(found.alarms_S[s])}
        if validates:
            figures = {name: value for name, value in figures.items() if name.startswith(WATCHED)}
        results.append(
            Result(
                arm=payload["arm"],
                seed=seed,
                condition=payload["condition"],
                utility=found.utility_S[s].item(),
                families={str(f): round(value, 5) for f, value in enumerate(found.family_SF[s].tolist())},
                tokens=config.steps * config.prompts * config.group_size * POSITIONS,
                figures={name: float(f"{value:.5g}") for name, value in figures.items()},
                history={
                    name: [(step, float(f"{value:.5g}")) for step, value in pairs]
                    for name, pairs in history.items()
                    if pairs
                },
                settings=payload["settings"],
            )
        )
    return results


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Leaves out the warnings of weight policies and diagnostics: they are figures here, and every arm is as meant."""
    logger = logging.getLogger("maestro_fast.weighting")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


# --- what is chosen ---


def _mean_utilities(runs: Iterable[tuple[str, int, list[Result]]]) -> dict[str, dict[int, float]]:
    """The mean true utility of each arm's settings over all their validation worlds."""
    found: dict[str, dict[int, list[float]]] = {}
    for arm, i, results in runs:
        found.setdefault(arm, {}).setdefault(i, []).extend(result.utility for result in results)
    return {arm: {i: sum(u) / len(u) for i, u in by_setting.items()} for arm, by_setting in found.items()}


def _best(values: Mapping[int, float]) -> int:
    """The number of the greatest value, the first one of equals."""
    return max(values, key=lambda i: (values[i], -i))


def pick_static(
    size: SuiteSize, weighed: Mapping[str, Mapping[int, Sequence[Result]]]
) -> dict[tuple[str, float | None], int]:
    """The number of the static weighting for each world and share of labels, and for each world with all utilities.

    Where no label was dealt out, the first weighting is taken, which is equal weights.
    """
    return {
        (world, share): _best(_values(by_weighting, share))
        for world, by_weighting in weighed.items()
        for share in (None, *size.shares)
    }


def _values(by_weighting: Mapping[int, Sequence[Result]], share: float | None) -> dict[int, float]:
    """What chooses among weightings: the mean labelled utility at a share, or the mean true utility."""
    found: dict[int, float] = {}
    for i, results in by_weighting.items():
        if share is None:
            seen = [result.utility for result in results]
        else:
            figures = [result.figures.get(f"{WATCHED}{share:g}") for result in results]
            seen = [value for value in figures if value is not None]
        found[i] = sum(seen) / len(seen) if seen else -math.inf
    return found


def _rounded(value: float) -> float | None:
    """The value to four digits; None if it is not known."""
    return round(value, 4) if math.isfinite(value) else None


def _grid(
    size: SuiteSize,
    means: Mapping[str, Mapping[int, float]],
    chosen: Mapping[str, Setting],
    weighed: Mapping[str, Mapping[int, Sequence[Result]]],
    picked: Mapping[tuple[str, float | None], int],
) -> dict[str, Any]:
    """All settings and weightings that were tried, what they came to in validation worlds, and what was taken."""
    settings = {
        arm: {
            "tried": [{**ARMS[arm].settings[i], "utility": round(value, 4)} for i, value in values.items()],
            "taken": chosen[arm],
        }
        for arm, values in means.items()
    }
    tried = weightings(WEIGHTINGS, len(REWARDS))
    statics = {}
    for world, by_weighting in weighed.items():
        columns = {"utility": _values(by_weighting, None)}
        columns |= {f"{WATCHED}{share:g}": _values(by_weighting, share) for share in size.shares}
        rows = [
            {"values": [round(w, 4) for w in tried[i]]} | {name: _rounded(of[i]) for name, of in columns.items()}
            for i in by_weighting
        ]
        taken = {STATIC_ORACLE: picked[world, None]}
        taken |= {f"{STATIC} at {share:g}": picked[world, share] for share in size.shares}
        statics[world] = {"tried": rows, "taken": taken}
    return {"size": asdict(size), "rewards": REWARDS, "settings": settings, "static": statics}
