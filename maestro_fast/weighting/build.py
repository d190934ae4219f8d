"""From a config entry to a weight policy: ``conductor``, or ``{policy: static, values: {format: 0.5, ...}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maestro_fast.settings import SettingsError, build
from maestro_fast.weighting.anchored import AnchoredConfig
from maestro_fast.weighting.conductor import ConductorConfig
from maestro_fast.weighting.dvao import DvaoConfig
from maestro_fast.weighting.exp3 import Exp3Config
from maestro_fast.weighting.fixed import (
    CallableConfig,
    EqualConfig,
    RandomConfig,
    RouterConfig,
    ScheduleConfig,
    StaticConfig,
)
from maestro_fast.weighting.guard import guarded
from maestro_fast.weighting.policy import WeightPolicy
from maestro_fast.weighting.saw import SawConfig
from maestro_fast.weighting.weakest_first import WeakestFirstConfig

POLICIES = {
    "equal": EqualConfig,
    "static": StaticConfig,
    "random": RandomConfig,
    "schedule": ScheduleConfig,
    "callable": CallableConfig,
    "router": RouterConfig,
    "saw": SawConfig,
    "dvao": DvaoConfig,
    "weakest_first": WeakestFirstConfig,
    "exp3": Exp3Config,
    "conductor": ConductorConfig,
    "anchored": AnchoredConfig,
}


def build_weight_policy(
    entry: str | Mapping[str, Any], reward_names: tuple[str, ...], context_size: int, path: str = "weights"
) -> WeightPolicy:
    """A weight policy by name.

    Args:
        entry: a name of ``POLICIES``, or a mapping with that name under ``policy`` and the policy's options; any
            policy may have the options of ``GuardConfig`` under ``guard``.
        reward_names: K names; a policy that refers to rewards does so by these.
        context_size: d, width of the hidden states.
        path: dotted name of ``entry``, for messages.

    Raises:
        SettingsError: an unknown policy, option or reward.
    """
    if not isinstance(entry, str | Mapping):
        raise SettingsError(f"{path}: got {entry!r}, expected the name of a policy or a mapping with it under 'policy'")
    options = {"policy": entry} if isinstance(entry, str) else dict(entry)
    name = options.pop("policy", "equal")
    if not isinstance(name, str) or name not in POLICIES:
        raise SettingsError(f"{path}.policy: {name!r}, expected one of {', '.join(POLICIES)}")
    guard: Any = options.pop("guard", None)
    config: Any = build(POLICIES[name], options, path)
    try:
        policy: WeightPolicy = config.build(reward_names, context_size)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"{path}.{error}") from error
    return guarded(policy, guard, reward_names, f"{path}.guard")
