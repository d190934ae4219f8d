"""What is done in a step, apart from the optimiser, and what can be refused before anything is copied or moved."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass, field

from torch import nn

from maestro_fast.generation import SamplingConfig
from maestro_fast.model.head import causal_lm, head_of
from maestro_fast.ops import AdvantageProfile, PolicyLossConfig
from maestro_fast.training.batches import BatchConfig, BatchPlan
from maestro_fast.training.data import PromptDataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """Sampling, batch sizes, advantages and loss. ``evaluation_samples``: responses per prompt of an evaluation."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    profile: str | AdvantageProfile = "maestro"
    seed: int = 0
    evaluation_samples: int = 1

    def __post_init__(self) -> None:
        if self.evaluation_samples < 1:
            raise ValueError(f"evaluation_samples: {self.evaluation_samples}, expected at least 1")


def checked_plan(method: Method, model: nn.Module, dataset: PromptDataset, processes: int) -> BatchPlan:
    """How a batch divides over ``processes``.

    Raises:
        ValueError: numbers that do not divide, too few prompts, or a model that cannot be served.
    """
    plan = BatchPlan.of(method.batch, method.sampling.group_size, processes)
    block = method.batch.prompts_per_batch
    if len(dataset) < block:
        raise ValueError(f"batch.prompts_per_batch: {block}, but the data holds {len(dataset)} prompts")
    language_model = causal_lm(model)
    if "logits_to_keep" not in inspect.signature(language_model.forward).parameters:
        raise ValueError(
            f"model: {type(language_model).__name__}.forward takes no logits_to_keep, so it would form all logits"
        )
    head_of(model)
    return plan


def check_positions(model: nn.Module, longest_prompt: int, sampling: SamplingConfig) -> None:
    """Warns where the longest response, in tokens, reaches past the positions that a model with RoPE was trained on.

    Raises:
        ValueError: it does, and the model has no further positions.
    """
    language_model = causal_lm(model)
    config = language_model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or longest_prompt + sampling.max_new_tokens <= positions:
        return
    complaint = (
        f"sampling.max_new_tokens: {sampling.max_new_tokens} after the longest prompt of {longest_prompt} tokens, "
        f"expected at most {positions} together, the positions of {type(language_model).__name__}"
    )
    if getattr(config, "rope_parameters", None) is None:  # learned, or a table of that length
        raise ValueError(complaint)
    logger.warning(complaint)
