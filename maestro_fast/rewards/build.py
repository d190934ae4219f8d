"""Rewards from a configuration: names of built-in kinds, mappings from YAML, functions, or finished rewards.

    rewards:
      - format
      - {name: brevity, kind: length, target: 12, unit: words}
      - {name: rich, function: "my_rewards.py:richness", scale: 2}
      - trl.rewards:think_format_reward

      - {name: style, function: "my_rewards.py:style", gate: {on: format, threshold: 1}, where: {family: [poem, essay]}}

The first two are of built-in kinds, the others functions with the signature of TRL's reward functions. Any entry may
have a ``where`` (``Where``: for some prompts only) and a ``gate`` (``Gate``: where another reward, an entry of its own,
reaches a threshold). What is none of these is an option: an argument of the kind, or a constant keyword argument of the
function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from maestro_fast.rewards.entropy import EntropyReward
from maestro_fast.rewards.format import FormatReward
from maestro_fast.rewards.function import FunctionReward, load_function
from maestro_fast.rewards.gate import Gate
from maestro_fast.rewards.labelled import Labelled, LabelsConfig
from maestro_fast.rewards.length import LengthReward
from maestro_fast.rewards.nover import NoverReward
from maestro_fast.rewards.perplexity import PerplexityReward
from maestro_fast.rewards.preference import PreferenceReward
from maestro_fast.rewards.reward import Reward, RewardSet
from maestro_fast.rewards.where import Where
from maestro_fast.settings import build

Kind = EntropyReward | FormatReward | LengthReward | NoverReward | PerplexityReward | PreferenceReward

KINDS: dict[str, type[Kind]] = {
    "entropy": EntropyReward,
    "format": FormatReward,
    "length": LengthReward,
    "nover": NoverReward,
    "perplexity": PerplexityReward,
    "preference": PreferenceReward,
}


@dataclass(frozen=True)
class RewardSpec:
    """One reward as configured.

    Attributes:
        name: the reward's name.
        kind: a key of ``KINDS``; by default the name, where that is one.
        function: instead of a kind, what ``load_function`` reads.
        options: arguments of the kind, or constant keyword arguments of the function.
        where: the mask of ``Where``.
        gate: the arguments of ``Gate``, ``on`` an entry for a reward.
    """

    name: str
    kind: str | None = None
    function: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    where: str | dict[str, Any] | None = None
    gate: dict[str, Any] | None = None


RewardEntry = str | Mapping[str, Any] | RewardSpec | Reward | Callable[..., Any]


def build_rewards(entries: Sequence[RewardEntry], *, base_dir: str | Path = ".") -> RewardSet:
    """The rewards of a run.

    Args:
        entries: see the module; a callable becomes a ``FunctionReward`` of its own name.
        base_dir: where relative paths of functions start, for instance the folder of the configuration file.

    Raises:
        ValueError, TypeError: an entry that cannot be built; the message names it, as ``rewards[i]`` and by
            name, and lists the kinds or options that there are. Also what ``RewardSet`` and ``load_function``
            raise.
    """
    if isinstance(entries, (str, Mapping)) or not isinstance(entries, Sequence):
        raise TypeError(f"rewards: got {type(entries).__name__}, expected a list")
    return RewardSet([_build(entry, f"rewards[{i}]", base_dir) for i, entry in enumerate(entries)])


def _build(entry: RewardEntry, where: str, base_dir: str | Path) -> Reward:
    if isinstance(entry, str):
        entry = {"function": entry} if ":" in entry else {"name": entry}
    if isinstance(entry, Mapping):
        entry = _spec(entry, where)
    if isinstance(entry, RewardSpec):
        return _conditional(_build_spec(entry, where, base_dir), entry, where, base_dir)
    if isinstance(entry, type):
        raise TypeError(f"{where}: got the class {entry.__name__}, expected an instance of it")
    if isinstance(entry, Reward):
        return entry
    if callable(entry):
        return FunctionReward(entry)
    raise TypeError(f"{where}: got {type(entry).__name__}, expected a name, a mapping, a function or a Reward")


def _conditional(reward: Reward, spec: RewardSpec, where: str, base_dir: str | Path) -> Reward:
    """The reward behind its gate and its mask; the mask is looked at first."""
    label = f"{where} {spec.name!r}"
    if spec.gate is not None:
        options = dict(spec.gate) if isinstance(spec.gate, Mapping) else {}
        known = {"on", "threshold", "closed"}
        if not {"on", "threshold"} <= options.keys() <= known:
            raise ValueError(f"{label}.gate: got {spec.gate!r}, expected on, threshold and perhaps closed")
        on, inner = _build(options.pop("on"), f"{label}.gate.on", base_dir), reward
        for name, value in options.items():
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise TypeError(f"{label}.gate.{name}: got {value!r}, expected a number")
        reward = _named(f"{label}.gate", lambda: Gate(inner, on=on, **options))
    if spec.where is not None:
        mask, masked = spec.where, reward
        reward = _named(label, lambda: Where(masked, mask))
    return reward


def build_anchor(entry: RewardEntry, *, base_dir: str | Path = ".") -> RewardSet:
    """The utility of responses, for a weight policy to learn from: a reward of its own, which is no reward of the run.

    Args:
        entry: as in ``build_rewards``; a mapping may have the options of ``LabelsConfig`` under ``labels``. It returns
            None, for all responses to a prompt, where the utility is not known.

    Raises:
        ValueError, TypeError: as ``build_rewards``; a utility that reads the policy's entropy.
    """
    labels = None
    if isinstance(entry, Mapping):
        entry = dict(entry)
        labels = entry.pop("labels", None)
    reward = _build(entry, "anchor", base_dir)
    if reward.needs_entropy:
        raise ValueError(f"anchor {reward.name!r}: reads the policy's entropy, expected a utility that does not")
    if labels is not None:
        reward = Labelled(reward, build(LabelsConfig, labels, "anchor.labels"))
    return RewardSet([reward])


def _spec(entry: Mapping[str, Any], where: str) -> RewardSpec:
    options = dict(entry)
    kind, function = options.pop("kind", None), options.pop("function", None)
    mask, conditions = options.pop("where", None), options.pop("gate", None)
    default = kind if function is None else str(function).rpartition(":")[2]
    name = options.pop("name", default)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: name is {name!r}, expected a non-empty string")
    return RewardSpec(name, kind, function, options, mask, conditions)


def _build_spec(spec: RewardSpec, where: str, base_dir: str | Path) -> Reward:
    label = f"{where} {spec.name!r}"
    if spec.function is not None:
        if spec.kind is not None:
            raise ValueError(f"{label}: both kind and function are set, expected one of them")
        function = load_function(spec.function, field=f"{label}.function", base_dir=base_dir)
        return _named(label, lambda: FunctionReward(function, spec.name, spec.options))
    kind = spec.name if spec.kind is None else spec.kind
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(
            f"{label}: kind {kind!r}, expected one of {', '.join(KINDS)}; a function of your own is named by "
            "function: 'package.module:attribute' or 'path/to/file.py:attribute'"
        )
    _check_options(label, kind, spec.options)
    return _named(label, lambda: KINDS[kind](name=spec.name, **spec.options))


def _check_options(label: str, kind: str, options: Mapping[str, Any]) -> None:
    known: dict[str, Field[Any]] = {item.name: item for item in fields(KINDS[kind]) if item.name != "name"}
    for option in options:
        if option not in known:
            raise ValueError(f"{label}: kind {kind!r} has no option {option!r}, its options are {', '.join(known)}")
    for name, item in known.items():
        if item.default is MISSING and name not in options:
            raise ValueError(f"{label}: the option {name!r} of kind {kind!r} is missing")


def _named(label: str, make: Callable[[], Reward]) -> Reward:
    """What ``make`` gives; the entry is named in front of its errors."""
    try:
        return make()
    except (ValueError, TypeError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{label}: {error}") from error
