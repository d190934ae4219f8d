"""What a weight policy is: something that gives each response of a batch its reward weights, and may learn from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from maestro_fast.ops.group_advantages import GroupAdvantages


@dataclass(frozen=True)
class WeightContext:
    """What a weight policy may look at, for the whole batch over all processes.

    Attributes:
        reward_names: K names.
        group_size: G; the B responses are B / G consecutive groups.
        step: number of the generation batch, from 0; keys the random draws.
        rewards_BK: [B, K], NaN where a reward abstained; weights come back on its device.
        context_Bd: [B, d], the hidden state of each response that the policy asked for, or None.
    """

    reward_names: tuple[str, ...]
    group_size: int
    step: int
    rewards_BK: Tensor
    context_Bd: Tensor | None = None


@dataclass(frozen=True)
class Weights:
    """float32 [B, K] weights that are used, their expectation over the policy's own sampling, and the drawn actions."""

    weights_BK: Tensor
    expected_BK: Tensor
    actions_B: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of the weights: the advantages of the same batch."""

    context: WeightContext
    weights: Weights
    advantages: GroupAdvantages


class WeightPolicy(Protocol):
    """Gives weights, sees the outcome, can be saved. Every process runs it on the whole batch, with the same result.

    Attributes:
        name: as in a config.
        needs_context: True if ``weights`` wants ``context_Bd``.
    """

    name: str
    needs_context: bool

    def weights(self, context: WeightContext) -> Weights: ...

    def observe(self, outcome: Outcome) -> None:
        """Called once for each batch, after its advantages are known."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures of the last batch, for the log."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All state, as named tensors."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class Stateless:
    """Base of the policies that learn nothing."""

    needs_context = False

    def observe(self, outcome: Outcome) -> None:
        del outcome

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(f"state: holds {sorted(state)}, expected nothing: this weight policy has no state")
