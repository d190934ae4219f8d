"""The anchored Conductor: it learns weights under which scores order the responses of a group as their utility does.

Utilities are known for some prompts (``WeightContext.utilities_B``, NaN elsewhere): a judge, a verifier or people gave
them. The weights that are learnt there serve every prompt, since they are a function of the prompt's own context:

    w(x) = softmax(b + V tanh(H x + c) / sqrt(hidden))                    x: the prompt's standardised context
    J    = mean over labelled groups of  rho(w(x) . r', U)  +  entropy_coef * H(w)  -  l2 * sum(V^2) / K

r' are the rewards standardised within the group. A reward that abstains from all responses of a group takes no part
there: the softmax and H are over the other rewards, so its weight goes to them and it gets no credit. Where it abstains
from some of them, those are scored as the advantage profile says. rho is the correlation over the responses of the
group: the mean of the product of the two standardised values. GRPO's advantage is the standardised score, so rho says
how well advantages under w order the responses as the utility does. b and V start at 0, so the weights start equal.

With ``residual``, a small regression f(x, r') beside the weights is learnt from the same labels (see ``residual``), and
the score becomes z(w . r') + c z(f) (see ``scored_rewards``). The figure ``conductor/residual_share`` says how much of
the score's variance within groups comes from f; the rest is what the weights say.

Labelled groups are kept, at most ``capacity`` of them (``replay`` says which), and after every batch the Conductor
learns from all of them again. It may, because nothing that is kept (context, standardised rewards, utilities) depends
on the current policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from maestro_fast.ops.group_advantages import live_weights
from maestro_fast.specs import PROFILES, AdvantageProfile, resolve_profile
from maestro_fast.weighting.anchored.adam import NamedAdam
from maestro_fast.weighting.anchored.replay import CAPACITY, Memory, PromptContext, normalised_rewards
from maestro_fast.weighting.anchored.residual import Regression
from maestro_fast.weighting.diagnostics import self_flattery
from maestro_fast.weighting.policy import Outcome, WeightContext, Weights, check_shapes, entropy
from maestro_fast.weighting.utilities import labelled_groups

SCORE_EPS = 1e-2  # It is added to the std of a group's scores: groups whose scores hardly differ say little.
_RESIDUAL = "residual."  # what names of the residual's tensors begin with in a saved state


@dataclass(frozen=True)
class AnchoredConfig:
    """A small network learns weights whose scores order the responses of a group as a known utility does.

    The defaults are those of the arm ``anchored_residual`` of ``maestro_fast.evals``, whose results are in its README.

    Attributes:
        surrogate: What the weights are trained to raise. "correlation" is the correlation of the weighted score with
            the utility within groups. "first_order" is the weighted mean of each reward's own correlation; it is linear
            in the weights, so they become one-hot, and it did worse.
        hybrid: Whether groups whose utility is known are trained on that utility instead of their weighted rewards.
        residual: Whether a small regression of the utility on context and rewards, learnt from the same labels, is
            added to the weighted rewards.
        residual_factor: The standard deviation of the residual's part of a score, as a multiple of that of the weighted
            rewards.
        context: The hidden state of the prompt that the network reads. A prompt's state under the frozen reference
            model never changes. "none" reads no state and learns one weighting for all prompts.
        hidden: The number of tanh units.
        steps: The number of Adam steps after every batch, each over all labelled groups that are kept. 20 steps over n
            groups of width d cost about 4000 n d operations on the CPU.
        capacity: The most labelled groups that are kept. Beyond it, the prompt with the most groups loses its oldest.
        learning_rate: The learning rate of Adam, whose betas are (0.9, 0.99).
        entropy_coef: The factor of the entropy of the weights in the objective.
        l2: The factor of the penalty on V, which is l2 * sum(V^2) / K.
        seed: The seed of the hidden layer's first values.
    """

    surrogate: Literal["correlation", "first_order"] = "correlation"
    hybrid: bool = True
    residual: bool = True
    residual_factor: float = 1.0
    context: PromptContext = "reference_prompt_mean"
    hidden: int = 16
    steps: int = 20
    capacity: int = CAPACITY
    learning_rate: float = 0.03
    entropy_coef: float = 0.01
    l2: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "steps", "capacity"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 1")
        for name in ("learning_rate", "entropy_coef", "l2", "residual_factor"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected a number >= 0")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: {self.seed}, expected 0 <= seed < 2**64")

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Anchored:
        """The policy for these rewards, with contexts of width ``context_size``."""
        return Anchored(self, reward_names, context_size)


@dataclass(frozen=True)
class AnchoredParams:
    """The network: H [hidden, d], c [hidden], V [K, hidden] and b [K], in float32 (or float64, as a reference)."""

    hidden_weight: Tensor
    hidden_bias: Tensor
    weight: Tensor
    bias: Tensor

    @staticmethod
    def start(size: int, actions: int, hidden: int, seed: int) -> AnchoredParams:
        """The tensors before learning: H and c are uniform within +-1 / sqrt(d), V and b are zero.

        Without contexts (d = 0) there are no hidden units, so the weights are softmax(b).
        """
        generator = torch.Generator().manual_seed(seed % 2**63)
        hidden, bound = (hidden, size**-0.5) if size else (0, 0.0)
        uniform = (torch.rand(hidden, size + 1, generator=generator) * 2 - 1) * bound
        first, offset = uniform[:, :-1].clone(), uniform[:, -1].clone()
        parts = (first, offset, torch.zeros(actions, hidden), torch.zeros(actions))
        return AnchoredParams(*(part.requires_grad_() for part in parts))

    def named(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return dict(vars(self))

    def logits(self, x_Nd: Tensor) -> Tensor:
        """The logits [N, K] of contexts that ``standardised`` returned."""
        hidden = torch.tanh(x_Nd @ self.hidden_weight.T + self.hidden_bias)
        logits_NK: Tensor = self.bias + hidden @ self.weight.T / float(max(1, self.weight.shape[1])) ** 0.5
        return logits_NK

    def weights(self, x_Nd: Tensor) -> Tensor:
        """w(x) [N, K] where no reward abstains."""
        return self.logits(x_Nd).softmax(-1)


def weights_of_present(logits_NK: Tensor, present_NK: Tensor) -> Tensor:
    """softmax [N, K] over the rewards that are present, 0 for the others; over all of them where none is present."""
    absent_NK = ~present_NK & present_NK.any(1, keepdim=True)
    return logits_NK.masked_fill(absent_NK, float("-inf")).softmax(-1)


def correlation(
    weights_NK: Tensor, rewards_NGK: Tensor, utilities_NG: Tensor, profile: AdvantageProfile = PROFILES["maestro"]
) -> Tensor:
    """rho [N]: the mean over the group of z(w . r') z(U). The arguments r' and z(U) are standardised already.

    r' is NaN where a reward abstained. ``profile`` says what that means for the score of the response.
    """
    weights_NGK, scored_NG = live_weights(weights_NK[:, None].expand_as(rewards_NGK), ~rewards_NGK.isnan(), profile)
    scores_NG = torch.where(scored_NG, (weights_NGK * rewards_NGK.nan_to_num(0.0)).sum(-1), 0.0)
    count_N1 = scored_NG.sum(1, keepdim=True)
    mean_N1 = scores_NG.sum(1, keepdim=True) / count_N1.clamp(min=1)
    centred_NG = torch.where(scored_NG, scores_NG - mean_N1, 0.0)
    variance_N1 = centred_NG.square().sum(1, keepdim=True) / (count_N1 - 1).clamp(min=1)
    positive_N1 = variance_N1 > 0  # The inner ``where`` keeps sqrt away from 0, where its derivative is infinite.
    std_N1 = torch.where(positive_N1, torch.where(positive_N1, variance_N1, 1.0).sqrt(), 0.0)
    return mean_over_responses(centred_NG / (std_N1 + SCORE_EPS) * utilities_NG, rewards_NGK)


def first_order(
    weights_NK: Tensor, rewards_NGK: Tensor, utilities_NG: Tensor, profile: AdvantageProfile = PROFILES["maestro"]
) -> Tensor:
    """[N]: sum_k w_k times the mean over the group of r'_k z(U), which is linear in w unless a reward abstained."""
    weights_NGK, _ = live_weights(weights_NK[:, None].expand_as(rewards_NGK), ~rewards_NGK.isnan(), profile)
    score_NG = (weights_NGK * rewards_NGK.nan_to_num(0.0)).sum(-1)
    return mean_over_responses(score_NG * utilities_NG, rewards_NGK)


def mean_over_responses(x_NG: Tensor, rewards_NGK: Tensor) -> Tensor:
    """The mean [N] over the responses that have a reward; x is 0 for the others."""
    present_NG = ~rewards_NGK.isnan().all(-1)
    return x_NG.sum(1) / present_NG.sum(1).clamp(min=1)


class Anchored:
    """Gives all responses to a prompt the same weights; they are equal until the first labelled group.

    It runs on the CPU, so every process computes the same bits.
    """

    name = "anchored"
    needs_columns: tuple[str, ...] = ()
    needs_group_scores = False
    should_stop = False

    def __init__(self, config: AnchoredConfig, reward_names: tuple[str, ...], context_size: int) -> None:
        self.config = config
        self.reward_names = reward_names
        self.memory = Memory(config.context, context_size, len(reward_names), config.capacity)
        self.needs_context, self.context_kind = self.memory.needs_context, self.memory.context_kind
        self.statistics, self.replay = self.memory.statistics, self.memory.replay
        size, K = self.memory.size, len(reward_names)
        self.params = AnchoredParams.start(size, K, config.hidden, config.seed)
        self._adam = NamedAdam(self.params.named(), config.learning_rate)
        self.residual: Regression | None = None
        if config.residual:
            self.residual = Regression(size, K, learning_rate=config.learning_rate, seed=config.seed)
        self._metrics: dict[str, float] = {}

    @property
    def labelled(self) -> int:
        """The number of labelled groups that are kept."""
        return len(self.replay)

    def weights(self, context: WeightContext) -> Weights:
        """w(x) for each group, over the rewards that do not abstain from all of its responses.

        The figure ``conductor/abstained_weight`` is the mean weight that has so moved from absent rewards to the
        others. With ``hybrid``, labelled groups are marked to be scored by their utility instead. With ``residual``, f
        stands beside the weights from the first labelled group on.
        """
        x_Nd = self.memory.standardised(self.memory.contexts(context))
        present_NK = ~context.rewards_BK.isnan().cpu().view(len(x_Nd), context.group_size, -1).all(1)
        with torch.no_grad():
            logits_NK = self.params.logits(x_Nd)
        weights_NK = weights_of_present(logits_NK, present_NK)
        kept_NK = present_NK | ~present_NK.any(1, keepdim=True)
        moved_N = torch.where(kept_NK, 0.0, logits_NK.softmax(-1)).sum(1)
        self._metrics = {
            "conductor/abstained_weight": moved_N.mean().item(),
            "conductor/entropy": entropy(weights_NK).mean().item(),
            "conductor/labelled_groups": float(self.labelled),
        }
        device = context.rewards_BK.device
        weights_BK = weights_NK.repeat_interleave(context.group_size, 0).to(device)
        direct_B, residual_B = None, None
        if self.config.hybrid:
            direct_B = labelled_groups(context).repeat_interleave(context.group_size).to(device)
        if self.residual is not None and self.residual.learnt:
            residual_B = self.residual.predict(x_Nd, normalised_rewards(context)).flatten().to(device)
        return Weights(
            weights_BK,
            weights_BK,
            direct_B=direct_B,
            residual_B=residual_B,
            residual_factor=self.config.residual_factor,
        )

    def weights_of(self, x_Nd: Tensor) -> Tensor:
        """w(x) [N, K] of contexts as the model gives them, before they are standardised, where no reward abstains."""
        return self.params.weights(self.memory.standardised(x_Nd))

    def observe(self, outcome: Outcome) -> None:
        """Keeps the labelled groups of the batch, and learns from all that are kept."""
        self._metrics["conductor/self_flattery"] = self_flattery(outcome)
        self.memory.observe(outcome.context)
        if self.labelled and self.config.learning_rate > 0:
            self._learn(resolve_profile(outcome.profile))

    def _learn(self, profile: AdvantageProfile) -> None:
        """Takes ``steps`` Adam steps on J over everything in the replay, and as many on the residual's loss."""
        config, replay = self.config, self.replay
        x_Pd = self.memory.standardised(replay.contexts)
        present_NK = ~replay.rewards.isnan().all(1)
        surrogate = correlation if config.surrogate == "correlation" else first_order
        for _ in range(config.steps):
            weights_NK = weights_of_present(self.params.logits(x_Pd)[replay.index], present_NK)
            value = surrogate(weights_NK, replay.rewards, replay.utilities, profile).mean()
            penalty = config.l2 * self.params.weight.square().sum() / len(self.reward_names)
            objective = value + config.entropy_coef * entropy(weights_NK).mean() - penalty
            self._adam.step(-objective)
        self._metrics |= {
            "conductor/objective": objective.item(),
            "conductor/correlation": value.item(),
            "conductor/grad_norm": self._adam.grad_norm(),
        }
        if self.residual is not None:
            self._metrics["conductor/residual_loss"] = self.residual.learn(x_Pd, replay, config.steps)

    def metrics(self) -> dict[str, float]:
        """Figures of the last batch and of the learning after it."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Tensor]:
        """The networks with Adam's moments, the statistics of the contexts and the replay."""
        residual = {} if self.residual is None else self.residual.state_dict(_RESIDUAL)
        return self._adam.state_dict() | residual | self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over a ``state_dict``.

        Raises:
            ValueError: A tensor is missing or has another shape, or there is a residual on one side alone. The policy
                is then as it was.
        """
        residual = {} if self.residual is None else self.residual.saved_shapes(_RESIDUAL)
        if any(name.startswith(_RESIDUAL) for name in state) != bool(residual):
            saved, own = ("false", "true") if residual else ("true", "false")
            raise ValueError(f"state.residual: was saved with `residual: {saved}`, expected it with `residual: {own}`")
        check_shapes(state, self._adam.saved_shapes() | residual)
        self.memory.check(state)
        self._adam.load_state_dict(state)
        if self.residual is not None:
            self.residual.load_state_dict(state, _RESIDUAL)
        self.memory.load_state_dict(state)
