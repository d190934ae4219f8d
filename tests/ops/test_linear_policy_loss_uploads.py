"""What the loss from hidden states copies from the host to a device, for which the meta device stands here."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from maestro_fast.ops import linear_policy_loss
from tests.ops.linear_policy_loss_batch import ALL_VARIANTS, CHUNK, random_batch

META = torch.device("meta")
WAITS = {"aten._local_scalar_dense.default", "aten.equal.default", "aten.nonzero.default"}  # for values of the device


class Traffic(TorchDispatchMode):
    """Counts copies between host and device, with and without waiting, and other operations that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        before, after = (
            {x.device.type for x in pytree.tree_leaves(y) if isinstance(x, Tensor)} for y in ((args, kwargs), result)
        )
        name = str(func)
        if "copy" in name and "meta" in before | after and before != after:
            waits = not kwargs.get("non_blocking", False)
            self.count["to the host" if "meta" in before else "pageable" if waits else "upload"] += 1
        elif name in WAITS and "meta" in before:
            self.count[name] += 1
        return result


@pytest.fixture(autouse=True)
def pinned(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Small chunks, and how many tensors were pinned, which needs a real device, as its autocast does."""
    count: Counter[str] = Counter()

    def pin(x: Tensor) -> Tensor:
        count["pinned"] += 1
        return x

    monkeypatch.setattr(sys.modules[linear_policy_loss.__module__], "_pinned", pin)
    monkeypatch.setattr("maestro_fast.ops.head.without_autocast", lambda x: torch.autocast("cpu", enabled=False))
    monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: CHUNK)
    return count


def run(variant: str, device: torch.device) -> Counter[str]:
    """A loss and its gradient on the device, with what the host may read on the CPU."""
    batch = random_batch().to(torch.float32)
    mask = batch.tokenwise["token_mask"]
    leaves = [x.detach().to(device).requires_grad_() for x in batch.leaves if x is not None]
    moved = {name: x if name == "token_mask" or x is None else x.to(device) for name, x in batch.tokenwise.items()}
    batch = replace(batch, tokenwise=moved)
    given = batch.given(ALL_VARIANTS[variant], {"token_mask": mask, "normalizer": torch.tensor(50.0)})
    advantages = torch.where(torch.arange(len(batch.lengths)) % 3 == 0, 0.0, batch.advantages)
    config = ALL_VARIANTS[variant]
    with Traffic() as traffic:
        loss = linear_policy_loss(
            leaves[0], leaves[1], batch.targets.to(device), advantages, batch.cu_seqlens, bias=leaves[2],
            active=advantages != 0, config=config, backend="torch", **given,
        ).loss  # fmt: skip
        torch.autograd.grad(loss, leaves)
    return traffic.count


@pytest.mark.parametrize("variant", ["dapo", "gspo"])
def test_one_upload_of_all_indices_and_no_waiting(variant: str, pinned: Counter[str]) -> None:
    """Of advantages, bounds, mask, active and normalizer, and of the indices of all chunks."""
    count = run(variant, META)
    targets = count.pop("pageable")  # of this test
    assert targets == 1 and count == {"upload": 6} and pinned["pinned"] == 6


def test_nothing_is_copied_on_the_cpu(pinned: Counter[str]) -> None:
    assert run("dapo", torch.device("cpu")) == {} and pinned == {}


def test_a_tensor_on_the_host_is_refused_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[linear_policy_loss.__module__], "_captures", lambda device: True)
    with pytest.raises(ValueError, match="advantages: on the CPU while a CUDA graph is captured, expected meta"):
        run("dapo", META)
