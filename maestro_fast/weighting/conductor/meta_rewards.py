"""What a Conductor learns from: its meta-rewards, and the estimators of the meta-gradient.

mu_j(a) is the meta-reward of response j if its action had been a. In the paper (MAESTRO, arXiv 2601.07208) it is the
advantage A_j(a). An estimator says what an update maximises, so that the gradient climbs the expected meta-reward:

    reinforce      mean of  mu_j(a_j) log p_j(a_j)
    baseline       mean of  (mu_j(a_j) - sum_a p_j(a) mu_j(a)) log p_j(a_j)
    all_actions    mean of  sum_a p_j(a) mu_j(a)
    pathwise       mean of  c_j A_j(w),  w = p: through the advantages themselves, for soft weights

Each adds entropy_coef * H(p). ``ops.conductor_update`` has the gradients in closed form. The first three have the same
expectation over a response's own action while the other responses keep theirs: what ``baseline`` subtracts does not
depend on that action, and ``all_actions`` computes the sum that the other two sample.

The paper's choice, ``reinforce`` with mu = A, has a known weakness. A is normalised within its group, so its mean is 0
whatever the weights are, and it does not say which reward the task needs. A response's own state lets the Conductor
emphasise the reward on which that response already looks good, which raises A and teaches nothing ("self-flattery").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from maestro_fast.ops.counterfactual_advantages import counterfactual_advantages
from maestro_fast.ops.group_advantages import group_advantages
from maestro_fast.specs import AdvantageProfile, ConductorBatch
from maestro_fast.weighting.policy import Outcome
from maestro_fast.weighting.utilities import standardised_utilities

Estimator = Literal["reinforce", "baseline", "all_actions", "pathwise"]
Objective = Literal["advantage", "first_order", "custom"]
MetaReward = Callable[[Outcome], Tensor]

# --- what is kept of a batch ---


def experience(
    outcome: Outcome,
    h_Bd: Tensor,
    probs_BK: Tensor,
    *,
    objective: Objective,
    estimator: Estimator,
    alpha: float,
    meta_reward: MetaReward | None,
    keep_drawn_probs: bool,
) -> dict[str, Tensor]:
    """What the buffer keeps of a batch, on the device of the contexts.

    Responses from which nothing can be learnt are left out: they are in a group without spread, or have no meta-reward,
    or their action emphasised a reward that abstained from them. Such an action changed nothing, so it gets no credit;
    ``all_actions`` gives it the mean of the other actions, which has next to no gradient.

    Args:
        outcome: the batch and its advantages.
        h_Bd: the contexts that the Conductor read.
        probs_BK: the probabilities that it gave them.
        objective, estimator, alpha: the options of ``ConductorConfig``.
        meta_reward: the user's function for the objective "custom", else None.
        keep_drawn_probs: whether later updates use the batch again and need importance ratios.

    Returns:
        ``h`` [n, d]; ``meta``, [n] or [n, K] as the estimator needs it; ``actions`` [n]; with ``keep_drawn_probs`` also
        ``drawn_probs`` [n], the probabilities that the actions were drawn with. For ``pathwise`` see
        ``_pathwise_experience``.

    Raises:
        ValueError: the user's function returned something else than a tensor of the expected shape, or the batch lacks
            the utilities that the objective needs.
    """
    if estimator == "pathwise":
        return _pathwise_experience(outcome, h_Bd, meta_reward if objective == "custom" else None)
    device = h_Bd.device
    needs_every_action = estimator in ("baseline", "all_actions")
    if objective == "custom":
        assert meta_reward is not None
        chosen_B, every_BK = _custom(meta_reward, outcome, needs_every_action)
        live_B = chosen_B.isfinite().to(device)
    else:
        chosen_B, every_BK = _of_advantages(outcome, objective, alpha if needs_every_action else None)
        # A group without spread says nothing about any action.
        live_B = chosen_B.isfinite().to(device) & ~outcome.advantages.degenerate.to(device)
    assert outcome.weights.actions_B is not None
    actions_B = outcome.weights.actions_B.to(device)
    live_BK = ~outcome.context.rewards_BK.isnan().to(device)
    live_B = live_B & live_BK.any(1)
    if estimator != "all_actions":
        live_B = live_B & live_BK.gather(1, actions_B[:, None])[:, 0]
    meta = chosen_B.to(device)
    if needs_every_action:
        assert every_BK is not None
        every_BK = _without_credit(every_BK.to(device), probs_BK, live_BK)
        meta = every_BK if estimator == "all_actions" else meta - (probs_BK * every_BK).sum(-1)
    batch = {"h": h_Bd, "meta": meta, "actions": actions_B}
    if keep_drawn_probs:
        batch["drawn_probs"] = probs_BK.gather(1, actions_B[:, None])[:, 0]
    return {name: tensor[live_B] for name, tensor in batch.items()}


def _without_credit(every_BK: Tensor, probs_BK: Tensor, live_BK: Tensor) -> Tensor:
    """Meta-rewards of all actions, in which a reward that abstained has the expectation over the others."""
    probs_BK = torch.where(live_BK, probs_BK, 0.0)
    mean_B1 = (probs_BK * every_BK).sum(-1, keepdim=True) / probs_BK.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.where(live_BK, every_BK, mean_B1)


def _of_advantages(outcome: Outcome, objective: Objective, alpha: float | None) -> tuple[Tensor, Tensor | None]:
    """Meta-rewards from the advantages, float32 on the CPU.

    Returns:
        [B] for the actions that were drawn, NaN where a response has no meta-reward; and, where ``alpha`` is given,
        [B, K] for all actions, from the counterfactual advantages.
    """
    chosen_B = outcome.advantages.advantages.float().cpu()
    every_BK = None
    if alpha is not None:
        rewards_BK = outcome.context.rewards_BK
        K = rewards_BK.shape[1]
        action_weights_KK = ((1.0 - alpha) / K + alpha * torch.eye(K)).to(rewards_BK.device)
        every_BK = counterfactual_advantages(
            rewards_BK,
            outcome.multiplied(outcome.weights.weights_BK),
            outcome.multiplied(action_weights_KK),
            outcome.context.group_size,
            kl=outcome.kl_B,
            beta=outcome.beta,
            profile=outcome.profile,
        )
        every_BK = every_BK.float().cpu()
    if objective == "first_order":
        worth_B = standardised_utilities(outcome.context)
        chosen_B = chosen_B * worth_B
        every_BK = None if every_BK is None else every_BK * worth_B[:, None]
    return chosen_B, every_BK


def _custom(meta_reward: MetaReward, outcome: Outcome, needs_every_action: bool) -> tuple[Tensor, Tensor | None]:
    """The user's meta-rewards in the form of ``_of_advantages``."""
    B, K = outcome.context.rewards_BK.shape
    found = _call(meta_reward, outcome, [(B, K)] if needs_every_action else [(B,), (B, K)])
    if found.ndim == 1:
        return found, None
    assert outcome.weights.actions_B is not None
    return found.gather(1, outcome.weights.actions_B.cpu()[:, None])[:, 0], found


