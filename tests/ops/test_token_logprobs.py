"""Token log-probs against a float64 composition that materialises its logits, and what chunking must not change."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from maestro_fast.ops import TokenLogprobs, token_logprobs
from tests.ops.helpers import assert_as_accurate, assert_same_compiled, assert_same_fake, reference_token_logprobs

CPU = torch.device("cpu")
D = 24
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 5.0},
    "everything": {"bias": True, "logit_scale": 1.7, "softcap": 9.0, "temperature": 1.3},
}
# torch warns about its own way of tracing an autograd.Function
IGNORE_TRACING = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


class Inputs(NamedTuple):
    hidden: Tensor
    lm_head: Tensor
    targets: Tensor
    bias: Tensor | None = None

    def to(self, dtype: torch.dtype, *, leaves: bool = False) -> Inputs:
        bias = None if self.bias is None else self.bias.to(dtype).detach().requires_grad_(leaves)
        hidden, head = (x.to(dtype).detach().requires_grad_(leaves) for x in self[:2])
        return Inputs(hidden, head, self.targets, bias)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.lm_head, self.bias) if x is not None]


def random_inputs(
    tokens: int, vocabulary: int, *, bias: bool = False, dtype: torch.dtype = torch.float32, size: int = D
) -> Inputs:
    """Values that ``dtype`` holds, in float64; logits of about +-5."""
    generator = torch.Generator().manual_seed(tokens + vocabulary)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).double()

    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return Inputs(normal(tokens, size), normal(vocabulary, size), targets, normal(vocabulary) if bias else None)


def composed(
    x: Inputs, *, logit_scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0
) -> TokenLogprobs:
    """What anyone would write, in the dtype of the inputs: all logits, then log_softmax."""
    logits = torch.nn.functional.linear(x.hidden, x.lm_head)
    return composed_of_logits(logits, x, logit_scale=logit_scale, softcap=softcap, temperature=temperature)


def composed_of_logits(
    logits: Tensor, x: Inputs, *, logit_scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0
) -> TokenLogprobs:
    """The same from the product of hidden states and head."""
    logits = logits * logit_scale
    if x.bias is not None:
        logits = logits + x.bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits / temperature, -1)
    chosen = logp[torch.arange(len(x.targets)), x.targets.clamp(min=0)]
    live = x.targets != -100
    return TokenLogprobs(chosen.where(live, 0.0), -(logp.exp() * logp).sum(-1).where(live, 0.0))


def ours(x: Inputs, **options: Any) -> TokenLogprobs:
    return token_logprobs(x.hidden, x.lm_head, x.targets, bias=x.bias, **options)


def with_gradients(
    function: Callable[..., TokenLogprobs], x: Inputs, entropy_weight: float, **options: Any
) -> list[Tensor]:
    """Log-probs, entropies, and the gradients of a weighted sum of them."""
    logprobs, entropies = function(x, **options)
    generator = torch.Generator().manual_seed(7)
    a, b = (torch.randn(len(x.targets), dtype=torch.float64, generator=generator) for _ in range(2))
    loss = (logprobs * a.to(logprobs.dtype)).sum()
    if entropy_weight:
        loss = loss + entropy_weight * (entropies * b.to(entropies.dtype)).sum()
    values = [logprobs.detach(), *([] if entropies is None else [entropies.detach()])]
    return values + list(torch.autograd.grad(loss, x.leaves))


@dataclass(frozen=True)
class Tolerance:
    """What an element may be off by beyond the plain op's error, relative to the largest true element.

    The plain op is the composition in float32, for bfloat16 inputs too: in bfloat16 it is off by 3e-2.
    """

    values: float
    gradients: float


# Gradients leave in the dtype of the inputs: 2^-8 is the rounding of bfloat16.
TOLERANCES = {torch.float32: Tolerance(1e-6, 1e-6), torch.bfloat16: Tolerance(1e-6, 2**-8)}


def assert_accurate(x: Inputs, dtype: torch.dtype, entropy: Any = "grad", **options: Any) -> None:
    weight = 0.5 if entropy == "grad" else 0.0
    truth = with_gradients(composed, x.to(torch.float64, leaves=True), weight, **options)
    plain = with_gradients(composed, x.to(torch.float32, leaves=True), weight, **options)
    got = with_gradients(ours, x.to(dtype, leaves=True), weight, entropy=entropy, **options)
    if entropy == "none":
        truth.pop(1), plain.pop(1)
    assert len(got) == len(truth)
    for i, (mine, theirs, wanted) in enumerate(zip(got, plain, truth, strict=True)):
        is_value = i < (1 if entropy == "none" else 2)
        assert mine.dtype == (torch.float32 if is_value else dtype)
        relative = TOLERANCES[dtype].values if is_value else TOLERANCES[dtype].gradients
        largest = wanted.abs().max().item() if wanted.numel() else 0.0
        assert_as_accurate(mine, theirs, wanted, epsilon=relative * max(largest, 1.0))


# --- accuracy ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", ["none", "value", "grad"])
@pytest.mark.parametrize("head", HEADS)
def test_values_and_gradients(head: str, entropy: Any, dtype: torch.dtype) -> None:
    options = dict(HEADS[head])
    x = random_inputs(37, 1003, bias=options.pop("bias", False), dtype=dtype)
    assert_accurate(x, dtype, entropy, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 3, 7])
def test_a_few_tokens_and_none(tokens: int, dtype: torch.dtype) -> None:
    assert_accurate(random_inputs(tokens, 331, bias=True, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [-1, 0, 1, 205])
def test_one_chunk_more_or_less(tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, chunk = 4099, 128
    monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: chunk)
    assert_accurate(random_inputs(chunk + tokens, vocabulary, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vocabulary_of_qwen(dtype: torch.dtype) -> None:
    assert_accurate(random_inputs(3, 151_936, dtype=dtype), dtype)


@pytest.mark.parametrize("offset", [-1e4, -300.0, 300.0, 1e4])
def test_strongly_negative_and_positive_logits(offset: float) -> None:
    """A bias for all tokens alike moves every logit and no probability."""
    x = random_inputs(9, 257)
    x = x._replace(bias=torch.full((257,), offset, dtype=torch.float64))
    assert_accurate(x, torch.float32)


def test_peaked_rows() -> None:
    """Logits hundreds of nats apart, with the peak on the target, off it, and shared."""
    x = random_inputs(6, 131)
    hidden = x.hidden * 60
    logits = hidden @ x.lm_head.T
    targets = logits.argmax(-1)
    targets[::2] = logits.argmin(-1)[::2]
    head = x.lm_head.clone()
    head[5], head[6] = head[4], head[4]
    got = token_logprobs(hidden.float(), head.float(), targets, entropy="value")
    assert got.logprobs.min() < -500 and got.logprobs.max() == 0
    assert_accurate(Inputs(hidden, head, targets), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_of_log_probs_is_that_of_a_float32_gemm(dtype: torch.dtype) -> None:
    x = random_inputs(300, 1999, dtype=dtype)
    truth = composed(x).logprobs
    error = (ours(x.to(dtype)).logprobs - truth).abs()
    assert (error <= 1e-5 * truth.abs().clamp(min=1)).all()
    float32_gemm = (composed(x.to(torch.float32)).logprobs - truth).abs().max()
    assert error.max() <= 2 * float32_gemm + 1e-7


@pytest.mark.parametrize("head", HEADS)
def test_gradcheck(head: str) -> None:
    options = dict(HEADS[head])
    x = random_inputs(5, 11, bias=options.pop("bias", False), size=3).to(torch.float64, leaves=True)
    targets = x.targets.clone()
    targets[2] = -100

    def function(hidden: Tensor, lm_head: Tensor, bias: Tensor | None = None) -> TokenLogprobs:
        return token_logprobs(hidden, lm_head, targets, bias=bias, entropy="grad", **options)

    assert torch.autograd.gradcheck(function, tuple(x.leaves))


def test_the_reference_is_the_composition() -> None:
    options = dict(HEADS["everything"])
    x = random_inputs(8, 50, bias=options.pop("bias"))
    x.targets[3] = -100
    reference = reference_token_logprobs(x.hidden, x.lm_head, x.targets, bias=x.bias, **options)
    for mine, wanted in zip(reference, composed(x, **options), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-13, atol=1e-13)


# --- what an ignored row, a frozen head and a detached entropy mean ---


@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ignored_row_is_zero_and_gets_and_gives_no_gradient(ignore_index: int, dtype: torch.dtype) -> None:
    x = random_inputs(200, 4099, bias=True).to(dtype, leaves=True)
    ignored = torch.zeros(200, dtype=torch.bool)
    ignored[[0, 5, 111, 112, 199]] = True
    targets = torch.where(ignored, ignore_index, x.targets.clamp(min=3))
    hidden = x.hidden.detach().clone()
    hidden[ignored] = float("nan")  # padding may hold anything
    x = x._replace(hidden=hidden.requires_grad_(), targets=targets)
    logprobs, entropies, dhidden, *rest = with_gradients(ours, x, 0.5, entropy="grad", ignore_index=ignore_index)
    assert (logprobs[ignored] == 0).all() and (entropies[ignored] == 0).all() and (dhidden[ignored] == 0).all()
    assert (logprobs[~ignored] < 0).all() and (dhidden[~ignored] != 0).any(-1).all()
    assert all(x.isfinite().all() for x in rest)
    without = x._replace(hidden=hidden[~ignored].detach().requires_grad_(), targets=targets[~ignored])
    again = ours(without, entropy="value")
    assert torch.equal(again.logprobs, logprobs[~ignored]) and torch.equal(again.entropies, entropies[~ignored])


def test_all_rows_ignored() -> None:
    x = random_inputs(5, 17).to(torch.float32, leaves=True)
    x = x._replace(targets=torch.full((5,), -100))
    assert all((value == 0).all() for value in with_gradients(ours, x, 1.0, entropy="grad"))


def test_gradients_are_made_for_what_wants_them() -> None:
    inputs = random_inputs(5, 17, bias=True)
    for wanted in ("hidden", "lm_head", "bias"):
        x = inputs.to(torch.float32)
        leaf = getattr(x, wanted).requires_grad_()
        ours(x).logprobs.sum().backward()
        assert leaf.grad is not None and (leaf.grad != 0).any()
        assert [y.grad is None for y in x.leaves].count(False) == 1


def test_the_entropy_has_a_gradient_only_on_demand() -> None:
    x = random_inputs(5, 17).to(torch.float32, leaves=True)
    assert ours(x).entropies is None
    value, grad = ours(x, entropy="value"), ours(x, entropy="grad")
    assert not value.entropies.requires_grad and grad.entropies.requires_grad
    assert torch.equal(value.entropies, grad.entropies) and torch.equal(value.logprobs, ours(x).logprobs)


def test_a_uniform_head_has_the_entropy_of_the_uniform_distribution() -> None:
    result = token_logprobs(torch.randn(4, D), torch.zeros(1000, D), torch.arange(4), entropy="value")
    expected = torch.tensor(1000.0).log().expand(4)
    torch.testing.assert_close(-result.logprobs, expected)
    torch.testing.assert_close(result.entropies, expected)


# --- independence of the rest of the batch ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vocabulary", [1003, 4099])
@pytest.mark.parametrize("size", [D, 300])
def test_a_row_does_not_depend_on_its_batch(
    size: int, vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, elsewhere in the batch, in another chunk, among other rows: bitwise the same."""
    generator = torch.Generator().manual_seed(0)
    chunk = 256
    monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: chunk)
    tokens = chunk + 29
    hidden = torch.randn(tokens, size, generator=generator).to(dtype)
    head = torch.randn(vocabulary, size, generator=generator).to(dtype) / size**0.5
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    options: dict[str, Any] = {"entropy": "value", "temperature": 0.9}
    whole = token_logprobs(hidden, head, targets, **options)

    def assert_equal(rows: Tensor, result: TokenLogprobs) -> None:
        assert torch.equal(result.logprobs, whole.logprobs[rows])
        assert torch.equal(result.entropies, whole.entropies[rows])

    order = torch.randperm(tokens, generator=generator)
    assert_equal(order, token_logprobs(hidden[order], head, targets[order], **options))
    for row in (0, 1, chunk - 1, chunk, tokens - 1):
        rows = torch.tensor([row])
        assert_equal(rows, token_logprobs(hidden[rows], head, targets[rows], **options))
        others = torch.randn(17, size, generator=generator).to(dtype) * 100
        among = token_logprobs(
            torch.cat([others, hidden[rows]]), head, torch.cat([targets[:17], targets[rows]]), **options
        )
        assert_equal(rows, TokenLogprobs(among.logprobs[-1:], among.entropies[-1:]))


