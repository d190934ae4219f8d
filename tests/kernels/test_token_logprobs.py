"""Token log-probs with backend="triton" in both strategies against a float64 composition, and what compilation sees."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from maestro_fast.kernels import token_logprobs as kernel
from maestro_fast.kernels.token_logprobs import Tiles
from maestro_fast.ops import TokenLogprobs, head, token_logprobs
from maestro_fast.specs import HeadSpec, as_text
from tests.kernels.helpers import DEVICE, DTYPES, INTERPRETED, assert_close, runs
from tests.ops.helpers import assert_same_compiled, half_products_on_the_cpu
from tests.ops.test_token_logprobs import (
    HEADS,
    Inputs,
    composed,
    composed_of_logits,
    random_inputs,
    with_gradients,
)

STRATEGIES = ["chunked", "fused"]
VALUES = 1e-6  # of the largest true value, beyond the error of the composition in float32
GRADIENTS = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # rounded in the logits and at the end
ON_A_DEVICE = pytest.mark.skipif(INTERPRETED, reason="needs a device and its memory")


@pytest.fixture(autouse=True)
def small_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, products, parts and tiles that a few rows and columns fill more than once."""
    if request.node.get_closest_marker("skipif"):
        return
    monkeypatch.setattr(head, "chunk_rows", lambda vocabulary, device: 8)
    monkeypatch.setattr(head, "product_rows", lambda device: 4)
    if INTERPRETED:
        half_products_on_the_cpu(monkeypatch)
    monkeypatch.setattr(kernel, "_PART", 64)
    monkeypatch.setattr(kernel, "_GROUP", 1)
    for name in ("_SINGLE", "_AMPERE", "_HOPPER"):
        monkeypatch.setattr(kernel, name, Tiles(16, 32, 16, warps=4, stages=2, descriptors=name == "_HOPPER"))


def there(x: Inputs) -> Inputs:
    """On the device, leaves again."""
    return Inputs(*(y if y is None else y.detach().to(DEVICE).requires_grad_(y.requires_grad) for y in x))


def ours(x: Inputs, **options: Any) -> Any:
    return token_logprobs(x.hidden, x.lm_head, x.targets, bias=x.bias, **{"backend": "triton", **options})


def computed(x: Inputs, **options: Any) -> list[Tensor]:
    """Values and gradients, on the CPU."""

    def op(y: Inputs) -> TokenLogprobs:
        logprobs, entropies = ours(y, **options)
        return TokenLogprobs(logprobs.cpu(), None if entropies is None else entropies.cpu())

    return [y.cpu() for y in with_gradients(op, x, 0.5 if options.get("entropy") == "grad" else 0.0)]


def composed_on_the_device(x: Inputs, dtype: torch.dtype, **options: Any) -> TokenLogprobs:
    """In float32 from the device's own product, whose tensor cores round otherwise than the CPU."""
    hidden, head = (y.detach().to(DEVICE, dtype) for y in (x.hidden, x.lm_head))
    half = {} if dtype is torch.float32 else {"out_dtype": torch.float32}
    logits = torch.mm(hidden, head.T, **half)
    return composed_of_logits(logits.cpu(), x.to(torch.float32), **options)


def compare(
    x: Inputs,
    dtype: torch.dtype,
    entropy: Any = "grad",
    strategy: str = "chunked",
    slack: float = 0.0,
    **options: Any,
) -> None:
    """Values, and the gradients of hidden, head and bias. ``slack``: what else a value may be off by."""
    weight = 0.5 if entropy == "grad" else 0.0
    truth = with_gradients(composed, x.to(torch.float64, leaves=True), weight, **options)
    plain = with_gradients(composed, x.to(torch.float32, leaves=True), weight, **options)
    if not INTERPRETED:
        plain[:2] = composed_on_the_device(x, dtype, **options)
    given = there(x.to(dtype, leaves=True))
    mine, *others = runs(lambda: computed(given, entropy=entropy, strategy=strategy, **options), *given)
    if entropy == "none":
        truth.pop(1), plain.pop(1)
    assert all(torch.equal(one, other) for again in others for one, other in zip(mine, again, strict=True))
    for i, (one, simple, true) in enumerate(zip(mine, plain, truth, strict=True)):
        value = i < (1 if entropy == "none" else 2)
        assert one.dtype == (torch.float32 if value else dtype)
        epsilon = VALUES + slack if value else GRADIENTS[dtype]
        assert_close(one, true, simple, epsilon=epsilon, what=f"output {i}")


