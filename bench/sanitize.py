"""Runs every Triton kernel once on small inputs, for compute-sanitizer. To pytest this file is five tests.

    python -m bench.sanitize

It fails if a result is not finite. No size is a multiple of a tile, and most are larger than one tile, so that loops
run both with and without their masks. The head pass runs in bfloat16, where the gradient overwrites the logits and
tensor descriptors load the tiles.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.gpu_race import MARKS
from maestro_fast import ops
from maestro_fast.kernels import conductor_update as update_kernel
from maestro_fast.ops import ConductorParams, PolicyLossConfig

pytestmark = MARKS
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
B, K, D, H, G, T = 15, 3, 300, 7, 5, 61
V, WIDTH = (
    (70 if INTERPRETED else 10_007),
    64,
)  # sizes of the LM head; the interpreter needs minutes for the larger V
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16  # the interpreter computes bfloat16 wrongly
LONG = 600  # the number of tokens in the inputs of pooling, more than one chunk


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).to(DEVICE)


def head(units: int | None) -> ConductorParams:
    """A Conductor's network with random weights: linear, or with ``units`` hidden units."""
    hidden = (None, None) if units is None else (normal(units, D) / 6, normal(units))
    return ConductorParams(normal(D), normal(D).abs() + 0.5, normal(K, units or D) / 6, normal(K), *hidden)


def bounds(tokens: int) -> Tensor:
    """int64 [B + 1], the bounds of sequences: the second one is empty, and the last one is the longest."""
    inner = torch.arange(1, B) * 4
    inner[1] = inner[0]
    return torch.cat([torch.zeros(1, dtype=torch.int64), inner, torch.tensor([tokens])]).to(DEVICE)


def advantages() -> Iterator[tuple[str, Any]]:
    """Advantages and counterfactual advantages, in even and in ragged groups."""
    rewards, weights = normal(B, K), normal(B, K).abs()
    rewards[1, 0] = rewards[4] = torch.nan
    ragged = [i % 4 for i in range(B)]
    given: dict[str, Any] = {"weights": weights, "backend": "triton"}
    kl: dict[str, Any] = {"kl": normal(B), "beta": 0.1}  # only this profile has the KL in the score
    for profile in ("maestro", "grpo", "grpo_batch", "gdpo", "rloo", "verl_gdpo"):
        more = kl if profile == "maestro" else {}
        lengths = torch.arange(B).to(DEVICE) + 1 if profile == "verl_gdpo" else None
        for groups in (G, ragged):
            out = ops.group_advantages(rewards, groups=groups, lengths=lengths, profile=profile, **given, **more)
            yield f"group_advantages, {profile}", out
    for groups in (G, ragged):
        actions = torch.eye(K).to(DEVICE)
        out = ops.counterfactual_advantages(rewards, action_weights=actions, groups=groups, **given, **kl)
        yield "counterfactual_advantages", out


def conductor() -> Iterator[tuple[str, Any]]:
    """Pooling, the Conductor's weights, the adaptive step and the Conductor's update."""
    h, hidden, rewards = normal(B, D), normal(LONG, D), normal(B, K)
    for mode in ("last", "mean"):
        yield f"pool_hidden, {mode}", ops.pool_hidden(hidden, cu_seqlens=bounds(LONG), mode=mode, backend="triton")
    short = bounds(T)
    yield "pool_hidden, one chunk", ops.pool_hidden(hidden[:T], cu_seqlens=short, mode="mean", backend="triton")
    for units in (None, H):
        params = head(units)
        for mode in ("sample", "soft"):
            yield f"conductor_weights, {units}", ops.conductor_weights(h, params, mode=mode, backend="triton")
        yield f"maestro_advantages, {units}", ops.maestro_advantages(rewards, params, G, h=h, backend="triton")
        for pool in ("last", "mean"):
            out = ops.maestro_advantages(
                rewards, params, G, hidden=hidden, cu_seqlens=bounds(LONG), pool=pool, backend="triton"
            )
            yield f"maestro_advantages, {units}, {pool}", out
        yield f"conductor_update, {units}", updated(h, params)


