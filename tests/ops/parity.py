"""Every variant of the loss under every advantage profile, next to the code that it is to equal.

A cell runs rewards -> advantages -> loss twice: with our ops, and with the peer's advantages in TRL's own
``_compute_loss``. What a peer cannot take as code comes from elsewhere: verl's advantages are those that verl returned
(goldens/), MAESTRO has published none, so its formula stands here a second time, in NumPy.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maestro_fast.ops import PROFILES, PolicyLossConfig, group_advantages, policy_loss
from tests.ops.trl_oracle import trl_advantages, trl_policy_loss, trl_sampler_ratio
from tests.ops.verl_oracle import verl_cases

LONGEST = 12
GROUP_SIZE = 4
BETA = 0.1  # of the KL, in the loss or in the score
TOKENS_ELSEWHERE = 37  # of the optimiser step, beside those of the batch: what dapo divides by


def make(normalization: str, **options: Any) -> PolicyLossConfig:
    longest = LONGEST if normalization == "dr_grpo" else None
    return PolicyLossConfig(normalization, max_completion_length=longest, **options)  # type: ignore[arg-type]


VARIANTS: dict[str, PolicyLossConfig] = {
    "grpo": make("grpo"),
    "bnpo": make("bnpo"),
    "dapo": make("dapo"),
    "dr_grpo": make("dr_grpo"),
    "asymmetric clip": make("dapo", clip_low=0.1, clip_high=0.4),
    "two-sided clip": make("grpo", clip_max=1.3),
    "gspo": make("grpo", ratio="sequence"),
    "cispo": make("dapo", objective="cispo", clip_max=1.2),
    "sampler token_truncate": make("dapo", sampler_correction="token_truncate", sampler_cap=1.5),
    "sampler token_mask": make("bnpo", sampler_correction="token_mask", sampler_cap=1.5),
    "sampler sequence_truncate": make("grpo", sampler_correction="sequence_truncate", sampler_cap=1.5),
    "sampler sequence_mask": make("dr_grpo", sampler_correction="sequence_mask", sampler_cap=1.5),
    "entropy bonus": make("bnpo", entropy_coef=0.05),
    "k3 KL": make("grpo", kl_coef=BETA),
    "k3 KL times ratio": make("dapo", kl_coef=BETA, kl_bias_correction=True),
    "k3 KL times gspo's ratio": make("grpo", ratio="sequence", kl_coef=BETA, kl_bias_correction=True),
}


class Peer(NamedTuple):
    """Whose advantages a profile is compared with, and how close a cell has to come."""

    name: str
    rtol: float


# Even in float64, TRL's count / (count - 1) and verl's 1 + eps of a singleton are float32, as is all of verl's gdpo.
PEERS: dict[str, Peer] = {
    "maestro": Peer("the paper's formula in NumPy", 1e-11),
    "grpo": Peer('TRL GRPOTrainer, scale_rewards="group"', 1e-6),
    "dr_grpo": Peer('TRL GRPOTrainer, scale_rewards="none"', 1e-11),
    "grpo_batch": Peer('TRL GRPOTrainer, scale_rewards="batch"', 1e-6),
    "gdpo": Peer('TRL GRPOTrainer, "normalize_then_sum"', 1e-6),
    "rloo": Peer("TRL RLOOTrainer", 1e-11),
    "verl_grpo": Peer("verl 0.9.1 grpo", 1e-6),
    "verl_dr_grpo": Peer("verl 0.9.1 grpo without std", 1e-11),
    "verl_gdpo": Peer("verl 0.9.1 gdpo", 1e-5),
}

CELLS = [(variant, profile) for variant in VARIANTS for profile in PROFILES]


class Batch(NamedTuple):
    """Responses and what their tokens got, all float64 but ids; ``weights`` [B, K], or [K] where the peer has one."""

    rewards_BK: Tensor
    weights: Tensor
    groups: Any
    lengths_B: Tensor
    logprobs: Tensor
    old: Tensor
    sampling: Tensor
    reference: Tensor
    entropies: Tensor

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.nn.functional.pad(self.lengths_B.cumsum(0), (1, 0))

    @property
    def step_tokens(self) -> int:
        return int(self.lengths_B.sum()) + TOKENS_ELSEWHERE

    @property
    def kl_B(self) -> Tensor:
        """The mean over each response of log pi - log pi_ref."""
        parts = (self.logprobs - self.reference).split(self.lengths_B.tolist())
        return torch.stack([part.mean() for part in parts])

    def pad(self, x_T: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(x_T.split(self.lengths_B.tolist())), batch_first=True)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@cache
def batch_for(profile: str) -> Batch:
    """Ragged groups and singletons for verl, abstained rewards for the others, weights per response for MAESTRO."""
    if profile.startswith("verl_"):
        case = verl_cases()["ragged groups"]
        return _with_tokens(case.rewards_BK, case.weights_K, case.groups, case.lengths_B)
    rewards_BK = draw(12, 3, seed=0)
    rewards_BK[[1, 6, 6, 11], [0, 1, 2, 2]] = float("nan")
    rewards_BK[9] = float("nan")  # unscorable
    lengths_B = torch.tensor([4, 1, 7, 3, 5, 2, 6, 3, 2, 4, 12, 1])
    if profile == "maestro":
        ids = [5, 0, 0, 5, 2, 0, 5, 2, 2, 0, 2, 5]
        return _with_tokens(rewards_BK, draw(12, 3, seed=1).abs(), ids, lengths_B)
    return _with_tokens(rewards_BK, draw(3, seed=1).abs(), GROUP_SIZE, lengths_B)


def _with_tokens(rewards_BK: Tensor, weights: Tensor, groups: Any, lengths_B: Tensor) -> Batch:
    tokens = int(lengths_B.sum())
    logprobs = -draw(tokens, seed=2).abs() - 0.1
    old = logprobs + 0.4 * draw(tokens, seed=3)
    sampling, reference = old + 0.4 * draw(tokens, seed=4), logprobs + 0.3 * draw(tokens, seed=5)
    entropies = draw(tokens, seed=6).abs()
    return Batch(rewards_BK, weights, groups, lengths_B, logprobs, old, sampling, reference, entropies)


# --- ours ---


def kl_in_score(variant: str, profile: str) -> bool:
    """Whether the cell's KL enters where the profile has it instead of in the loss."""
    return VARIANTS[variant].kl_coef > 0 and PROFILES[profile].kl_in == "score"


