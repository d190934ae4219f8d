"""The arms of a suite of trainings: what is changed in a run's config, and what each arm may know.

An arm changes dotted settings of one config and leaves everything else as it is, so two arms of the same seed have the
same first policy, prompts, labels and random draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from maestro_fast.settings import SettingsError, near


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: its name in results and tables.
        about: a sentence on it.
        changes: dotted settings of the run's config and their values.
        labels: whether it learns from labels, and so depends on their share. Such an arm keeps its best policy by
            labelled utility. Other arms get no anchor at all.
    """

    name: str
    about: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    labels: bool = False


_BUILT_IN = [
    Arm("equal", "Every reward has the weight 1 / K.", {"weights": "equal"}),
    Arm("random", "Weights are drawn anew for every response.", {"weights": "random"}),
    Arm(
        "conductor",
        "MAESTRO as published: the response's terminal state, REINFORCE on group-normalised advantages.",
        {"weights": {"type": "conductor", "estimator": "reinforce"}},
    ),
    Arm("saw", "SAW: rewards that still vary count more.", {"weights": "saw"}),
    Arm("dvao", "DVAO: a reward counts by its spread in the group.", {"weights": "dvao"}),
    Arm("weakest_first", "DRBO: the reward furthest from its goal counts most.", {"weights": "weakest_first"}),
    Arm("exp3", "A bandit without a context chooses the reward.", {"weights": "exp3"}),
    Arm(
        "labelled",
        "GRPO on the labelled prompts alone, by their utility; the others are left out of the loss.",
        {"weights": {"type": "utility"}, "batch.no_signal": "drop"},
        labels=True,
    ),
    Arm(
        "reward_model",
        "A reward model of context and rewards, learnt from the labels, scores all responses.",
        {"weights": {"type": "reward_model"}},
        labels=True,
    ),
    Arm(
        "reward_model_hybrid",
        "The same, but labelled groups are scored by their utility.",
        {"weights": {"type": "reward_model", "hybrid": True}},
        labels=True,
    ),
    Arm(
        "global",
        "One weighting for all prompts, learnt from the labels as they come.",
        {"weights": {"type": "anchored", "context": "none", "residual": False, "hybrid": False}},
        labels=True,
    ),
    Arm(
        "anchored",
        "Weights of the prompt's state, learnt from the labels.",
        {"weights": {"type": "anchored", "residual": False, "hybrid": False}},
        labels=True,
    ),
    Arm(
        "anchored_hybrid",
        "The same, but labelled groups are scored by their utility.",
        {"weights": {"type": "anchored", "residual": False, "hybrid": True}},
        labels=True,
    ),
    Arm(
        "anchored_residual",
        "The same, and a small learnt reward is added to the weighted ones.",
        {"weights": {"type": "anchored", "residual": True, "hybrid": True}},
        labels=True,
    ),
]
ARMS = {arm.name: arm for arm in _BUILT_IN}
STATIC, STATIC_ORACLE, SINGLE = "static", "static_oracle", "single"
_TRIED = 12  # static weightings, unless a suite says how many
CHOSEN = {  # These are one weighting out of many, which validation trainings choose.
    STATIC: "The weighting with the best labelled utility in validation trainings, each with as many labels as an arm.",
    STATIC_ORACLE: "The weighting with the best true utility there: an oracle.",
}


def named_arms(
    entries: Sequence[str | Mapping[str, Any]], rewards: Sequence[str], more: Mapping[str, Arm] | None = None
) -> list[Arm]:
    """The arms that a config asks for, without those of ``CHOSEN``.

    Args:
        entries: names of ``ARMS``; "single" for one arm of each reward alone; or mappings of a user's own arm, for
            example {name: mine, set: {weights: {type: static, values: {...}}}, labels: false}.
        rewards: the names of the K rewards.
        more: further arms that may be named.

    Raises:
        SettingsError: there is no such arm, or an arm of the user's own has no name or takes one that is there.
    """
    found: list[Arm] = []
    arms = {**(more or {}), **ARMS}
    for i, entry in enumerate(entries):
        path = f"arms[{i}]"
        if isinstance(entry, Mapping):
            found.append(_own_arm(entry, path))
        elif entry == SINGLE:
            found += [_single(rewards, name) for name in rewards]
        elif entry in arms:
            found.append(arms[entry])
        elif entry not in CHOSEN:
            known = [*arms, *CHOSEN, SINGLE]
            raise SettingsError(f"{path}: {entry!r}, expected one of {', '.join(known)}{near(entry, known)}")
    names = [arm.name for arm in found]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise SettingsError(f"arms: {double!r} stands there twice, expected each arm once")
    return found


def _own_arm(entry: Mapping[str, Any], path: str) -> Arm:
    if unknown := set(entry) - {"name", "set", "labels"}:
        raise SettingsError(f"{path}.{min(unknown)}: unknown setting, expected name, set and labels")
    name, changes, labels = entry.get("name"), entry.get("set", {}), entry.get("labels", False)
    if not isinstance(name, str) or not name or name in (*ARMS, *CHOSEN, SINGLE):
        raise SettingsError(f"{path}.name: {name!r}, expected a name of its own")
    if not isinstance(changes, Mapping):
        raise SettingsError(f"{path}.set: {changes!r}, expected a mapping of settings of the run")
    if not isinstance(labels, bool):
        raise SettingsError(f"{path}.labels: {labels!r}, expected true or false")
    return Arm(name, "An arm of the suite's own.", dict(changes), labels)


def _single(rewards: Sequence[str], name: str) -> Arm:
    alone = [float(other == name) for other in rewards]
    return Arm(f"{SINGLE}:{name}", f"The reward {name} alone.", {"weights": static(rewards, alone)})


def static(rewards: Sequence[str], values: Sequence[float]) -> dict[str, Any]:
    """The entry of the static weights that give reward k the weight ``values[k]``."""
    return {"type": "static", "values": dict(zip(rewards, values, strict=True))}


def weightings(count: int | None, size: int) -> list[tuple[float, ...]]:
    """The first ``count`` static weightings of ``size`` rewards that a search tries; None takes at most 12.

    They spread over the simplex from coarse to fine: the equal one, each pair of rewards, each reward alone, each
    reward with half of the weight beside the others, each triple, then all but one.
    """
    equal = (1 / size,) * size

    def even(members: Sequence[int]) -> tuple[float, ...]:
        return tuple(1 / len(members) if k in members else 0.0 for k in range(size))

    tried = [equal]
    tried += [even(pair) for pair in combinations(range(size), 2)]
    tried += [even([k]) for k in range(size)]
    if size > 1:
        tried += [tuple(0.5 if j == k else 0.5 / (size - 1) for j in range(size)) for k in range(size)]
    tried += [even(triple) for triple in combinations(range(size), 3)]
    tried += [even([j for j in range(size) if j != k]) for k in range(size)] if size > 1 else []
    different = list(dict.fromkeys(tried))
    if count is None:
        return different[:_TRIED]
    if not 1 <= count <= len(different):
        raise SettingsError(f"static: {count}, expected 1 to {len(different)} weightings of {size} rewards")
    return different[:count]
