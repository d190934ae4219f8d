"""What kernels and ops share and neither owns: options, parameters and results, each defined once.

Axis suffixes: B responses, N groups, K rewards, d hidden size, H units of a hidden layer, T or C tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn import functional

# --- options as text, for the operators that torch.compile calls ---

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def constant_in_graphs(function: F) -> F:
    """Has ``torch.compile`` call the function while it traces, and keep the result as a constant of the graph.

    ``torch.compiler.assume_constant_result`` does the same, and imports half of torch's compiler with it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def as_text(spec: Any) -> str:
    """A frozen dataclass of options as a registered operator takes it: its fields in JSON, which ``from_text`` reads.

    The fields are numbers, strings or None. They become constants of a compiled graph, so that another value compiles
    another one: what changes from call to call, such as a seed, is better an argument of its own.
    """
    if not torch.compiler.is_compiling():
        return _text_of(spec)
    values = [getattr(spec, name) for name in spec.__dataclass_fields__]
    for i, value in enumerate(values):
        if value is not None and not isinstance(value, str):  # the number may be a symbol of the graph by now
            values[i] = torch.fx.experimental.symbolic_shapes.guard_scalar(value)
    return _json(list(spec.__dataclass_fields__), *values)


def from_text(cls: type[T], text: str) -> T:
    """The options that ``as_text`` made the text from."""
    found: T = _options_of(cls, text)  # type: ignore[arg-type]  # classes are hashable
    return found


@lru_cache(maxsize=256)
def _text_of(spec: Any) -> str:
    return json.dumps(asdict(spec))


@lru_cache(maxsize=256)
def _options_of(cls: Any, text: str) -> Any:
    return cls(**json.loads(text))


@constant_in_graphs
def _json(names: list[str], *values: Any) -> str:
    return json.dumps(dict(zip(names, values, strict=True)))


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


class GroupAdvantages(NamedTuple):
    """Advantages and what they were made of; float32 [B] (float64 for float64 rewards) unless noted.

    Attributes:
        advantages: 0 for degenerate groups (except singletons that the profile leaves raw) and for responses without a
            live reward.
        scores: the weighted sum of the normalised rewards, minus beta * KL where the profile has the KL in the score.
        normalized_rewards: [B, K], 0 where a reward abstained.
        mean: what was subtracted from the score (leave-one-out: the mean of the others).
        std: of the scores over ``score_scale``'s scope, over the group where that is ``none``; 1 for a raw singleton.
        degenerate: bool, True for every response of a group without spread before the KL, or with one live response.
    """

    advantages: Tensor
    scores: Tensor
    normalized_rewards: Tensor
    mean: Tensor
    std: Tensor
    degenerate: Tensor

    @staticmethod
    def empty(rewards: Tensor) -> GroupAdvantages:
        """Room for the float32 results of rewards [B, K] or [B], on their device."""
        batch, K = rewards.shape[0], rewards.shape[1] if rewards.ndim == 2 else 1
        # These calls are the quickest of their kind: sizes as arguments, not as a tuple, and empty_like.
        first = torch.empty(batch, dtype=torch.float32, device=rewards.device)
        normalized = torch.empty(batch, K, dtype=torch.float32, device=rewards.device)
        like = torch.empty_like
        return GroupAdvantages(first, like(first), normalized, like(first), like(first), like(first, dtype=torch.bool))


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
    """What happens to the output of the head's matrix product: scale, soft cap and temperature, see ``ops.head_rows``.

    Attributes:
        ignore_index: the target of rows that are ignored.
        entropy: "none", "value" (without a gradient), or "grad".
    """

    scale: float
    softcap: float | None
    temperature: float
    ignore_index: int
    entropy: EntropyMode


class RowStatistics(NamedTuple):
    """Statistics of C rows of logits, each [C], in the dtype of the logits.

    Attributes:
        logprobs: the log-prob of the target in nats; 0 in ignored rows.
        peaks: max_v y_v, before the temperature.
        totals: sum_v exp((y_v - peak) / T), so that logsumexp(z) = peak / T + log(total). One number for both would be
            rounded to the size of the logits: in float32, with logits near 1e4, every probability would lose 1e-3.
        entropies: in nats; 0 in ignored rows. They have no elements with ``entropy="none"``.
    """

    logprobs: Tensor
    peaks: Tensor
    totals: Tensor
    entropies: Tensor


class TokenLogprobs(NamedTuple):
    """Log-probs [T] and entropies [T] in nats (None with ``entropy="none"``); ignored rows hold 0."""

    logprobs: Tensor
    entropies: Tensor | None


# --- the policy loss ---


