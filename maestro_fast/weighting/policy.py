"""What a weight policy is: something that gives each response of a batch its reward weights, and may learn from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from maestro_fast.ops.group_advantages import GroupAdvantages
from maestro_fast.specs import AdvantageProfile

# Which hidden state a policy reads: the response's terminal one, or the prompt's last or mean one (one per group).
ContextKind = Literal["response", "prompt_last", "prompt_mean", "reference_prompt_mean"]


@dataclass(frozen=True)
class WeightContext:
    """What a weight policy may look at, for the whole batch over all processes.

    Attributes:
        reward_names: K names.
        group_size: G; the B responses are B / G consecutive groups.
        step: number of the generation batch, from 0; keys the random draws.
        rewards_BK: [B, K], NaN where a reward abstained; weights come back on its device.
        context_Bd: [B, d], the hidden state of each response that the policy asked for, or None.
        utilities_B: [B], the known utility of each response, NaN where none is known; None without an anchor.
        columns: data set columns that the policy asked for, B entries each.
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
    """What a policy gives.

    Attributes:
        weights_BK: float32 [B, K], used; expected_BK: their expectation over the policy's own sampling.
        actions_B: the drawn actions, if it draws any.
        direct_B: bool [B], responses that are scored by their utility and not by their rewards; None: none is.
    """

    weights_BK: Tensor
    expected_BK: Tensor
    actions_B: Tensor | None = None
    direct_B: Tensor | None = None


@dataclass(frozen=True)
class Comparison:
    """How scores become advantages: what ``group_advantages`` takes besides rewards, weights and groups.

    Attributes:
        kl_B, lengths_B: [B], on the device of the rewards.
    """

    profile: str | AdvantageProfile = "maestro"
    kl_B: Tensor | None = None
    beta: float = 0.0
    lengths_B: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of the weights: the advantages of the same batch, and how they were made (``group_advantages``)."""

    context: WeightContext
    weights: Weights
    advantages: GroupAdvantages
    profile: str | AdvantageProfile = "maestro"
    kl_B: Tensor | None = None
    beta: float = 0.0


class WeightPolicy(Protocol):
    """Gives weights, sees the outcome, can be saved. Every process runs it on the whole batch, with the same result.

    Attributes:
        name: as in a config.
        needs_context: True if ``weights`` wants ``context_Bd``; context_kind: which one.
        needs_columns: data set columns that ``weights`` wants.
        needs_group_scores: True if it asks what other weights would have given, which only profiles that compare
            scores within the group can answer.
    """

    name: str
    needs_context: bool
    context_kind: ContextKind
    needs_columns: tuple[str, ...]
    needs_group_scores: bool

    @property
    def should_stop(self) -> bool:
        """True once it wants training to stop."""
        ...

    def weights(self, context: WeightContext) -> Weights: ...

    def observe(self, outcome: Outcome) -> None:
        """Called once for each batch, after its advantages are known."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures of the last batch, for the log."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All state, as named tensors that nothing writes to later."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class WithoutContext:
    """What a policy says of itself that looks at rewards alone."""

    needs_context = False
    context_kind: ContextKind = "response"
    needs_columns: tuple[str, ...] = ()
    needs_group_scores = False
    should_stop = False


class Stateless(WithoutContext):
    """Base of the policies that learn nothing."""

    def observe(self, outcome: Outcome) -> None:
        del outcome

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(f"state: holds {sorted(state)}, expected nothing: this weight policy has no state")


def check_profile(policy: WeightPolicy, profile: AdvantageProfile) -> None:
    """
    Raises:
        ValueError: the policy needs scores that are compared within groups, and the profile compares them wider.
    """
    scopes = (profile.score_center, profile.score_scale)
    if policy.needs_group_scores and not {"batch", "tokens"}.isdisjoint(scopes):
        raise ValueError(
            f"advantages.profile: compares scores over {' and '.join(sorted({*scopes} - {'none'}))}, but weight policy "
            f"{policy.name!r}, as configured, asks for other weights one group at a time; expected a profile such as "
            "maestro, grpo or dr_grpo"
        )
