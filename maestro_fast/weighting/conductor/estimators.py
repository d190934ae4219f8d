"""Estimators of the meta-gradient: scalars to maximise, whose gradients climb the expected meta-reward.

    mu_j(a)        the meta-reward of response j, had its action been a; the paper's is its advantage A_j(a)
    reinforce      mean of  mu_j(a_j) log p_j(a_j)
    baseline       the same with  mu_j(a_j) - sum_a p_j(a) mu_j(a)
    all_actions    mean of  sum_a p_j(a) mu_j(a)
    pathwise       mean of  c_j A_j(w),  w = p: through the advantages themselves, soft weights only

each plus entropy_coef * H(p). The first three have the same expectation over a response's own action, the others'
actions given: what ``baseline`` subtracts does not depend on that action, and ``all_actions`` takes the sum that the
other two draw from.

MAESTRO, arXiv 2601.07208, is ``reinforce`` with mu = A. Its known weakness: A is normalised in its group, so its mean
is 0 whatever the weights are; it does not say which reward the task needs. A response's own state lets the Conductor
emphasise the reward on which that response already looks good, which raises A and teaches nothing ("self-flattery").
"""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_fast.ops.conductor_weights import action_probs
from maestro_fast.ops.group_advantages import group_advantages
from maestro_fast.ops.profiles import AdvantageProfile

WEAKNESS = (
    "The Conductor's meta-objective 'advantage' is the published one. The group-normalised advantage carries no "
    "information on which reward a task needs: in our simulations the true utility stayed at or below that of equal "
    "weights. Watch conductor/self_flattery (healthy within +-0.05) and compare with policy 'equal'."
)


def reinforce(
    logits_BK: Tensor,
    actions_B: Tensor,
    meta_B: Tensor,
    tau: float,
    min_prob: float,
    entropy_coef: float,
    ratios_B: Tensor | None = None,
) -> Tensor:
    """J of ``reinforce`` and ``baseline``.

    Args:
        logits_BK: [B, K], differentiable.
        actions_B: int64 [B], the drawn actions.
        meta_B: [B], meta-rewards of these actions, or those minus their expectation.
        tau, min_prob, entropy_coef: as in ``ConductorConfig``.
        ratios_B: [B], importance ratios of actions that an earlier policy drew; None: the policy itself drew them.
    """
    probs_BK = action_probs(logits_BK, tau, min_prob)
    log_BK = _finite_log(probs_BK)
    chosen_B = log_BK.gather(1, actions_B[:, None])[:, 0]
    if ratios_B is not None:
        meta_B = meta_B * ratios_B
    return (meta_B.detach() * chosen_B + entropy_coef * _entropy(probs_BK, log_BK)).mean()


def all_actions(logits_BK: Tensor, meta_BK: Tensor, tau: float, min_prob: float, entropy_coef: float) -> Tensor:
    """J of ``all_actions``; ``meta_BK`` [B, K] holds the meta-reward of every action, else as ``reinforce``."""
    probs_BK = action_probs(logits_BK, tau, min_prob)
    expected_B = (probs_BK * meta_BK.detach()).sum(-1)
    return (expected_B + entropy_coef * _entropy(probs_BK, _finite_log(probs_BK))).mean()


def pathwise(
    logits_BK: Tensor,
    coefficients_B: Tensor,
    rewards_BK: Tensor,
    group_size: int,
    tau: float,
    min_prob: float,
    entropy_coef: float,
    *,
    profile: str | AdvantageProfile = "maestro",
    kl_B: Tensor | None = None,
    beta: float = 0.0,
) -> Tensor:
    """J of ``pathwise``.

    Args:
        coefficients_B: [B], what one unit of advantage of each response is worth; with the standardised utility J is
            the mean correlation, within groups, of scores and utility.
        rewards_BK: [B, K], NaN where a reward abstained.
        group_size: G; the B responses are consecutive groups.
        profile, kl_B, beta: as in ``group_advantages``.
    """
    probs_BK = action_probs(logits_BK, tau, min_prob)
    advantages_B = group_advantages(rewards_BK, probs_BK, group_size, kl=kl_B, beta=beta, profile=profile).advantages
    entropy_B = _entropy(probs_BK, _finite_log(probs_BK))
    return (coefficients_B.detach() * advantages_B + entropy_coef * entropy_B).mean()


def _finite_log(probs_BK: Tensor) -> Tensor:
    """log p; 0 where p is 0, which happens without a floor and has no derivative."""
    return torch.where(probs_BK > 0, probs_BK, 1.0).log()


def _entropy(probs_BK: Tensor, log_BK: Tensor) -> Tensor:
    return -(probs_BK * log_BK).sum(-1)
