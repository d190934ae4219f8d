"""Times linear_policy_loss with its gradients in bfloat16 beside its peers on the same batch.

The limit is torch.mm of the op's three products into float32, over every row, in chunks of as many rows as ours. TRL
runs its own head and loss on padded tokens, and reads its metrics on the host. Liger runs its fused linear GRPO loss,
which it compiles by default. verl runs its kernel with our loss, which is the fastest. ``--head
1024x32768x2048,...`` or ``make gpu-bench ARGS=linear_policy_loss:1024x32768x2048`` takes other shapes.

The column of errors holds the largest error against float64; the error of a gradient is a share of its largest element.
Our errors must pass a gate; those of peers are only printed. In a dry run on a CPU, PyTorch computes the rows, because
the op uses Triton on CUDA devices only.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu_gate import gate, normal
from bench.gpu_head import (
    DTYPE,
    RACE,
    Shape,
    gate_gradients,
    inputs,
    measured,
    picked,
    products,
    true_gradients,
    truth,
    worst,
)
from bench.gpu_peers import TRL, VERL, peers
from bench.gpu_race import DEVICE, DRY, HEAD_PEERS, MARKS, Contender, race, report
from maestro_fast.ops import PolicyLossConfig, linear_policy_loss, policy_loss, token_logprobs
from tests.ops.trl_oracle import trl_policy_loss

pytestmark = MARKS
RESPONSES = 3 if DRY else 16
CONFIG = PolicyLossConfig("dapo")
LIGER = "Liger's linear GRPO loss"


class Batch:
    """Hidden states, head and targets of a shape, with the inputs of the loss that all contenders take."""

    def __init__(self, shape: Shape, without_gradient: float) -> None:
        self.hidden, self.head, self.targets = inputs(shape)
        self.leaves = [self.hidden.requires_grad_(), self.head.requires_grad_()]
        self.advantages = normal(RESPONSES, seed=3).cpu()  # the host has to know which are 0
        self.advantages[: round(without_gradient * RESPONSES)] = 0.0
        self.cu_seqlens = torch.arange(0, shape.T + 1, shape.T // RESPONSES)
        self.old = truth(shape).logprobs.float() + 0.2 * normal(shape.T, seed=4)
        self.on_device = self.advantages.to(DEVICE), self.cu_seqlens.to(DEVICE)
        self.mask = torch.ones(RESPONSES, shape.T // RESPONSES, device=DEVICE)
        self.tokens = float(shape.T)

    def sweep(self, active: Tensor | None = None) -> Tensor:
        return linear_policy_loss(
            self.hidden,
            self.head,
            self.targets,
            self.advantages,
            self.cu_seqlens,
            old_logprobs=self.old,
            normalizer=self.tokens,
            active=active,
            config=CONFIG,
        ).loss

    def loss(self, logprobs: Tensor, backend: Any = None) -> Tensor:
        advantages, cu_seqlens = self.on_device
        old = self.old.to(logprobs)
        given = {"old_logprobs": old, "normalizer": self.tokens, "config": CONFIG, "backend": backend}
        return policy_loss(logprobs, advantages.to(logprobs), cu_seqlens, **given).loss

    def trl_loss(self, logprobs: Tensor) -> Tensor:
        padded = logprobs.view_as(self.mask), self.mask, self.on_device[0]
        return trl_policy_loss(*padded, loss_type="dapo", old_logprobs_BT=self.old.view_as(self.mask))[0]

    def liger_loss(self) -> Callable[[], Tensor]:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        op = LigerFusedLinearGRPOLoss(beta=0.0, compiled=not DRY, use_ref_model=False, loss_type="dapo")
        shape = self.mask.shape
        return lambda: op(
            self.hidden.view(*shape, -1),
            self.head,
            self.targets.view(shape),
            self.mask,
            self.on_device[0],
            old_per_token_logps=self.old.view(shape),
        )[0]

    def with_gradient(self, name: str, loss: Callable[[], Tensor], peer: bool = True) -> Contender:
        def run() -> list[Tensor]:
            value = loss()
            return [value.detach(), *torch.autograd.grad(value, self.leaves)]

        return Contender(name, run, peer)

    def of(self, found: list[Tensor]) -> list[Tensor]:
        return [found[0], *picked(self.targets, *found[1:])]


def rivals(batch: Batch) -> tuple[list[Contender], list[str]]:
    """Our two ops, the peers that are installed, and a line for each that is not."""

    def two_ops() -> Tensor:
        return batch.loss(token_logprobs(batch.hidden, batch.head, batch.targets).logprobs)

    theirs, missing = peers()
    given = batch.hidden, batch.head, batch.targets, False
    found = [batch.with_gradient("our two ops", two_ops, peer=False)]
    if TRL in theirs:
        found.append(batch.with_gradient(TRL, lambda: batch.trl_loss(theirs[TRL](*given)[0])))
    if VERL in theirs:
        found.append(batch.with_gradient(VERL, lambda: batch.loss(theirs[VERL](*given)[0])))
    if HEAD_PEERS and find_spec("liger_kernel") is not None:
        found.append(batch.with_gradient(LIGER, batch.liger_loss()))
    else:
        missing.append(f"{LIGER}: skipped, liger_kernel is not installed")
    return found, [line for line in missing if line.startswith((TRL, VERL, LIGER))]


@pytest.mark.headline
@pytest.mark.parametrize("without_gradient", [0.0, 0.5])
def test_linear_policy_loss(capsys: Any, shape: Shape, without_gradient: float) -> None:
    batch = Batch(shape, without_gradient)
    logprobs = truth(shape).logprobs.detach().requires_grad_()
    loss = batch.loss(logprobs)
    (dlogprobs,) = torch.autograd.grad(loss, logprobs)
    with torch.no_grad():
        exact = [loss.detach(), *true_gradients(shape, dlogprobs)]
    ours = [batch.with_gradient("one sweep", batch.sweep, peer=False)]
    if without_gradient:
        active = batch.advantages != 0
        ours.append(batch.with_gradient("one sweep, active", lambda: batch.sweep(active), peer=False))

    def reference() -> Tensor:
        plain = token_logprobs(batch.hidden, batch.head, batch.targets, backend="torch").logprobs
        return batch.loss(plain, "torch")

    plain = batch.of(batch.with_gradient("torch reference", reference).run())
    for c in ours:
        found = batch.of(c.run())
        gate(found[0], plain[0], exact[0], epsilon=2e-6, what=f"{c.name}, loss")
        gate_gradients(found[1:], plain[1:], exact[1:], c.name)
    others, missing = rivals(batch)
    columns = measured([*ours, *others], lambda found: worst(batch.of(found), exact))
    limit = products(shape, "xhw")
    raced = race([*ours, *others, limit], seconds=RACE)
    moved = 2 * sum(x.numel() * x.element_size() for x in batch.leaves)
    case = f"d = {shape.d}, V = {shape.V}, T = {shape.T}, {without_gradient:.0%} of advantage 0, {DTYPE}, {DEVICE}"
    report(capsys, "linear_policy_loss", case, raced, moved, missing, columns)
