"""The loss from hidden states with backend="triton" against a float64 composition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import head, linear_policy_loss, token_logprobs
from maestro_fast.ops.head import Chunk
from tests.kernels.helpers import DEVICE, DTYPES, INTERPRETED, assert_close
from tests.ops.helpers import assert_same_compiled, half_products_on_the_cpu
from tests.ops.linear_policy_loss_batch import (
    ALL_VARIANTS,
    EVERYTHING,
    LENGTHS,
    Batch,
    random_batch,
    values_and_gradients,
)
from tests.ops.test_token_logprobs import IGNORE_TRACING

EPSILON = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}  # rounded in the states and at the end
# In the interpreter, which is slow: one longer than a chunk, one as long, one empty, and two in a chunk, as in LENGTHS.
FEWER = (3, 0, 16, 1, 17) if INTERPRETED else LENGTHS


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "chunk_rows", lambda vocabulary, device: 16)
    monkeypatch.setattr(head, "product_rows", lambda device: 8)
    if INTERPRETED:
        half_products_on_the_cpu(monkeypatch)


def there(batch: Batch) -> Batch:
    """On the device, leaves again."""
    leaves = [None if x is None else x.detach().to(DEVICE).requires_grad_() for x in batch.leaves]
    moved = {name: None if x is None else x.to(DEVICE) for name, x in batch.tokenwise.items()}
    hidden, lm_head, bias = leaves
    assert hidden is not None and lm_head is not None
    return replace(batch, hidden=hidden, lm_head=lm_head, bias=bias, targets=batch.targets.to(DEVICE), tokenwise=moved)


CASES = [  # what differs in the sweep: whole responses, both gradients, none of the log-probs before
    ("gspo, KL, entropy bonus", False),
    ("gspo, two-sided clip, sampler", False),
    ("gspo, two-sided clip, sampler", True),
    ("cispo, entropy bonus", False),
    ("dapo", False),
    ("dapo", True),
]


# In the interpreter, which is slow, one variant of each kind of ratio stands for the others in 16 bits.
SLOW = [(*case, dtype) for case in CASES for dtype in DTYPES if not INTERPRETED or dtype is torch.float32]
SLOW += [(name, False, torch.float16) for name in ("dapo", "gspo, KL, entropy bonus") if INTERPRETED]


@pytest.mark.parametrize(("variant", "on_policy", "dtype"), SLOW)
def test_equals_the_composition(variant: str, on_policy: bool, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"old_logprobs": None} if on_policy else {}
    batch = random_batch(lengths=FEWER, masked=True).to(dtype)
    config, exact = ALL_VARIANTS[variant], batch.to(torch.float64)
    ours = values_and_gradients(Batch.ours, there(batch), config, EVERYTHING, backend="triton", **options)
    plain = values_and_gradients(Batch.ours, batch, config, EVERYTHING, backend="torch", **options)
    truth = values_and_gradients(Batch.composed, exact, config, EVERYTHING, **options)
    for i, (mine, written, wanted) in enumerate(zip(ours, truth, plain, strict=True)):
        assert_close(mine, written, wanted.detach().double(), epsilon=EPSILON[dtype], what=f"{variant} {i}")


@IGNORE_TRACING
@pytest.mark.parametrize("dtype", [x for x in DTYPES if not INTERPRETED or x is torch.float32], ids=str)
def test_a_trained_head_compiles_to_one_graph(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host knows nothing in a graph: to be bitwise the same, eager mode must not either."""
    monkeypatch.setattr("maestro_fast.ops.sweep.readable", lambda x: False)
    batch = there(random_batch(lengths=FEWER).to(dtype))
    given = batch.targets, batch.advantages.to(DEVICE), batch.cu_seqlens.to(DEVICE)

    def op(hidden: Tensor, lm_head: Tensor, bias: Tensor, *rest: Tensor) -> list[Tensor]:
        loss, metrics, logprobs = linear_policy_loss(
            hidden, lm_head, *rest, bias=bias, normalizer=50.0, config=ALL_VARIANTS["dapo"], backend="triton"
        )
        return [loss, *metrics.values(), logprobs]

    assert_same_compiled(op, *batch.leaves, *given)


@pytest.mark.parametrize("variant", ["dapo", "gspo"])
def test_two_chunks_of_a_16_bit_head_share_the_products_of_the_gradient(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are float32 of at most 8 rows; the gradient's products have 16 rows, or as many as responses allow."""
    rows: dict[str, list[int]] = {"logits": [], "dhidden": [], "add_dweight_": []}

    def counted(name: str) -> Any:
        original = getattr(Chunk, name)

        def method(self: Chunk, *args: Any) -> Any:
            rows[name].append(self.hidden.shape[0])
            return original(self, *args)

        return method

    for name in rows:
        monkeypatch.setattr(Chunk, name, counted(name))
    batch = there(random_batch(lengths=FEWER, masked=False).to(torch.float16))
    loss = batch.ours(ALL_VARIANTS[variant], backend="triton")
    torch.autograd.grad(loss.loss, batch.leaves)
    tokens = len(batch.targets)
    longer = sum(n for n in batch.lengths if n > 8) if variant == "gspo" else 0
    assert max(rows["logits"]) == 8 and sum(rows["logits"]) == tokens + longer
    assert rows["dhidden"] == rows["add_dweight_"] and sum(rows["dhidden"]) == tokens
    assert max(rows["dhidden"]) == 16
    if variant == "dapo":
        assert rows["dhidden"] == [16] * (tokens // 16) + [tokens % 16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_are_bitwise_those_of_the_op(dtype: torch.dtype) -> None:
    batch = there(random_batch(lengths=FEWER, masked=False).to(dtype))
    swept = batch.ours(ALL_VARIANTS["dapo"], EVERYTHING, backend="triton").logprobs
    expected = token_logprobs(
        batch.hidden, batch.lm_head, batch.targets, bias=batch.bias, **EVERYTHING, backend="triton"
    )
    assert torch.equal(swept, expected.logprobs)