def _call(meta_reward: MetaReward, outcome: Outcome, shapes: list[tuple[int, ...]]) -> Tensor:
    """What the user's function returns, float32 on the CPU; ValueError unless it has one of the shapes."""
    found = meta_reward(outcome)
    if not isinstance(found, Tensor) or found.shape not in shapes:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"meta_reward: returned {got}, expected a tensor of shape {' or '.join(map(str, shapes))}")
    return found.detach().float().cpu()


def _pathwise_experience(outcome: Outcome, h_Bd: Tensor, meta_reward: MetaReward | None) -> dict[str, Tensor]:
    """What ``pathwise`` needs, which forms the advantages anew and therefore keeps whole groups.

    Returns:
        ``h`` [n, d]; ``meta`` [n], the coefficient c of each response, 0 where it has none; ``rewards`` [n, K];
        ``kl_penalty`` [n], which is beta times the KL, if the score has a KL in it; ``group_size``; ``factors`` [K], if
        the weights were multiplied by factors.
    """
    context = outcome.context
    if meta_reward is None:
        worth_B = standardised_utilities(context)
    else:
        worth_B = _call(meta_reward, outcome, [tuple(context.rewards_BK.shape[:1])])
    kept_B = (worth_B.isfinite() & (worth_B != 0)).view(-1, context.group_size).any(1)
    kept_B = kept_B.repeat_interleave(context.group_size).to(h_Bd.device)
    batch = {"h": h_Bd, "meta": worth_B.nan_to_num(0.0), "rewards": context.rewards_BK.float()}
    if outcome.kl_B is not None:
        batch["kl_penalty"] = outcome.beta * outcome.kl_B.float()
    kept = {name: tensor.to(h_Bd.device)[kept_B] for name, tensor in batch.items()}
    if outcome.factors_K is not None:
        kept["factors"] = outcome.factors_K.to(h_Bd.device)
    return {**kept, "group_size": torch.tensor(context.group_size)}


