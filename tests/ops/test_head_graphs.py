"""The head pass in graphs of symbolic sizes, in exports, and with tensors of other classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

from maestro_fast.ops import PolicyLossConfig, linear_policy_loss, token_logprobs


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both_ops(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probs of one op and the loss of the other."""
    tokens = hidden.shape[0]
    advantages, bounds = torch.tensor([1.0, -1.0]), torch.tensor([0, tokens // 2, tokens])
    config = PolicyLossConfig("dapo")
    logprobs = token_logprobs(hidden, lm_head, targets).logprobs
    loss = linear_policy_loss(hidden, lm_head, targets, advantages, bounds, normalizer=20.0, config=config).loss
    return logprobs, loss


def with_gradients(function: Any, V: int, d: int, tokens: int = 300) -> list[Tensor]:
    given = draw(tokens, d).requires_grad_(), draw(V, d, seed=1).requires_grad_(), torch.arange(tokens) % V
    logprobs, loss = function(*given)
    return [logprobs, loss, *torch.autograd.grad(logprobs.sum() + loss, given[:2])]


@pytest.mark.filterwarnings("ignore")  # Inductor's own
def test_a_graph_of_symbolic_sizes_is_right() -> None:
    """Several products, vocabularies and hidden sizes that are no multiples of 16, in code that Inductor makes."""
    torch._dynamo.reset()
    compiled = torch.compile(both_ops, dynamic=True, fullgraph=True)
    for V, d in ((61, 8), (67, 12), (70, 20)):
        for mine, wanted in zip(with_gradients(compiled, V, d), with_gradients(both_ops, V, d), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


class Policy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = torch.nn.Parameter(draw(61, 8, seed=1))

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return token_logprobs(hidden, self.lm_head, targets).logprobs


def test_a_module_with_a_head_is_exported() -> None:
    given = draw(20, 8), torch.arange(20)
    exported = torch.export.export(Policy(), given).module()
    torch.testing.assert_close(exported(*given), Policy()(*given), rtol=1e-6, atol=1e-6)


def test_tensors_of_another_class_never_reach_an_address() -> None:
    targets = torch.arange(20)
    strange: Any = TwoTensor(targets, targets.clone())
    given = draw(20, 8), draw(61, 8, seed=1)
    found = token_logprobs(*given, strange).logprobs
    torch.testing.assert_close(getattr(found, "a", found), token_logprobs(*given, targets).logprobs)
    with pytest.raises(ValueError, match="'cpp' cannot serve token_logprobs here: got a TwoTensor"):
        token_logprobs(*given, strange, backend="cpp")
    leaf = given[0].requires_grad_()
    slopes: Any = TwoTensor(torch.ones(20), torch.ones(20))
    with pytest.raises(TypeError, match="got a TwoTensor, expected plain tensors"):
        token_logprobs(leaf, given[1], targets).logprobs.backward(slopes)


def test_a_head_that_is_replicated_or_sharded_is_served_by_torch() -> None:
    hidden, lm_head, targets = draw(20, 8), draw(61, 8, seed=1), torch.arange(20)
    expected = token_logprobs(hidden, lm_head, targets).logprobs
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for where in (Replicate(), Shard(0)):
            leaf = distribute_tensor(lm_head, mesh, [where]).requires_grad_()
            given = (distribute_tensor(x, mesh, [Replicate()]) for x in (hidden, targets))
            states, ids = given
            found: Any = token_logprobs(states, leaf, ids).logprobs
            torch.testing.assert_close(found.full_tensor(), expected, rtol=1e-5, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()


def test_a_gradient_cannot_be_differentiated_again() -> None:
    leaf = draw(20, 8).requires_grad_()
    logprobs = token_logprobs(leaf, draw(61, 8, seed=1), torch.arange(20)).logprobs
    four = torch.tensor(4.0, requires_grad=True)
    (gradient,) = torch.autograd.grad((four * logprobs).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
