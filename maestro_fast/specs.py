"""What kernels and ops share and neither owns: options, parameters and results, each defined once.

Axis suffixes: B responses, N groups, K rewards, d hidden size, H units of a hidden layer, T or C tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

# --- advantages ---

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


# --- the Conductor ---


@dataclass(frozen=True)
class ConductorParams:
    """Parameters of the head, float32 (float64 for a reference).

    Attributes:
        mean, rstd: [d], standardisation of h, frozen between updates.
        weight, bias: [K, d] or [K, H] and [K], the last layer; zeros mean equal weights.
        hidden_weight, hidden_bias: [H, d] and [H] of an MLP head, or None for a linear one.
    """

    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor
    hidden_weight: Tensor | None = None
    hidden_bias: Tensor | None = None

    @property
    def num_rewards(self) -> int:
        return self.weight.shape[0]

    def logits(self, h: Tensor) -> Tensor:
        """z [B, K] of contexts [B, d]."""
        with torch.autocast(h.device.type, enabled=False):
            return functional.linear(self.features(h), self.weight, self.bias)

    def features(self, h: Tensor) -> Tensor:
        """What the last layer is applied to: standardised contexts [B, d], or the hidden layer's outputs [B, H]."""
        x = (h.to(self.weight.dtype) - self.mean) * self.rstd
        if self.hidden_weight is None:
            return x
        with torch.autocast(h.device.type, enabled=False):
            return functional.gelu(functional.linear(x, self.hidden_weight, self.hidden_bias))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.mean, self.rstd, self.weight, self.bias, self.hidden_weight, self.hidden_bias

    @property
    def contiguous_floats(self) -> ConductorParams:
        """The same in contiguous float32, as the kernels read them; itself where it is so already."""
        if all(x is None or (x.dtype is torch.float32 and x.is_contiguous()) for x in self.tensors):
            return self
        return ConductorParams(*(None if x is None else x.float().contiguous() for x in self.tensors))  # type: ignore[arg-type]

    @property
    def learned(self) -> dict[str, Tensor]:
        """What an update changes, by name."""
        found = {name: getattr(self, name) for name in ("weight", "bias", "hidden_weight", "hidden_bias")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


@dataclass(frozen=True)
class ConductorState:
    """A head and AdamW's moments of it.

    Attributes:
        params: contiguous, of one dtype, float32 (float64 for a reference).
        first, second: moments by the names of the parameters: "weight", "bias", and of an MLP "hidden_weight" and
            "hidden_bias"; like the parameters, contiguous.
        step: updates made so far.
    """

    params: ConductorParams
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    step: int = 0

    @staticmethod
    def start(params: ConductorParams) -> ConductorState:
        """Of a head that has not learnt yet."""
        first, second = ({name: torch.zeros_like(x) for name, x in params.learned.items()} for _ in range(2))
        return ConductorState(params, first, second)


@dataclass(frozen=True)
class ConductorBatch:
    """N responses to learn from.

    Attributes:
        h: [N, d] contexts, any floating dtype.
        meta: [N] meta-rewards of the actions drawn (the paper's: their advantages; or those minus a baseline), or
            without ``actions`` [N, K] of all actions.
        actions: int [N], or None.
        drawn_probs: [N] probabilities that the actions were drawn with, where that was not by these parameters: their
            meta-rewards then count p / drawn_probs fold, at most ``max_ratio``.
        live: bool [N], rows that count; all if None. The others may hold anything, NaN included.
    """

    h: Tensor
    meta: Tensor
    actions: Tensor | None = None
    drawn_probs: Tensor | None = None
    live: Tensor | None = None


@dataclass(frozen=True)
class ConductorUpdateConfig:
    """Options of an update.

    Attributes:
        tau, min_prob: as in ``conductor_weights``.
        entropy_coef: weight of the entropy of p in the objective.
        learning_rate, weight_decay, beta1, beta2, eps: of AdamW. Biases do not decay.
        max_ratio: importance ratios beyond it would let one old response rule an update.
    """

    tau: float = 1.0
    min_prob: float = 0.05
    entropy_coef: float = 0.3
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_ratio: float = 2.0

    def __post_init__(self) -> None:
        for name in ("tau", "eps", "max_ratio"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected a positive number")
        for name in ("entropy_coef", "learning_rate", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected a number >= 0")
        for name in ("min_prob", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected 0 <= {name} < 1")


# --- the head: a row of logits ---

EntropyMode = Literal["none", "value", "grad"]


@dataclass(frozen=True)
class HeadSpec:
    """What is applied to the output of the head's GEMM, see the module; ``ignore_index`` is the target of dead rows."""

    scale: float
    softcap: float | None
    temperature: float
    ignore_index: int
    entropy: EntropyMode


class RowStatistics(NamedTuple):
    """Of C rows, each [C], in the dtype of the logits.

    Attributes:
        logprobs: log-prob of the target in nats; 0 in ignored rows.
        peaks: max_v y_v, before the temperature.
        totals: sum_v exp((y_v - peak) / T). Then logsumexp(z) = peak / T + log(total); in one number it would be
            rounded to the size of the logits, which in float32 costs 1e-3 of every probability where they are near 1e4.
        entropies: in nats; 0 in ignored rows. None with ``entropy="none"``.
    """

    logprobs: Tensor
    peaks: Tensor
    totals: Tensor
    entropies: Tensor | None


# --- the policy loss ---

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


@dataclass(frozen=True)
class FunctionLoss:
    """A loss of the user's own, as a config names it. Once ``function`` is loaded, this is a loss function itself.

    The function takes ``LossInputs`` and returns the scalar loss and a dict of scalar metrics.

    Attributes:
        function: the loss function, in a config as "package.module:name" or "path/to/file.py:name".
        needs_reference: says that the function reads ``ref_logprobs``, so the reference policy is scored for it.
        needs_entropy: says that the function reads ``entropies``, and that their gradient counts.
    """

    function: str | Callable[[Any], Any]
    needs_reference: bool = False
    needs_entropy: bool = False

    def __call__(self, inputs: Any) -> Any:
        if isinstance(self.function, str):
            raise TypeError(f"function: is the name {self.function!r}, expected the function that it stands for")
        return self.function(inputs)

    @property
    def row_wise(self) -> bool:
        """Whether the function is marked to be evaluated chunk by chunk, see ``ops.linear_policy_loss``."""
        return bool(getattr(self.function, "row_wise", False))

    @property
    def entropies(self) -> bool:
        """Whether entropies and their gradient are needed: it says so, or the function is marked so."""
        return self.needs_entropy or bool(getattr(self.function, "entropies", False))


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
