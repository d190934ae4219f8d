"""GSPO, CISPO, two-sided clipping, sampler correction and the entropy bonus against TRL's own code."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import PolicyLossConfig, policy_loss
from maestro_fast.specs import OBJECTIVES, Objective, as_text, from_text
from tests.ops.helpers import assert_same_compiled
from tests.ops.trl_oracle import trl_policy_loss, trl_sampler_ratio

LENGTHS = [4, 1, 7, 3, 5, 2]
TOKENS, LONGEST = sum(LENGTHS), max(LENGTHS)
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0)
NORMALIZATIONS = ["grpo", "bnpo", "dapo", "dr_grpo"]
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LOGPROBS = -draw(TOKENS, seed=0).abs() - 0.1
OLD = LOGPROBS + 0.5 * draw(TOKENS, seed=1)
SAMPLING = OLD + 0.5 * draw(TOKENS, seed=2)
ENTROPIES = draw(TOKENS, seed=3).abs()
ADVANTAGES = draw(len(LENGTHS), seed=4)
MASK = (torch.arange(TOKENS) % 4 != 2).double()


def pad(x_T: Tensor) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(x_T.split(LENGTHS)), batch_first=True)


def compare(config: PolicyLossConfig, given: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Value and gradients, of log-probs and of entropies, against TRL's."""
    logprobs, entropies = LOGPROBS.clone().requires_grad_(), ENTROPIES.clone().requires_grad_()
    if "entropies" in given:
        given = {**given, "entropies": entropies}
        theirs = {**theirs, "entropies_BT": pad(entropies)}
    normalizer = MASK.sum() if config.normalization == "dapo" else None
    ours = policy_loss(
        logprobs,
        ADVANTAGES,
        CU_SEQLENS,
        token_mask=MASK,
        normalizer=normalizer,
        config=config,
        **{"old_logprobs": OLD, **given},
    )
    theirs = {"old_logprobs_BT": pad(OLD), **theirs}
    expected, metrics = trl_policy_loss(pad(logprobs), pad(MASK), ADVANTAGES, max_completion_length=LONGEST, **theirs)

    torch.testing.assert_close(ours.loss, expected, rtol=1e-11, atol=1e-13)
    leaves = [logprobs, entropies] if "entropies" in given else [logprobs]
    for mine, other in zip(torch.autograd.grad(ours.loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-13)
        assert other.abs().max() > 1e-4
    for name, value in (("clip_low", "clip_ratio/low_mean"), ("clip_high", "clip_ratio/high_mean"), ("kl", "kl")):
        if value in metrics:
            assert ours.metrics[name].item() == pytest.approx(metrics[value])


def make(normalization: str, **options: Any) -> PolicyLossConfig:
    return PolicyLossConfig(normalization, max_completion_length=LONGEST, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("delta", [None, 1.3])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ratio_level_and_two_sided_clip_equal_trl(normalization: str, level: Any, delta: float | None) -> None:
    compare(
        make(normalization, ratio=level, clip_max=delta, clip_high=0.28),
        {},
        {"loss_type": normalization, "level": level, "delta": delta, "epsilon_high": 0.28},
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("cap", [1.2, 5.0])
def test_cispo_equals_trl(level: Any, cap: float) -> None:
    compare(
        make("dapo", objective="cispo", ratio=level, clip_max=cap),
        {},
        {"loss_type": "cispo", "level": level, "epsilon_high": cap},
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalization", ["grpo", "dapo"])
@pytest.mark.parametrize("cap", [1.1, 3.0])
def test_sampler_correction_equals_trl(mode: Any, normalization: str, cap: float) -> None:
    sampling = SAMPLING.clone()
    sampling[[1, 9]] = float("nan")  # no log-prob came back: the ratio of that token is 1
    ratio = trl_sampler_ratio(pad(OLD), pad(sampling), pad(MASK), mode, cap)
    assert (ratio == 0).any() or not mode.endswith("mask") or cap > 2

    compare(
        make(normalization, sampler_correction=mode, sampler_cap=cap),
        {"sampling_logprobs": sampling},
        {"loss_type": normalization, "importance_sampling_ratio": ratio},
    )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_entropy_bonus_equals_trl(normalization: str) -> None:
    compare(
        make(normalization, entropy_coef=0.07),
        {"entropies": ENTROPIES},
        {"loss_type": normalization, "entropy_coef": 0.07},
    )


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", [*NORMALIZATIONS, "cispo"])
def test_bias_correction_of_the_kl_equals_trl(loss_type: str, level: Any, on_policy: bool) -> None:
    """The ratio is that before any clip, and its gradient counts, on-policy too. The metric is multiplied as well."""
    cispo = loss_type == "cispo"
    reference = LOGPROBS + 0.7 * draw(TOKENS, seed=5)
    config = make(
        "dapo" if cispo else loss_type,
        objective="cispo" if cispo else "clip",
        ratio=level,
        clip_max=1.3,  # TRL's delta: it would cap the ratio of the KL, if that were the capped one
        kl_coef=0.3,
        kl_bias_correction=True,
    )
    theirs = {"loss_type": loss_type, "level": level, "beta": 0.3, "bias_correction_kl": True}
    compare(
        config,
        {"ref_logprobs": reference, "old_logprobs": None if on_policy else OLD},
        {
            **theirs,
            "ref_logprobs_BT": pad(reference),
            "old_logprobs_BT": None if on_policy else pad(OLD),
            **({"epsilon_high": 1.3} if cispo else {"delta": 1.3}),
        },
    )


def test_sampling_log_probs_without_a_correction_feed_the_metric_alone() -> None:
    plain = policy_loss(LOGPROBS, ADVANTAGES, CU_SEQLENS, config=make("grpo"))
    with_metric = policy_loss(LOGPROBS, ADVANTAGES, CU_SEQLENS, sampling_logprobs=SAMPLING, config=make("grpo"))

    assert torch.equal(plain.loss, with_metric.loss)
    assert with_metric.metrics["sampler_ratio"].item() == pytest.approx((LOGPROBS - SAMPLING).exp().mean().item())


def test_masked_tokens_of_every_input_may_hold_anything() -> None:
    dead = MASK == 0
    config = make("grpo", ratio="sequence", sampler_correction="sequence_truncate", entropy_coef=0.1, kl_coef=0.1)
    results = []
    for filler in (0.0, float("inf"), float("nan")):
        inputs = [torch.where(dead, filler, x) for x in (LOGPROBS, OLD, OLD + 0.1, SAMPLING, ENTROPIES)]
        logprobs = inputs[0].requires_grad_()
        out = policy_loss(
            logprobs,
            ADVANTAGES,
            CU_SEQLENS,
            old_logprobs=inputs[1],
            ref_logprobs=inputs[2],
            sampling_logprobs=inputs[3],
            entropies=inputs[4],
            token_mask=MASK,
            config=config,
        )
        results.append((out.loss.detach(), torch.autograd.grad(out.loss, logprobs)[0]))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("options", [{"ratio": "sequence"}, {"objective": "cispo", "clip_max": 2.0}])
def test_variants_compile_to_one_graph(options: dict[str, Any]) -> None:
    def run(logprobs: Tensor, old: Tensor, sampling: Tensor) -> Tensor:
        config = make("grpo", sampler_correction="sequence_mask", **options)
        return policy_loss(
            logprobs, ADVANTAGES, CU_SEQLENS, old_logprobs=old, sampling_logprobs=sampling, config=config
        ).loss

    arguments = (LOGPROBS.clone().requires_grad_(), OLD, SAMPLING)
    assert_same_compiled(run, *arguments)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"normalization": "sapo"}, r"normalization: 'sapo' \(its soft gate replaces the clip\), expected one of"),
        ({"normalization": "luspo"}, r"normalization: 'luspo' \(it weights a sequence by its length"),
        ({"normalization": "vespo"}, r"normalization: 'vespo' \(its gamma weights replace the clip\)"),
        ({"objective": "ppo"}, "objective: 'ppo', expected one of"),
        ({"ratio": "word"}, "ratio: 'word', expected one of"),
        ({"objective": "cispo"}, "clip_max: missing, expected the cap of the ratio with objective='cispo'"),
        ({"clip_max": 0.5}, "clip_max: 0.5, expected clip_max >= 1 or None with objective='clip'"),
        ({"objective": "cispo", "clip_max": 0.0}, "clip_max: 0.0, expected clip_max > 0 with objective='cispo'"),
        ({"sampler_correction": "both"}, "sampler_correction: 'both', expected one of"),
        ({"sampler_cap": 0.1}, "sampler_cap: 0.1, expected sampler_cap >= 1"),
        ({"entropy_coef": -1.0}, "entropy_coef: -1.0, expected a finite number >= 0"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PolicyLossConfig(**{"normalization": "grpo", **options})


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"sampler_correction": "token_mask"}, r"sampling_logprobs: missing, expected \[T\] with token_mask"),
        ({"entropy_coef": 0.1}, r"entropies: missing, expected \[T\] with entropy_coef=0\.1"),
    ],
)
def test_a_missing_input_is_named(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        policy_loss(LOGPROBS, ADVANTAGES, CU_SEQLENS, config=make("grpo", **options))


def test_every_objective_has_a_formula() -> None:
    assert set(OBJECTIVES) == set(get_args(Objective))


def test_options_without_a_cap_pass_through_text() -> None:
    """TRL without a cap has an infinite one."""
    config = PolicyLossConfig("dapo", sampler_cap=math.inf)
    assert from_text(PolicyLossConfig, as_text(config)) == config
