"""The Conductor's forward: reward weights per response from its context vector.

    z = head((h - mean) * rstd)      q = softmax(z / tau)      p = (1 - K m) q + m,   m = min_prob
    sample: a ~ p, w = (1 - alpha) / K + alpha onehot(a)         soft: w = p, a = argmax p

The head is linear, d -> K, or d -> H -> GELU (erf) -> K. Log-probs and entropy are of p, not of q.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from maestro_fast.ops import cpp_conductor
from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.conductor_state import check_params
from maestro_fast.ops.gpu import operator
from maestro_fast.ops.philox import check_key, uniform
from maestro_fast.specs import ConductorParams

WeightMode = Literal["sample", "soft"]


class ConductorSample(NamedTuple):
    """What the Conductor chose: weights [B, K], actions int64 [B], log_probs [B], entropy [B] in nats, probs [B, K]."""

    weights: Tensor
    actions: Tensor
    log_probs: Tensor
    entropy: Tensor
    probs: Tensor


class Choice(NamedTuple):
    """How probabilities become weights, and the key of the draws: see ``conductor_weights``."""

    tau: float
    min_prob: float
    alpha: float
    soft: bool
    seed: int
    step: int
    offset: int

    def plain(self) -> tuple[float | int | bool, ...]:
        """As a registered operator takes it, whose integers are signed: the seed goes in two halves."""
        numbers = float(self.tau), float(self.min_prob), float(self.alpha)
        return (*numbers, self.soft, self.seed & 0xFFFFFFFF, self.seed >> 32, self.step, self.offset)

    @staticmethod
    def of_plain(given: tuple[Any, ...]) -> Choice:
        tau, min_prob, alpha, soft, low, high, step, offset = given
        return Choice(tau, min_prob, alpha, soft, low | high << 32, step, offset)


def conductor_weights(
    h: Tensor,
    params: ConductorParams,
    *,
    tau: float = 1.0,
    min_prob: float = 0.05,
    alpha: float = 0.3,
    mode: WeightMode = "sample",
    seed: int = 0,
    step: int = 0,
    offset: int = 0,
    backend: Backend | None = None,
) -> ConductorSample:
    """Weights of K rewards for each of B responses.

    Args:
        h: [B, d] contexts, any floating dtype.
        params: the head.
        tau: temperature of the softmax.
        min_prob: floor m of every action's probability, 0 <= m < 1 / K.
        alpha: how far a sampled action moves the weights from equal to one-hot, in (0, 1].
        mode: "sample" draws an action per response; "soft" takes the probabilities as weights.
        seed, step, offset: key of the draws; ``offset`` is the global index of the first response, so that a batch
            that is split over processes draws what it would have drawn whole.
        backend: "cpp", "triton", "torch", or None: C++ on the CPU and Triton on a CUDA device, unless there is float64
            or a gradient to compute. C++ does the whole of a linear head, and the last layer of an MLP, whose first
            is PyTorch's.

    Returns:
        ``ConductorSample``; log_probs, entropy and probs are differentiable in ``params``, in soft mode weights too.

    Raises:
        ValueError: shapes, devices, or a number out of its range.
        TypeError: dtypes.
    """
    check_choice(h, params, tau, min_prob, alpha, mode)
    chosen = resolve("conductor_weights", backend, h, *params.tensors)
    if chosen != "torch":
        if mode == "sample":
            check_key(seed, step, offset)
        key = (seed, step, offset) if mode == "sample" else (0, 0, 0)
        choice = Choice(tau, min_prob, alpha, mode == "soft", *key)
        if chosen == "triton":
            return ConductorSample(*_by_triton(h, params, choice))
        return _by_cpp(h, params, choice)
    probs = action_probs(params.logits(h), tau, min_prob)
    if mode == "soft":
        actions = probs.detach().argmax(-1)
        weights = probs
    else:
        u = uniform(seed, step, offset, h.shape[0], h.device)
        actions = _inverse_cdf(probs.detach(), u)
        equal = (1.0 - alpha) / params.num_rewards
        weights = equal + alpha * functional.one_hot(actions, params.num_rewards).to(probs.dtype)
    possible = probs > 0  # without a floor a probability may be 0, where log has no finite derivative
    log = torch.where(possible, torch.where(possible, probs, 1.0).log(), float("-inf"))
    entropy = -torch.where(possible, probs * torch.where(possible, log, 0.0), 0.0).sum(-1)
    return ConductorSample(weights, actions, log.gather(1, actions[:, None])[:, 0], entropy, probs)


def _by_cpp(h: Tensor, params: ConductorParams, choice: Choice) -> ConductorSample:
    mean, rstd = (params.mean, params.rstd) if params.hidden_weight is None else (None, None)
    x = h if params.hidden_weight is None else params.features(h)
    return ConductorSample(*cpp_conductor.conductor_weights(x, mean, rstd, params.weight, params.bias, choice))


def action_probs(logits: Tensor, tau: float, min_prob: float) -> Tensor:
    """p = (1 - K m) softmax(z / tau) + m over the last axis."""
    return (1.0 - logits.shape[-1] * min_prob) * (logits / tau).softmax(-1) + min_prob


def _inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """The first action whose cumulative probability exceeds u; sequential sum, as every backend does it."""
    total = torch.zeros_like(probs[:, 0])
    actions = torch.zeros_like(probs[:, 0], dtype=torch.int64)
    for k in range(probs.shape[1] - 1):
        total = total + probs[:, k]
        actions = actions + (u >= total)
    return actions


def check_choice(h: Tensor, params: ConductorParams, tau: float, min_prob: float, alpha: float, mode: str) -> None:
    if not h.is_floating_point():
        raise TypeError(f"h: dtype {h.dtype}, expected a floating dtype")
    check_params(h, params)
    if not tau > 0:
        raise ValueError(f"tau: {tau}, expected a positive number")
    if not 0 <= min_prob < 1 / params.num_rewards:
        raise ValueError(f"min_prob: {min_prob}, expected 0 <= min_prob < 1 / K = {1 / params.num_rewards:.4g}")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha: {alpha}, expected 0 < alpha <= 1")
    if mode not in ("sample", "soft"):
        raise ValueError(f"mode: {mode!r}, expected 'sample' or 'soft'")


# --- Triton ---

PARAMS = "Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor? hidden_weight, Tensor? hidden_bias"
CHOICE = "float tau, float min_prob, float alpha, bool soft, int seed_low, int seed_high, int step, int offset"


def sample_shapes(batch: int, weight: Tensor) -> tuple[Tensor, ...]:
    """Empty outputs of the operators that give the fields of ``ConductorSample``."""

    def floating(*shape: int) -> Tensor:
        return weight.new_empty(shape, dtype=torch.float32)

    K, actions = weight.shape[0], weight.new_empty(batch, dtype=torch.int64)
    return floating(batch, K), actions, floating(batch), floating(batch), floating(batch, K)


def kernel_rows(x: Tensor) -> Tensor:
    """Columns contiguous, as the kernels read rows."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def kernel_draw(rewards: int, choice: Choice) -> Any:
    from maestro_fast.kernels.conductor_weights import Draw

    tau, min_prob, alpha, _, seed, step, offset = choice
    return Draw.of(rewards, tau=tau, min_prob=min_prob, alpha=alpha, seed=seed, step=step, offset=offset)


@operator(
    f"triton_conductor_weights(Tensor h, {PARAMS}, {CHOICE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda h, *rest: sample_shapes(h.shape[0], rest[2]),
    flat=lambda h, params, choice: (h, *params.tensors, *choice.plain()),
    whole=lambda h, *rest: (h, ConductorParams(*rest[:6]), Choice.of_plain(rest[6:])),
)
def _by_triton(h: Tensor, params: ConductorParams, choice: Choice) -> tuple[Tensor, ...]:
    from maestro_fast.kernels import conductor_weights as kernel

    draw = kernel_draw(params.num_rewards, choice)
    return kernel.conductor_weights(kernel_rows(h), params.contiguous_floats, draw, soft=choice.soft)
