"""Loss, gradients and metrics of the kernel against the reference and its autograd, in float64."""

from __future__ import annotations

import sys
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from maestro_fast.kernels import policy_loss as kernel
from maestro_fast.ops import LossInputs, PolicyLossConfig
from maestro_fast.ops.policy_loss import policy_gradient, policy_loss
from maestro_fast.ops.policy_loss import policy_loss as reference
from maestro_fast.specs import LOSS_METRICS, LossWithGradients, Objective
from tests.kernels.helpers import DEVICE, DTYPES, INTERPRETED, RUNS, assert_close, counted_launches, runs
from tests.ops.helpers import outputs_and_gradients
from tests.ops.overflow import (
    IMPOSSIBLE,
    check_impossible,
    check_impossible_in_a_response,
    check_nan_is_seen,
    check_overflow,
)
from tests.ops.overflow import VARIANTS as AWKWARD_VARIANTS

EPSILON = 1e-6
LENGTHS = [13, 1, 40, 0, 7]
TOKENS = sum(LENGTHS)
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0)
BOUNDS = CU_SEQLENS.to(DEVICE)
MODES = ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_TOKENS", 16)


def tensors(tokens: int = TOKENS, batch: int = len(LENGTHS)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens)

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    logprobs = -torch.rand(tokens, generator=generator) * 3
    old = logprobs + 0.3 * normal(tokens)
    mask = torch.rand(tokens, generator=generator) < 0.75
    return {
        "logprobs": logprobs,
        "advantages": normal(batch),
        "old_logprobs": old,
        "ref_logprobs": logprobs + 0.3 * normal(tokens),
        "sampling_logprobs": old + 0.2 * normal(tokens),
        "entropies": torch.rand(tokens, generator=generator) * 2,
        "token_mask": mask,
    }


def named_metrics(out: LossWithGradients) -> dict[str, Tensor]:
    return dict(zip(LOSS_METRICS, out.metrics, strict=False))


def compare(config: PolicyLossConfig, given: dict[str, Any], cu_seqlens: Tensor = CU_SEQLENS) -> LossWithGradients:
    def expected(dtype: torch.dtype) -> dict[str, Tensor]:
        wide = {
            name: x.detach().to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in given.items()
        }
        leaves = [wide[name].requires_grad_() for name in ("logprobs", "entropies") if name in wide]
        loss, metrics = reference(cu_seqlens=cu_seqlens, config=config, **wide)
        zero = sum(leaf.sum() * 0 for leaf in leaves)
        grads = torch.autograd.grad(loss + zero, leaves)
        out = {"loss": loss.detach(), **metrics, "d_logprobs": grads[0]}
        return out | ({"d_entropies": grads[1]} if config.entropy_coef > 0 else {})

    there = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in given.items()}

    def ours() -> tuple[LossWithGradients, dict[str, Tensor]]:
        out = kernel.policy_loss(LossInputs(cu_seqlens=cu_seqlens.to(DEVICE), **there), config)
        needs = {"kl": "ref_logprobs", "sampler_ratio": "sampling_logprobs"}
        metrics = {name: x for name, x in named_metrics(out).items() if name not in needs or needs[name] in given}
        named = {"loss": out.loss, **metrics, **dict(zip(("d_logprobs", "d_entropies"), out.gradients, strict=False))}
        return out, named

    (out, mine), *others = runs(ours, *(x for x in there.values() if isinstance(x, Tensor)))
    truth, plain = expected(torch.float64), expected(torch.float32)
    assert mine.keys() == truth.keys()
    for name in truth:
        assert_close(mine[name], truth[name], plain[name], epsilon=EPSILON, what=name)
        assert all(torch.equal(mine[name], again[name]) for _, again in others), f"{name} differs between two runs"
    return out


def make(normalization: str, **options: Any) -> PolicyLossConfig:
    return PolicyLossConfig(normalization, max_completion_length=50, **options)  # type: ignore[arg-type]


def chosen(*names: str) -> dict[str, Any]:
    return {name: x for name, x in tensors().items() if name in ("logprobs", "advantages", *names)}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalizer", [None, 137.0, torch.tensor(137)], ids=["default", "number", "tensor"])
