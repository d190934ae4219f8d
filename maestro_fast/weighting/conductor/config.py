"""Options of the Conductor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from maestro_fast.weighting.conductor.conductor import Conductor


@dataclass(frozen=True)
class ConductorConfig:
    """Defaults limit the harm that a Conductor can do; see the README on what it can be expected to learn.

    Attributes:
        alpha: how far a sampled action moves the weights from equal to one-hot, in (0, 1].
        tau: temperature of the softmax.
        min_prob: floor of every action's probability, below 1 / K.
        mode: "sample" draws one action per response (training, as in the paper); "soft" uses the probabilities as
            weights, which leaves nothing to reinforce and so needs learning_rate 0.
        context: "response" is the terminal hidden state of each response (the paper); "shuffled" hands every response
            the state of another one, the control that shows what the states contribute.
        learning_rate, weight_decay: of AdamW; 0 freezes the Conductor.
        entropy_coef: weight of the entropy of p in the objective.
        period: batches between two updates (M); each update uses the batches since the last one.
        seed: key of the action draws.
    """

    alpha: float = 0.3
    tau: float = 1.0
    min_prob: float = 0.05
    mode: Literal["sample", "soft"] = "sample"
    context: Literal["response", "shuffled"] = "response"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    entropy_coef: float = 0.3
    period: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha: {self.alpha}, expected 0 < alpha <= 1")
        if not self.tau > 0:
            raise ValueError(f"tau: {self.tau}, expected a positive number")
        if not 0 <= self.min_prob < 1:
            raise ValueError(f"min_prob: {self.min_prob}, expected 0 <= min_prob < 1 / K")
        if self.period < 1:
            raise ValueError(f"period: {self.period}, expected at least 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: {self.seed}, expected 0 <= seed < 2**64")
        for name in ("learning_rate", "weight_decay", "entropy_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected a number >= 0")
        if self.mode == "soft" and self.learning_rate > 0:
            raise ValueError(
                f"learning_rate: {self.learning_rate} with mode 'soft', expected 0: soft weights draw no action, so "
                "REINFORCE has nothing to learn from"
            )

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Conductor:
        from maestro_fast.weighting.conductor.conductor import Conductor

        if not self.min_prob < 1 / len(reward_names):
            raise ValueError(f"min_prob: {self.min_prob}, expected below 1 / K = {1 / len(reward_names):.4g}")
        return Conductor(self, reward_names, context_size)
