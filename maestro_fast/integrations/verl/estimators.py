"""Estimators for verl: ``maestro``, and verl's own GRPO, Dr.GRPO, RLOO and GDPO made fast.

verl calls each with token-level rewards [B, L], a mask [B, L] and the uids, and wants advantages and returns [B, L],
which for outcome rewards are the same. What verl does not tell them stands in ``batch.current``. The results of the
fast ones are verl's, except in groups of identical rewards: there verl's are rounding noise, and these exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from maestro_fast.integrations.verl.batch import ESTIMATORS, TrainerBatch, current

if TYPE_CHECKING:
    from torch import Tensor

    from maestro_fast.integrations.verl.rows import Rows
    from maestro_fast.ops import TokenMask

Result = tuple["Tensor", "Tensor"]


def maestro(token_level_rewards: Tensor, response_mask: Tensor, index: Any, config: Any = None, **_: Any) -> Result:
    """The advantages of the run's weight policy, see ``weigher.Weigher``."""
    from maestro_fast.ops import sum_tokens, token_mask

    del index, config
    batch = _batch("maestro")
    assert batch.advantages is not None
    rows, tokens = _rows(batch, ()), token_mask(response_mask)
    penalty = None
    if batch.scores_B is not None:
        penalty = rows.take(batch.scores_B - sum_tokens(token_level_rewards))
    return _on_tokens(batch.advantages(batch, rows, rows.take(tokens.lengths_B), penalty), rows, tokens)


def fast_grpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    config: Any = None,
    norm_adv_by_std_in_grpo: bool | None = None,
    **_: Any,
) -> Result:
    """verl's ``grpo``: with ``norm_adv_by_std_in_grpo``, its default, scores are divided by their group's deviation.

    verl's trainers hand the flag on to its own estimator alone; here it comes from ``config`` unless it is given.
    """
    profile = "verl_grpo" if _normalises(config, norm_adv_by_std_in_grpo) else "verl_dr_grpo"
    return _of_scores(token_level_rewards, response_mask, index, profile)


def fast_dr_grpo(token_level_rewards: Tensor, response_mask: Tensor, index: Any, **_: Any) -> Result:
    """verl's ``grpo`` without ``norm_adv_by_std_in_grpo``, Dr.GRPO (arXiv 2503.20783)."""
    return _of_scores(token_level_rewards, response_mask, index, "verl_dr_grpo")


def fast_rloo(token_level_rewards: Tensor, response_mask: Tensor, index: Any, **_: Any) -> Result:
    """verl's ``rloo`` (arXiv 2402.14740). The only response to a prompt keeps its score."""
    from maestro_fast.ops import PROFILES

    return _of_scores(token_level_rewards, response_mask, index, replace(PROFILES["rloo"], singleton="raw"))


def fast_gdpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    config: Any = None,
    norm_adv_by_std_in_grpo: bool | None = None,
    **_: Any,
) -> Result:
    """verl's ``gdpo`` (arXiv 2601.05242): each reward is normalised in its group, their sum over the tokens.

    It obeys ``norm_adv_by_std_in_grpo`` as ``fast_grpo`` does; verl's trainers forget to hand it on to ``gdpo``.
    """
    import torch

    from maestro_fast.ops import PROFILES, group_advantages, token_mask

    del token_level_rewards
    batch = _batch("fast_gdpo")
    names = [str(name) for name in config.get("gdpo_reward_keys")]
    given = config.get("gdpo_reward_weights")
    weights_K = None if given is None else torch.tensor([float(weight) for weight in given])
    rows, tokens = _rows(batch, index), token_mask(response_mask)
    profile = PROFILES["verl_gdpo"]
    if not _normalises(config, norm_adv_by_std_in_grpo):
        profile = replace(profile, reward_scale="none")
    found = group_advantages(
        rows.take(batch.values_of(names)),
        weights_K,
        rows.groups,
        lengths=rows.take(tokens.lengths_B),
        profile=profile,
    )
    return _on_tokens(found.advantages, rows, tokens)


def _of_scores(token_level_rewards: Tensor, response_mask: Tensor, index: Any, profile: Any) -> Result:
    from maestro_fast.ops import group_advantages, sum_tokens, token_mask

    rows = _rows(current.get(), index)
    scores_R = rows.take(sum_tokens(token_level_rewards))
    advantages_R = group_advantages(scores_R, None, rows.groups, profile=profile).advantages
    return _on_tokens(advantages_R, rows, token_mask(response_mask))


def _on_tokens(advantages_R: Tensor, rows: Rows, tokens: TokenMask) -> Result:
    """The advantage of a row at each of its tokens."""
    out = tokens.spread(rows.spread(advantages_R))
    return out, out


def _rows(batch: TrainerBatch | None, index: Sequence[Any]) -> Rows:
    """The rows that are compared: by the keys of the V1 trainer, else each row with those of its uid."""
    from maestro_fast.integrations.verl.rows import Rows

    if batch is None:
        return Rows.of_uids(index.tolist() if hasattr(index, "tolist") else index)
    return Rows.of_keys(batch.keys, batch.padding, batch.order)


def _batch(estimator: str) -> TrainerBatch:
    batch = current.get()
    if batch is None:
        raise RuntimeError(
            f"adv_estimator={estimator}: verl handed it no rewards by name, expected a V1 trainer "
            "(trainer.use_v1=True) as verl's get_trainer_cls gives it"
        )
    return batch


def _normalises(config: Any, given: bool | None) -> bool:
    if given is not None:
        return given
    return config is None or bool(config.get("norm_adv_by_std_in_grpo", True))


_FUNCTIONS: tuple[Callable[..., Result], ...] = (maestro, fast_grpo, fast_dr_grpo, fast_rloo, fast_gdpo)


def register(core_algos: Any) -> None:
    """Registers the estimators with verl's module ``core_algos``."""
    for name, function in zip(ESTIMATORS, _FUNCTIONS, strict=True):
        core_algos.register_adv_est(name)(function)
