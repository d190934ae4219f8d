"""The published meta-objective: reinforce the action that went with a high advantage.

    J(phi) = mean over responses of [ A log p(a | h) + entropy_coef H(p(. | h)) ],   A held constant

MAESTRO, arXiv 2601.07208. Its known weakness: A is normalised in its group, so its mean is 0 whatever the weights are;
it does not say which reward the task needs. A response's own state lets the Conductor emphasise the reward on which
that response already looks good, which raises A and teaches nothing ("self-flattery").
"""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_fast.ops.conductor_weights import action_probs

WEAKNESS = (
    "The Conductor's meta-objective 'advantage' is the published one. The group-normalised advantage carries no "
    "information on which reward a task needs: in our simulations the true utility stayed at or below that of equal "
    "weights. Watch conductor/self_flattery (healthy within +-0.05) and compare with policy 'equal'."
)


def reinforce(
    logits_BK: Tensor,
    actions_B: Tensor,
    advantages_B: Tensor,
    tau: float,
    min_prob: float,
    entropy_coef: float,
) -> Tensor:
    """J, a scalar to maximise.

    Args:
        logits_BK: [B, K], differentiable.
        actions_B: int64 [B], drawn from the policy that is updated.
        advantages_B: [B].
        tau, min_prob, entropy_coef: as in ``ConductorConfig``.
    """
    probs_BK = action_probs(logits_BK, tau, min_prob)
    log_BK = torch.where(probs_BK > 0, probs_BK, 1.0).log()  # without a floor p may be 0, where log has no derivative
    chosen_B = log_BK.gather(1, actions_B[:, None])[:, 0]
    entropy_B = -(probs_BK * log_BK).sum(-1)
    return (advantages_B.detach() * chosen_B + entropy_coef * entropy_B).mean()
