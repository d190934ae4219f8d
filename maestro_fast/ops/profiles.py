"""Advantage profiles: how rewards and scores are centred and scaled, under the names of the code they equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

Center = Literal["none", "group", "batch", "leave_one_out"]
Scale = Literal["none", "group", "batch"]
ScoreCenter = Literal["none", "group", "batch", "leave_one_out", "tokens"]
ScoreScale = Literal["none", "group", "batch", "tokens"]
Singleton = Literal["zero", "raw"]


@dataclass(frozen=True)
class AdvantageProfile:
    """The normalisation of a GRPO-like method.

    Each reward is centred and scaled over ``reward_center`` and ``reward_scale``; the weighted sum of a response's
    rewards is its score; the score, centred and scaled over ``score_center`` and ``score_scale``, is its advantage.

    Attributes:
        reward_center, reward_scale: scope of the mean and the standard deviation of each reward.
        score_center, score_scale: the same for the score; ``leave_one_out`` is the mean of the others of the group,
            ``tokens`` the batch in which every response counts once per token of its completion.
        reward_eps, score_eps: added to the standard deviation.
        ddof: 1 divides the squared deviations by n - 1 (sample standard deviation), 0 by n (tokens: their number).
        singleton: the only live response of its group (for a reward: the only one with a live value) has nothing to be
            compared with. ``zero``: reward or advantage 0. ``raw``: the group counts as having mean 0 and standard
            deviation 1, so the value itself remains, over 1 + eps if scaled. Scopes wider than a group see it as any
            other. It is flagged ``degenerate`` either way.
        missing: a response whose reward k abstained. ``zero``: it counts as 0 in the sum. ``renormalize``: the weights
            of its live rewards are scaled up to the row's original sum.
        kl_in: ``score`` subtracts beta * KL from the score; with ``loss`` the KL is the loss's business.
        score_eps_in: ``std`` divides by std + score_eps, ``variance`` by sqrt(std**2 + score_eps).
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


# maestro: MAESTRO (arXiv 2601.07208), rewards and then scores normalised in the group, with GRPO's sample std.
# grpo, dr_grpo, grpo_batch: TRL's scale_rewards "group", "none", "batch". gdpo: TRL's normalize_then_sum.
# rloo: RLOO (arXiv 2402.14740), the mean of the other responses as baseline.
# verl_grpo, verl_dr_grpo, verl_gdpo: verl's estimator "grpo" with norm_adv_by_std_in_grpo and without, and "gdpo"
# (arXiv 2601.05242), whose masked_whiten runs over the tokens. All three leave a singleton with its raw score.
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


_SCOPES: tuple[Any, ...] = ("none", "group", "batch", "leave_one_out", "tokens")  # csrc's enum Scope, in its order


def as_numbers(profile: AdvantageProfile) -> tuple[list[int], list[float]]:
    """A profile as a registered operator or C++ takes it: integers and epsilons. ``kl_in`` is the caller's business."""
    scopes = profile.reward_center, profile.reward_scale, profile.score_center, profile.score_scale
    switches = profile.singleton == "raw", profile.missing == "renormalize", profile.score_eps_in == "variance"
    integers = [*(_SCOPES.index(scope) for scope in scopes), profile.ddof, *map(int, switches)]
    return integers, [float(profile.reward_eps), float(profile.score_eps)]


def from_numbers(integers: Sequence[int], epsilons: Sequence[float]) -> AdvantageProfile:
    """The profile that ``as_numbers`` came from, but for ``kl_in``."""
    return _known(tuple(integers), tuple(epsilons))


@lru_cache(maxsize=256)
def _known(integers: tuple[int, ...], epsilons: tuple[float, ...]) -> AdvantageProfile:
    *scopes, ddof, raw, renormalize, in_variance = integers
    reward_center, reward_scale, score_center, score_scale = (_SCOPES[scope] for scope in scopes)
    return AdvantageProfile(
        reward_center,
        reward_scale,
        score_center,
        score_scale,
        reward_eps=epsilons[0],
        score_eps=epsilons[1],
        ddof=ddof,
        singleton="raw" if raw else "zero",
        missing="renormalize" if renormalize else "zero",
        score_eps_in="variance" if in_variance else "std",
    )
