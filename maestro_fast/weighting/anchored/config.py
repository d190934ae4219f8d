"""Options of the anchored Conductor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from maestro_fast.weighting.anchored.anchored import Anchored


@dataclass(frozen=True)
class AnchoredConfig:
    """The defaults are those of our trial on a small language model.

    Attributes:
        surrogate: what the weights climb. "correlation" of the weighted score with the utility, within groups;
            "first_order", the weighted mean of each reward's own correlation, is linear in the weights, so it goes
            one-hot, and did worse.
        hybrid: groups whose utility is known are trained on that utility instead of their weighted rewards.
        context: the state of the prompt that is read; of the frozen reference it never changes.
        hidden: tanh units.
        steps: Adam steps after every batch, each over all labelled groups so far. 20 steps over n groups of width d
            cost about 4000 n d operations on the CPU.
        learning_rate: of Adam, betas (0.9, 0.99).
        entropy_coef: weight of the entropy of the weights.
        l2: penalty on the mean square of V, times its hidden units: l2 * sum(V^2) / K.
        seed: of the hidden layer's first values.
    """

    surrogate: Literal["correlation", "first_order"] = "correlation"
    hybrid: bool = False
    context: Literal["reference_prompt_mean", "prompt_mean", "prompt_last"] = "reference_prompt_mean"
    hidden: int = 16
    steps: int = 20
    learning_rate: float = 0.03
    entropy_coef: float = 0.01
    l2: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 1")
        for name in ("learning_rate", "entropy_coef", "l2"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected a number >= 0")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: {self.seed}, expected 0 <= seed < 2**64")

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Anchored:
        from maestro_fast.weighting.anchored.anchored import Anchored

        return Anchored(self, reward_names, context_size)
