"""Estimators of the meta-gradient: what is maximised, so that its gradient climbs the expected meta-reward.

    mu_j(a)        the meta-reward of response j, had its action been a; the paper's is its advantage A_j(a)
    reinforce      mean of  mu_j(a_j) log p_j(a_j)
    baseline       the same with  mu_j(a_j) - sum_a p_j(a) mu_j(a)
    all_actions    mean of  sum_a p_j(a) mu_j(a)
    pathwise       mean of  c_j A_j(w),  w = p: through the advantages themselves, soft weights only

each plus entropy_coef * H(p), by ``ops.conductor_update``, which has the gradients in closed form. The first three
have the same expectation over a response's own action, the others' actions given: what ``baseline`` subtracts does not
depend on that action, and ``all_actions`` takes the sum that the other two draw from.

MAESTRO, arXiv 2601.07208, is ``reinforce`` with mu = A. Its known weakness: A is normalised in its group, so its mean
is 0 whatever the weights are; it does not say which reward the task needs. A response's own state lets the Conductor
emphasise the reward on which that response already looks good, which raises A and teaches nothing ("self-flattery").
"""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_fast.ops.group_advantages import group_advantages
from maestro_fast.specs import AdvantageProfile

WEAKNESS = (
    "The Conductor's meta-objective 'advantage' is the published one. The group-normalised advantage carries no "
    "information on which reward a task needs: in our simulations the true utility stayed at or below that of equal "
    "weights. Watch conductor/self_flattery (healthy within +-0.05) and compare with policy 'equal'."
)


def pathwise_slopes(
    probs_BK: Tensor,
    coefficients_B: Tensor,
    rewards_BK: Tensor,
    group_size: int,
    *,
    profile: str | AdvantageProfile = "maestro",
    kl_B: Tensor | None = None,
    beta: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """c_j A_j(p) [B], and the derivative [B, K] of their sum by p: with it as the meta-reward of all actions
    ``conductor_update`` climbs their mean.

    Args:
        coefficients_B: [B], what one unit of advantage of each response is worth; with the standardised utility the
            mean is the correlation, within groups, of scores and utility.
        rewards_BK: [B, K], NaN where a reward abstained.
        group_size: G; the B responses are consecutive groups.
        profile, kl_B, beta: as in ``group_advantages``.
    """
    with torch.enable_grad():
        weights_BK = probs_BK.detach().requires_grad_()
        out = group_advantages(rewards_BK, weights_BK, group_size, kl=kl_B, beta=beta, profile=profile)
        values_B = coefficients_B.detach() * out.advantages
        (slopes_BK,) = torch.autograd.grad(values_B.sum(), weights_BK)
    return values_B.detach(), slopes_BK