# In the interpreter, which is slow, the heads meet 16 bits with one strategy.
CASES = [
    (*case, dtype)
    for case in product(STRATEGIES, HEADS)
    for dtype in DTYPES
    if not INTERPRETED or dtype is torch.float32 or case[0] == "fused"
]


@pytest.mark.parametrize(("strategy", "head", "dtype"), CASES, ids=str)
def test_values_and_gradients(strategy: str, head: str, dtype: torch.dtype) -> None:
    options = dict(HEADS[head])
    compare(random_inputs(9, 40, bias=options.pop("bias", False), dtype=dtype), dtype, strategy=strategy, **options)


@pytest.mark.parametrize(("strategy", "entropy"), list(product(STRATEGIES, ["none", "value"])))
def test_without_an_entropy_or_its_gradient(strategy: str, entropy: Any) -> None:
    compare(random_inputs(5, 70, bias=True), torch.float32, entropy, strategy, temperature=0.7)


@pytest.mark.parametrize(("strategy", "tokens"), list(product(STRATEGIES, [0, 1, 3, 7])))
def test_a_few_tokens_and_none(strategy: str, tokens: int) -> None:
    compare(random_inputs(tokens, 37), torch.float32, strategy=strategy)


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 64, 65, 130])
def test_one_column_more_or_less_than_a_tile(vocabulary: int) -> None:
    compare(random_inputs(2, vocabulary, bias=True), torch.float32, "value", "fused")


