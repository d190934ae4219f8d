"""Log-probs hundreds of nats apart, and what the policy loss of every variant is of them in exact arithmetic.

A response's terms and their derivatives are written out as in the papers, with numbers that cannot overflow. A backend
has to return them wherever they fit into float32.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from mpmath import exp, mp, mpf
from pytest import approx
from torch import Tensor

from maestro_fast.ops import LossInputs, PolicyLossConfig

LOGPROBS = [0.0, -0.25, -1.0, -2.5, -30.0, -88.5, -101.0, -140.25, -189.5, -700.0]
ADVANTAGES = [0.0, 1.0, -1.0, 0.375, -2.5, 1e-12, -1e-12, -1e-25]
LARGEST = 1e36  # of the numbers that are compared: hundreds of them do not overflow


def make(**options: Any) -> PolicyLossConfig:
    return PolicyLossConfig("dapo", **options)  # each token's loss is divided by the normalizer alone


VARIANTS: dict[str, PolicyLossConfig] = {
    "clip": make(),
    "two-sided clip": make(clip_max=3.0),
    "no clip": make(clip_low=1.0, clip_high=math.inf),
    "gspo": make(ratio="sequence"),
    "cispo": make(objective="cispo", clip_max=5.0),
    "cispo with a high cap": make(objective="cispo", clip_max=1e30, ratio="sequence"),
    "token_truncate": make(sampler_correction="token_truncate"),
    "token_mask": make(sampler_correction="token_mask"),
    "sequence_truncate": make(sampler_correction="sequence_truncate"),
    "sequence_mask": make(sampler_correction="sequence_mask", objective="cispo", clip_max=5.0),
    "gspo, token_truncate without a cap": make(
        ratio="sequence", sampler_correction="token_truncate", sampler_cap=math.inf
    ),
    "k3": make(kl_coef=0.04),
    "k3 times ratio": make(kl_coef=0.04, kl_bias_correction=True),
    "k3 times gspo's ratio": make(kl_coef=0.04, kl_bias_correction=True, ratio="sequence"),
    "k3 times ratio, two-sided, token_mask": make(
        kl_coef=1e-9, kl_bias_correction=True, clip_max=3.0, sampler_correction="token_mask"
    ),
}


class Response(NamedTuple):
    """One response: log-probs of its tokens, and its advantage, all of them numbers that float32 holds."""

    advantage: float
    logprobs: list[float]
    old: list[float]
    ref: list[float]
    sampling: list[float]


class Terms(NamedTuple):
    """The loss of each token and the derivative of their sum by each log-prob, as exact numbers."""

    losses: list[Any]
    slopes: list[Any]

    @property
    def fits(self) -> list[bool]:
        """Whether loss and derivative of each token do, and in a sequence those of all."""
        return [abs(x) < LARGEST and abs(y) < LARGEST for x, y in zip(self.losses, self.slopes, strict=True)]


def responses(count: int, *, seed: int, longest: int = 3) -> list[Response]:
    generator = torch.Generator().manual_seed(seed)

    def draw(values: list[float], number: int) -> list[float]:
        chosen = torch.randint(len(values), (number,), generator=generator)
        return torch.tensor(values)[chosen].tolist()

    found = []
    for _ in range(count):
        n = int(torch.randint(1, longest + 1, (), generator=generator))
        (advantage,) = draw(ADVANTAGES, 1)
        found.append(Response(advantage, *(draw(LOGPROBS, n) for _ in range(3)), draw([*LOGPROBS, math.nan], n)))
    return found


@mp.workdps(340)  # type: ignore[untyped-decorator]  # 1 - exp(700) keeps its 1
def exact(config: PolicyLossConfig, response: Response) -> Terms:
    """The formulas at the top of ``ops.policy_loss``."""
    advantage = mpf(response.advantage)
    logprobs, old, ref = ([mpf(x) for x in values] for values in response[1:4])
    n = len(logprobs)
    log_ratios = [p - q for p, q in zip(logprobs, old, strict=True)]
    if config.ratio == "sequence":
        log_ratios = [sum(log_ratios) / n] * n
    ratios = [exp(x) for x in log_ratios]
    weights = _weights(config, [float(x) for x in old], response.sampling)
    for t, (rho, w) in enumerate(zip(ratios, weights, strict=True)):
        if rho > exp(150) and 0 < abs(advantage * w) < 1e-27:  # No backend holds such a ratio.
            weights[t] = mpf(math.inf)
    largest = mpf(math.inf if config.clip_max is None else config.clip_max)
    losses, slopes = [], []
    for p, rho, w in zip(logprobs, ratios, weights, strict=True):
        capped, clipped = min(rho, largest), min(max(rho, 1 - mpf(config.clip_low)), 1 + mpf(config.clip_high))
        if config.objective == "cispo":
            losses.append(-capped * advantage * p * w if advantage else mpf(0))
            slopes.append(-capped * advantage * w if advantage else mpf(0))
            continue
        one, other = capped * advantage, clipped * advantage
        losses.append(-min(one, other) * w if advantage else mpf(0))
        moves = capped == rho if one <= other else clipped == rho
        weight = sum(weights) / n if config.ratio == "sequence" else w
        slopes.append(-rho * advantage * weight if moves and advantage else mpf(0))
    gaps = [r - p for r, p in zip(ref, logprobs, strict=True)]
    k3 = [exp(gap) - gap - 1 for gap in gaps]
    factors = ratios if config.kl_bias_correction else [mpf(1)] * n
    moved = [rho * k for rho, k in zip(ratios, k3, strict=True)] if config.kl_bias_correction else [mpf(0)] * n
    if config.ratio == "sequence":
        moved = [sum(moved) / n] * n
    for t in range(n):
        losses[t] += config.kl_coef * factors[t] * k3[t]
        slopes[t] += config.kl_coef * (moved[t] + factors[t] * (1 - exp(gaps[t])))
    return Terms(losses, slopes)


def _weights(config: PolicyLossConfig, old: list[float], sampling: list[float]) -> list[Any]:
    """A weight is a number in float32. One that is smaller than all of these is 0, and one that a GPU rounds to 0 while
    a CPU does not, or that is larger than all, is infinite here, so that it is left out."""
    gaps = [mpf(0) if math.isnan(s) else mpf(o) - mpf(s) for o, s in zip(old, sampling, strict=True)]
    mode, cap = config.sampler_correction, mpf(config.sampler_cap)
    if mode == "none":
        return [mpf(1)] * len(gaps)
    if mode.startswith("sequence"):
        gaps = [sum(gaps)] * len(gaps)
    ratios = [exp(gap) for gap in gaps]
    weights = [min(x, cap) if mode.endswith("truncate") else mpf(0) if x > cap else x for x in ratios]
    return [x if x == 0 or 1e-37 < x < 1e38 else mpf(0) if x < 1e-46 else mpf(math.inf) for x in weights]


def packed(chosen: list[Response], device: str = "cpu") -> LossInputs:
    """The responses as the op's inputs, float32. Log-probs are a leaf."""

    def tensor(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device)

    of_tokens = [tensor([x for r in chosen for x in r[i]]) for i in range(1, 5)]
    bounds = torch.tensor([0, *(len(r.logprobs) for r in chosen)], device=device).cumsum(0)
    logprobs, old, ref, sampling = of_tokens
    return LossInputs(
        logprobs.requires_grad_(), tensor([r.advantage for r in chosen]), bounds, old, ref, sampling, normalizer=1.0
    )


