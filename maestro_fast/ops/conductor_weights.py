"""The Conductor's forward: reward weights for each response from its context vector.

    z = network((h - mean) * rstd)      q = softmax(z / tau)      p = (1 - K m) q + m,   m = min_prob
    sample: a ~ p, w = (1 - alpha) / K + alpha onehot(a)         soft: w = p, a = argmax p

The Conductor's network is linear, d -> K, or an MLP, d -> H -> GELU (erf) -> K. Log-probs and entropy are those of p,
not of q.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from maestro_fast.ops import cpp
from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.gpu import operator
from maestro_fast.ops.philox import check_key, uniform
from maestro_fast.ops.tensors import PLAIN, check_number, check_tensors, contiguous_columns, floats
from maestro_fast.specs import ConductorChoice, ConductorParams, ConductorSample, WeightMode

__all__ = ["ConductorSample", "WeightMode", "conductor_weights"]
_NEEDED = 4  # parameters of every network; a linear one has no others
_PARAMETERS = tuple(f"params.{item.name}" for item in fields(ConductorParams))


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
    """Weights of K rewards for each of B responses (MAESTRO, arXiv 2601.07208).

    Args:
        h: [B, d] contexts, any floating dtype.
        params: the Conductor's network.
        tau: the temperature of the softmax.
        min_prob: the floor m of every action's probability, 0 <= m < 1 / K.
        alpha: how far a sampled action moves the weights from equal to one-hot, in (0, 1].
        mode: "sample" draws an action per response; "soft" takes the probabilities as weights.
        seed, step, offset: the key of the draws. ``offset`` is the global index of the first response, so a batch that
            is split over processes draws the same actions as the whole batch.
        backend: "cpp", "triton", "torch", or None. None means C++ on the CPU and Triton on a CUDA device, unless there
            is float64 or a gradient to compute. C++ computes all of a linear network; of an MLP it computes the last
            layer, and PyTorch the first.

    Returns:
        A ``ConductorSample``. Its log_probs, entropy and probs are differentiable in ``params``, and in soft mode its
        weights too.

    Raises:
        ValueError: a shape or device does not fit, or a number is out of its range.
        TypeError: a dtype does not fit.
    """
    choice = checked_choice(h, params, ConductorChoice(tau, min_prob, alpha, mode, seed, step, offset))
    chosen = resolve("conductor_weights", backend, h, *params.tensors)
    if chosen == "triton":
        return _by_triton(h, params, choice)
    if chosen == "cpp":
        if params.hidden_weight is None:
            return _by_cpp(h, params.mean, params.rstd, params.weight, params.bias, choice)
        return _by_cpp(params.features(h), None, None, params.weight, params.bias, choice)
    return _reference(h, params, choice)


def checked_choice(h: Tensor, params: ConductorParams, choice: ConductorChoice) -> ConductorChoice:
    """Checks the arguments of ``conductor_weights``, and returns the choice as every backend takes it.

    With soft weights nothing is drawn, so seed, step and offset become 0.

    Raises:
        ValueError, TypeError: see ``conductor_weights``.
    """
    check_tensors(1, h=h)
    if not h.is_floating_point():
        raise TypeError(f"h: dtype {h.dtype}, expected a floating dtype")
    check_params(h, params)
    tau, min_prob, alpha, mode, seed, step, offset = choice
    check_number("tau", tau, 0.0, above=True)
    check_number("min_prob", min_prob)
    check_number("alpha", alpha)
    if not 0 <= min_prob < 1 / params.num_rewards:
        raise ValueError(f"min_prob: {min_prob}, expected 0 <= min_prob < 1 / K = {1 / params.num_rewards:.4g}")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha: {alpha}, expected 0 < alpha <= 1")
    if mode not in ("sample", "soft"):
        raise ValueError(f"mode: {mode!r}, expected 'sample' or 'soft'")
    if mode == "soft":
        return ConductorChoice(tau, min_prob, alpha, mode)
    check_key(seed, step, offset, h.shape[0])
    return choice


def check_is_params(name: str, params: Any) -> None:
    """Raises an error unless ``params`` is a network of tensors whose number of rewards can be read."""
    if not isinstance(params, ConductorParams):
        raise TypeError(f"{name}: got {type(params).__name__}, expected ConductorParams")
    for i, x in enumerate(params.tensors):  # check_tensors by itself would take six times as long
        wrong = i < _NEEDED if x is None else type(x) not in PLAIN or x.layout is not torch.strided
        if wrong:
            check_tensors(_NEEDED, **dict(zip(_PARAMETERS, params.tensors, strict=True)))
            break
    if params.weight.ndim != 2:
        raise ValueError(f"params.weight: shape {tuple(params.weight.shape)}, expected [K, d] or [K, H]")
    if params.hidden_weight is not None and params.hidden_weight.ndim != 2:
        raise ValueError(f"params.hidden_weight: shape {tuple(params.hidden_weight.shape)}, expected [H, d]")


def check_params(h: Tensor, params: ConductorParams) -> None:
    """Raises a ValueError or TypeError that names the parameter. Every launch waits for this, so it has to be quick."""
    check_is_params("params", params)
    if h.ndim != 2 or h.shape[1:] != params.mean.shape:
        raise ValueError(f"h: shape {tuple(h.shape)}, expected [B, d] with d = {params.mean.numel()}")
    if (params.hidden_weight is None) != (params.hidden_bias is None):
        raise ValueError("params: hidden_weight or hidden_bias alone, expected both or neither")
    size, actions = h.shape[1], params.weight.shape[0]
    inner = size if params.hidden_weight is None else params.hidden_weight.shape[0]
    device, dtype = h.device, params.weight.dtype
    for name, tensor, shape in (
        ("mean", params.mean, (size,)),
        ("rstd", params.rstd, (size,)),
        ("weight", params.weight, (actions, inner)),
        ("bias", params.bias, (actions,)),
        ("hidden_weight", params.hidden_weight, (inner, size)),
        ("hidden_bias", params.hidden_bias, (inner,)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"params.{name}: shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype is not dtype or not dtype.is_floating_point:
            raise TypeError(f"params.{name}: dtype {tensor.dtype}, expected one floating dtype for all")
        if tensor.device != device:
            raise ValueError(f"params.{name}: on {tensor.device}, expected {device} as h")


# --- the reference ---


def _reference(h: Tensor, params: ConductorParams, choice: ConductorChoice) -> ConductorSample:
    probs = action_probs(params.logits(h), choice.tau, choice.min_prob)
    if choice.soft:
        actions = probs.detach().argmax(-1)
        weights = probs
    else:
        u = uniform(choice.seed, choice.step, choice.offset, h.shape[0], h.device)
        actions = _inverse_cdf(probs.detach(), u)
        equal = (1.0 - choice.alpha) / params.num_rewards
        weights = equal + choice.alpha * functional.one_hot(actions, params.num_rewards).to(probs.dtype)
    possible = probs != 0  # without a floor a probability may be 0, where log has no finite derivative
    log = torch.where(possible, torch.where(possible, probs, 1.0).log(), float("-inf"))
    entropy = -torch.where(possible, probs * torch.where(possible, log, 0.0), 0.0).sum(-1)
    return ConductorSample(weights, actions, log.gather(1, actions[:, None])[:, 0], entropy, probs)


def action_probs(logits: Tensor, tau: float, min_prob: float) -> Tensor:
    """p = (1 - K m) softmax(z / tau) + m over the last axis."""
    return (1.0 - logits.shape[-1] * min_prob) * (logits / tau).softmax(-1) + min_prob


def _inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """The first action whose cumulative probability exceeds u. Every backend adds the actions up in their order."""
    total = torch.zeros_like(probs[:, 0])
    actions = torch.zeros_like(probs[:, 0], dtype=torch.int64)
    for k in range(probs.shape[1] - 1):
        total = total + probs[:, k]
        actions = actions + (u >= total)
    return actions


# --- C++ and Triton ---

RESULTS = "Tensor, Tensor, Tensor, Tensor, Tensor"
PARAMS = "Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor? hidden_weight, Tensor? hidden_bias"
# The integers of an operator are signed, so the seed passes as two halves. These numbers are arguments, and not text as
# other options are, because the step changes from call to call.
CHOICE = "float tau, float min_prob, float alpha, bool soft, int seed_low, int seed_high, int step, int offset"


def flat_choice(choice: ConductorChoice) -> tuple[float | int | bool, ...]:
    """The choice as an operator with the arguments ``CHOICE`` takes it."""
    numbers = float(choice.tau), float(choice.min_prob), float(choice.alpha)
    return (*numbers, choice.soft, choice.seed & 0xFFFFFFFF, choice.seed >> 32, choice.step, choice.offset)


def whole_choice(*given: Any) -> ConductorChoice:
    """The opposite of ``flat_choice``."""
    tau, min_prob, alpha, soft, seed_low, seed_high, step, offset = given
    return ConductorChoice(tau, min_prob, alpha, "soft" if soft else "sample", seed_low | seed_high << 32, step, offset)


@cpp.operator(
    f"conductor_weights(Tensor h, Tensor? mean, Tensor? rstd, Tensor weight, Tensor bias, {CHOICE}) -> ({RESULTS})",
    lambda h, mean, rstd, weight, *rest: ConductorSample.empty(h.shape[0], weight),
    flat=lambda h, mean, rstd, weight, bias, choice: (h, mean, rstd, weight, bias, *flat_choice(choice)),
    whole=lambda h, mean, rstd, weight, bias, *choice: (h, mean, rstd, weight, bias, whole_choice(*choice)),
    result=ConductorSample,
)
def _by_cpp(
    h: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: Tensor, bias: Tensor, choice: ConductorChoice
) -> ConductorSample:
    """The weights that a linear layer gives. Without mean and rstd, h is not standardised."""
    h = cpp.floats_or_bfloat16(h)
    mean, rstd = (None if x is None else floats(x) for x in (mean, rstd))
    weight, bias = floats(weight), floats(bias)
    out = ConductorSample.empty(h.shape[0], weight)
    cpp._C.conductor_weights(
        h.data_ptr(),
        h.dtype is torch.bfloat16,
        h.shape[0],
        h.shape[1],
        weight.shape[0],
        cpp.address(mean),
        cpp.address(rstd),
        weight.data_ptr(),
        bias.data_ptr(),
        choice.tau,
        choice.min_prob,
        choice.alpha,
        choice.soft,
        choice.seed,
        choice.step,
        choice.offset,
        out.weights.data_ptr(),
        out.actions.data_ptr(),
        out.log_probs.data_ptr(),
        out.entropy.data_ptr(),
        out.probs.data_ptr(),
        torch.get_num_threads(),
    )
    return out


@operator(
    f"triton_conductor_weights(Tensor h, {PARAMS}, {CHOICE}) -> ({RESULTS})",
    lambda h, mean, rstd, weight, *rest: ConductorSample.empty(h.shape[0], weight),
    flat=lambda h, params, choice: (h, *params.tensors, *flat_choice(choice)),
    whole=lambda h, *rest: (h, ConductorParams(*rest[:6]), whole_choice(*rest[6:])),
    result=ConductorSample,
)
def _by_triton(h: Tensor, params: ConductorParams, choice: ConductorChoice) -> ConductorSample:
    from maestro_fast.kernels import conductor_weights as kernel

    return kernel.conductor_weights(contiguous_columns(h), params.contiguous_floats, choice)
