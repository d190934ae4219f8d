"""Rewards from a config: entries of ``rewards`` and the ``anchor``.

    rewards:
      - format
      - {type: length, name: brevity, target: 12, unit: words}
      - {type: function, function: "my_rewards.py:richness", scale: 2}
      - trl.rewards:think_format_reward
      - {type: length, target: 50, gate: {on: format, threshold: 1}, where: {family: [poem, essay]}}
      - {function: "my_rewards.py:compiles", timeout: 30, on_error: abstain}

``type`` says which reward it is, ``name`` what it is called in the log and in weights; by default the two are the same.
A mere name is a type, and a mere "file.py:function" a function of the user's own. Any entry may have a ``where`` (it
counts for some prompts only) and a ``gate`` (it counts where another reward, an entry of its own, reaches a threshold).
``timeout`` and ``on_error`` say what becomes of a batch on which the reward fails. All other settings are options:
fields of the type's dataclass, or constant keyword arguments of the function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from maestro_fast.rewards.builtin import REWARD_TYPES
from maestro_fast.rewards.conditional import Gate, Labelled, LabelsConfig, Where, check_mask
from maestro_fast.rewards.function import FunctionReward, FunctionRewardConfig
from maestro_fast.rewards.guarded import Guarded, OnError, check_guard
from maestro_fast.rewards.judge import JudgeConfig
from maestro_fast.rewards.preference import PreferenceConfig
from maestro_fast.rewards.reward import Reward, RewardSet
from maestro_fast.settings import REST, Choice, SettingsError, build, rename_key, say_once

Value = str | int | float | bool | None


def _modernise(entry: dict[str, Any], path: str) -> None:
    """Entries of release 0.1 have a ``kind`` in place of ``type``, or a ``name`` that says the type as well."""
    rename_key(entry, "kind", "type", path)
    name = entry.get("name")
    if not {"type", "function"} & entry.keys() and name in REWARD_TYPES:
        entry["type"] = name
        say_once(
            f"{path}: a reward's type is no longer read off its name: write `type: {name}`. Entries with a name alone "
            "are read in this release and refused in the next.",
            key="rewards: a name that is a type",
        )


REWARDS = Choice(REWARD_TYPES, what="reward", modernise=_modernise)


@dataclass(frozen=True)
class RewardConfig:
    """One reward, with the conditions under which it counts.

    Attributes:
        reward: the reward, which ``type`` names; its settings stand beside these.
        where: a column of the data that is true where the reward counts, or a mapping of columns to the value, or the
            list of values, that they have there; elsewhere the reward abstains.
        gate: the condition that another reward reaches a threshold; the reward counts only where it does.
        timeout: the seconds within which the reward has to judge a batch, see ``rewards.guarded``; null sets no limit.
        on_error: what becomes of a batch on which the reward raises, is too late or returns what is no reward: "stop"
            stops the run, and "abstain" makes the reward abstain from all of the batch and counts that in the log.
    """

    reward: Annotated[Reward | PreferenceConfig | JudgeConfig | FunctionRewardConfig, REWARDS, REST]
    where: str | dict[str, Value | list[Value]] | None = None
    gate: GateConfig | None = None
    timeout: float | None = None
    on_error: OnError = "stop"

    def __post_init__(self) -> None:
        if self.where is not None:
            check_mask(self.where)
        check_guard(self.timeout, self.on_error)

    def build(self, path: str, base_dir: str | Path = ".") -> Reward:
        """The reward behind its gate and its mask. The mask is looked at first, and the deadline is the reward's own.

        Args:
            path: the dotted name of this entry, for messages.
            base_dir: where relative paths of functions start.
        """
        own = self.reward if isinstance(self.reward, Reward) else self.reward.build(path, base_dir)
        reward = self._guarded(own, path)
        if self.gate is not None:
            on = self.gate.on.build(f"{path}.gate.on", base_dir)
            try:
                reward = Gate(reward, on=on, threshold=self.gate.threshold, closed=self.gate.closed)
            except ValueError as error:
                raise SettingsError(f"{path}.gate.{error}") from error
        return reward if self.where is None else Where(reward, self.where)

    def _guarded(self, reward: Reward, path: str) -> Reward:
        """The reward with its deadline, and with what follows from an error.

        Raises:
            SettingsError: the reward cannot be guarded, or a function has an argument with the name of such a setting.
        """
        given = {"timeout": self.timeout is not None, "on_error": self.on_error != "stop"}
        for setting in (setting for setting, is_given in given.items() if is_given):
            if isinstance(reward, FunctionReward) and reward.names(setting):
                raise SettingsError(
                    f"{path}.{setting}: a setting of every reward, but {reward.name!r} takes an argument of that name "
                    "as well, which it would not get; expected another name of the argument"
                )
        if not any(given.values()):
            return reward
        try:
            return Guarded(reward, timeout=self.timeout, on_error=self.on_error)
        except ValueError as error:
            raise SettingsError(f"{path}.{error}") from error


@dataclass(frozen=True)
class GateConfig:
    """The condition behind which a reward counts.

    Attributes:
        on: the reward that opens the gate, an entry as in ``rewards``, computed for the gate alone.
        threshold: the least value of that reward that opens the gate.
        closed: the value of the gated reward where the gate is closed; null makes it abstain.
    """

    on: RewardConfig
    threshold: float
    closed: float | None = None


@dataclass(frozen=True)
class AnchorConfig(RewardConfig):
    """The utility that some weight policies learn from: a reward of its own, which is no reward of the run.

    Attributes:
        labels: the rule that says for which prompts the utility is known; null means for all of them.
    """

    labels: LabelsConfig | None = None

    def build(self, path: str, base_dir: str | Path = ".") -> Reward:
        reward = super().build(path, base_dir)
        return reward if self.labels is None else Labelled(reward, self.labels)


@dataclass(frozen=True)
class RewardSpec:
    """One entry of ``rewards`` for those who write it in Python.

    Attributes:
        name: the reward's name.
        kind: the reward's type, a key of ``REWARD_TYPES``; None means that the name is the type.
        function: the name of a function of the user's own, in place of a type.
        options: fields of the type's dataclass, or constant keyword arguments of the function.
        where: as in ``RewardConfig``.
        gate: a mapping of the fields of ``GateConfig``.
        timeout, on_error: as in ``RewardConfig``.
    """

    name: str
    kind: str | None = None
    function: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    where: str | dict[str, Any] | None = None
    gate: dict[str, Any] | None = None
    timeout: float | None = None
    on_error: OnError = "stop"

    def entry(self) -> dict[str, Any]:
        """The same entry as a mapping."""
        found: dict[str, Any] = {"where": self.where, "gate": self.gate, "function": self.function}
        found |= {"timeout": self.timeout, "on_error": None if self.on_error == "stop" else self.on_error}
        kind = self.kind if self.kind is not None or self.function is not None else self.name
        found |= {} if kind is None else {"type": kind}
        return {**self.options, "name": self.name, **{key: value for key, value in found.items() if value is not None}}


RewardEntry = str | Mapping[str, Any] | RewardSpec | RewardConfig | Reward | Callable[..., Any]


def build_rewards(entries: Sequence[RewardEntry], *, base_dir: str | Path = ".") -> RewardSet:
    """The rewards of a run.

    Args:
        entries: the entries, in the forms that the module describes. A callable becomes a ``FunctionReward`` that has
            the callable's name.
        base_dir: where relative paths of functions start, for instance the folder of the configuration file.

    Raises:
        ValueError, TypeError: an entry cannot be built. The message names it as ``rewards[i]``, and lists the types or
            options that there are. ``RewardSet`` and ``load_function`` raise further ones.
    """
    if isinstance(entries, (str, Mapping)) or not isinstance(entries, Sequence):
        raise TypeError(f"rewards: got {type(entries).__name__}, expected a list")
    return RewardSet([_build(entry, RewardConfig, f"rewards[{i}]", base_dir) for i, entry in enumerate(entries)])


def build_anchor(entry: RewardEntry | None, *, base_dir: str | Path = ".") -> RewardSet:
    """Builds the reward that gives the utility of responses, from which a weight policy learns.

    Args:
        entry: one entry as in ``build_rewards``. A mapping may have the options of ``LabelsConfig`` under ``labels``.
            The reward returns None for all responses to a prompt whose utility is not known.
        base_dir: where relative paths of functions start.

    Raises:
        ValueError, TypeError: the entry is missing or cannot be built, or the utility reads the policy's entropy.
    """
    reward = _build(entry, AnchorConfig, "anchor", base_dir)
    if reward.needs_entropy:
        raise ValueError(f"anchor {reward.name!r}: reads the policy's entropy, expected a utility that does not")
    return RewardSet([reward], may_abstain=True)


def _build(entry: RewardEntry | None, config: type[RewardConfig], path: str, base_dir: str | Path) -> Reward:
    if isinstance(entry, RewardSpec):
        entry = entry.entry()
    if isinstance(entry, str | Mapping):
        entry = build(config, entry, path)
    if isinstance(entry, RewardConfig):
        return entry.build(path, base_dir)
    if isinstance(entry, type):
        raise TypeError(f"{path}: got the class {entry.__name__}, expected an instance of it")
    if isinstance(entry, Reward):
        return entry
    if callable(entry):
        return FunctionReward(entry)
    raise TypeError(f"{path}: got {type(entry).__name__}, expected a name, a mapping, a function or a Reward")
