"""What a weight policy gets to see of a generation batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from maestro_fast.records import PolicyOutputs, Rollouts
from maestro_fast.training.scoring import reads_reference
from maestro_fast.weighting import WeightContext

if TYPE_CHECKING:
    from maestro_fast.training.pipeline import Pipeline, Sampled


def weight_context(
    pipeline: Pipeline,
    sampled: Sampled,
    rewards_BK: Tensor,
    outputs: PolicyOutputs | None,
    utilities_B: Tensor | None,
) -> WeightContext:
    """The context over all processes; ``rewards_BK`` and ``utilities_B`` come gathered."""
    return WeightContext(
        pipeline.rewards.names,
        pipeline.sampling.group_size,
        sampled.number,
        rewards_BK,
        _hidden(pipeline, sampled.rollouts, outputs),
        utilities_B,
        _columns(pipeline, sampled.rollouts),
    )


def _hidden(pipeline: Pipeline, rollouts: Rollouts, outputs: PolicyOutputs | None) -> Tensor | None:
    """[B, d], the states that the policy asked for."""
    if reads_reference(pipeline.weights):
        assert pipeline.reference is not None
        with pipeline.reference() as (model, _):
            return pipeline.gather(pipeline.prompt_contexts(model, rollouts.prompts.token_ids))
    if outputs is None or outputs.context_Bd is None:
        return None
    return pipeline.gather(outputs.context_Bd)


def _columns(pipeline: Pipeline, rollouts: Rollouts) -> dict[str, list[Any]]:
    columns = rollouts.prompts.columns
    for name in pipeline.weights.needs_columns:
        if name not in columns:
            raise ValueError(
                f"weights: policy {pipeline.weights.name!r} reads the column {name!r}, the data has "
                f"{', '.join(sorted(columns)) or 'none beside the prompts'}"
            )
    return {name: pipeline.gather_objects(columns[name]) for name in pipeline.weights.needs_columns}
