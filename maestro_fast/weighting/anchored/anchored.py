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

Each labelled group is kept for good (see ``replay``), and after every batch the Conductor learns from all of them
again. It may, because nothing that is kept (context, standardised rewards, utilities) depends on the current policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from maestro_fast.ops.group_advantages import group_advantages, live_weights
from maestro_fast.specs import PROFILES, AdvantageProfile, resolve_profile
from maestro_fast.weighting.anchored.replay import Replay
from maestro_fast.weighting.conductor.experience import RunningStatistics, policy_contexts
from maestro_fast.weighting.diagnostics import self_flattery
from maestro_fast.weighting.policy import ContextKind, Outcome, WeightContext, Weights, check_shapes, entropy
from maestro_fast.weighting.utilities import labelled_groups, standardised_utilities

VARIANCE_EPS = 4e-4  # It is added to the variance of the contexts, so that dimensions that hardly vary stay small.
SCORE_EPS = 1e-2  # It is added to the std of a group's scores: groups whose scores hardly differ say little.
CLIP = 4.0  # The bound of standardised contexts: a prompt unlike all others gets no extreme weights.


@dataclass(frozen=True)
class AnchoredConfig:
    """A small network learns weights whose scores order the responses of a group as a known utility does.

    The defaults are those of our trial on a small language model.

    Attributes:
        surrogate: What the weights are trained to raise. "correlation" is the correlation of the weighted score with
            the utility within groups. "first_order" is the weighted mean of each reward's own correlation; it is linear
            in the weights, so they become one-hot, and it did worse.
        hybrid: Whether groups whose utility is known are trained on that utility instead of their weighted rewards.
        context: The hidden state of the prompt that the network reads. A prompt's state under the frozen reference
            model never changes.
        hidden: The number of tanh units.
        steps: The number of Adam steps after every batch, each over all labelled groups so far. 20 steps over n groups
            of width d cost about 4000 n d operations on the CPU.
        learning_rate: The learning rate of Adam, whose betas are (0.9, 0.99).
        entropy_coef: The factor of the entropy of the weights in the objective.
        l2: The factor of the penalty on V, which is l2 * sum(V^2) / K.
        seed: The seed of the hidden layer's first values.
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
        """The tensors before learning: H and c are uniform within +-1 / sqrt(d), V and b are zero."""
        generator = torch.Generator().manual_seed(seed % 2**63)
        bound = size**-0.5
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
        logits_NK: Tensor = self.bias + hidden @ self.weight.T / float(self.weight.shape[1]) ** 0.5
        return logits_NK

    def weights(self, x_Nd: Tensor) -> Tensor:
        """w(x) [N, K] where no reward abstains."""
        return self.logits(x_Nd).softmax(-1)


def standardised(x_Nd: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """(x - mean) * rstd, clipped at +-4."""
    return ((x_Nd - mean) * rstd).clamp(-CLIP, CLIP)


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
    needs_context = True
    needs_columns: tuple[str, ...] = ()
    needs_group_scores = False
    should_stop = False

    def __init__(self, config: AnchoredConfig, reward_names: tuple[str, ...], context_size: int) -> None:
        self.config = config
        self.reward_names = reward_names
        self.context_kind: ContextKind = config.context
        self.params = AnchoredParams.start(context_size, len(reward_names), config.hidden, config.seed)
        self.statistics = RunningStatistics(context_size)
        self._optimizer = torch.optim.Adam(
            list(self.params.named().values()), lr=config.learning_rate, betas=(0.9, 0.99)
        )
        self.replay = Replay(context_size, len(reward_names))
        self._metrics: dict[str, float] = {}

    @property
    def labelled(self) -> int:
        """The number of labelled groups so far."""
        return len(self.replay)

    def weights(self, context: WeightContext) -> Weights:
        """w(x) for each group, over the rewards that do not abstain from all of its responses.

        The figure ``conductor/abstained_weight`` is the mean weight that has so moved from absent rewards to the
        others. With ``hybrid``, labelled groups are marked to be scored by their utility instead.
        """
        x_Nd = self._contexts(context)
        present_NK = ~context.rewards_BK.isnan().cpu().view(len(x_Nd), context.group_size, -1).all(1)
        with torch.no_grad():
            logits_NK = self.params.logits(self._standardised(x_Nd))
        weights_NK = weights_of_present(logits_NK, present_NK)
        kept_NK = present_NK | ~present_NK.any(1, keepdim=True)
        moved_N = torch.where(kept_NK, 0.0, logits_NK.softmax(-1)).sum(1)
        self._metrics = {
            "conductor/abstained_weight": moved_N.mean().item(),
            "conductor/entropy": entropy(weights_NK).mean().item(),
            "conductor/labelled_groups": float(self.labelled),
        }
        weights_BK = weights_NK.repeat_interleave(context.group_size, 0).to(context.rewards_BK.device)
        direct_B = None
        if self.config.hybrid:
            direct_B = labelled_groups(context).repeat_interleave(context.group_size).to(weights_BK.device)
        return Weights(weights_BK, weights_BK, direct_B=direct_B)

    def weights_of(self, x_Nd: Tensor) -> Tensor:
        """w(x) [N, K] of contexts as the model gives them, before they are standardised, where no reward abstains."""
        return self.params.weights(self._standardised(x_Nd))

    def _standardised(self, x_Nd: Tensor) -> Tensor:
        return standardised(x_Nd, *self.statistics.standardisation(VARIANCE_EPS))

    def _contexts(self, context: WeightContext) -> Tensor:
        """float32 [N, d] on the CPU, one context per group."""
        size = self.statistics.mean.numel()
        x_Bd = policy_contexts(context, self.config.context, size, self.config.seed, torch.device("cpu"))
        return x_Bd[:: context.group_size]

    def observe(self, outcome: Outcome) -> None:
        """Keeps the labelled groups of the batch, and learns from all labelled groups so far."""
        self._metrics["conductor/self_flattery"] = self_flattery(outcome)
        context = outcome.context
        x_Nd = self._contexts(context)
        self.statistics.update(x_Nd)
        self._remember(context, x_Nd)
        if self.labelled and self.config.learning_rate > 0:
            self._learn(resolve_profile(outcome.profile))

    def _remember(self, context: WeightContext, x_Nd: Tensor) -> None:
        """Adds the labelled groups of the batch to the replay."""
        labelled_N = labelled_groups(context)
        shape = (-1, context.group_size)
        rewards_BK = group_advantages(context.rewards_BK, None, context.group_size).normalized_rewards
        rewards_BK = torch.where(context.rewards_BK.isnan(), float("nan"), rewards_BK)
        rewards_NGK = rewards_BK.float().cpu().view(*shape, rewards_BK.shape[1])
        utilities_NG = standardised_utilities(context).view(shape)
        self.replay.add(x_Nd[labelled_N], rewards_NGK[labelled_N], utilities_NG[labelled_N])

    def _learn(self, profile: AdvantageProfile) -> None:
        """Takes ``steps`` Adam steps on J over everything in the replay."""
        config, replay = self.config, self.replay
        x_Pd = self._standardised(replay.contexts)
        present_NK = ~replay.rewards.isnan().all(1)
        surrogate = correlation if config.surrogate == "correlation" else first_order
        for _ in range(config.steps):
            weights_NK = weights_of_present(self.params.logits(x_Pd)[replay.index], present_NK)
            value = surrogate(weights_NK, replay.rewards, replay.utilities, profile).mean()
            penalty = config.l2 * self.params.weight.square().sum() / len(self.reward_names)
            objective = value + config.entropy_coef * entropy(weights_NK).mean() - penalty
            self._optimizer.zero_grad()
            (-objective).backward()
            self._optimizer.step()
        norms = [p.grad.norm() for p in self.params.named().values() if p.grad is not None]
        self._metrics |= {
            "conductor/objective": objective.item(),
            "conductor/correlation": value.item(),
            "conductor/grad_norm": torch.stack(norms).norm().item(),
        }

    def metrics(self) -> dict[str, float]:
        """Figures of the last batch and of the learning after it."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Tensor]:
        """The network, the statistics of the contexts, Adam's moments and the replay."""
        return {
            **{name: tensor.detach().clone() for name, tensor in self.params.named().items()},
            **self.statistics.state_dict("statistics."),
            **self._moments(),
            **self.replay.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over a ``state_dict``.

        Raises:
            ValueError: A tensor is missing or has another shape. The policy is then as it was.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in self.params.named().items()}
        check_shapes(state, shapes | self.statistics.saved_shapes("statistics."))
        self.replay.check(state)
        for name, parameter in self.params.named().items():
            parameter.data.copy_(state[name])
        self._load_moments(state)
        self.statistics.load_state_dict(state, "statistics.")
        self.replay.load_state_dict(state)

    def _moments(self) -> dict[str, Tensor]:
        """Adam's state of each parameter, as ``optimizer.<parameter>.<key>``; nothing before the first step."""
        return {
            f"optimizer.{name}.{key}": value.detach().clone()
            for name, parameter in self.params.named().items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }

    def _load_moments(self, state: Mapping[str, Tensor]) -> None:
        """Replaces Adam's state by what ``_moments`` returned."""
        for name, parameter in self.params.named().items():
            prefix = f"optimizer.{name}."
            found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            self._optimizer.state.pop(parameter, None)
            if found:
                self._optimizer.state[parameter] = {key: value.clone() for key, value in found.items()}