# --- what an update takes ---


def update_batch(
    batches: Sequence[dict[str, Tensor]],
    estimator: Estimator,
    probs: Callable[[Tensor], Tensor],
    profile: str | AdvantageProfile,
) -> tuple[ConductorBatch, float]:
    """Joins batches of ``experience`` for one update, in which each response that has a reward counts once.

    Args:
        batches: the batches, at least one.
        estimator: the estimator that they were kept for.
        probs: a function that gives the present probabilities [n, K] of contexts [n, d].
        profile: the profile by which ``pathwise`` forms the advantages anew.

    Returns:
        What ``conductor_update`` takes, and a number to add to its objective. For ``pathwise`` the update gets slopes
        only, so its objective lacks a constant.
    """
    h = torch.cat([batch["h"] for batch in batches])
    if estimator == "pathwise":
        found = [
            pathwise_slopes(
                probs(batch["h"]),
                batch["meta"],
                batch["rewards"],
                int(batch["group_size"]),
                profile=profile,
                kl_B=batch.get("kl_penalty"),
                beta=float("kl_penalty" in batch),
                factors_K=batch.get("factors"),
            )
            for batch in batches
        ]
        live = torch.cat([~batch["rewards"].isnan().all(1) for batch in batches])
        values, slopes = (torch.cat(parts)[live] for parts in zip(*found, strict=True))
        h = h[live]
        return ConductorBatch(h, slopes), (values - (probs(h) * slopes).sum(-1)).mean().item()
    meta = torch.cat([batch["meta"] for batch in batches])
    if estimator == "all_actions":
        return ConductorBatch(h, meta), 0.0
    actions = torch.cat([batch["actions"] for batch in batches])
    if "drawn_probs" not in batches[0]:
        return ConductorBatch(h, meta, actions), 0.0
    return ConductorBatch(h, meta, actions, torch.cat([batch["drawn_probs"] for batch in batches])), 0.0


def pathwise_slopes(
    probs_BK: Tensor,
    coefficients_B: Tensor,
    rewards_BK: Tensor,
    group_size: int,
    *,
    profile: str | AdvantageProfile = "maestro",
    kl_B: Tensor | None = None,
    beta: float = 0.0,
    factors_K: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The values c_j A_j(p) [B], and the derivative [B, K] of their sum by p.

    With the derivative as the meta-rewards of all actions, ``conductor_update`` climbs the mean of the values.

    Args:
        probs_BK: the soft weights p.
        coefficients_B: c, what one unit of advantage of each response is worth. With the standardised utility the mean
            is the correlation of scores and utility within groups.
        rewards_BK: the rewards, NaN where one abstained.
        group_size: G; the B responses are consecutive groups.
        profile, kl_B, beta: see ``group_advantages``.
        factors_K: what p is multiplied by before the rewards are weighed; None means by 1.
    """
    with torch.enable_grad():
        weights_BK = probs_BK.detach().requires_grad_()
        row_weights_BK = weights_BK if factors_K is None else weights_BK * factors_K.to(weights_BK)
        out = group_advantages(rewards_BK, row_weights_BK, group_size, kl=kl_B, beta=beta, profile=profile)
        values_B = coefficients_B.detach() * out.advantages
        (slopes_BK,) = torch.autograd.grad(values_B.sum(), weights_BK)
    return values_B.detach(), slopes_BK
