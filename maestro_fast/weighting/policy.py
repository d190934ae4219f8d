"""What a weight policy is: something that gives each response of a batch its reward weights, and may learn from it.

To write one, implement ``WeightPolicy``. ``Stateless`` is the base of policies that learn nothing, ``WithoutContext``
of those that learn but read no hidden states. The functions at the end are what several policies share: numbers by
reward name, the entropy of weights, and statistics that leave abstained rewards out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from maestro_fast.ops.group_advantages import GroupAdvantages
from maestro_fast.specs import AdvantageProfile

# Which hidden state a policy reads: the response's last one, that one after the first layer instead of the last layer,
# or the mean over the response's tokens; or the prompt's last or mean one, which all responses of a group share.
# "reference_prompt_mean" is the prompt's mean under the frozen reference model.
ContextKind = Literal[
    "response", "response_mean", "response_first_layer", "prompt_last", "prompt_mean", "reference_prompt_mean"
]


@dataclass(frozen=True)
class WeightContext:
    """What a weight policy may look at: the whole generation batch, gathered from all processes.

    Attributes:
        reward_names: The K names of the rewards.
        group_size: G, the number of responses to each prompt. The B responses are B / G groups, one after another.
        step: The number of the generation batch, from 0. Random draws are keyed by it.
        rewards_BK: [B, K]. It is NaN where a reward abstained. The weights are returned on its device.
        context_Bd: [B, d], the hidden state of each response that the policy asked for, or None.
        utilities_B: [B], the known utility of each response, NaN where it is unknown. It is None without an anchor.
        columns: The data set columns that the policy asked for, with B entries each.
    """

    reward_names: tuple[str, ...]
    group_size: int
    step: int
    rewards_BK: Tensor
    context_Bd: Tensor | None = None
    utilities_B: Tensor | None = None
    columns: Mapping[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """The weights of a batch, as a policy returns them.

    Attributes:
        weights_BK: float32 [B, K], the weights that are used.
        expected_BK: float32 [B, K], their expectation over the policy's own random draws.
        actions_B: [B], the actions that were drawn, or None if the policy draws none.
        direct_B: bool [B], True for responses that are scored by their utility instead of their rewards. None means
            that there are no such responses.
        residual_B: float32 [B], a learnt reward beside the named ones, in any unit: it counts by where it stands in the
            group. It is NaN for responses without one, and None if there is none at all. See ``scored_rewards``.
        residual_factor: The standard deviation of its part of the score, as a multiple of that of the weighted rewards.
    """

    weights_BK: Tensor
    expected_BK: Tensor
    actions_B: Tensor | None = None
    direct_B: Tensor | None = None
    residual_B: Tensor | None = None
    residual_factor: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """How scores become advantages: the arguments of ``group_advantages`` beside rewards, weights and groups.

    Attributes:
        profile: An advantage profile, or its name.
        kl_B: [B], the penalty of each response if it enters the score, on the device of the rewards.
        beta: The factor of ``kl_B``.
        lengths_B: [B], the lengths of the responses if the profile needs them, on the device of the rewards.
    """

    profile: str | AdvantageProfile = "maestro"
    kl_B: Tensor | None = None
    beta: float = 0.0
    lengths_B: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of the weights: the advantages of the same batch, and how they were compared (see ``Comparison``).

    Attributes:
        factors_K: [K], what the policy's weights were multiplied by before the rewards were weighed; None means by 1.
            TRL's weights, for example, sum to K, where a policy's sum to 1.
    """

    context: WeightContext
    weights: Weights
    advantages: GroupAdvantages
    profile: str | AdvantageProfile = "maestro"
    kl_B: Tensor | None = None
    beta: float = 0.0
    factors_K: Tensor | None = None

    def multiplied(self, weights: Tensor) -> Tensor:
        """Weights [..., K] of the policy, multiplied by the factors."""
        return weights if self.factors_K is None else weights * self.factors_K.to(weights)


class WeightPolicy(Protocol):
    """Gives weights, sees their outcome, and can be saved.

    Every process calls it with the whole batch and must get the same result.

    Attributes:
        name: The policy's name in a config.
        needs_context: True if ``weights`` reads ``context_Bd``.
        context_kind: The hidden state that ``context_Bd`` holds.
        needs_columns: The data set columns that ``weights`` reads.
        needs_group_scores: True if the policy asks which advantages other weights would have given. Only profiles that
            compare scores within the group can answer that.
    """

    name: str
    needs_context: bool
    context_kind: ContextKind
    needs_columns: tuple[str, ...]
    needs_group_scores: bool

    @property
    def should_stop(self) -> bool:
        """True once the policy wants training to stop."""
        ...

    def weights(self, context: WeightContext) -> Weights:
        """The weights of a batch. It is called once per batch."""
        ...

    def observe(self, outcome: Outcome) -> None:
        """Takes note of a batch. It is called once per batch, after the advantages are known."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures of the last batch, for the log."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as named tensors. The policy never writes to a tensor that it has returned."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replaces the state by one that ``state_dict`` returned. A ValueError names a tensor that does not fit."""
        ...


