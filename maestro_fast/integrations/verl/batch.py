"""What verl's trainer knows of a batch and tells no estimator: which rows are responses, K rewards, hidden states.

verl calls an estimator with token-level rewards, a mask and the uids. Around that call our trainer leaves a
``TrainerBatch`` in ``current``, and the estimator reads the rest from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from maestro_fast.integrations.verl.rows import PromptRank, Rows

    Advantages = Callable[["TrainerBatch", Rows, Tensor, Tensor | None], Tensor]

ESTIMATORS = ("maestro", "fast_grpo", "fast_dr_grpo", "fast_rloo", "fast_gdpo")  # our values of adv_estimator
CONTEXT_FLAG = "maestro_context"  # The batch asks the engine for contexts by this key; its value is the kind.
CONTEXT_FIELD = "maestro_h"  # The engine's answer, and its column in the TransferQueue.


@dataclass
class TrainerBatch:
    """One batch of B rows, as the queue holds them.

    Attributes:
        keys: "{uid}_{session}_{output}" of each row. An agent's session may have several outputs.
        padding: whether a row only fills the batch up and is nobody's response.
        order: the rank of each row's prompt, by which groups are sorted; None leaves them in the order of the batch.
        values_of: gives the rewards of these names, float32 [B, K], NaN where a reward abstained; utilities likewise.
        scores_B: float32 [B], the scores before verl's KL penalty, if there is a penalty.
        advantages: computes those of the estimator ``maestro``, see ``weigher.Weigher.advantages``.
        context_Bd: float32 [B, d], what the policy reads; None if it reads nothing.
        columns: columns of the data for the policy, B entries each.
        families: the task family of each row, verl's ``data_source``; empty where the data have none.
        prompts: the prompt of each row as messages, where something is decided by prompt; else empty.
        metrics: the figures that the estimator wants in verl's log.
    """

    keys: Sequence[str]
    padding: Sequence[bool]
    order: Sequence[PromptRank] | None
    values_of: Callable[[Sequence[str]], Tensor]
    scores_B: Tensor | None = None
    advantages: Advantages | None = None
    context_Bd: Tensor | None = None
    columns: dict[str, list[object]] = field(default_factory=dict)
    families: Sequence[str] = ()
    prompts: Sequence[object] = ()
    metrics: dict[str, float] = field(default_factory=dict)


current: ContextVar[TrainerBatch | None] = ContextVar("maestro_fast_verl_batch", default=None)