class LossInputs(NamedTuple):
    """What a loss is computed from: T completion tokens of B responses, packed. A user's own loss gets this record.

    Attributes:
        logprobs: [T], log-probs of the sampled tokens under the current policy, in nats.
        advantages: [B].
        cu_seqlens: int [B + 1]; response b has the tokens ``[cu_seqlens[b], cu_seqlens[b + 1])``.
        old_logprobs: [T] of the policy that the ratio refers to; None means the current policy.
        ref_logprobs: [T] of the reference policy.
        sampling_logprobs: [T] of the sampler; NaN where it gave none.
        entropies: [T] of the current policy, in nats.
        token_mask: [T]; a zero leaves a token out.
        normalizer: what the summed loss is divided by, for the whole optimizer step.
        entropy_normalizer: what the summed entropies are divided by.
    """

    logprobs: Tensor
    advantages: Tensor
    cu_seqlens: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    sampling_logprobs: Tensor | None = None
    entropies: Tensor | None = None
    token_mask: Tensor | None = None
    normalizer: float | Tensor | None = None
    entropy_normalizer: float | Tensor | None = None

    @property
    def of_tokens(self) -> dict[str, Tensor | None]:
        """The optional tensors [T], by their names."""
        return {
            "old_logprobs": self.old_logprobs,
            "ref_logprobs": self.ref_logprobs,
            "sampling_logprobs": self.sampling_logprobs,
            "entropies": self.entropies,
            "token_mask": self.token_mask,
        }


# A user's own loss returns the scalar loss, and metrics as scalar tensors by their names.
LossFunction = Callable[[LossInputs], tuple[Tensor, dict[str, Tensor]]]


class PolicyLoss(NamedTuple):
    """The scalar loss, and metrics as scalar tensors by their names. Float32 (float64 for float64 log-probs).

    The metrics of a ``PolicyLossConfig`` are means over the live tokens. ``clip_low`` and ``clip_high`` are the shares
    of tokens that were clipped on either side, ``ratio`` is the mean of rho, ``kl`` the mean of k3 (only with a
    reference), ``sampler_ratio`` the mean of w before it is capped (only with sampling log-probs).
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class LinearPolicyLoss(NamedTuple):
    """``PolicyLoss``, and the log-probs [T] that it was computed from, without a graph.

    Rows that were skipped keep the log-prob given as ``old_logprobs``, or 0.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logprobs: Tensor


LOSS_METRICS = ("clip_low", "clip_high", "ratio", "kl", "sampler_ratio")


class LossWithGradients(NamedTuple):
    """A loss whose gradients were computed with it, float32.

    Attributes:
        loss: a scalar.
        metrics: [8], of which the first are ``LOSS_METRICS`` in their order.
        gradients: [1 or 2, T], of the log-probs and, with an entropy bonus, of the entropies.
    """

    loss: Tensor
    metrics: Tensor
    gradients: Tensor


Normalization = Literal["grpo", "bnpo", "dapo", "dr_grpo"]
Objective = Literal["clip", "cispo"]
Ratio = Literal["token", "sequence"]
SamplerCorrection = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

# Losses of TRL 1.16 that these options do not cover, and why. They are refused by name, not approximated.
_REFUSED = {
    "luspo": "it weights a sequence by its length, which no normalization here does",
    "sapo": "its soft gate replaces the clip",
    "vespo": "its gamma weights replace the clip",
}


@dataclass(frozen=True)
class PolicyLossConfig:
    """Options of ``policy_loss``.

    Attributes:
        normalization: how the losses of tokens are averaged, see ``ops.policy_loss``.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        kl_coef: coefficient of the k3 term; 0 needs no reference.
        max_completion_length: in tokens, the constant that ``dr_grpo`` divides by.
        objective: "clip", or "cispo", which treats the capped ratio as a constant, so that no token loses its gradient.
        ratio: "token", or "sequence", the geometric mean over the response's tokens (GSPO).
        clip_max: upper bound of the ratio itself. With "clip" it bounds the loss of tokens with negative advantage
            (two-sided clipping, TRL's ``delta``); "cispo" needs it (TRL's ``epsilon_high``).
        sampler_correction: multiplies the policy term by pi_old / pi_sampler of a token or of a whole response, which
            is capped ("truncate") or becomes zero past the cap ("mask").
        sampler_cap: that cap.
        entropy_coef: coefficient of the mean entropy of the tokens, which the loss rewards.
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


class TokenLosses(NamedTuple):
    """[T] each: the loss of a token before its weight, and bool, whether it was clipped on either side."""

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def _clip(ratio: Tensor, logprobs: Tensor, advantages: Tensor, config: PolicyLossConfig) -> TokenLosses:
    capped = ratio if config.clip_max is None else ratio.clamp(max=config.clip_max)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    low = (ratio < 1 - config.clip_low) & (advantages < 0)
    high = (ratio > 1 + config.clip_high) & (advantages > 0)
    return TokenLosses(-torch.minimum(capped * advantages, clipped * advantages), low, high)


def _cispo(ratio: Tensor, logprobs: Tensor, advantages: Tensor, config: PolicyLossConfig) -> TokenLosses:
    assert config.clip_max is not None
    capped = ratio.clamp(max=config.clip_max).detach()
    high = (ratio > config.clip_max) & (advantages > 0)
    return TokenLosses(-capped * advantages * logprobs, torch.zeros_like(high), high)


# The formula of each ``Objective``, for ratios, log-probs and advantages [T]. The kernel's are in ``_objective`` of
# kernels/policy_loss.py.
OBJECTIVES = {"clip": _clip, "cispo": _cispo}