def check_overflow(
    loss_and_gradient: Callable[[LossInputs, PolicyLossConfig], tuple[Tensor, Tensor]],
    variant: str,
    *,
    count: int,
    device: str = "cpu",
) -> None:
    """Losses and gradients are the exact ones where these fit into float32. A loss that does not fit is infinite."""
    config, by_sequence = VARIANTS[variant], VARIANTS[variant].ratio == "sequence"
    given = responses(count, seed=len(variant))
    truth = [exact(config, response) for response in given]
    _, gradient = loss_and_gradient(packed(given, device), config)
    compared = 0
    for response, terms, slopes in zip(given, truth, gradient.split([len(r.logprobs) for r in given]), strict=True):
        fits = torch.tensor([all(terms.fits)] * len(terms.fits) if by_sequence else terms.fits)
        wanted = torch.tensor([float(x) for x in terms.slopes], dtype=torch.float64)
        allowed = 5e-4 * wanted.abs() + 1e-30
        if by_sequence:  # The slopes are differences of numbers as large as the losses.
            allowed += 2e-5 * max(abs(float(x)) for x in (*terms.losses, *terms.slopes))
        error = (slopes.cpu().double() - wanted).abs()
        assert ((error <= allowed) | ~fits).all(), (response, slopes, wanted)
        compared += int(fits.sum())
    assert compared > count / 3

    # The loss is one number. So responses are grouped by the size of theirs: a large one would hide the others.
    decades, beyond = defaultdict(list), []
    for i, terms in enumerate(truth):
        if all(terms.fits):
            decades[int(math.log10(max(1e-30, *(abs(float(x)) for x in terms.losses)))) // 6].append(i)
        elif 1e39 < sum(terms.losses) < math.inf:
            beyond.append(i)
    assert len(decades) > 1
    for members in decades.values():
        losses = [float(x) for i in members for x in truth[i].losses]
        loss, _ = loss_and_gradient(packed([given[i] for i in members], device), config)
        allowed = 5e-4 * sum(map(abs, losses)) + 1e-30
        assert abs(loss.item() - math.fsum(losses)) <= allowed, (loss, losses, [given[i] for i in members])
    if beyond:
        loss, _ = loss_and_gradient(packed([given[i] for i in beyond], device), config)
        assert loss.item() == math.inf


class Impossible(NamedTuple):
    """One token to which one of the policies gives the probability 0, and what the loss has to make of it."""

    config: PolicyLossConfig
    advantage: float
    logprob: float
    old: float | None
    other: float  # under the reference, or as the sampler reported it
    loss: float
    slope: float


ZERO = -math.inf
KL = make(kl_coef=0.5, kl_bias_correction=True)
IMPOSSIBLE = {
    "now, clip": Impossible(make(), 1.0, ZERO, -1.0, -1.0, 0.0, 0.0),
    "now, clipped": Impossible(make(), -1.0, ZERO, -1.0, -1.0, 0.8, 0.0),
    "now, cispo": Impossible(make(objective="cispo", clip_max=2.0), -1.0, ZERO, -1.0, -1.0, 0.0, 0.0),
    "on-policy": Impossible(make(), -2.0, ZERO, None, -1.0, 2.0, 0.0),
    "now and then": Impossible(make(), -2.0, ZERO, ZERO, -1.0, 2.0, 0.0),
    "then": Impossible(make(), 1.0, -1.0, ZERO, -1.0, -1.2, 0.0),
    "for the sampler": Impossible(make(sampler_correction="token_truncate"), 1.0, -1.0, -1.0, ZERO, -3.0, -3.0),
    "now and for the reference": Impossible(make(kl_coef=0.5), 0.0, ZERO, -1.0, ZERO, 0.0, 0.0),
    "now, KL times ratio": Impossible(KL, 0.0, ZERO, -1.0, -2.0, 0.5 * math.exp(-1.0), 0.0),
}


def check_impossible(
    loss_and_gradient: Callable[[LossInputs, PolicyLossConfig], tuple[Tensor, Tensor]], name: str, device: str = "cpu"
) -> None:
    config, advantage, logprob, old, other, loss, slope = IMPOSSIBLE[name]
    given = packed([Response(advantage, [logprob], [0.0 if old is None else old], [other], [other])], device)
    if old is None:
        given = given._replace(old_logprobs=None)
    if config.kl_coef == 0:
        given = given._replace(ref_logprobs=None)
    found, gradient = loss_and_gradient(given, config)
    assert found.item() == approx(loss) and gradient.item() == approx(slope)


def check_impossible_in_a_response(
    loss_and_gradient: Callable[[LossInputs, PolicyLossConfig], tuple[Tensor, Tensor]], device: str = "cpu"
) -> None:
    """The mean of a response's k3 moves each of its log-probs through the ratio, but not one that is -inf."""
    ref = [-1.5, -3.0]
    given = packed([Response(0.0, [-1.0, -2.0, ZERO], [0.0] * 3, [*ref, ZERO], [0.0] * 3)], device)
    config = make(kl_coef=0.5, kl_bias_correction=True, ratio="sequence")
    _, gradient = loss_and_gradient(given._replace(old_logprobs=None), config)
    gaps = [ref[0] + 1, ref[1] + 2]
    mean = sum(math.exp(gap) - gap - 1 for gap in gaps) / 3
    assert gradient.tolist() == approx([0.5 * (mean + 1 - math.exp(gap)) for gap in gaps] + [0.0])


def check_nan_is_seen(
    loss_and_gradient: Callable[[LossInputs, PolicyLossConfig], tuple[Tensor, Tensor]], device: str = "cpu"
) -> None:
    """A number that is none makes the loss NaN, although no comparison with a bound tells it."""
    whole = Response(1.0, [-1.0], [-1.25], [-1.0], [-1.0])
    nan = math.nan
    for broken in (whole._replace(logprobs=[nan]), whole._replace(old=[nan]), whole._replace(advantage=nan)):
        for options in ({"clip_max": 3.0}, {"ratio": "sequence"}, {"objective": "cispo", "clip_max": 3.0}):
            assert loss_and_gradient(packed([broken], device), make(**options))[0].isnan(), (broken, options)
