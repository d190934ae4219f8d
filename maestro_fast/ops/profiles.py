"""Advantage profiles: how rewards and scores are centred and scaled, under the names of the code they equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Center = Literal["none", "group", "batch", "leave_one_out"]
Scale = Literal["none", "group", "batch"]


@dataclass(frozen=True)
class AdvantageProfile:
    """The normalisation of a GRPO-like method.

    Each reward is centred and scaled over ``reward_center`` and ``reward_scale``; the weighted sum of a response's
    rewards is its score; the score, centred and scaled over ``score_center`` and ``score_scale``, is its advantage.

    Attributes:
        reward_center, reward_scale: scope of the mean and the standard deviation of each reward.
        score_center, score_scale: the same for the score; ``leave_one_out`` is the mean of the others of the group.
        reward_eps, score_eps: added to the standard deviation.
        ddof: 1 divides the squared deviations by n - 1 (sample standard deviation), 0 by n.
        missing: a response whose reward k abstained. ``zero``: it counts as 0 in the sum. ``renormalize``: the weights
            of its live rewards are scaled up to the row's original sum.
        kl_in: ``score`` subtracts beta * KL from the score; with ``loss`` the KL is the loss's business.
    """

    reward_center: Center = "group"
    reward_scale: Scale = "group"
    score_center: Center = "group"
    score_scale: Scale = "group"
    reward_eps: float = 1e-4
    score_eps: float = 1e-4
    ddof: int = 1
    missing: Literal["zero", "renormalize"] = "renormalize"
    kl_in: Literal["score", "loss"] = "score"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("reward_center", self.reward_center, get_args(Center)),
            ("reward_scale", self.reward_scale, get_args(Scale)),
            ("score_center", self.score_center, get_args(Center)),
            ("score_scale", self.score_scale, get_args(Scale)),
            ("ddof", self.ddof, (0, 1)),
            ("missing", self.missing, ("zero", "renormalize")),
            ("kl_in", self.kl_in, ("score", "loss")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: {value!r}, expected one of {allowed}")
        for name, eps in (("reward_eps", self.reward_eps), ("score_eps", self.score_eps)):
            if not eps >= 0:
                raise ValueError(f"{name}: {eps}, expected a number >= 0")


def _trl(score_scale: Scale) -> AdvantageProfile:
    return AdvantageProfile("none", "none", "group", score_scale, missing="zero", kl_in="loss")


# maestro: MAESTRO (arXiv 2601.07208), rewards and then scores normalised in the group, with GRPO's sample std.
# grpo, dr_grpo, grpo_batch: TRL's scale_rewards "group", "none", "batch". gdpo: TRL's normalize_then_sum.
# rloo: RLOO (arXiv 2402.14740), the mean of the other responses as baseline.
PROFILES: dict[str, AdvantageProfile] = {
    "maestro": AdvantageProfile(),
    "grpo": _trl("group"),
    "dr_grpo": _trl("none"),
    "grpo_batch": _trl("batch"),
    "gdpo": AdvantageProfile("group", "group", "batch", "batch", missing="zero", kl_in="loss"),
    "rloo": AdvantageProfile("none", "none", "leave_one_out", "none", missing="zero", kl_in="loss"),
}


def resolve_profile(profile: str | AdvantageProfile) -> AdvantageProfile:
    """A profile by name, or the profile itself.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a profile.
    """
    if isinstance(profile, AdvantageProfile):
        return profile
    if not isinstance(profile, str):
        raise TypeError(f"profile: got {type(profile).__name__}, expected a name or an AdvantageProfile")
    if profile not in PROFILES:
        raise ValueError(f"profile: {profile!r}, expected one of {', '.join(PROFILES)}")
    return PROFILES[profile]
