"""GRPO on the labelled prompts alone: labelled groups are scored by their utility, and no others are learnt from.

It is the plainest use of labels, and what a policy that spreads them to other prompts has to beat. Every weight is 0.
The responses of a group without labels so have the same score, and exactly no advantage: the group is degenerate.
``batch.no_signal`` says what becomes of it. "train" counts its tokens in the loss's divisor, so a small share of labels
makes small updates; "drop" leaves them out, and the update is the mean over labelled groups. Profiles that divide by a
standard deviation over the batch count the zeros of these groups in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from maestro_fast.weighting.policy import Stateless, WeightContext, Weights
from maestro_fast.weighting.utilities import labelled_groups


@dataclass(frozen=True)
class UtilityConfig:
    """Groups whose utility is known are trained on it, and no others: GRPO on the labelled prompts alone.

    With ``batch.no_signal: drop`` the other groups do not count in the size of an update either. There are no options.
    """

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Utility:
        """The policy for these rewards."""
        del reward_names, context_size
        return Utility()


class Utility(Stateless):
    """Gives no reward any weight, and scores labelled groups by their utility."""

    name = "utility"

    def weights(self, context: WeightContext) -> Weights:
        """Zeros, and the groups whose utilities are all known."""
        zeros_BK = torch.zeros_like(context.rewards_BK)
        direct_B = labelled_groups(context).repeat_interleave(context.group_size).to(zeros_BK.device)
        return Weights(zeros_BK, zeros_BK, direct_B=direct_B)
