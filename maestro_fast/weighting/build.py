"""From a config entry to a weight policy: ``conductor``, or ``{type: static, values: {format: 0.5, ...}}``.

``type`` names one of ``POLICIES``. Any policy may have the options of ``GuardConfig`` under ``guard``. A policy of the
user's own is a function: ``{type: function, function: "file.py:name"}``, or only "file.py:name".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from maestro_fast.settings import REST, Choice, SettingsError, build, rename_key, say_once
from maestro_fast.weighting.anchored import AnchoredConfig
from maestro_fast.weighting.conductor import ConductorConfig
from maestro_fast.weighting.dvao import DvaoConfig
from maestro_fast.weighting.exp3 import Exp3Config
from maestro_fast.weighting.fixed import (
    EqualConfig,
    FunctionPolicyConfig,
    RandomConfig,
    RouterConfig,
    ScheduleConfig,
    StaticConfig,
)
from maestro_fast.weighting.guard import GuardConfig, Guarded
from maestro_fast.weighting.policy import WeightPolicy
from maestro_fast.weighting.reward_model import RewardModelConfig
from maestro_fast.weighting.saw import SawConfig
from maestro_fast.weighting.utility import UtilityConfig
from maestro_fast.weighting.weakest_first import WeakestFirstConfig


class PolicyConfig(Protocol):
    """The options of a weight policy. The policy needs the K names of the rewards and d, the width of hidden states."""

    def build(self, reward_names: tuple[str, ...], context_size: int) -> WeightPolicy: ...


POLICIES: dict[str, type[Any]] = {
    "equal": EqualConfig,
    "static": StaticConfig,
    "random": RandomConfig,
    "schedule": ScheduleConfig,
    "function": FunctionPolicyConfig,
    "router": RouterConfig,
    "saw": SawConfig,
    "dvao": DvaoConfig,
    "weakest_first": WeakestFirstConfig,
    "exp3": Exp3Config,
    "conductor": ConductorConfig,
    "anchored": AnchoredConfig,
    "reward_model": RewardModelConfig,
    "utility": UtilityConfig,
}


def _modernise(entry: dict[str, Any], path: str) -> None:
    """In release 0.1 ``type`` was called ``policy``, and the type ``function`` was called ``callable``."""
    rename_key(entry, "policy", "type", path)
    if entry.get("type") == "callable":
        entry["type"] = "function"
        say_once(
            f"{path}.type: `callable` is now called `function`: write `type: function`. "
            "The old name is read in this release and refused in the next."
        )


@dataclass(frozen=True)
class WeightsConfig:
    """The weight policy of a run, and its guard.

    Attributes:
        policy: the weight policy, which ``type`` names; its settings stand beside these.
        guard: watches labelled utility and steps in when it falls while rewards rise; null means no guard.
    """

    policy: Annotated[PolicyConfig, Choice(POLICIES, "equal", "weight policy", _modernise), REST] = field(
        default_factory=EqualConfig
    )
    guard: GuardConfig | None = None

    def __post_init__(self) -> None:
        if self.guard is not None and isinstance(self.policy, RewardModelConfig | UtilityConfig):
            raise ValueError(
                f"guard: given with {self._type}, under which no reward has a weight, expected none: "
                "the guard compares utility with weighted rewards"
            )

    @property
    def _type(self) -> str:
        return next(name for name, kind in POLICIES.items() if type(self.policy) is kind)

    @property
    def trains_on_utility(self) -> bool:
        """Whether known utilities decide how responses are scored, so that these are worth as much as the labels."""
        return isinstance(self.policy, AnchoredConfig | RewardModelConfig | UtilityConfig)

    @property
    def needs_utility(self) -> str:
        """The setting that makes no sense without a known utility; "" if there is none."""
        if self.trains_on_utility:
            return f"weights: {self._type}"
        if isinstance(self.policy, ConductorConfig) and self.policy.objective == "first_order":
            return "weights.objective: first_order"
        return "" if self.guard is None else "weights.guard"

    def build(self, reward_names: tuple[str, ...], context_size: int, path: str = "weights") -> WeightPolicy:
        """The policy, under its guard if there is one.

        Args:
            reward_names: K names. A policy that refers to rewards does so by these.
            context_size: d, the width of the hidden states.
            path: the dotted name of this section, for messages.

        Raises:
            SettingsError: an option does not fit the rewards.
        """
        within = path
        try:
            policy = self.policy.build(reward_names, context_size)
            within = f"{path}.guard"
            return policy if self.guard is None else Guarded(policy, self.guard, reward_names)
        except SettingsError:
            raise
        except ValueError as error:
            raise SettingsError(f"{within}.{error}") from error


def build_weight_policy(
    entry: str | Mapping[str, Any] | WeightsConfig,
    reward_names: tuple[str, ...],
    context_size: int,
    path: str = "weights",
) -> WeightPolicy:
    """A weight policy from its config entry.

    Args:
        entry: a name of ``POLICIES``, or a mapping with that name under ``type`` and the policy's options. Any policy
            may have the options of ``GuardConfig`` under ``guard``.
        reward_names: K names. A policy that refers to rewards does so by these.
        context_size: d, the width of the hidden states.
        path: the dotted name of ``entry``, for messages.

    Raises:
        SettingsError: an unknown policy, option or reward.
    """
    config = entry if isinstance(entry, WeightsConfig) else build(WeightsConfig, entry, path)
    return config.build(reward_names, context_size, path)
