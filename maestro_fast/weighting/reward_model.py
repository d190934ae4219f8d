"""A reward model in place of weights: a regression of the utility on context and rewards scores every response.

It learns from the same labels as ``anchored`` does, by the regression that ``anchored`` may add to its weights (see
``anchored.residual``), and is the freest use of them: nothing ties a score to the sum of the rewards. That needs more
labels than weights do. Until the first labelled group the weights are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maestro_fast.weighting.anchored.replay import CAPACITY, Memory, PromptContext, normalised_rewards
from maestro_fast.weighting.anchored.residual import Regression
from maestro_fast.weighting.policy import Outcome, WeightContext, Weights, check_shapes, same_weights
from maestro_fast.weighting.utilities import labelled_groups

_MODEL = "model."  # what names of the regression's tensors begin with in a saved state


@dataclass(frozen=True)
class RewardModelConfig:
    """A small regression of a known utility on context and rewards scores the responses, in the place of weights.

    Attributes:
        hybrid: Whether groups whose utility is known are trained on that utility instead of the regression's.
        context: The hidden state of the prompt that the regression reads, as for ``anchored``. "none" reads no state.
        hidden: The number of tanh units.
        steps: The number of Adam steps after every batch, each over all labelled groups that are kept.
        capacity: The most labelled groups that are kept. Beyond it, the prompt with the most groups loses its oldest.
        learning_rate: The learning rate of Adam, whose betas are (0.9, 0.99).
        l2: The factor of the penalty, which is l2 times the sum of the squares of all parameters.
        seed: The seed of the parameters' first values.
    """

    hybrid: bool = False
    context: PromptContext = "reference_prompt_mean"
    hidden: int = 32
    steps: int = 20
    capacity: int = CAPACITY
    learning_rate: float = 0.03
    l2: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "steps", "capacity"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 1")
        for name in ("learning_rate", "l2"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected a number >= 0")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: {self.seed}, expected 0 <= seed < 2**64")

    def build(self, reward_names: tuple[str, ...], context_size: int) -> RewardModel:
        """The policy for these rewards, with contexts of width ``context_size``."""
        return RewardModel(self, reward_names, context_size)


class RewardModel:
    """Scores responses by what it has learnt of their utility. It runs on the CPU."""

    name = "reward_model"
    needs_columns: tuple[str, ...] = ()
    needs_group_scores = False
    should_stop = False

    def __init__(self, config: RewardModelConfig, reward_names: tuple[str, ...], context_size: int) -> None:
        self.config = config
        self.memory = Memory(config.context, context_size, len(reward_names), config.capacity)
        self.needs_context, self.context_kind = self.memory.needs_context, self.memory.context_kind
        self.model = Regression(
            self.memory.size,
            len(reward_names),
            hidden=config.hidden,
            learning_rate=config.learning_rate,
            l2=config.l2,
            seed=config.seed,
        )
        self._metrics: dict[str, float] = {}

    def weights(self, context: WeightContext) -> Weights:
        """Zeros beside the regression's utilities, or equal weights before the first labelled group."""
        self._metrics = {"conductor/labelled_groups": float(len(self.memory.replay))}
        device, K = context.rewards_BK.device, context.rewards_BK.shape[1]
        direct_B, residual_B = None, None
        if self.config.hybrid:
            direct_B = labelled_groups(context).repeat_interleave(context.group_size).to(device)
        if self.model.learnt:
            x_Nd = self.memory.standardised(self.memory.contexts(context))
            residual_B = self.model.predict(x_Nd, normalised_rewards(context)).flatten().to(device)
        share = 1.0 / K if residual_B is None else 0.0
        weights_BK = same_weights(torch.full((K,), share), context).weights_BK
        return Weights(weights_BK, weights_BK, direct_B=direct_B, residual_B=residual_B)

    def observe(self, outcome: Outcome) -> None:
        """Keeps the labelled groups of the batch, and learns from all that are kept."""
        self.memory.observe(outcome.context)
        replay = self.memory.replay
        if len(replay) and self.config.learning_rate > 0:
            x_Pd = self.memory.standardised(replay.contexts)
            self._metrics["conductor/residual_loss"] = self.model.learn(x_Pd, replay, self.config.steps)

    def metrics(self) -> dict[str, float]:
        """Figures of the last batch and of the learning after it."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Tensor]:
        """The regression with Adam's moments, the statistics of the contexts and the replay."""
        return self.model.state_dict(_MODEL) | self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over a ``state_dict``.

        Raises:
            ValueError: A tensor is missing or has another shape. The policy is then as it was.
        """
        check_shapes(state, self.model.saved_shapes(_MODEL))
        self.memory.check(state)
        self.model.load_state_dict(state, _MODEL)
        self.memory.load_state_dict(state)
