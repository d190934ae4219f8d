"""The functional API: the ops of a GRPO step as functions of tensors, for any training loop.

Shapes: B responses in N groups, K rewards, d hidden size, T tokens (packed), V vocabulary.
"""

from maestro_fast.ops.backend import SERVED_BY
from maestro_fast.ops.conductor_update import conductor_update
from maestro_fast.ops.conductor_weights import ConductorSample, conductor_weights
from maestro_fast.ops.counterfactual_advantages import counterfactual_advantages
from maestro_fast.ops.group_advantages import GroupAdvantages, group_advantages
from maestro_fast.ops.groups import Groups
from maestro_fast.ops.linear_policy_loss import linear_policy_loss
from maestro_fast.ops.loss_function import loss_function
from maestro_fast.ops.maestro_advantages import maestro_advantages
from maestro_fast.ops.pack_sequences import balance_sequences, pack_sequences
from maestro_fast.ops.policy_loss import policy_loss
from maestro_fast.ops.pool_hidden import pool_hidden
from maestro_fast.ops.token_logprobs import token_logprobs
from maestro_fast.ops.token_mask import TokenMask, sum_tokens, token_mask
from maestro_fast.specs import (
    PROFILES,
    AdvantageProfile,
    ConductorBatch,
    ConductorParams,
    ConductorState,
    ConductorUpdateConfig,
    LinearPolicyLoss,
    LossFunction,
    LossInputs,
    PolicyLoss,
    PolicyLossConfig,
    TokenLogprobs,
)

__all__ = [
    "PROFILES",
    "SERVED_BY",
    "AdvantageProfile",
    "ConductorBatch",
    "ConductorParams",
    "ConductorSample",
    "ConductorState",
    "ConductorUpdateConfig",
    "GroupAdvantages",
    "Groups",
    "LinearPolicyLoss",
    "LossFunction",
    "LossInputs",
    "PolicyLoss",
    "PolicyLossConfig",
    "TokenLogprobs",
    "TokenMask",
    "balance_sequences",
    "conductor_update",
    "conductor_weights",
    "counterfactual_advantages",
    "group_advantages",
    "linear_policy_loss",
    "loss_function",
    "maestro_advantages",
    "pack_sequences",
    "policy_loss",
    "pool_hidden",
    "sum_tokens",
    "token_logprobs",
    "token_mask",
]