def test_scoring_and_training_passes_are_bitwise_equal() -> None:
    x = random_inputs(50, 1003)
    with torch.no_grad():
        scored = ours(x.to(torch.bfloat16), entropy="value")
    trained = ours(x.to(torch.bfloat16, leaves=True), entropy="grad")
    assert torch.equal(scored.logprobs, trained.logprobs) and torch.equal(scored.entropies, trained.entropies)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_auto_is_chunked_where_nothing_is_fused(backend: Any) -> None:
    x = random_inputs(20, 61).to(torch.float32)
    expected = ours(x, strategy="chunked", backend=backend).logprobs
    assert torch.equal(ours(x, strategy="auto", backend=backend).logprobs, expected)


def test_two_runs_are_bitwise_equal() -> None:
    x = random_inputs(200, 4099).to(torch.float32, leaves=True)
    first, second = (with_gradients(ours, x, 0.5, entropy="grad") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_changes_nothing() -> None:
    x = random_inputs(20, 331, bias=True).to(torch.float32, leaves=True)
    expected = with_gradients(ours, x, 0.5, entropy="grad")
    with torch.autocast("cpu", torch.bfloat16):
        result = with_gradients(ours, x, 0.5, entropy="grad")
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


# --- memory ---


class LargestTensor(TorchDispatchMode):
    """Remembers the elements of the largest storage that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, storage)
        return result


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_the_logits_of_all_tokens_never_exist(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, chunk = 2003, 256
    monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: chunk)
    tokens = 5 * chunk + 3
    x = random_inputs(tokens, vocabulary, bias=True).to(torch.float32, leaves=True)
    with LargestTensor() as seen:
        composed(x)
    assert seen.elements >= tokens * vocabulary  # the mode sees what it looks for
    with LargestTensor() as seen:
        with_gradients(ours, x, 0.5, entropy="grad", softcap=5.0, temperature=0.7, backend=backend)
    assert seen.elements <= chunk * (vocabulary + 15)  # rows begin at multiples of 16 columns


# --- graphs and errors ---


@IGNORE_TRACING
@pytest.mark.parametrize("entropy", ["none", "grad"])
def test_compiles_to_one_graph(entropy: Any) -> None:
    x = random_inputs(150, 4099, bias=True).to(torch.float32, leaves=True)

    def op(hidden: Tensor, lm_head: Tensor, bias: Tensor, targets: Tensor) -> list[Tensor]:
        result = token_logprobs(hidden, lm_head, targets, bias=bias, softcap=8.0, temperature=0.7, entropy=entropy)
        return [y for y in result if y is not None]

    assert_same_compiled(op, x.hidden, x.lm_head, x.bias, x.targets)


@pytest.mark.parametrize("entropy", ["none", "grad"])
def test_runs_on_fake_tensors(entropy: Any) -> None:
    x = random_inputs(150, 4099)

    def op(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> list[Tensor]:
        result = token_logprobs(hidden, lm_head, targets, entropy=entropy)
        values = [y for y in result if y is not None]
        return values + list(torch.autograd.grad(values[-1].sum(), (hidden, lm_head)))

    half = x.to(torch.bfloat16, leaves=True)
    assert_same_fake(op, half.hidden, half.lm_head, half.targets)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.ones(3)}, ValueError, r"hidden: shape \(3,\)"),
        ({"lm_head": torch.ones(7, 5)}, ValueError, r"lm_head: shape \(7, 5\), expected \[V, 4\]"),
        ({"lm_head": torch.ones(7, 4).bfloat16()}, TypeError, "lm_head: dtype torch.bfloat16 beside hidden"),
        ({"lm_head": torch.ones(7, 4, device="meta")}, ValueError, "lm_head: on meta, expected cpu"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, ValueError, r"targets: shape \(2,\), expected \(3,\)"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, TypeError, "targets: dtype torch.int32"),
        ({"targets": torch.tensor([0, 7, 1])}, ValueError, r"targets: 7 in row 1, expected \[0, 7\)"),
        ({"targets": torch.tensor([0, 1, -1])}, ValueError, "targets: -1 in row 2"),
        ({"bias": torch.ones(4)}, ValueError, r"bias: shape \(4,\), expected \(7,\)"),
        ({"bias": torch.ones(7, dtype=torch.int64)}, TypeError, "bias: dtype torch.int64"),
        ({"temperature": 0.0}, ValueError, "temperature: 0.0"),
        ({"temperature": math.inf}, ValueError, "temperature: inf, expected a finite number > 0"),
        ({"temperature": "1"}, TypeError, "temperature: got str '1', expected a number"),
        ({"logit_scale": math.nan}, ValueError, "logit_scale: nan, expected a finite number"),
        ({"softcap": -1.0}, ValueError, "softcap: -1.0"),
        ({"softcap": math.inf}, ValueError, "softcap: inf, expected a finite number > 0"),
        ({"softcap": True}, TypeError, "softcap: got bool True, expected a number"),
        ({"lm_head": torch.ones(0, 4)}, ValueError, r"lm_head: shape \(0, 4\), expected \[V, 4\] with V and d above 0"),
        ({"hidden": torch.ones(3, 0), "lm_head": torch.ones(7, 0)}, ValueError, r"lm_head: shape \(7, 0\)"),
        ({"entropy": True}, ValueError, "entropy: True"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.ones(3, 4),
        "lm_head": torch.ones(7, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
        **changes,
    }
    with pytest.raises(error, match=message):
        token_logprobs(**arguments)


def test_a_bias_of_another_dtype_is_converted() -> None:
    x = random_inputs(5, 17, bias=True)
    half = x.to(torch.bfloat16)
    wide = half._replace(bias=half.bias.double().requires_grad_())
    result = ours(wide)
    assert torch.equal(result.logprobs, ours(half).logprobs)
    (gradient,) = torch.autograd.grad(result.logprobs.sum(), wide.bias)
    assert gradient.dtype == torch.float64
