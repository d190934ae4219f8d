"""Products of 16-bit heads in compiled graphs: on the CPU, with products in place of a GPU's, and on fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from maestro_fast.ops import PolicyLossConfig, linear_policy_loss
from maestro_fast.ops import head as head_module
from tests.ops.helpers import assert_same_compiled, half_products_on_the_cpu
from tests.ops.test_token_logprobs import IGNORE_TRACING

T, V, D = 70, 61, 16
HALVES = [torch.bfloat16, torch.float16]


def batch(dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Hidden states and a head that both want a gradient, targets, advantages, and bounds of three responses."""
    generator = torch.Generator().manual_seed(0)
    hidden, head, advantages = (torch.randn(*n, generator=generator) for n in ((T, D), (V, D), (3,)))
    targets, bounds = torch.arange(T) % V, torch.tensor([0, 20, 41, T])
    leaves = (x.to(device, dtype).requires_grad_() for x in (hidden, head))
    return *leaves, *(x.to(device) for x in (targets, advantages, bounds))


def losses(backend: Any) -> Any:
    def op(hidden: Tensor, head: Tensor, targets: Tensor, advantages: Tensor, bounds: Tensor) -> Tensor:
        config = PolicyLossConfig("dapo")
        given = hidden, head, targets, advantages, bounds
        return linear_policy_loss(*given, normalizer=50.0, config=config, backend=backend).loss

    return op


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: 32)
    monkeypatch.setattr("maestro_fast.ops.head.product_rows", lambda device: 16)


@IGNORE_TRACING
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_graph_gives_what_eager_calls_give(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host knows nothing in a graph: to be bitwise the same, eager mode must not either."""
    half_products_on_the_cpu(monkeypatch)
    monkeypatch.setattr("maestro_fast.ops.sweep.readable", lambda x: False)
    assert_same_compiled(losses("torch"), *batch(dtype, "cpu"))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_products_of_fake_tensors_of_a_device(dtype: torch.dtype, compiled: bool) -> None:
    def products(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
        head_module.add_product_(total, a, b, 0.5)
        return head_module.product(a, b, 16)

    torch._dynamo.reset()
    function = torch.compile(products, fullgraph=True, backend="eager") if compiled else products
    with FakeTensorMode(), torch.no_grad():
        a, b = (torch.empty(n, device="cuda", dtype=dtype) for n in ((T, D), (D, V)))
        out = function(a, b, torch.empty(T, V, device="cuda"))
    assert (out.shape, out.dtype, out.device.type) == ((T, V), torch.float32, "cuda")


@IGNORE_TRACING
@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="fake CUDA tensors are indexed by CUDA builds alone")
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_a_trained_head_is_traced_for_a_device_that_is_not_here(dtype: torch.dtype) -> None:
    """Forward, which has all products, and the backward that Dynamo traces beside it."""
    torch._dynamo.reset()
    compiled = torch.compile(losses("triton"), fullgraph=True, backend="eager")  # autograd's engine needs a device
    with FakeTensorMode():
        given = batch(dtype, "cuda")
        loss = compiled(*given)
    assert (loss.shape, loss.dtype, loss.device) == ((), torch.float32, given[0].device) and loss.requires_grad


def test_operators_are_registered_properly(monkeypatch: pytest.MonkeyPatch) -> None:
    half_products_on_the_cpu(monkeypatch)
    a, b, out = torch.randn(4, 3).half(), torch.randn(3, 5).half(), torch.zeros(4, 8)[:, :5]
    checks = ("test_schema", "test_faketensor")
    for step in (3, 4, 9):
        torch.library.opcheck(torch.ops.maestro_fast.head_product, (a, b, step, False), test_utils=checks)
    torch.library.opcheck(torch.ops.maestro_fast.head_add_product_, (out, a, b, 0.5), test_utils=checks)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_eager_calls_pass_the_operators_by(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost the host several microseconds each."""
    half_products_on_the_cpu(monkeypatch)
    monkeypatch.setattr(head_module.torch.ops, "maestro_fast", None)
    hidden, head, *rest = batch(dtype, "cpu")
    losses("torch")(hidden, head, *rest).backward()
    assert hidden.grad is not None and head.grad is not None and head.grad.abs().max() > 0