def config_of(variant: str, profile: str) -> PolicyLossConfig:
    return make("grpo") if kl_in_score(variant, profile) else VARIANTS[variant]


def our_advantages(variant: str, profile: str, weights: Tensor) -> Tensor:
    batch = batch_for(profile)
    options: dict[str, Any] = {"kl": batch.kl_B, "beta": BETA} if kl_in_score(variant, profile) else {}
    lengths_B = batch.lengths_B if PROFILES[profile].needs_lengths else None
    return group_advantages(
        batch.rewards_BK, weights, batch.groups, lengths=lengths_B, profile=profile, **options
    ).advantages


def our_loss(variant: str, profile: str, logprobs: Tensor, entropies: Tensor, weights: Tensor) -> Tensor:
    batch, config = batch_for(profile), config_of(variant, profile)
    return policy_loss(
        logprobs,
        our_advantages(variant, profile, weights),
        batch.cu_seqlens,
        old_logprobs=batch.old,
        ref_logprobs=batch.reference if config.kl_coef > 0 else None,
        sampling_logprobs=batch.sampling if config.sampler_correction != "none" else None,
        entropies=entropies,
        normalizer=batch.step_tokens if config.normalization == "dapo" else None,
        config=config,
    ).loss


# --- the peers ---


def peer_advantages(variant: str, profile: str) -> Tensor:
    batch = batch_for(profile)
    if profile == "maestro":
        return maestro_paper(batch, batch.kl_B.numpy() * (BETA if kl_in_score(variant, profile) else 0.0))
    if profile.startswith("verl_"):
        return verl_cases()["ragged groups"].advantages_B[profile]
    return trl_advantages(profile, batch.rewards_BK, batch.weights, GROUP_SIZE)