class WithoutContext:
    """Base of the policies that read no hidden states."""

    needs_context = False
    context_kind: ContextKind = "response"
    needs_columns: tuple[str, ...] = ()
    needs_group_scores = False
    should_stop = False


class Stateless(WithoutContext):
    """Base of the policies that learn nothing."""

    def observe(self, outcome: Outcome) -> None:
        """A policy that learns nothing ignores the outcome."""
        del outcome

    def metrics(self) -> dict[str, float]:
        """A policy that learns nothing logs no figures of its own."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """A policy that learns nothing has no state."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Accepts an empty state alone, so that the state of another policy is never dropped in silence."""
        if state:
            raise ValueError(f"state: holds {sorted(state)}, expected nothing: this weight policy has no state")


def same_weights(row_K: Tensor, context: WeightContext) -> Weights:
    """The weights ``row_K`` [K] for every response of the batch, without any random draw."""
    weights_BK = row_K.to(context.rewards_BK).expand_as(context.rewards_BK)
    return Weights(weights_BK, weights_BK)


def check_profile(policy: WeightPolicy, profile: AdvantageProfile) -> None:
    """Refuses an advantage profile that the policy cannot learn under.

    Raises:
        ValueError: The policy needs scores that are compared within groups, and the profile compares them over more.
    """
    scopes = (profile.score_center, profile.score_scale)
    if policy.needs_group_scores and not {"batch", "tokens"}.isdisjoint(scopes):
        raise ValueError(
            f"advantages.profile: compares scores over {' and '.join(sorted({*scopes} - {'none'}))}, but weight policy "
            f"{policy.name!r}, as configured, asks for other weights one group at a time; expected a profile such as "
            "maestro, grpo or dr_grpo"
        )


def check_shapes(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that a saved state holds tensors of these shapes. It may hold others beside them.

    Raises:
        ValueError: A tensor is missing or has another shape.
    """
    for name, shape in shapes.items():
        if name not in state or state[name].shape != shape:
            came = f"shape {tuple(state[name].shape)}" if name in state else "missing"
            raise ValueError(f"state.{name}: {came}, expected shape {shape}")


def in_reward_order(
    values: Mapping[str, float], reward_names: tuple[str, ...], path: str, default: float | None = None
) -> tuple[float, ...]:
    """Numbers by reward name, as a config gives them, in the order of the rewards.

    Args:
        values: The numbers by reward name.
        reward_names: The K names of the rewards.
        path: The dotted name of ``values`` in the config. Error messages start with it.
        default: The number of a reward that ``values`` leaves out. None means that every reward needs one.

    Raises:
        ValueError: A name is no reward's, a number is not finite, or a number is missing.
    """
    for name, value in values.items():
        if name not in reward_names:
            raise ValueError(f"{path}.{name}: there is no such reward, expected one of {', '.join(reward_names)}")
        if not math.isfinite(value):
            raise ValueError(f"{path}.{name}: {value}, expected a finite number")
    found = [values.get(name, default) for name in reward_names]
    for name, number in zip(reward_names, found, strict=True):
        if number is None:
            raise ValueError(f"{path}.{name}: missing, every reward needs a weight")
    return tuple(number for number in found if number is not None)


def positive_in_reward_order(
    values: Mapping[str, float], reward_names: tuple[str, ...], path: str
) -> tuple[float, ...]:
    """Does what ``in_reward_order`` does, with 1 as the default. A number that is not above 0 raises ValueError too."""
    found = in_reward_order(values, reward_names, path, 1.0)
    for name, number in zip(reward_names, found, strict=True):
        if not number > 0:
            raise ValueError(f"{path}.{name}: {number}, expected a number above 0")
    return found


def entropy(weights_NK: Tensor) -> Tensor:
    """The entropy [N], in nats, of each row of weights that are positive and add up to 1."""
    return -(weights_NK * weights_NK.clamp(min=1e-30).log()).sum(-1)


def live_mean_and_std(values: Tensor, dim: int, *, correction: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation along ``dim`` over the values that are not NaN, the rewards that did not abstain.

    ``correction`` is 1 for the sample deviation and 0 for that of the population. The deviation of a single value is 0.
    Both are NaN where every value is.
    """
    live = ~values.isnan()
    count = live.sum(dim)
    wide = values.double()  # The squares of large and small numbers are beyond float32.
    mean = wide.nanmean(dim)
    squares = torch.where(live, (wide - mean.unsqueeze(dim)).square(), 0.0).sum(dim)
    std = (squares / (count - correction).clamp(min=1)).sqrt()
    return mean.to(values.dtype), torch.where(count > 0, std, float("nan")).to(values.dtype)


def live_range(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest value along ``dim`` that is not NaN; inf and -inf where every value is."""
    live = ~values.isnan()
    low = torch.where(live, values, float("inf")).amin(dim)
    return low, torch.where(live, values, float("-inf")).amax(dim)
