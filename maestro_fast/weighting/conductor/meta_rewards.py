"""What a Conductor is rewarded with: the meta-reward of each response, for the action drawn or for every action."""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_fast.ops.counterfactual_advantages import counterfactual_advantages
from maestro_fast.weighting.conductor.config import ConductorConfig, MetaReward
from maestro_fast.weighting.policy import Outcome
from maestro_fast.weighting.utilities import standardised_utilities


def action_weights(config: ConductorConfig, k: int) -> Tensor:
    """[K, K], row a the weights of action a."""
    return (1.0 - config.alpha) / k + config.alpha * torch.eye(k)


def meta_batch(
    config: ConductorConfig, outcome: Outcome, h_Bd: Tensor, probs_BK: Tensor, custom: MetaReward | None
) -> dict[str, Tensor]:
    """What the buffer keeps of a batch, on the device of the contexts.

    ``h`` [n, d] and ``meta``, [n] or [n, K] as the estimator wants it; ``actions`` [n] and the probabilities
    ``drawn_probs`` [n] that they were drawn with; for ``pathwise`` ``rewards`` [n, K]. Responses from which nothing
    can be learnt are left out: those of groups without spread, and those without a meta-reward.
    """
    if config.estimator == "pathwise":
        return _pathwise_batch(config, outcome, h_Bd, custom)
    device = h_Bd.device
    chosen_B, every_BK = (None if x is None else x.to(device) for x in _meta_rewards(config, outcome, custom))
    assert chosen_B is not None
    live_B = chosen_B.isfinite()
    if config.objective != "custom":  # a group without spread says nothing about any action
        live_B = live_B & ~outcome.advantages.degenerate.to(device)
    assert outcome.weights.actions_B is not None
    actions_B = outcome.weights.actions_B.to(device)
    drawn_B = probs_BK.gather(1, actions_B[:, None])[:, 0]
    meta = chosen_B
    if config.estimator != "reinforce":
        assert every_BK is not None
        meta = every_BK if config.estimator == "all_actions" else chosen_B - (probs_BK * every_BK).sum(-1)
    batch = {"h": h_Bd, "meta": meta, "actions": actions_B}
    if config.capacity is not None:
        batch["drawn_probs"] = drawn_B
    return {name: tensor[live_B] for name, tensor in batch.items()}


def _meta_rewards(config: ConductorConfig, outcome: Outcome, custom: MetaReward | None) -> tuple[Tensor, Tensor | None]:
    """float32 [B] for the drawn actions, NaN where there is none, and [B, K] for every action if the estimator asks."""
    if config.objective == "custom":
        return _custom(config, outcome, custom)
    chosen_B = outcome.advantages.advantages.float().cpu()
    every_BK = _counterfactuals(config, outcome) if config.needs_counterfactuals else None
    if config.objective == "first_order":
        worth_B = standardised_utilities(outcome.context)
        chosen_B = chosen_B * worth_B
        every_BK = None if every_BK is None else every_BK * worth_B[:, None]
    return chosen_B, every_BK


def _counterfactuals(config: ConductorConfig, outcome: Outcome) -> Tensor:
    rewards_BK = outcome.context.rewards_BK
    return (
        counterfactual_advantages(
            rewards_BK,
            outcome.weights.weights_BK,
            action_weights(config, rewards_BK.shape[1]).to(rewards_BK.device),
            outcome.context.group_size,
            kl=outcome.kl_B,
            beta=outcome.beta,
            profile=outcome.profile,
        )
        .float()
        .cpu()
    )


def _custom(config: ConductorConfig, outcome: Outcome, custom: MetaReward | None) -> tuple[Tensor, Tensor | None]:
    assert custom is not None
    found = custom(outcome)
    B, K = outcome.context.rewards_BK.shape
    wanted = [(B, K)] if config.needs_counterfactuals else [(B,)] if config.estimator == "pathwise" else [(B,), (B, K)]
    if not isinstance(found, Tensor) or found.shape not in wanted:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"meta_reward: returned {got}, expected a tensor of shape {' or '.join(map(str, wanted))}")
    found = found.detach().float().cpu()
    if found.ndim == 1:
        return found, None
    assert outcome.weights.actions_B is not None
    return found.gather(1, outcome.weights.actions_B.cpu()[:, None])[:, 0], found


def _pathwise_batch(
    config: ConductorConfig, outcome: Outcome, h_Bd: Tensor, custom: MetaReward | None
) -> dict[str, Tensor]:
    """Whole groups, as advantages are formed anew; a response without a coefficient gets 0."""
    context = outcome.context
    if config.objective == "custom":
        worth_B, _ = _custom(config, outcome, custom)
    else:
        worth_B = standardised_utilities(context)
    kept_B = (worth_B.isfinite() & (worth_B != 0)).view(-1, context.group_size).any(1)
    kept_B = kept_B.repeat_interleave(context.group_size)
    batch = {"h": h_Bd, "meta": worth_B.nan_to_num(0.0), "rewards": context.rewards_BK.float()}
    if outcome.kl_B is not None:
        batch["kl_penalty"] = outcome.beta * outcome.kl_B.float()
    return {
        **{name: tensor.to(h_Bd.device)[kept_B.to(h_Bd.device)] for name, tensor in batch.items()},
        "group_size": torch.tensor(context.group_size),
    }
