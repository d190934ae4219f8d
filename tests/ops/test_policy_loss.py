"""The policy loss against TRL's ``_compute_loss`` and a float64 loop, and what batches, masks and clips must mean."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import PolicyLoss, PolicyLossConfig, policy_loss
from maestro_fast.specs import Normalization
from tests.ops.helpers import assert_as_accurate, assert_same_compiled, assert_same_fake
from tests.ops.trl_oracle import trl_policy_loss

NORMALIZATIONS = get_args(Normalization)
LENGTHS = [4, 1, 7, 3, 7, 2]
LONGEST = 9  # max_completion_length
B, T = len(LENGTHS), sum(LENGTHS)


def config(normalization: Any, **options: Any) -> PolicyLossConfig:
    return PolicyLossConfig(normalization, max_completion_length=LONGEST, **options)


@dataclass
class Batch:
    """A packed batch in float64: T tokens of B responses."""

    logprobs: Tensor
    old: Tensor
    ref: Tensor
    mask: Tensor
    advantages: Tensor
    lengths: list[int]

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0)

    def pad(self, packed: Tensor) -> Tensor:
        """[T] -> [B, longest], 0 in the padding."""
        return torch.nn.utils.rnn.pad_sequence(list(packed.split(self.lengths)), batch_first=True)

    def part(self, first: int, last: int) -> Batch:
        """Responses ``first`` to ``last``."""
        tokens = slice(*self.cu_seqlens[[first, last]].tolist())
        of_tokens = (x[tokens] for x in (self.logprobs, self.old, self.ref, self.mask))
        return Batch(*of_tokens, self.advantages[first:last], self.lengths[first:last])

    def loss(self, config: PolicyLossConfig, *, dtype: torch.dtype = torch.float64, **options: Any) -> PolicyLoss:
        """The op on this batch, off-policy and masked unless ``options`` says otherwise."""
        given = {"old_logprobs": self.old, "ref_logprobs": self.ref, "token_mask": self.mask, **options}
        given = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in given.items()}
        if config.normalization == "dapo" and "normalizer" not in given:
            given["normalizer"] = given["token_mask"].sum() if given["token_mask"] is not None else T
        return policy_loss(self.logprobs.to(dtype), self.advantages.to(dtype), self.cu_seqlens, config=config, **given)


def random_batch(lengths: list[int] = LENGTHS, *, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    logprobs = -torch.rand(tokens, dtype=torch.float64, generator=generator) * 4
    noise = torch.randn(2, tokens, dtype=torch.float64, generator=generator) * 0.4
    mask = (torch.rand(tokens, generator=generator) < 0.8).double()
    advantages = torch.randn(len(lengths), dtype=torch.float64, generator=generator)
    return Batch(
        logprobs.requires_grad_(), logprobs.detach() + noise[0], logprobs.detach() + noise[1], mask, advantages, lengths
    )


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


# --- TRL's own code ---


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.15])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.45)])
def test_equals_trl(normalization: Any, on_policy: bool, beta: float, masked: bool, low: float, high: float) -> None:
    batch = random_batch()
    mask = batch.mask if masked else torch.ones(T, dtype=torch.float64)
    theirs, metrics = trl_policy_loss(
        batch.pad(batch.logprobs),
        batch.pad(mask),
        batch.advantages,
        loss_type=normalization,
        epsilon_low=low,
        epsilon_high=high,
        beta=beta,
        old_logprobs_BT=None if on_policy else batch.pad(batch.old),
        ref_logprobs_BT=batch.pad(batch.ref),
        max_completion_length=LONGEST,
    )
    ours = batch.loss(
        config(normalization, clip_low=low, clip_high=high, kl_coef=beta),
        token_mask=mask if masked else None,
        old_logprobs=None if on_policy else batch.old,
        ref_logprobs=batch.ref if beta else None,
    )
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-11, atol=1e-13)
    expected = gradient(theirs, batch.logprobs)
    torch.testing.assert_close(gradient(ours.loss, batch.logprobs), expected, rtol=1e-11, atol=1e-13)
    assert expected.abs().max() > 1e-3
    assert ours.metrics["clip_low"].item() == pytest.approx(metrics["clip_ratio/low_mean"])
    assert ours.metrics["clip_high"].item() == pytest.approx(metrics["clip_ratio/high_mean"])
    assert on_policy or (ours.metrics["clip_low"] > 0 and ours.metrics["clip_high"] > 0)
    assert not beta or ours.metrics["kl"].item() == pytest.approx(metrics["kl"])


@pytest.mark.parametrize("normalization", ["grpo", "dr_grpo", "dapo"])
def test_equals_trl_with_gradient_accumulation(normalization: Any) -> None:
    """TRL divides by its accumulation steps where we divide by the responses or tokens of the whole step."""
    batch, cuts = random_batch(), [0, 2, 4, 6]
    tokens = int(batch.mask.sum())
    theirs = torch.stack(
        [
            trl_policy_loss(
                part.pad(part.logprobs),
                part.pad(part.mask),
                part.advantages,
                loss_type=normalization,
                old_logprobs_BT=part.pad(part.old),
                max_completion_length=LONGEST,
                num_items=tokens,
                accumulation_steps=3,
            )[0]
            for part in (batch.part(*cut) for cut in pairwise(cuts))
        ]
    ).sum()
    ours = batch.loss(config(normalization), normalizer=tokens if normalization == "dapo" else B)
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradient(ours.loss, batch.logprobs), gradient(theirs, batch.logprobs))


# --- the formula a second time: one token after another ---


def direct(
    batch: Batch, c: PolicyLossConfig, normalizer: float | None, *, on_policy: bool
) -> tuple[float, list[float]]:
    """Loss and its gradient, in Python floats."""
    live = batch.mask.tolist()
    spans = list(pairwise(batch.cu_seqlens.tolist()))
    if normalizer is None:
        normalizer = len(spans) if c.normalization in ("grpo", "dr_grpo") else sum(live)
    if c.normalization == "dr_grpo":
        normalizer *= c.max_completion_length
    loss, slopes = 0.0, [0.0] * len(live)
    for (start, stop), advantage in zip(spans, batch.advantages.tolist(), strict=True):
        divisor = normalizer * (sum(live[start:stop]) if c.normalization == "grpo" else 1)
        for t in range(start, stop):
            if not live[t]:
                continue
            logp, ref = batch.logprobs[t].item(), batch.ref[t].item()
            ratio = 1.0 if on_policy else math.exp(logp - batch.old[t].item())
            clipped = min(max(ratio, 1 - c.clip_low), 1 + c.clip_high)
            active = ratio * advantage <= clipped * advantage
            slope = -ratio * advantage if active else 0.0
            k3 = math.exp(ref - logp) - (ref - logp) - 1
            loss += (-min(ratio * advantage, clipped * advantage) + c.kl_coef * k3) / divisor
            slopes[t] = (slope + c.kl_coef * (1 - math.exp(ref - logp))) / divisor
    return loss, slopes


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("normalizer", [None, 17.5])
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_formula(normalization: Any, normalizer: Any, on_policy: bool, dtype: torch.dtype) -> None:
    batch = random_batch(seed=3)
    for name in ("logprobs", "old", "ref", "advantages"):  # float64 values that float32 holds
        setattr(batch, name, getattr(batch, name).detach().float().double())
    batch.logprobs.requires_grad_()
    c = config(normalization, clip_low=0.15, clip_high=0.3, kl_coef=0.1)
    options = {"old_logprobs": None} if on_policy else {}
    if normalizer is not None or normalization == "dapo":
        options["normalizer"] = normalizer = normalizer or float(batch.mask.sum())
    ours = batch.loss(c, dtype=dtype, **options)
    assert ours.loss.dtype == dtype and ours.loss.shape == ()
    loss, slopes = direct(batch, c, normalizer, on_policy=on_policy)
    epsilon = 1e-12 if dtype == torch.float64 else 2e-6
    assert ours.loss.item() == pytest.approx(loss, rel=epsilon, abs=epsilon)
    expected = torch.tensor(slopes, dtype=torch.float64)
    assert_as_accurate(gradient(ours.loss, batch.logprobs), expected, expected, epsilon=epsilon)


def test_by_hand() -> None:
    """Two responses of 1 and 3 tokens, ratios 2, 1/2, 1 and 2, clip 0.25 and 0.5."""
    logprobs = torch.tensor([2.0, 0.5, 1.0, 2.0], dtype=torch.float64).log().requires_grad_()
    advantages, cu_seqlens = torch.tensor([1.0, -3.0], dtype=torch.float64), torch.tensor([0, 1, 4])
    token_losses = [-1.5, 0.75 * 3, 3.0, 2.0 * 3]
    slopes = [0.0, 0.0, 3.0, 2.0 * 3]
    for normalization, weights in {
        "grpo": [1 / 2, 1 / 6, 1 / 6, 1 / 6],
        "bnpo": [1 / 4] * 4,
        "dapo": [1 / 10] * 4,
        "dr_grpo": [1 / 18] * 4,
    }.items():
        result = policy_loss(
            logprobs,
            advantages,
            cu_seqlens,
            old_logprobs=torch.zeros(4, dtype=torch.float64),
            normalizer=10 if normalization == "dapo" else None,
            config=config(normalization, clip_low=0.25, clip_high=0.5),
        )
        assert result.loss.item() == pytest.approx(sum(x * w for x, w in zip(token_losses, weights, strict=True)))
        expected = [x * w for x, w in zip(slopes, weights, strict=True)]
        assert gradient(result.loss, logprobs).tolist() == pytest.approx(expected)
        assert {name: value.item() for name, value in result.metrics.items()} == {
            "clip_low": 0.25,
            "clip_high": 0.25,
            "ratio": pytest.approx(5.5 / 4),
        }


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradcheck(normalization: Any) -> None:
    batch = random_batch()
    c = config(normalization, kl_coef=0.2)

    def function(logprobs: Tensor) -> Tensor:
        return replace(batch, logprobs=logprobs).loss(c).loss

    assert torch.autograd.gradcheck(function, (batch.logprobs,))


# --- batches, masks, ratios ---


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("cuts", [[0, 3, 6], [0, 1, 1, 5, 6]])
def test_micro_batches_sum_to_the_whole(normalization: Any, cuts: list[int]) -> None:
    batch, c = random_batch(), config(normalization, kl_coef=0.1)
    normalizer = B if normalization in ("grpo", "dr_grpo") else float(batch.mask.sum())
    whole = batch.loss(c, normalizer=normalizer).loss
    parts = [batch.part(*cut).loss(c, normalizer=normalizer).loss for cut in pairwise(cuts)]
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-12, atol=1e-14)
    summed = gradient(torch.stack(parts).sum(), batch.logprobs)
    torch.testing.assert_close(summed, gradient(whole, batch.logprobs), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_default_normalizer_is_that_of_the_batch(normalization: Any) -> None:
    batch, c = random_batch(), config(normalization)
    normalizer = B if normalization in ("grpo", "dr_grpo") else batch.mask.sum()
    if normalization == "dapo":
        with pytest.raises(ValueError, match="normalizer: missing"):
            policy_loss(batch.logprobs, batch.advantages, batch.cu_seqlens, config=c)
    else:
        assert torch.equal(batch.loss(c).loss, batch.loss(c, normalizer=normalizer).loss)
    as_tensor = batch.loss(c, normalizer=torch.tensor(float(normalizer)))
    assert torch.equal(as_tensor.loss, batch.loss(c, normalizer=float(normalizer)).loss)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_an_empty_response_counts_as_a_response_and_nowhere_else(normalization: Any) -> None:
    batch, c = random_batch(), config(normalization, kl_coef=0.1)
    with_empty = replace(
        batch, lengths=[0, *LENGTHS, 0], advantages=torch.nn.functional.pad(batch.advantages, (1, 1), value=9.0)
    )
    factor = B / (B + 2) if normalization in ("grpo", "dr_grpo") else 1.0
    ours, expected = with_empty.loss(c), batch.loss(c)
    torch.testing.assert_close(ours.loss, expected.loss * factor)
    torch.testing.assert_close(gradient(ours.loss, batch.logprobs), gradient(expected.loss, batch.logprobs) * factor)
    assert all(torch.equal(ours.metrics[name], expected.metrics[name]) for name in expected.metrics)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("lengths", [[], [0, 0], [3, 2]])
def test_no_live_token_gives_zero(normalization: Any, lengths: list[int]) -> None:
    batch = random_batch(lengths)
    result = batch.loss(config(normalization, kl_coef=0.1), token_mask=torch.zeros(sum(lengths)), normalizer=5)
    assert result.loss == 0 and (gradient(result.loss, batch.logprobs) == 0).all()
    assert all(value == 0 for value in result.metrics.values())


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("on_policy", [False, True])
def test_masked_tokens_may_hold_anything(normalization: Any, on_policy: bool) -> None:
    batch, c = random_batch(), config(normalization, kl_coef=0.1)
    batch.mask[5:12] = 0.0  # a whole response: its advantage may be anything too
    dirty = replace(batch, advantages=batch.advantages.clone())
    dirty.advantages[2] = float("nan")
    for name, junk in {"logprobs": -math.inf, "old": math.nan, "ref": math.inf}.items():
        setattr(dirty, name, torch.where(batch.mask == 0, junk, getattr(batch, name).detach()))
    dirty.logprobs.requires_grad_()
    options = {"old_logprobs": None} if on_policy else {}
    ours, expected = dirty.loss(c, **options), batch.loss(c, **options)
    assert torch.equal(ours.loss, expected.loss)
    assert torch.equal(gradient(ours.loss, dirty.logprobs), gradient(expected.loss, batch.logprobs))
    assert all(torch.equal(ours.metrics[name], expected.metrics[name]) for name in expected.metrics)
    assert (gradient(ours.loss, dirty.logprobs)[batch.mask == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_on_policy_the_ratio_is_exactly_one(dtype: torch.dtype) -> None:
    batch = random_batch()
    for old in (None, batch.logprobs.detach()):
        result = batch.loss(config("bnpo", clip_low=0.0, clip_high=0.0), dtype=dtype, old_logprobs=old)
        assert result.metrics["ratio"] == 1 and result.metrics["clip_low"] == 0 and result.metrics["clip_high"] == 0
    assert (gradient(result.loss, batch.logprobs) != 0).sum() == batch.mask.sum()


def test_masks_of_any_dtype_agree() -> None:
    batch, c = random_batch(), config("grpo")
    results = [
        policy_loss(batch.logprobs, batch.advantages, batch.cu_seqlens.to(ids), token_mask=mask, config=c).loss
        for mask in (batch.mask.bool(), batch.mask.long(), batch.mask.float(), batch.mask * 3)
        for ids in (torch.int32, torch.int64)
    ]
    assert all(torch.equal(x, results[0]) for x in results)


def test_bfloat16_log_probs_are_computed_in_float32() -> None:
    batch = random_batch()
    half = [x.detach().bfloat16() for x in (batch.logprobs, batch.old, batch.ref)]
    leaf = half[0].requires_grad_()
    c = config("grpo", kl_coef=0.1)
    advantages = batch.advantages.float()
    ours = policy_loss(leaf, advantages, batch.cu_seqlens, old_logprobs=half[1], ref_logprobs=half[2], config=c)
    full = [x.detach().float() for x in half]
    expected = policy_loss(full[0], advantages, batch.cu_seqlens, old_logprobs=full[1], ref_logprobs=full[2], config=c)
    assert ours.loss.dtype == torch.float32 and torch.equal(ours.loss, expected.loss)
    assert all(value.dtype == torch.float32 for value in ours.metrics.values())
    assert gradient(ours.loss, leaf).dtype == torch.bfloat16


def test_a_reference_without_coefficient_only_feeds_the_metric() -> None:
    batch, c = random_batch(), config("bnpo")
    far = torch.full((T,), 800.0, dtype=torch.float64)  # its k3 overflows
    ours, expected = batch.loss(c, ref_logprobs=far), batch.loss(c, ref_logprobs=None)
    assert torch.equal(ours.loss, expected.loss)
    assert torch.equal(gradient(ours.loss, batch.logprobs), gradient(expected.loss, batch.logprobs))
    assert ours.metrics["kl"] == math.inf and "kl" not in expected.metrics


def test_k3_of_nearly_equal_policies_keeps_its_digits() -> None:
    logprobs = torch.full((4,), -1.5)
    gap = torch.tensor([1e-3, 3e-4, -1e-3, -2e-4])
    ref = logprobs + gap
    gap = (ref - logprobs).double()  # what float32 made of it
    result = policy_loss(logprobs, torch.zeros(2), torch.tensor([0, 2, 4]), ref_logprobs=ref, config=config("grpo"))
    expected = (torch.expm1(gap) - gap).mean().item()
    assert result.metrics["kl"].item() == pytest.approx(expected, rel=1e-3)


# --- graphs, errors ---


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_compiles_to_one_graph_and_runs_on_fake_tensors(normalization: Any) -> None:
    batch = random_batch()

    def op(logprobs: Tensor, old: Tensor, ref: Tensor, mask: Tensor, advantages: Tensor, bounds: Tensor) -> PolicyLoss:
        return policy_loss(
            logprobs,
            advantages,
            bounds,
            old_logprobs=old,
            ref_logprobs=ref,
            token_mask=mask,
            normalizer=30.0,
            config=config(normalization, kl_coef=0.1),
        )

    args = (batch.logprobs, batch.old, batch.ref, batch.mask, batch.advantages, batch.cu_seqlens)
    assert_same_fake(op, *(x.detach() for x in args))
    if normalization in ("grpo", "dapo"):
        assert_same_compiled(op, *args)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logprobs": torch.ones(5, 1)}, ValueError, "logprobs: torch.float32"),
        ({"logprobs": torch.ones(5, dtype=torch.int64)}, ValueError, "logprobs: torch.int64"),
        ({"advantages": torch.ones(3)}, ValueError, r"advantages, cu_seqlens: shapes \(3,\) and \(3,\)"),
        ({"advantages": torch.ones(2, dtype=torch.int64)}, TypeError, "advantages: dtype torch.int64"),
        ({"advantages": torch.ones(2, device="meta")}, ValueError, "advantages: on meta, expected cpu"),
        ({"cu_seqlens": torch.tensor([0.0, 2.0, 5.0])}, TypeError, "cu_seqlens: dtype torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, ValueError, "cu_seqlens: from 0 to 4, expected"),
        ({"cu_seqlens": torch.tensor([1, 2, 5])}, ValueError, "cu_seqlens: from 1 to 5, expected"),
        ({"cu_seqlens": torch.tensor([0, 6, 5])}, ValueError, "cu_seqlens: from 0 to 5, expected non-decreasing"),
        ({"cu_seqlens": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "cu_seqlens: on meta"),
        ({"old_logprobs": torch.ones(4)}, ValueError, r"old_logprobs: shape \(4,\), expected \(5,\)"),
        ({"old_logprobs": torch.ones(5, dtype=torch.int64)}, TypeError, "old_logprobs: dtype torch.int64"),
        ({"ref_logprobs": torch.ones(5, 1)}, ValueError, "ref_logprobs: shape"),
        ({"token_mask": torch.ones(2)}, ValueError, "token_mask: shape"),
        ({"config": config("bnpo", kl_coef=0.1)}, ValueError, "ref_logprobs: missing"),
        ({"config": config("dapo")}, ValueError, "normalizer: missing"),
        (
            {"cu_seqlens": torch.tensor([0, 3, 1, 5]).to(torch.uint8), "advantages": torch.ones(3)},
            TypeError,
            "torch.uint8",
        ),
        ({"normalizer": 0}, ValueError, r"^normalizer: 0, expected a finite number > 0"),
        ({"normalizer": -5.0}, ValueError, "^normalizer: -5.0, expected a finite number > 0"),
        ({"normalizer": torch.tensor(0.0)}, ValueError, "^normalizer: 0.0, expected a finite number > 0"),
        (
            {"normalizer": torch.ones(5)},
            ValueError,
            r"^normalizer: torch.float32 \(5,\), expected a number or a real scalar",
        ),
        ({"normalizer": True}, TypeError, "^normalizer: got bool True, expected a number"),
        ({"normalizer": "3"}, TypeError, "^normalizer: got str '3', expected a number"),
        ({"entropy_normalizer": math.inf}, ValueError, "^entropy_normalizer: inf, expected a finite number > 0"),
        ({"entropy_normalizer": torch.tensor(math.nan)}, ValueError, "^entropy_normalizer: nan, expected"),
        ({"entropy_normalizer": torch.tensor(2j)}, ValueError, "^entropy_normalizer: torch.complex64"),
        ({"backend": "triton"}, ValueError, "backend: 'triton'"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "logprobs": torch.ones(5),
        "advantages": torch.ones(2),
        "cu_seqlens": torch.tensor([0, 2, 5]),
        "config": config("bnpo"),
        **changes,
    }
    with pytest.raises(error, match=message):
        policy_loss(**arguments)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("normalization", "luspo"),
        ("clip_low", -0.1),
        ("clip_low", 1.1),
        ("clip_high", -0.1),
        ("clip_high", math.nan),
        ("kl_coef", -1.0),
        ("kl_coef", math.inf),
        ("kl_coef", True),
        ("entropy_coef", math.inf),
        ("entropy_coef", "0.1"),
        ("clip_low", None),
        ("clip_max", "none"),
        ("sampler_cap", None),
        ("max_completion_length", 1.5),
        ("max_completion_length", True),
        ("max_completion_length", 0),
    ],
)
def test_a_wrong_option_is_named(field: str, value: Any) -> None:
    number = isinstance(value, float | int) and not isinstance(value, bool)
    named = number or field in ("normalization", "max_completion_length")
    with pytest.raises(ValueError if named else TypeError, match=f"^{field}: "):
        PolicyLossConfig(**{field: value})


def test_dr_grpo_needs_its_constant() -> None:
    for value in (None, 0, -3):
        with pytest.raises(ValueError, match=r"^max_completion_length: "):
            PolicyLossConfig("dr_grpo", max_completion_length=value)