def updated(h: Tensor, params: ConductorParams) -> list[Tensor]:
    learned = {f.name: getattr(params, f.name) for f in fields(params) if f.name not in ("mean", "rstd")}
    moments = {
        name: update_kernel.Moments(torch.zeros_like(x), torch.zeros_like(x))
        for name, x in learned.items()
        if x is not None
    }
    done = update_kernel.conductor_update(
        h,
        torch.arange(B).to(DEVICE) % K,
        normal(B),
        params,
        moments,
        update_kernel.activations(h, params),
        tau=1.0,
        min_prob=0.05,
        entropy_coef=0.3,
        adamw=update_kernel.AdamW(1, 1e-3),
        live=torch.arange(B).to(DEVICE) % 3 > 0,
    )
    return [done.objective, done.squares, *(x for x in learned.values() if x is not None)]


def losses() -> Iterator[tuple[str, Any]]:
    """The policy loss of given log-probs, with its gradient."""
    configs = [
        PolicyLossConfig("dapo", kl_coef=0.1, entropy_coef=0.1),
        PolicyLossConfig("grpo", ratio="sequence", sampler_correction="sequence_mask"),
        PolicyLossConfig("bnpo", objective="cispo", clip_max=2.0, sampler_correction="token_truncate"),
    ]
    for config in configs:
        now = (-normal(T).abs()).requires_grad_()
        loss, metrics = ops.policy_loss(
            now,
            normal(B),
            bounds(T),
            old_logprobs=-normal(T).abs(),
            ref_logprobs=-normal(T).abs(),
            sampling_logprobs=-normal(T).abs(),
            entropies=normal(T).abs(),
            token_mask=torch.arange(T).to(DEVICE) % 5 > 0,
            normalizer=float(T),
            config=config,
            backend="triton",
        )
        yield f"policy_loss, {config.normalization}", [loss, *metrics.values(), *torch.autograd.grad(loss, now)]


def head_pass() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the matrix of the LM head, and targets from the whole vocabulary, one of which is ignored."""
    targets = (torch.arange(T) * 331 % V).to(DEVICE)
    targets[3] = -100
    hidden, lm_head = ((normal(n, WIDTH) / WIDTH**0.25).to(DTYPE).requires_grad_() for n in (T, V))
    return hidden, lm_head, targets


def logprobs() -> Iterator[tuple[str, Any]]:
    """Log-probs and entropies by both strategies, with their gradients."""
    strategies: tuple[Any, ...] = ("chunked", "fused")
    for strategy in strategies:
        hidden, lm_head, targets = head_pass()
        bias = normal(V).to(DTYPE).requires_grad_()
        given: dict[str, Any] = {"bias": bias, "softcap": 9.0, "temperature": 0.7, "entropy": "grad"}
        values = ops.token_logprobs(hidden, lm_head, targets, **given, strategy=strategy, backend="triton")
        total = values.logprobs.sum() + values.entropies.sum()
        yield f"token_logprobs, {strategy}", [*values, *torch.autograd.grad(total, [hidden, lm_head, bias])]


def sweep() -> Iterator[tuple[str, Any]]:
    """Head and loss in one sweep, with the gradients. Every second sequence has the advantage 0."""
    hidden, lm_head, targets = head_pass()
    advantages = torch.randn(B)
    advantages[::2] = 0.0
    config = PolicyLossConfig("dapo")
    found = ops.linear_policy_loss(
        hidden,
        lm_head,
        targets,
        advantages,
        bounds(T).cpu(),
        old_logprobs=-normal(T).abs(),
        normalizer=float(T),
        mean_entropy=True,
        config=config,
    )
    gradients = torch.autograd.grad(found.loss, [hidden, lm_head])
    yield "linear_policy_loss", [found.loss, *found.metrics.values(), found.logprobs, *gradients]


GROUPS = (advantages, conductor, losses, logprobs, sweep)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_results_are_finite(group: Callable[[], Iterator[tuple[str, Any]]]) -> None:
    torch.manual_seed(0)
    for name, results in group():
        tensors = [x for x in pytree.tree_leaves(results) if isinstance(x, Tensor)]
        bad = [i for i, x in enumerate(tensors) if not bool(x.isfinite().all())]
        assert tensors and not bad, f"{name}: outputs {bad} of {len(tensors)} are not finite"
        print(f"{name}: {len(tensors)} finite tensors", flush=True)


if __name__ == "__main__":
    for each in GROUPS:
        test_results_are_finite(each)
