"""Where a ratio, a sampler's weight or k3 leaves the range of float32: the reference against exact arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import LossInputs, PolicyLossConfig, policy_loss
from tests.ops.overflow import VARIANTS, check_overflow


def by_the_reference(inputs: LossInputs, config: PolicyLossConfig) -> tuple[Tensor, Tensor]:
    loss = policy_loss(**inputs._asdict(), config=config, backend="torch").loss
    return loss, torch.autograd.grad(loss, inputs.logprobs)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_right_where_it_fits_and_never_nan(variant: str) -> None:
    check_overflow(by_the_reference, variant, count=400)
