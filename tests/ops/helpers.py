"""What the tests of several ops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from maestro_fast.ops import SERVED_BY, head
from maestro_fast.ops.head_rows import capped_logits
from maestro_fast.ops.tensors import wide, without_autocast
from maestro_fast.specs import HeadSpec, TokenLogprobs


def assert_as_accurate(ours: Tensor, plain: Tensor, truth: Tensor, *, epsilon: float) -> None:
    """Error of ours <= error of the plain op in the same dtype + epsilon, both against float64 and at their worst."""
    assert ours.shape == truth.shape and truth.dtype == torch.float64
    if truth.numel() == 0:
        return
    error = (ours.double() - truth).abs()
    allowed = (plain.double() - truth).abs().max() + epsilon
    if bool((error <= allowed).all()):  # False for NaN
        return
    worst = int(torch.where(error.isnan(), float("inf"), error).argmax())
    got, expected = ours.flatten()[worst].item(), truth.flatten()[worst].item()
    raise AssertionError(f"element {worst}: {got!r}, truth {expected!r}, allowed error {allowed.item():.3g}")


def assert_same_compiled(function: Callable[..., Any], *args: Tensor) -> None:
    """One graph without a break gives bitwise the same tensors as eager mode, gradients of the inputs included."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(outputs_and_gradients(compiled, *args), outputs_and_gradients(function, *args), strict=True):
        assert torch.equal(ours, eager), (ours, eager)


def outputs_and_gradients(function: Callable[..., Any], *args: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in args]
    outputs = [x for x in pytree.tree_leaves(function(*leaves)) if isinstance(x, Tensor)]
    wanted = [x for x in leaves if x.requires_grad]
    if not wanted:
        return outputs
    total = torch.stack([x.square().sum() for x in outputs if x.requires_grad]).sum()
    return [x.detach() for x in outputs] + list(torch.autograd.grad(total, wanted))


def half_products_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 16 bits go the way that they go on a CUDA device, with products that add up in float32."""

    def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
        out.copy_(a.float() @ b.float())

    def add_product_(total: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
        assert a.dtype == b.dtype and total.dtype == torch.float32
        total.addmm_(a.float(), b.float(), alpha=alpha)

    for op in ("token_logprobs", "linear_policy_loss"):
        monkeypatch.setitem(SERVED_BY, op, ("triton", "torch"))  # C++ does not serve there.
    monkeypatch.setattr(head, "operand", lambda x: x if head.is_half(x) else wide(x))
    monkeypatch.setattr(head, "_product_into", product_into)
    monkeypatch.setattr(head, "_add_product_", add_product_)


def assert_same_fake(function: Callable[..., Any], *args: Tensor) -> None:
    """Under a fake mode the op needs no values and announces the shapes and dtypes that it really returns."""
    with FakeTensorMode() as mode:
        fakes = function(*(mode.from_tensor(x) for x in args))
    for fake, real in zip(pytree.tree_leaves(fakes), pytree.tree_leaves(function(*args)), strict=True):
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def reference_token_logprobs(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> TokenLogprobs:
    """The formula of ``ops.token_logprobs`` with all logits at once, which autograd differentiates."""
    live = targets != ignore_index
    with without_autocast(hidden):
        x = torch.where(live[:, None], hidden, 0.0) @ lm_head.T
    y = capped_logits(x, bias, HeadSpec(logit_scale, softcap, temperature, ignore_index, "grad"))
    logp_TV = (y / temperature).log_softmax(-1)
    logprobs = logp_TV.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    entropies = -(logp_TV.exp() * logp_TV).sum(-1)
    return TokenLogprobs(torch.where(live, logprobs, 0.0), torch.where(live, entropies, 0.0))