@pytest.mark.parametrize("size", [16, 40])
@pytest.mark.parametrize("descriptors", [False, True])
def test_tiles_of_either_kind(monkeypatch: pytest.MonkeyPatch, descriptors: bool, size: int) -> None:
    """Pointers with and without a rest of d, and tensor descriptors."""
    if not INTERPRETED and descriptors and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor descriptors need sm_90")
    monkeypatch.setattr(kernel, "tiles", lambda *_: Tiles(16, 32, 16, warps=4, stages=2, descriptors=descriptors))
    compare(random_inputs(17, 33, size=size, dtype=torch.float16), torch.float16, "value", "fused")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strongly_negative_logits_and_peaked_rows(strategy: str) -> None:
    x = random_inputs(5, 70)
    compare(x._replace(bias=torch.full((70,), -1e4, dtype=torch.float64)), torch.float32, strategy=strategy)
    hidden = x.hidden * 60
    targets = (hidden @ x.lm_head.T).argmax(-1)
    peaked = x._replace(hidden=hidden, targets=targets)
    logprobs = ours(there(peaked.to(torch.float32)), strategy=strategy).logprobs
    assert (logprobs <= 0).all()
    # the fused pass adds up the target's logit and the largest one in different orders
    slack = 1.2e-7 * (hidden @ x.lm_head.T).abs().max().item() if strategy == "fused" else 0.0
    compare(peaked, torch.float32, strategy=strategy, slack=slack)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ignored_rows(strategy: str) -> None:
    x = random_inputs(11, 70, bias=True)
    targets = x.targets.clone()
    targets[[0, 4, 10]] = -100
    ignored = targets == -100
    hidden = x.hidden.masked_fill(ignored[:, None], torch.nan)  # padding may hold anything
    given = there(x._replace(hidden=hidden, targets=targets).to(torch.float32, leaves=True))
    logprobs, entropies, dhidden, *rest = computed(given, entropy="grad", strategy=strategy)
    assert (logprobs[ignored] == 0).all() and (entropies[ignored] == 0).all() and (dhidden[ignored] == 0).all()
    assert (logprobs[~ignored] < 0).all() and (dhidden[~ignored] != 0).any(-1).all()
    assert all(y.isfinite().all() for y in rest)
    nothing = there(x._replace(targets=torch.full_like(targets, -100)).to(torch.float32, leaves=True))
    assert all((y == 0).all() for y in computed(nothing, entropy="grad", strategy=strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_are_made_for_what_wants_them(strategy: str) -> None:
    inputs = random_inputs(5, 33, bias=True)
    for wanted in ("hidden", "lm_head", "bias"):
        x = there(inputs.to(torch.float32))
        leaf = getattr(x, wanted).requires_grad_()
        ours(x, strategy=strategy).logprobs.sum().backward()
        assert leaf.grad is not None and (leaf.grad != 0).any()
        assert [y.grad is None for y in x.leaves].count(False) == 1


def test_the_entropy_has_a_gradient_only_on_demand() -> None:
    x = there(random_inputs(5, 33).to(torch.float32, leaves=True))
    value, grad = ours(x, entropy="value"), ours(x, entropy="grad")
    assert ours(x).entropies is None
    assert not value.entropies.requires_grad and grad.entropies.requires_grad
    assert torch.equal(value.entropies, grad.entropies) and torch.equal(value.logprobs, ours(x).logprobs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_does_not_depend_on_its_batch(strategy: str) -> None:
    """Alone, elsewhere in the batch, in another chunk, among few and many: bitwise the same."""
    x = random_inputs(11, 70, size=256)
    if INTERPRETED and strategy == "fused":  # its products are numpy's, which depend on the row unless they are exact
        x = x._replace(hidden=x.hidden.round(), lm_head=x.lm_head.round() / 16)
    x = there(x.to(torch.float32))
    whole = ours(x, entropy="value", strategy=strategy)
    for rows in ([5], [3, 10, 0], [10, 9, 8, 7, 6, 5, 4]):
        part = x._replace(hidden=x.hidden[rows], targets=x.targets[rows])
        some = ours(part, entropy="value", strategy=strategy)
        assert torch.equal(some.logprobs, whole.logprobs[rows]) and torch.equal(some.entropies, whole.entropies[rows])


def test_strided_states_and_heads() -> None:
    x = random_inputs(5, 33).to(torch.float32)
    twice = torch.cat([x.lm_head, x.lm_head], 1)
    apart = x._replace(hidden=x.hidden.T.contiguous().T, lm_head=twice[:, : x.lm_head.shape[1]])
    for strategy in STRATEGIES:
        expected = ours(there(x), strategy=strategy).logprobs
        assert torch.equal(ours(there(apart), strategy=strategy).logprobs, expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiles_to_one_graph(strategy: str) -> None:
    x = there(random_inputs(9, 33, bias=True).to(torch.float32, leaves=True))

    def op(hidden: Tensor, lm_head: Tensor, bias: Tensor, targets: Tensor) -> list[Tensor]:
        return list(ours(Inputs(hidden, lm_head, targets, bias), softcap=8.0, entropy="grad", strategy=strategy))

    assert_same_compiled(op, x.hidden, x.lm_head, x.bias, x.targets)


def test_operators_are_registered_properly() -> None:
    """Schemas, fake tensors and autograd registration, by torch's own checks."""
    x = there(random_inputs(5, 33, bias=True).to(torch.float32, leaves=True))
    spec = as_text(HeadSpec(1.0, None, 0.7, -100, "grad"))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    forward = torch.ops.maestro_fast.triton_token_logprobs
    torch.library.opcheck(forward, (x.hidden, x.lm_head, x.bias, x.targets, spec, "chunked"), test_utils=checks)
    logits = (x.hidden @ x.lm_head.T).detach()
    rows = torch.ops.maestro_fast.triton_row_statistics
    torch.library.opcheck(rows, (logits, x.targets, None, spec), test_utils=checks[:2])
    _, peaks, totals, entropies = rows(logits, x.targets, None, spec)
    slopes = torch.ones_like(peaks)
    arguments = (logits, x.targets, None, peaks, totals, entropies, slopes, slopes, spec)
    torch.library.opcheck(torch.ops.maestro_fast.triton_dlogits_, arguments, test_utils=checks[:2])
    into = torch.ops.maestro_fast.triton_dlogits_into
    torch.library.opcheck(into, (logits.half(), *arguments), test_utils=checks[:2])


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False)])
def test_gradients_of_transposed_inputs_have_the_strides_that_are_announced(wanted: tuple[bool, ...]) -> None:
    x = there(random_inputs(5, 33, bias=True).to(torch.float32))
    hidden, weight = x.hidden.T.contiguous().T, x.lm_head.T.contiguous().T
    spec, slopes = as_text(HeadSpec(1.0, None, 0.7, -100, "none")), torch.ones(5, device=DEVICE)
    _, peaks, totals, entropies = torch.ops.maestro_fast.triton_token_logprobs(
        hidden, weight, x.bias, x.targets, spec, "chunked"
    )
    given = hidden, weight, x.bias, x.targets, peaks, totals, entropies, slopes, slopes, spec, "chunked", wanted
    backward = torch.ops.maestro_fast.triton_token_logprobs_backward
    torch.library.opcheck(backward, given, test_utils=("test_schema", "test_faketensor"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = backward(*given)
    for fake, real in zip(fakes, backward(*given), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "paged"}, "strategy: 'paged', expected 'chunked', 'fused' or 'auto'"),
        (
            {"strategy": "fused", "backend": "torch"},
            "strategy: 'fused' is served by backend 'triton' alone, here by 'torch'",
        ),
        ({"backend": "cpp"}, "backend: 'cpp' does not serve token_logprobs, expected one of triton, torch"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(there(random_inputs(3, 9).to(torch.float32)), **changes)


@pytest.mark.parametrize("faster", [False, True])
def test_auto_is_fused_where_that_is_faster_and_no_gradient_is_wanted(
    faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "is_faster", lambda hidden, weight: faster)
    x = there(random_inputs(17, 70).to(torch.float32, leaves=True))
    expected = {name: ours(x, strategy=name).logprobs for name in STRATEGIES}
    assert not torch.equal(expected["fused"], expected["chunked"])
    assert torch.equal(ours(x, strategy="auto").logprobs, expected["chunked"])
    with torch.no_grad():
        assert torch.equal(ours(x, strategy="auto").logprobs, expected["fused" if faster else "chunked"])


def test_fused_counts_as_faster_only_where_it_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on a CPU, on sm_90 alone, and not where descriptors cannot read the operands."""
    hidden, head = torch.empty(4, 64, dtype=torch.bfloat16), torch.empty(9, 64, dtype=torch.bfloat16)
    assert not kernel.is_faster(hidden, head)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for capability, faster in {(8, 0): False, (9, 0): True, (10, 0): False}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert kernel.is_faster(hidden, head) is faster
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not kernel.is_faster(hidden.float(), head.float())
    assert not kernel.is_faster(hidden[:, 1:], head[:, 1:])


def test_float64_is_refused_by_triton() -> None:
    with pytest.raises(ValueError, match="'triton' cannot serve token_logprobs here: got float64"):
        ours(there(random_inputs(3, 9)))


# --- on a device: the sizes and the dtype of real heads ---


def real_logits(x: Inputs) -> Inputs:
    """Of a standard deviation of 1 from states of 1,024 numbers; a division by 32 rounds nothing."""
    assert x.hidden.shape[1] == 1024
    return x._replace(lm_head=x.lm_head / 32)


@ON_A_DEVICE
@pytest.mark.parametrize("vocabulary", [129_280, 151_936])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_real_vocabularies(strategy: str, vocabulary: int) -> None:
    compare(
        real_logits(random_inputs(7, vocabulary, dtype=torch.bfloat16, size=1024)), torch.bfloat16, strategy=strategy
    )


@ON_A_DEVICE
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_error_of_log_probs_is_that_of_a_float32_gemm(strategy: str) -> None:
    """The other 2e-6 are a rounding of log-probs of 8 to 16, once as such and once as the logarithm of the total."""
    x = real_logits(random_inputs(1100, 32_000, dtype=torch.bfloat16, size=1024))
    truth = composed(x).logprobs
    error = (ours(there(x.to(torch.bfloat16)), strategy=strategy).logprobs.cpu() - truth).abs()
    assert (error <= 1e-5 * truth.abs().clamp(min=1)).all()
    float32_gemm = (composed_on_the_device(x, torch.bfloat16).logprobs - truth).abs().max()
    assert error.max() <= 2 * float32_gemm + 2e-6


@ON_A_DEVICE
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [256, 1024])
def test_a_row_among_65537(strategy: str, size: int) -> None:
    """Bitwise the same alone and in 17 chunks, where a logit has an index beyond 2^31."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden, head = (
        torch.randn(n, size, device=DEVICE, generator=generator).bfloat16() / size**0.25 for n in (65_537, 50_257)
    )
    targets = torch.randint(0, 50_257, (65_537,), device=DEVICE, generator=generator)
    whole = token_logprobs(hidden, head, targets, entropy="value", strategy=strategy)
    for rows in ([65_536], [0, 1023, 1024], [40_000, 7, 4095, 4096, 65_535, 2, 1]):
        some = token_logprobs(hidden[rows], head, targets[rows], entropy="value", strategy=strategy)
        assert torch.equal(some.logprobs, whole.logprobs[rows]) and torch.equal(some.entropies, whole.entropies[rows])


@ON_A_DEVICE
@pytest.mark.parametrize(("frozen", "gigabytes"), [(True, 3.0), (False, 3.0 + 4 * 151_936 * 1024 / 1e9)])
def test_memory_beyond_inputs_and_outputs(frozen: bool, gigabytes: float) -> None:
    hidden, head = (torch.randn(n, 1024, device=DEVICE, dtype=torch.bfloat16) for n in (16_384, 151_936))
    hidden.requires_grad_(), head.requires_grad_(not frozen)
    targets = torch.randint(0, 151_936, (16_384,), device=DEVICE)
    outputs = hidden.nbytes + (0 if frozen else head.nbytes) + 5 * 4 * 16_384
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    token_logprobs(hidden, head, targets).logprobs.sum().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before - outputs <= gigabytes * 1e9
