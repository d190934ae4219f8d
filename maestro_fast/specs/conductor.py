"""The Conductor's parameters, options and results.

Axis suffixes: B responses, N rows of a batch, K rewards, d hidden size, H units of the hidden layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

WeightMode = Literal["sample", "soft"]
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@dataclass(frozen=True)
class ConductorParams:
    """The parameters of the Conductor's network. All are float32 (float64 in reference computations).

    Attributes:
        mean, rstd: [d], the mean of the contexts and one over their standard deviation, by which contexts are
            standardised. They change only between updates.
        weight, bias: the last layer: [K, d] for a linear network or [K, H] for an MLP, and [K]. Zeros give equal
            weights.
        hidden_weight, hidden_bias: [H, d] and [H], the hidden layer of an MLP; None for a linear network.
    """

    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor
    hidden_weight: Tensor | None = None
    hidden_bias: Tensor | None = None

    @property
    def num_rewards(self) -> int:
        """K."""
        return self.weight.shape[0]

    def logits(self, h: Tensor) -> Tensor:
        """The logits z [B, K] of contexts [B, d]."""
        with torch.autocast(h.device.type, enabled=False):
            return functional.linear(self.features(h), self.weight, self.bias)

    def features(self, h: Tensor) -> Tensor:
        """The inputs of the last layer: standardised contexts [B, d], or the outputs of the hidden layer [B, H]."""
        x = (h.to(self.weight.dtype) - self.mean) * self.rstd
        if self.hidden_weight is None:
            return x
        with torch.autocast(h.device.type, enabled=False):
            return functional.gelu(functional.linear(x, self.hidden_weight, self.hidden_bias))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All parameters in the order of the fields."""
        return self.mean, self.rstd, self.weight, self.bias, self.hidden_weight, self.hidden_bias

    @property
    def contiguous_floats(self) -> ConductorParams:
        """The parameters as contiguous float32, which the kernels read. Without a copy where they are so already."""
        if all(x is None or (x.dtype is torch.float32 and x.is_contiguous()) for x in self.tensors):
            return self
        return ConductorParams(*(None if x is None else x.float().contiguous() for x in self.tensors))  # type: ignore[arg-type]

    @property
    def learned(self) -> dict[str, Tensor]:
        """The parameters that an update changes, by name."""
        found = {name: getattr(self, name) for name in ("weight", "bias", "hidden_weight", "hidden_bias")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class ConductorChoice(NamedTuple):
    """How the Conductor turns logits into weights, and the key of its random draws; see ``ops.conductor_weights``.

    Attributes:
        tau: the temperature of the softmax.
        min_prob: the floor of every probability.
        alpha: how far a drawn action moves the weights from equal to one-hot.
        mode: "sample" draws an action; "soft" takes the probabilities as weights and draws none.
        seed, step, offset: the key of the draws; ``offset`` is the global index of the first response.
    """

    tau: float
    min_prob: float
    alpha: float
    mode: WeightMode = "sample"
    seed: int = 0
    step: int = 0
    offset: int = 0

    @property
    def soft(self) -> bool:
        """Whether the probabilities themselves are the weights."""
        return self.mode == "soft"


class ConductorSample(NamedTuple):
    """What the Conductor chose for each of B responses.

    Attributes:
        weights: [B, K], the weights of the rewards.
        actions: int64 [B], the index of the reward that was drawn, or of the likeliest one in soft mode.
        log_probs: [B], the log-prob of the action.
        entropy: [B], the entropy of the probabilities in nats.
        probs: [B, K], the probabilities that actions were drawn with.
    """

    weights: Tensor
    actions: Tensor
    log_probs: Tensor
    entropy: Tensor
    probs: Tensor

    @staticmethod
    def empty(batch: int, weight: Tensor) -> ConductorSample:
        """Uninitialised float32 results for ``batch`` responses, on the device of the last layer's weight [K, *]."""
        K, device = weight.shape[0], weight.device
        return ConductorSample(
            weights=torch.empty(batch, K, dtype=torch.float32, device=device),
            actions=torch.empty(batch, dtype=torch.int64, device=device),
            log_probs=torch.empty(batch, dtype=torch.float32, device=device),
            entropy=torch.empty(batch, dtype=torch.float32, device=device),
            probs=torch.empty(batch, K, dtype=torch.float32, device=device),
        )


SourceKind = Literal["context", "last", "mean"]


class ContextSource(NamedTuple):
    """Where the contexts of B responses are: in a tensor of their own, or in hidden states that are to be pooled.

    Attributes:
        x: contexts [B, d] with the kind "context", else packed hidden states [T, d]. Columns are contiguous.
        kind: "context" takes x itself, "last" the last hidden state of each response, "mean" the mean of its states.
        bounds: int [B + 1], where each response begins and ends in the hidden states; None for contexts.
        limit_B: int [B], how many hidden states of each response count; None for all.
    """

    x: Tensor
    kind: SourceKind = "context"
    bounds: Tensor | None = None
    limit_B: Tensor | None = None

    @property
    def responses(self) -> int:
        """B."""
        return self.x.shape[0] if self.bounds is None else self.bounds.shape[0] - 1


class ScoreInputs(NamedTuple):
    """The inputs of a score besides rewards and weights; see ``ops.group_advantages``."""

    kl: Tensor | None
    beta: float
    lengths: Tensor | None


@dataclass(frozen=True)
class ConductorState:
    """The Conductor's parameters and AdamW's moments of them.

    Attributes:
        params: contiguous tensors of one dtype, float32 (float64 in reference computations).
        first, second: AdamW's moments by the names of the parameters: "weight", "bias", and of an MLP "hidden_weight"
            and "hidden_bias". They are contiguous, like the parameters.
        step: the number of updates made so far.
    """

    params: ConductorParams
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    step: int = 0

    @staticmethod
    def start(params: ConductorParams) -> ConductorState:
        """The state before the first update: all moments are 0."""
        first, second = ({name: torch.zeros_like(x) for name, x in params.learned.items()} for _ in range(2))
        return ConductorState(params, first, second)


@dataclass(frozen=True)
class ConductorBatch:
    """N responses that an update learns from.

    Attributes:
        h: [N, d] contexts, any floating dtype.
        meta: with ``actions``, [N] meta-rewards of the actions that were drawn (in the paper their advantages; with a
            baseline, those minus it). Without ``actions``, [N, K] meta-rewards of all actions.
        actions: int [N], or None.
        drawn_probs: [N], the probabilities that the actions were drawn with, where other parameters than the present
            ones drew them. The meta-rewards then count p / drawn_probs fold, at most ``max_ratio``.
        live: bool [N], the rows that count; None if all do. The other rows may hold anything, NaN included.
    """

    h: Tensor
    meta: Tensor
    actions: Tensor | None = None
    drawn_probs: Tensor | None = None
    live: Tensor | None = None


@dataclass(frozen=True)
class ConductorUpdateConfig:
    """Options of an update of the Conductor.

    Attributes:
        tau, min_prob: see ``ConductorChoice``.
        entropy_coef: weight of the entropy of p in the objective.
        learning_rate, weight_decay, beta1, beta2, eps: options of AdamW. Biases do not decay.
        max_ratio: the largest importance ratio. Without a bound one old response could rule an update.
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
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{item.name}: got {type(value).__name__} {value!r}, expected a number")
            if value > _LARGEST and not (item.name == "max_ratio" and value == math.inf):
                came = "an integer" if isinstance(value, int) else value
                raise ValueError(f"{item.name}: {came}, expected a number that float32 can hold")
        for name in ("tau", "eps", "max_ratio"):
            if not getattr(self, name) >= _SMALLEST:  # Two of them divide.
                raise ValueError(f"{name}: {getattr(self, name)}, expected a positive number that float32 can hold")
        for name in ("entropy_coef", "learning_rate", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected a number >= 0")
        for name in ("min_prob", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected 0 <= {name} < 1")
