"""Options of the policy loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

Normalization = Literal["grpo", "bnpo", "dapo", "dr_grpo"]
Objective = Literal["clip", "cispo"]
Ratio = Literal["token", "sequence"]
SamplerCorrection = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

# Losses of TRL 1.16 that stand outside this family, and why; they are refused by name rather than approximated.
_REFUSED = {
    "luspo": "it weights a sequence by its length, which no normalization here does",
    "sapo": "its soft gate replaces the clip",
    "vespo": "its gamma weights replace the clip",
}


@dataclass(frozen=True)
class PolicyLossConfig:
    """Options of ``policy_loss``.

    Attributes:
        normalization: how token losses are averaged, see ``ops.policy_loss``.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        kl_coef: coefficient of the k3 term; 0 needs no reference.
        max_completion_length: tokens, the constant of ``dr_grpo``.
        objective: "clip", or "cispo", which holds the capped ratio constant and keeps every token's gradient.
        ratio: "token", or "sequence", the geometric mean over the response's tokens (GSPO).
        clip_max: upper bound of the ratio itself. With "clip" it bounds the loss of tokens with negative advantage
            (two-sided clipping, TRL's ``delta``); "cispo" needs it (TRL's ``epsilon_high``).
        sampler_correction: weight of the policy term by pi_old / pi_sampler, over tokens or whole responses, capped
            ("truncate") or zeroed past the cap ("mask").
        sampler_cap: that cap.
        entropy_coef: coefficient of the mean token entropy, which is added to what is maximised.
    """

    normalization: Normalization = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    max_completion_length: int | None = None
    objective: Objective = "clip"
    ratio: Ratio = "token"
    clip_max: float | None = None
    sampler_correction: SamplerCorrection = "none"
    sampler_cap: float = 3.0
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("normalization", get_args(Normalization)),
            ("objective", get_args(Objective)),
            ("ratio", get_args(Ratio)),
            ("sampler_correction", get_args(SamplerCorrection)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                reason = f" ({_REFUSED[value]})" if value in _REFUSED else ""
                raise ValueError(f"{name}: {value!r}{reason}, expected one of {allowed}")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low: {self.clip_low}, expected 0 <= clip_low <= 1")
        for name in ("clip_high", "kl_coef", "entropy_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected {name} >= 0")
        if self.normalization == "dr_grpo" and not (self.max_completion_length or 0) > 0:
            raise ValueError("max_completion_length: missing, expected a positive int with normalization='dr_grpo'")
        if self.objective == "cispo" and self.clip_max is None:
            raise ValueError("clip_max: missing, expected the cap of the ratio with objective='cispo'")
        if self.clip_max is not None and not self.clip_max >= 1:
            raise ValueError(f"clip_max: {self.clip_max}, expected clip_max >= 1 or None")
        if not self.sampler_cap >= 1:
            raise ValueError(f"sampler_cap: {self.sampler_cap}, expected sampler_cap >= 1")


# An operator that torch.compile sees takes strings and numbers, so a configuration goes there as these lists and back.
Fields = tuple[list[str], list[float], float | None, int | None]


def as_fields(config: PolicyLossConfig) -> Fields:
    names = [config.normalization, config.objective, config.ratio, config.sampler_correction]
    numbers = [config.clip_low, config.clip_high, config.kl_coef, config.sampler_cap, config.entropy_coef]
    return [*names], [float(number) for number in numbers], config.clip_max, config.max_completion_length


def from_fields(
    names: list[str], numbers: list[float], clip_max: float | None, longest: int | None
) -> PolicyLossConfig:
    return _from_fields(tuple(names), tuple(numbers), clip_max, longest)


@lru_cache(maxsize=64)
def _from_fields(
    names: tuple[Any, ...], numbers: tuple[float, ...], clip_max: float | None, longest: int | None
) -> PolicyLossConfig:
    normalization, objective, ratio, correction = names
    clip_low, clip_high, kl_coef, sampler_cap, entropy_coef = numbers
    return PolicyLossConfig(
        normalization=normalization,
        clip_low=clip_low,
        clip_high=clip_high,
        kl_coef=kl_coef,
        max_completion_length=longest,
        objective=objective,
        ratio=ratio,
        clip_max=clip_max,
        sampler_correction=correction,
        sampler_cap=sampler_cap,
        entropy_coef=entropy_coef,
    )
