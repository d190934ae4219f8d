"""Checks what rewards and the weight policy expect of the columns of the data, before a run."""

from __future__ import annotations

import logging

from maestro_fast.data.dataset import PromptDataset
from maestro_fast.data.files import Row
from maestro_fast.rewards import RewardSet, masks, needed_columns
from maestro_fast.settings import SettingsError
from maestro_fast.weighting import WeightPolicy

logger = logging.getLogger(__name__)


def check_conditions(
    rewards: RewardSet,
    anchor: RewardSet | None,
    weights: WeightPolicy,
    dataset: PromptDataset,
    evaluation: PromptDataset | None,
) -> None:
    """Checks what rewards and the weight policy expect of the columns of the data, which are known before the run.

    These are the columns that rewards need, in the training data and in the held-out ones; the conditions ``where`` of
    all rewards, whose values may stand in held-out prompts alone; and the columns that the weight policy reads. Of a
    stream the first rows are known. They tell its columns, but not all their values, so those are not checked.

    Raises:
        ValueError: the data have no such column or value, so that a reward would abstain for ever, or the policy would
            fail at some batch.
    """
    rows = _rows_of_columns(dataset)
    both = rows + ([] if evaluation is None else _rows_of_columns(evaluation))
    named = [(f"rewards[{i}]", reward) for i, reward in enumerate(rewards.rewards)]
    named += [("anchor", reward) for reward in (() if anchor is None else anchor.rewards)]
    unchecked = []
    for path, reward in named:
        for kind, data in (("training", dataset), ("held-out", evaluation)):
            missing = [] if data is None else sorted(needed_columns(reward, data.rows) - {*data.columns})
            if data is not None and missing:
                raise SettingsError(
                    f"{path}: {reward.name!r} reads the column {missing[0]!r}, the columns of the {kind} data are "
                    f"{', '.join(sorted(data.columns)) or 'none'}"
                )
        for where, mask in masks(reward, path):
            if dataset.streaming:
                unchecked.append(where)
            else:
                mask.check_rows(both, where)
    columns = sorted({name for row in rows for name in row})
    for name in weights.needs_columns:
        if name not in columns:
            listed = ", ".join(columns) or "none"
            raise ValueError(f"weights: policy {weights.name!r} reads the column {name!r}, the data has {listed}")
    check = getattr(weights, "check_rows", None)
    if check is not None and dataset.streaming:
        unchecked.append("weights")
    elif check is not None:
        check(rows)
    if unchecked:
        logger.info("data.streaming: whether values of the data fit %s is not known before", ", ".join(unchecked))


def _rows_of_columns(dataset: PromptDataset) -> list[Row]:
    """The rows of a data set without their prompts, which are no column for a reward."""
    return [{name: value for name, value in row.items() if name != dataset.prompt_column} for row in dataset.rows]