def maestro_paper(batch: Batch, penalty_B: np.ndarray[Any, Any]) -> Tensor:
    """arXiv 2601.07208: rewards normalised in the group, R = w . r' - beta KL, and R normalised in the group.

    The paper knows no abstentions: an abstained reward leaves its weight to the others, in proportion to theirs.
    """
    rewards, weights, ids = batch.rewards_BK.numpy(), batch.weights.numpy(), np.array(batch.groups)
    advantages = np.zeros(len(rewards))
    for group in np.unique(ids):
        (members,) = np.nonzero((ids == group) & ~np.isnan(rewards).all(1))
        r, w = rewards[members], np.where(np.isnan(rewards[members]), 0.0, weights[members])
        normalized = (r - np.nanmean(r, 0)) / (np.nanstd(r, 0, ddof=1) + 1e-4)
        w = w * (weights[members].sum(1) / w.sum(1))[:, None]
        R = np.nansum(w * normalized, 1) - penalty_B[members]
        advantages[members] = (R - R.mean()) / (R.std(ddof=1) + 1e-4)
    return torch.from_numpy(advantages)


def peer_loss(variant: str, profile: str, logprobs: Tensor, entropies: Tensor) -> Tensor:
    """TRL's ``_compute_loss`` on the peer's advantages."""
    batch, config = batch_for(profile), config_of(variant, profile)
    mask_BT = batch.pad(torch.ones_like(logprobs))
    cispo, correction = config.objective == "cispo", config.sampler_correction
    sampler_ratio = None
    if correction != "none":
        sampler_ratio = trl_sampler_ratio(
            batch.pad(batch.old), batch.pad(batch.sampling), mask_BT, correction, config.sampler_cap
        )
    loss, _ = trl_policy_loss(
        batch.pad(logprobs),
        mask_BT,
        peer_advantages(variant, profile),
        loss_type="cispo" if cispo else config.normalization,
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_max if cispo else config.clip_high,  # type: ignore[arg-type]
        delta=None if cispo else config.clip_max,
        level=config.ratio,
        beta=config.kl_coef,
        old_logprobs_BT=batch.pad(batch.old),
        ref_logprobs_BT=batch.pad(batch.reference),
        entropies_BT=batch.pad(entropies),
        entropy_coef=config.entropy_coef,
        importance_sampling_ratio=sampler_ratio,
        bias_correction_kl=config.kl_bias_correction,
        max_completion_length=LONGEST,
        num_items=batch.step_tokens,
    )
    return loss


# --- a cell ---


class Errors(NamedTuple):
    """Relative to the peer: of the value, and of the gradient's worst element to the gradient's largest."""

    value: float
    gradient: float


class Cell(NamedTuple):
    ours: Tensor
    peer: Tensor
    our_gradient: Tensor
    peer_gradient: Tensor

    @property
    def errors(self) -> Errors:
        value = (self.ours - self.peer).abs() / self.peer.abs()
        gradient = (self.our_gradient - self.peer_gradient).abs().max() / self.peer_gradient.abs().max()
        return Errors(value.item(), gradient.item())


def run_cell(variant: str, profile: str) -> Cell:
    """Values, and gradients of the log-probs and (with an entropy bonus) of the entropies, concatenated."""
    batch = batch_for(profile)
    leaves = [batch.logprobs.clone().requires_grad_()]
    entropies = batch.entropies
    if VARIANTS[variant].entropy_coef > 0:
        entropies = entropies.clone().requires_grad_()
        leaves.append(entropies)
    ours = our_loss(variant, profile, leaves[0], entropies, batch.weights)
    peer = peer_loss(variant, profile, leaves[0], entropies)
    gradients = [torch.cat(torch.autograd.grad(loss, leaves)) for loss in (ours, peer)]
    return Cell(ours.detach(), peer.detach(), *gradients)