@pytest.mark.parametrize("normalization", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_normalizations(normalization: str, normalizer: Any, masked: bool) -> None:
    if normalization == "dapo" and normalizer is None:
        return  # the op asks for it
    given = chosen("old_logprobs", "token_mask" if masked else "")
    compare(make(normalization, clip_high=0.28), given | {"normalizer": normalizer})


@pytest.mark.parametrize(
    ("ratio", "objective", "mode"), list(product(["token", "sequence"], get_args(Objective), MODES))
)
def test_ratios_objectives_and_sampler_corrections(ratio: str, objective: str, mode: str) -> None:
    narrow = 0.05 if ratio == "sequence" else 0.2  # the ratios of whole responses lie closer to 1
    bounds = {"clip_low": narrow, "clip_high": narrow, "clip_max": 0.9 if objective == "cispo" else 1 + 1.5 * narrow}
    config = make("grpo", ratio=ratio, objective=objective, **bounds, sampler_correction=mode, sampler_cap=1.2)
    given = chosen("old_logprobs", "sampling_logprobs", "token_mask")
    given["sampling_logprobs"][::5] = float("nan")
    compare(config, given)


@pytest.mark.parametrize("clip_max", [None, 1.1, 4.0])
@pytest.mark.parametrize("given_old", [False, True])
def test_two_sided_clip_and_on_policy(clip_max: float | None, given_old: bool) -> None:
    given = chosen("old_logprobs") if given_old else chosen()
    compare(make("bnpo", clip_max=clip_max), given)
    compare(make("bnpo", clip_max=clip_max, ratio="sequence"), given)


@pytest.mark.parametrize("coefficient", [0.0, 0.04])
def test_kl(coefficient: float) -> None:
    compare(make("grpo", kl_coef=coefficient), chosen("old_logprobs", "ref_logprobs", "token_mask"))


def test_a_small_kl_does_not_cancel() -> None:
    """k3 of 1e-4 is 5e-9, of which exp(x) - 1 - x in float32 has no digit."""
    given = chosen("ref_logprobs")
    given["logprobs"] = torch.full((TOKENS,), -0.5)
    given["ref_logprobs"] = given["logprobs"] + 2.0**-13
    out = compare(make("grpo", kl_coef=0.04), given)
    expected = torch.tensor(2.0**-13, dtype=torch.float64)
    torch.testing.assert_close(
        named_metrics(out)["kl"].cpu().double(), torch.expm1(expected) - expected, rtol=1e-5, atol=0.0
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalizer", [None, 99.0, torch.tensor(99.0)], ids=["default", "number", "tensor"])
def test_entropy_bonus(normalizer: Any, masked: bool) -> None:
    given = chosen("old_logprobs", "entropies", "token_mask" if masked else "")
    compare(make("bnpo", entropy_coef=0.01), given | {"entropy_normalizer": normalizer})


def test_all_masked_and_what_masked_tokens_hold() -> None:
    given = chosen("old_logprobs", "ref_logprobs", "sampling_logprobs", "token_mask")
    for name in ("logprobs", "old_logprobs", "ref_logprobs", "sampling_logprobs"):
        given[name][~given["token_mask"]] = float("inf")
    config = make("bnpo", kl_coef=0.1, sampler_correction="token_truncate")
    out = compare(config, given)
    assert (out.gradients[0].cpu()[~given["token_mask"]] == 0).all()
    compare(config, given | {"token_mask": torch.zeros(TOKENS)})


@pytest.mark.parametrize("lengths", [[1], [3, 7], [0, 0], []], ids=str)
def test_few_tokens(lengths: list[int]) -> None:
    made = tensors(sum(lengths), len(lengths))
    given = {name: made[name] for name in ("logprobs", "advantages", "old_logprobs")}
    compare(make("grpo"), given, torch.tensor([0, *lengths]).cumsum(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: torch.dtype) -> None:
    given = chosen("old_logprobs", "ref_logprobs")
    given = {name: x.to(dtype) if name != "advantages" else x for name, x in given.items()}
    compare(make("grpo", kl_coef=0.04), given, CU_SEQLENS.int())


@pytest.mark.parametrize("masked", [False, True])
def test_two_launches(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = counted_launches(monkeypatch)
    compare(make("bnpo"), chosen("old_logprobs", "token_mask" if masked else ""))
    assert launches == ["_sequences", "_reduce"] * RUNS


@pytest.mark.parametrize("divisor", [97.0, torch.tensor(97)], ids=["number", "tensor"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
@pytest.mark.parametrize("given_old", [False, True])
def test_the_gradient_alone(given_old: bool, entropy_coef: float, divisor: Any) -> None:
    """``policy_gradient`` by Triton, as the loss from hidden states asks for it, and by PyTorch in float64."""
    config = make("grpo", kl_coef=0.04, entropy_coef=entropy_coef, sampler_correction="token_truncate", sampler_cap=1.2)
    given = tensors() if given_old else {**tensors(), "old_logprobs": None}
    logprobs, advantages = given.pop("logprobs"), given.pop("advantages")

    def moved(to: Any) -> LossInputs:
        tokenwise = {name: None if x is None else x if x.dtype is torch.bool else x.to(to) for name, x in given.items()}
        divisors = {"normalizer": divisor, "entropy_normalizer": 3 * divisor}
        return LossInputs(logprobs.to(to), advantages.to(to), CU_SEQLENS, **tokenwise, **divisors)

    exact = policy_gradient(moved(torch.float64), config)
    plain = policy_gradient(moved(torch.float32), config)
    there = {name: x.to(DEVICE) for name, x in moved(DEVICE)._asdict().items() if isinstance(x, Tensor)}
    ours = policy_gradient(moved(DEVICE)._replace(**there), config, "triton")

    assert exact[0].dtype is torch.float64 and (exact[1] is None) is (ours[1] is None) is (entropy_coef == 0)
    for name, mine, truth, float32 in zip(("log-probs", "entropies"), ours, exact, plain, strict=True):
        if truth is not None:
            assert mine is not None
            assert_close(mine, truth, float32, epsilon=EPSILON, what=name)


# --- what autograd and torch.compile make of it ---

VIEWS = {"select", "slice", "view", "detach", "alias", "unbind", "_unsafe_view"}  # they cost no launch, no memory


class Operations(TorchDispatchMode):
    """The operations that run under it, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls += [] if name in VIEWS else [name]
        return func(*args, **(kwargs or {}))


def leaves(dtype: torch.dtype = torch.float32, *, entropy: bool) -> tuple[PolicyLossConfig, dict[str, Any]]:
    """A configuration, and the arguments of the op, of which log-probs and entropies want a gradient."""
    given = {name: x.to(DEVICE) for name, x in chosen("old_logprobs", "entropies" if entropy else "").items()}
    for name in ("logprobs", "entropies") if entropy else ("logprobs",):
        given[name] = given[name].to(dtype).requires_grad_()
    return make("dapo", entropy_coef=0.1 if entropy else 0.0), {**given, "normalizer": 37.0}


def by_triton(config: PolicyLossConfig, given: dict[str, Any]) -> Any:
    return policy_loss(cu_seqlens=BOUNDS, **given, config=config, backend="triton")


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_two_launches_and_one_for_the_gradient(
    dtype: torch.dtype, entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And three allocations: what backward needs, the metrics, the loss."""
    launches = counted_launches(monkeypatch, start=False)
    monkeypatch.setattr(sys.modules[policy_loss.__module__], "readable", lambda x: False)  # as on a device
    config, given = leaves(dtype, entropy=entropy)
    with Operations() as forward:
        loss, _ = by_triton(config, given)
    assert launches == ["_sequences", "_reduce"] and forward.calls == ["empty"] * 3
    wanted = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
    with Operations() as backward:
        torch.autograd.grad(loss, wanted)
    products = 1 if dtype is torch.float32 else len(wanted)
    assert sorted(x for x in backward.calls if not x.startswith("empty")) == ["mul"] * products + ["ones_like"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
def test_backward_scales_the_gradient_of_the_forward(entropy: bool, dtype: torch.dtype) -> None:
    config, given = leaves(dtype, entropy=entropy)
    with torch.no_grad():
        expected = policy_gradient(LossInputs(cu_seqlens=BOUNDS, **given), config, "triton")
    (by_triton(config, given).loss * 3.0).backward()
    for name, gradient in zip(("logprobs", "entropies"), expected, strict=True):
        if gradient is not None:
            assert torch.equal(given[name].grad, (3.0 * gradient).to(dtype))


def test_a_gradient_of_the_entropies_alone_or_of_the_log_probs_alone() -> None:
    for wanted, other in (("entropies", "logprobs"), ("logprobs", "entropies")):
        config, given = leaves(entropy=True)
        both = torch.autograd.grad(by_triton(config, given).loss, [given[wanted], given[other]])
        alone = by_triton(config, {**given, other: given[other].detach()}).loss
        assert torch.equal(torch.autograd.grad(alone, given[wanted])[0], both[0])


def test_metrics_may_be_kept_and_written_to() -> None:
    """They hold neither the gradients' memory nor the loss."""
    config, given = leaves(entropy=False)
    loss, metrics = by_triton(config, given)
    expected = torch.autograd.grad(loss, given["logprobs"], retain_graph=True)[0]
    value = loss.item()
    for x in metrics.values():
        assert not x.requires_grad and x.untyped_storage().nbytes() <= 32
        x.zero_()
    assert loss.item() == value and loss.untyped_storage().nbytes() == 4
    assert torch.equal(torch.autograd.grad(loss, given["logprobs"])[0], expected)


def test_a_second_derivative_is_refused() -> None:
    config, given = leaves(entropy=False)
    squared = by_triton(config, given).loss.square()
    (slope,) = torch.autograd.grad(squared, given["logprobs"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()


@pytest.mark.parametrize("entropy", [False, True])
def test_compiled_it_is_the_same(entropy: bool) -> None:
    config, given = leaves(entropy=entropy)
    names = [name for name, x in given.items() if isinstance(x, Tensor)]

    def op(*tensors: Tensor) -> Any:
        return by_triton(config, {**given, **dict(zip(names, tensors, strict=True))})

    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    tensors = [given[name] for name in names]
    eager = outputs_and_gradients(op, *tensors)
    for one, other in zip(outputs_and_gradients(compiled, *tensors), eager, strict=True):
        assert torch.equal(one, other)


def test_a_divisor_on_another_device_is_read_where_that_stalls_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 0-dim tensor goes to the kernel as it is, whatever its dtype: a cast would be a launch."""
    seen: list[Any] = []
    monkeypatch.setattr(kernel, "policy_loss", lambda inputs, _: seen.append(inputs.normalizer) or OUTPUT)
    config, given = leaves(entropy=False)
    divisor = torch.tensor(37, device=DEVICE)
    by_triton(config, {**given, "normalizer": divisor})
    assert seen[0].data_ptr() == divisor.data_ptr() and seen[0].dtype is torch.int64
    if not INTERPRETED:
        by_triton(config, {**given, "normalizer": torch.tensor(37)})
        assert seen[1] == 37.0 and isinstance(seen[1], float)


OUTPUT = LossWithGradients(torch.zeros(()), torch.zeros(8), torch.zeros(1, TOKENS))


@pytest.mark.parametrize("name", ["advantages", "old_logprobs"])
def test_a_gradient_that_triton_lacks_is_refused(name: str) -> None:
    config, given = leaves(entropy=False)
    given[name] = given[name].requires_grad_()
    with pytest.raises(ValueError, match=f"'triton' cannot serve policy_loss here: {name} wants a gradient"):
        by_triton(config, given)
    with torch.no_grad():
        assert by_triton(config, given).loss.isfinite()


@pytest.mark.skipif(INTERPRETED, reason="NumPy warns of the division")
def test_a_divisor_of_zero_is_no_divisor_of_one() -> None:
    config, given = leaves(entropy=True)
    by_zero = {**given, "entropy_normalizer": 0.0}
    ours = by_triton(config, by_zero).loss
    expected = policy_loss(cu_seqlens=BOUNDS, **by_zero, config=config, backend="torch").loss
    assert torch.equal(ours.isinf(), expected.isinf()) and ours.isinf()


# --- where a ratio, a weight or k3 leaves the range of float32 ---


def by_the_kernel(inputs: LossInputs, config: PolicyLossConfig) -> tuple[Tensor, Tensor]:
    out = kernel.policy_loss(inputs._replace(logprobs=inputs.logprobs.detach()), config)
    return out.loss, out.gradients[0]


# NumPy warns of overflows and of inf - inf, also in the lanes of a ``where`` that are not taken.
ignore_numpy = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
REACHING_EVERY_BRANCH = [
    "cispo with a high cap",
    "sequence_mask",
    "gspo, token_truncate without a cap",
    "k3",
    "k3 times gspo's ratio",
    "k3 times ratio, two-sided, token_mask",
]


@ignore_numpy
@pytest.mark.parametrize("variant", REACHING_EVERY_BRANCH if INTERPRETED else AWKWARD_VARIANTS)
def test_right_wherever_it_fits(variant: str) -> None:
    check_overflow(by_the_kernel, variant, count=16 if INTERPRETED else 400, device=DEVICE)


@ignore_numpy
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_token_of_probability_zero(name: str) -> None:
    check_impossible(by_the_kernel, name, DEVICE)


@ignore_numpy
def test_a_token_of_probability_zero_in_a_response() -> None:
    check_impossible_in_a_response(by_the_kernel, DEVICE)


@ignore_numpy
def test_what_is_not_a_number_is_seen() -> None:
    check_nan_is_seen(by_the_kernel, DEVICE)
