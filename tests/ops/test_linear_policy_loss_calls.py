"""The loss from hidden states in a graph of torch.compile, on fake tensors, and called wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import linear_policy_loss
from tests.ops.helpers import assert_same_compiled, assert_same_fake
from tests.ops.linear_policy_loss_batch import ALL_VARIANTS, random_batch
from tests.ops.parity import make
from tests.ops.test_token_logprobs import IGNORE_TRACING


@IGNORE_TRACING
@pytest.mark.parametrize("variant", ["dapo", "sampler sequence_truncate", "gspo, KL, entropy bonus"])
def test_compiles_to_one_graph_and_runs_on_fake_tensors(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph the host knows nothing: to be bitwise the same, eager mode must not either."""
    monkeypatch.setattr("maestro_fast.ops.sweep.readable", lambda x: False)
    monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: 32)
    batch = random_batch().to(torch.float32)
    names = ["old_logprobs", "ref_logprobs", "sampling_logprobs", "token_mask"]

    def op(hidden: Tensor, lm_head: Tensor, bias: Tensor, *rest: Tensor) -> list[Tensor]:
        targets, advantages, bounds, *tokenwise = rest
        given = {**dict(zip(names, tokenwise, strict=True)), "normalizer": 50.0, "mean_entropy": True}
        loss, metrics, _ = linear_policy_loss(
            hidden, lm_head, targets, advantages, bounds, bias=bias, softcap=8.0, config=ALL_VARIANTS[variant], **given
        )
        return [loss, *metrics.values()]

    def with_gradients(*arguments: Tensor) -> list[Tensor]:
        results = op(*arguments)
        return results + list(torch.autograd.grad(results[0], arguments[:3]))

    tokenwise = [batch.tokenwise[name] for name in names]
    tokenwise[2] = tokenwise[0]  # one tensor under two names
    arguments = (*batch.leaves, batch.targets, batch.advantages, batch.cu_seqlens, *tokenwise)
    assert_same_fake(with_gradients, *arguments)
    assert_same_compiled(op, *arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lm_head": torch.ones(7, 5)}, ValueError, r"lm_head: shape \(7, 5\), expected \[V, 4\]"),
        ({"targets": torch.tensor([0, 7, 1, 0, 0])}, ValueError, "targets: 7 in row 1"),
        ({"temperature": 0.0}, ValueError, "temperature: 0.0"),
        ({"advantages": torch.ones(3)}, ValueError, r"advantages, cu_seqlens: shapes \(3,\) and \(3,\)"),
        ({"advantages": torch.ones(2, device="meta")}, ValueError, "advantages: on meta, expected cpu as hidden"),
        ({"advantages": torch.ones(2, requires_grad=True)}, ValueError, "advantages: requires a gradient"),
        ({"old_logprobs": torch.ones(5, requires_grad=True)}, ValueError, "old_logprobs: requires a gradient"),
        ({"old_logprobs": torch.ones(4)}, ValueError, r"old_logprobs: shape \(4,\), expected \(5,\)"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, ValueError, "cu_seqlens: from 0 to 4, expected"),
        ({"token_mask": torch.ones(2)}, ValueError, "token_mask: shape"),
        ({"config": make("bnpo", kl_coef=0.1)}, ValueError, "ref_logprobs: missing"),
        ({"config": make("bnpo", sampler_correction="token_mask")}, ValueError, "sampling_logprobs: missing"),
        ({"config": make("dapo")}, ValueError, "normalizer: missing"),
        ({"active": torch.ones(3, dtype=torch.bool)}, ValueError, r"active: shape \(3,\), expected \(2,\)"),
        ({"active": torch.ones(2)}, TypeError, "active: dtype torch.float32, expected torch.bool"),
        ({"active": torch.tensor([True, False])}, ValueError, "active: False for response 1 with advantage 2, exp"),
        (
            {"active": torch.tensor([True, True]), "config": make("bnpo", entropy_coef=0.1)},
            ValueError,
            "active: given with kl_coef=0.0 and entropy_coef=0.1",
        ),
    ],
)
def test_errors_name_the_argument(
    changes: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gemm(*args: Any) -> None:
        raise AssertionError("a GEMM before the inputs were looked at")

    monkeypatch.setattr("maestro_fast.ops.head.Chunk.logits", no_gemm)
    arguments: dict[str, Any] = {
        "hidden": torch.ones(5, 4),
        "lm_head": torch.ones(7, 4),
        "targets": torch.zeros(5, dtype=torch.int64),
        "advantages": torch.full((2,), 2.0),
        "cu_seqlens": torch.tensor([0, 2, 5]),
        "config": make("bnpo"),
        **changes,
    }
    function: Callable[..., Any] = linear_policy_loss
    with pytest.raises(error, match=message):
        function(**arguments)
