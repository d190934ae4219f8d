"""Advantage profiles, and the result of ``ops.group_advantages``.

Axis suffixes: B responses, K rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Center = Literal["none", "group", "batch", "leave_one_out"]
Scale = Literal["none", "group", "batch"]
ScoreCenter = Literal["none", "group", "batch", "leave_one_out", "tokens"]
ScoreScale = Literal["none", "group", "batch", "tokens"]
Singleton = Literal["zero", "raw"]


@dataclass(frozen=True)
class AdvantageProfile:
    """The normalisation of a GRPO-like method.

    Each reward is centred and scaled over ``reward_center`` and ``reward_scale``. The weighted sum of a response's
    rewards is its score. The score, centred and scaled over ``score_center`` and ``score_scale``, is its advantage.

    Attributes:
        reward_center, reward_scale: the scopes over which the mean and the standard deviation of each reward are taken.
        score_center, score_scale: the same scopes for the score. ``leave_one_out`` subtracts the mean of the others of
            the group, and ``tokens`` is the batch, where every response counts once per token of its completion.
        reward_eps, score_eps: what is added to the standard deviation of a reward or of the score.
        ddof: 1 divides the squared deviations by n - 1 (the sample standard deviation), 0 by n. In the scope ``tokens``
            n is the number of tokens.
        singleton: what happens to the only live response of a group, or to the only live value of a reward in a group.
            It has nothing to be compared with. ``zero`` makes its advantage or its reward 0. ``raw`` takes the group to
            have mean 0 and standard deviation 1, so the value itself remains, divided by 1 + eps if it is scaled.
            Scopes wider than a group treat it like any other. It is flagged ``degenerate`` either way. (A reward is
            live unless it abstained; a response is live if it has a live reward.)
        missing: what happens to a response whose reward k abstained. ``zero`` counts that reward as 0 in the sum.
            ``renormalize`` scales the weights of its live rewards up to the original sum of its weights.
        kl_in: ``score`` subtracts beta * KL from the score. ``loss`` leaves the KL to the loss.
        score_eps_in: ``std`` divides the score by std + score_eps, ``variance`` by sqrt(std**2 + score_eps).
    """

    reward_center: Center = "group"
    reward_scale: Scale = "group"
    score_center: ScoreCenter = "group"
    score_scale: ScoreScale = "group"
    reward_eps: float = 1e-4
    score_eps: float = 1e-4
    ddof: int = 1
    singleton: Singleton = "zero"
    missing: Literal["zero", "renormalize"] = "renormalize"
    kl_in: Literal["score", "loss"] = "score"
    score_eps_in: Literal["std", "variance"] = "std"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("reward_center", self.reward_center, get_args(Center)),
            ("reward_scale", self.reward_scale, get_args(Scale)),
            ("score_center", self.score_center, get_args(ScoreCenter)),
            ("score_scale", self.score_scale, get_args(ScoreScale)),
            ("ddof", self.ddof, (0, 1)),
            ("singleton", self.singleton, get_args(Singleton)),
            ("missing", self.missing, ("zero", "renormalize")),
            ("kl_in", self.kl_in, ("score", "loss")),
            ("score_eps_in", self.score_eps_in, ("std", "variance")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: {value!r}, expected one of {allowed}")
        for name, eps in (("reward_eps", self.reward_eps), ("score_eps", self.score_eps)):
            if isinstance(eps, bool) or not isinstance(eps, int | float):
                raise TypeError(f"{name}: got {type(eps).__name__} {eps!r}, expected a number")
            if isinstance(eps, int) and eps > 2**63:
                raise ValueError(f"{name}: an integer above 2**63, expected a number that a float32 can hold")
            if not eps >= 0:
                raise ValueError(f"{name}: {eps}, expected a number >= 0")

    @property
    def needs_lengths(self) -> bool:
        """Whether the advantages depend on the lengths of the completions."""
        return "tokens" in (self.score_center, self.score_scale)


def _trl(score_scale: Scale) -> AdvantageProfile:
    return AdvantageProfile("none", "none", "group", score_scale, missing="zero", kl_in="loss")


def _verl(rewards: Scale, score_center: ScoreCenter, score_scale: ScoreScale, **options: Any) -> AdvantageProfile:
    return AdvantageProfile(
        rewards, rewards, score_center, score_scale, singleton="raw", missing="zero", kl_in="loss", **options
    )


# maestro is MAESTRO (arXiv 2601.07208): rewards and then scores are normalised in the group, with GRPO's sample std.
# grpo, dr_grpo and grpo_batch are TRL's scale_rewards "group", "none" and "batch". gdpo is TRL's normalize_then_sum.
# rloo is RLOO (arXiv 2402.14740), whose baseline is the mean of the other responses.
# verl_grpo and verl_dr_grpo are verl's estimator "grpo" with norm_adv_by_std_in_grpo and without it. verl_gdpo is its
# "gdpo" (arXiv 2601.05242), whose masked_whiten runs over the tokens. All three leave a singleton its raw score.
PROFILES: dict[str, AdvantageProfile] = {
    "maestro": AdvantageProfile(),
    "grpo": _trl("group"),
    "dr_grpo": _trl("none"),
    "grpo_batch": _trl("batch"),
    "gdpo": AdvantageProfile("group", "group", "batch", "batch", missing="zero", kl_in="loss"),
    "rloo": AdvantageProfile("none", "none", "leave_one_out", "none", missing="zero", kl_in="loss"),
    "verl_grpo": _verl("none", "group", "group", score_eps=1e-6),
    "verl_dr_grpo": _verl("none", "group", "none"),
    "verl_gdpo": _verl("group", "tokens", "tokens", reward_eps=1e-6, score_eps=1e-8, score_eps_in="variance"),
}


def resolve_profile(profile: str | AdvantageProfile) -> AdvantageProfile:
    """Looks a profile up by its name; a profile is returned unchanged.

    Raises:
        ValueError: the name is unknown.
        TypeError: the argument is neither a name nor a profile.
    """
    if isinstance(profile, AdvantageProfile):
        return profile
    if not isinstance(profile, str):
        raise TypeError(f"profile: got {type(profile).__name__}, expected a name or an AdvantageProfile")
    if profile not in PROFILES:
        raise ValueError(f"profile: {profile!r}, expected one of {', '.join(PROFILES)}")
    return PROFILES[profile]


class GroupAdvantages(NamedTuple):
    """Advantages, and the quantities that they were computed from.

    Every tensor is float32 [B] (float64 for float64 rewards) unless noted. In kernels the same record holds pointers.

    Attributes:
        advantages: the advantage of each response. It is 0 in degenerate groups (except for singletons that the profile
            leaves raw) and for responses without a live reward.
        scores: the weighted sum of the normalised rewards, minus beta * KL where the profile has the KL in the score.
        normalized_rewards: [B, K], 0 where a reward abstained.
        mean: the mean that was subtracted from the score. With ``leave_one_out`` it is the mean of the others.
        std: the standard deviation of the scores over the scope ``score_scale``, or over the group where that scope is
            ``none``. It is 1 for a raw singleton.
        degenerate: bool. True for every response of a group whose scores before the KL are all the same, or which has
            only one live response.
    """

    advantages: Tensor
    scores: Tensor
    normalized_rewards: Tensor
    mean: Tensor
    std: Tensor
    degenerate: Tensor

    @staticmethod
    def empty(rewards: Tensor) -> GroupAdvantages:
        """Uninitialised float32 results for rewards [B, K] or [B], on their device."""
        batch, K = rewards.shape[0], rewards.shape[1] if rewards.ndim == 2 else 1
        # These are the quickest ways to allocate: sizes passed as arguments, not as a tuple, and empty_like.
        first = torch.empty(batch, dtype=torch.float32, device=rewards.device)
        normalized = torch.empty(batch, K, dtype=torch.float32, device=rewards.device)
        like = torch.empty_like
        return GroupAdvantages(first, like(first), normalized, like(first), like(first), like(first, dtype=torch.bool))
