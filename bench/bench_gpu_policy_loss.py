"""Times policy_loss by Triton, with gradient and metrics, beside TRL's loss, the PyTorch reference and its compilation.

A call computes the loss, its metrics and the gradient of the log-probs. The kernel writes the gradient with the loss.
Autograd adds a slice and a product when it hands the gradient over; "triton" includes them, and "triton, the launch
alone" does not. TRL computes on padded [B, T], as it does in training, and reads its metrics on the host.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu_gate import gate, normal, wide
from bench.gpu_race import DEVICE, DRY, MARKS, Contender, compiled, copy_of, race, report
from maestro_fast.ops import PolicyLossConfig, policy_loss
from tests.ops.trl_oracle import trl_policy_loss

pytestmark = MARKS
B, MEAN_LENGTH = (6, 8) if DRY else (512, 256)
T = B * MEAN_LENGTH  # 131,072 tokens
CONFIGS = {"dapo": PolicyLossConfig("dapo"), "grpo, KL": PolicyLossConfig("grpo", kl_coef=0.04)}


def lengths() -> Tensor:
    """The lengths of the responses, int64 [B] on the CPU: 0.5 to 1.5 times the mean length, and T in all."""
    steps = torch.arange(B) * MEAN_LENGTH // max(1, B - 1) + MEAN_LENGTH // 2
    steps[-1] += T - steps.sum()
    assert steps.min() > 0
    return steps[torch.randperm(B, generator=torch.Generator().manual_seed(0))]


def inputs(config: PolicyLossConfig) -> dict[str, Any]:
    now = -normal(T, seed=1).abs()
    return {
        "logprobs": now.requires_grad_(),
        "advantages": normal(B, seed=2),
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), lengths().cumsum(0)]).to(DEVICE),
        "old_logprobs": now.detach() + 0.1 * normal(T, seed=3),
        "ref_logprobs": now.detach() + 0.3 * normal(T, seed=4) if config.kl_coef else None,
        "normalizer": float(T) if config.normalization == "dapo" else None,
    }


def with_gradient(given: dict[str, Any], config: PolicyLossConfig, backend: Any) -> tuple[Tensor, Tensor, Any]:
    loss, metrics = policy_loss(**given, config=config, backend=backend)
    return loss, torch.autograd.grad(loss, given["logprobs"])[0], metrics


def trl(given: dict[str, Any], config: PolicyLossConfig) -> Contender:
    """TRL's ``_compute_loss`` on the same tokens. They are padded beforehand, which is not timed."""
    sizes = lengths().tolist()
    pad = {
        name: torch.nn.utils.rnn.pad_sequence(list(x.detach().split(sizes)), batch_first=True)
        for name, x in {**given, "mask": torch.ones(T, device=DEVICE)}.items()
        if isinstance(x, Tensor) and x.shape == (T,)
    }
    leaf = pad["logprobs"].requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        loss, _ = trl_policy_loss(
            leaf,
            pad["mask"],
            given["advantages"],
            loss_type=config.normalization,
            beta=config.kl_coef,
            old_logprobs_BT=pad["old_logprobs"],
            ref_logprobs_BT=pad.get("ref_logprobs"),
            num_items=T,
        )
        return loss, torch.autograd.grad(loss, leaf)[0]

    return Contender("TRL's loss", run)


@pytest.mark.parametrize("name", [pytest.param("dapo", marks=pytest.mark.headline), "grpo, KL"])
def test_policy_loss(capsys: Any, name: str) -> None:
    config = CONFIGS[name]
    given = inputs(config)
    true = {key: wide(value) for key, value in given.items()}
    true["logprobs"] = true["logprobs"].detach().requires_grad_()
    ours, plain, truth = (
        with_gradient(*case) for case in ((given, config, "triton"), (given, config, "torch"), (true, config, "torch"))
    )
    for what, *values in zip(("loss", "gradient"), ours, plain, truth, strict=False):
        gate(*(T * x if what == "gradient" else x for x in values), epsilon=2e-6, what=what)  # a mean over T
    for key, expected in truth[2].items():
        gate(ours[2][key], plain[2][key], expected, epsilon=2e-6, what=key)

    def alone() -> Any:
        with torch.no_grad():
            return policy_loss(**given, config=config, backend="triton")

    contenders = [
        Contender("triton", lambda: with_gradient(given, config, "triton"), peer=False),
        Contender("triton, the launch alone", alone, peer=False),
        Contender("torch reference", lambda: with_gradient(given, config, "torch")),
        *_compiled(given, config),
    ]
    notes = []
    if find_spec("trl") is None:
        notes.append("TRL's loss: left out, trl is not installed")
    else:
        theirs = trl(given, config)
        torch.testing.assert_close(theirs.run()[0].double(), truth[0], rtol=1e-4, atol=1e-5)  # the same work
        contenders.append(theirs)
    moved = 4 * (T * (3 + bool(config.kl_coef)) + 2 * B) + 8 * B
    case = f"{name}, B = {B}, T = {T}, {DEVICE}"
    report(capsys, "policy_loss", case, race([*contenders, copy_of(moved)]), moved, notes)


def _compiled(given: dict[str, Any], config: PolicyLossConfig) -> list[Contender]:
    """Compiles the forward into one graph. Autograd runs the backward that was compiled with it."""
    return [
        Contender(forward.name, lambda run=forward.run: torch.autograd.grad(run()[0], given["logprobs"])[0])
        for forward in compiled(lambda: policy_loss(**given, config=config, backend="torch"))
    ]
