"""Times linear_policy_loss with its gradients on the CPU beside TRL's chunked head with TRL's loss, and our two ops.

The op takes three matrix products of 2 T V d operations each. TRL takes four, and so does ``token_logprobs`` with
``policy_loss``. The plain composition takes three as well, but holds all logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from bench.race import Contender, race, report
from maestro_fast.ops import PolicyLossConfig, linear_policy_loss, policy_loss, token_logprobs
from tests.ops.helpers import assert_as_accurate
from tests.ops.trl_oracle import trl_policy_loss

RESPONSES = 8
CONFIG = PolicyLossConfig("dapo")


def inputs(T: int, d: int, V: int, without_gradient: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, LM head, targets, advantages of which a share is 0, and old log-probs near the present ones."""
    generator = torch.Generator().manual_seed(0)
    hidden, lm_head = (torch.randn(n, d, generator=generator) for n in (T, V))
    lm_head.mul_(2 / d**0.5)
    targets = torch.randint(0, V, (T,), generator=generator)
    advantages = torch.randn(RESPONSES, generator=generator)
    advantages[: round(without_gradient * RESPONSES)] = 0.0
    old = token_logprobs(hidden, lm_head, targets).logprobs + 0.2 * torch.randn(T, generator=generator)
    return hidden, lm_head, targets, advantages, old


@pytest.mark.parametrize("without_gradient", [0.0, 0.5])
@pytest.mark.parametrize(("T", "d", "V"), [(512, 128, 8192), (256, 256, 32_000), (64, 256, 151_936)])
def test_linear_policy_loss(benchmark: Any, capsys: Any, T: int, d: int, V: int, without_gradient: float) -> None:
    hidden, lm_head, targets, advantages, old = inputs(T, d, V, without_gradient)
    leaves = [hidden.requires_grad_(), lm_head.requires_grad_()]
    cu_seqlens = torch.arange(0, T + 1, T // RESPONSES)
    mask = torch.ones(RESPONSES, T // RESPONSES)

    def sweep(active: Tensor | None = None) -> Tensor:
        return linear_policy_loss(
            hidden,
            lm_head,
            targets,
            advantages,
            cu_seqlens,
            old_logprobs=old,
            normalizer=float(T),
            active=active,
            config=CONFIG,
        ).loss

    def of_logprobs(logprobs: Tensor) -> Tensor:
        return policy_loss(
            logprobs, advantages.to(logprobs), cu_seqlens, old_logprobs=old, normalizer=float(T), config=CONFIG
        ).loss

    def two_ops() -> Tensor:
        return of_logprobs(token_logprobs(hidden, lm_head, targets).logprobs)

    def trl() -> Tensor:
        logprobs = ChunkedLogProbFunction.apply(
            hidden, lm_head, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        )[0]
        return trl_policy_loss(
            logprobs.view_as(mask), mask, advantages, loss_type="dapo", old_logprobs_BT=old.view_as(mask)
        )[0]

    def plain(hidden: Tensor = hidden, lm_head: Tensor = lm_head) -> Tensor:
        logits = hidden @ lm_head.T
        return of_logprobs(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])

    def with_gradient(loss: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: list(torch.autograd.grad(loss(), leaves))

    def active_only() -> Tensor:
        return sweep(advantages != 0)

    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = torch.autograd.grad(plain(*exact), exact)
    for op in (sweep, active_only):  # A wrong answer is not timed.
        for mine, theirs, wanted in zip(with_gradient(op)(), with_gradient(plain)(), truth, strict=True):
            assert_as_accurate(mine, theirs, wanted, epsilon=1e-6 * wanted.abs().max().item())

    contenders = [
        Contender("one sweep", with_gradient(sweep)),
        *([Contender("one sweep, active", with_gradient(active_only))] if without_gradient else []),
        Contender("our two ops", with_gradient(two_ops)),
        Contender("TRL's head and loss", with_gradient(trl)),
        Contender("all logits", with_gradient(plain)),
    ]
    times = race(contenders, rounds=5)
    case = f"T = {T}, d = {d}, V = {V}, {without_gradient:.0%} of advantage 0"
    moved = 4 * 2 * (T * d + V * d)
    report(benchmark, capsys, "linear_policy_loss with gradients on the CPU", case, times, moved)
    benchmark.pedantic(with_gradient(sweep), rounds=3, iterations=1, warmup_rounds=1)
