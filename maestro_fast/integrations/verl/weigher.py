"""The weight policy in verl's driver: rewards and hidden states of a batch become weights, advantages and figures.

verl adds rewards up, so its weights of K rewards sum to K, where a policy's sum to 1. A policy's weights are therefore
multiplied by K, as in TRL, and ``equal`` under a profile ``verl_*`` is verl as it was. The values of ``static`` count
as they are.

Policies take groups of one size. A session that failed leaves its group smaller; such a group is filled up with
responses from which every reward abstains, which count in no mean, no deviation and no update.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from maestro_fast.integrations.verl.batch import TrainerBatch
from maestro_fast.integrations.verl.rows import Rows
from maestro_fast.integrations.verl.settings import RunSettings
from maestro_fast.ops import GroupAdvantages, Groups
from maestro_fast.specs import resolve_profile
from maestro_fast.weighting import (
    Comparison,
    Guarded,
    Outcome,
    Static,
    WeightContext,
    Weights,
    compare_scaled,
    scales,
    weigh_scaled,
)
from maestro_fast.weighting.diagnostics import Watch, diagnose, healthy_ranges
from maestro_fast.weighting.families import family_metrics
from maestro_fast.weighting.saved import WEIGHTS_FILE, load_weight_policy, save_weight_policy

BATCHES_FILE = "maestro_fast.json"


@dataclass(frozen=True)
class Filled:
    """N groups of R responses, filled up to one size G.

    Attributes:
        groups: the groups as they came.
        first_NG: int64 [N, G], a response for every place: its own, or the first of the group where none came.
    """

    groups: Groups
    first_NG: Tensor

    @staticmethod
    def of(groups: Groups) -> Filled:
        missing_NG = groups.index_NG == groups.batch
        return Filled(groups, torch.where(missing_NG, groups.index_NG[:, :1], groups.index_NG))

    @property
    def size(self) -> int:
        return self.first_NG.shape[1]

    def values(self, x_R: Tensor | None) -> Tensor | None:
        """[R, ...] -> [N G, ...], NaN in the places that were filled up."""
        return None if x_R is None else self.groups.gather(x_R, float("nan")).flatten(0, 1)

    def copies(self, x_R: Tensor | None) -> Tensor | None:
        """[R, ...] -> [N G, ...], copies of the group's first response in the places that were filled up."""
        return None if x_R is None else x_R[self.first_NG.flatten()]

    def back(self, x: Tensor) -> Tensor:
        """[N G, ...] -> [R, ...], the opposite."""
        return self.groups.scatter(x.unflatten(0, (-1, self.size)))

    def like_groups(self, outcome: Outcome) -> Outcome:
        """The outcome of the groups of the most frequent size alone, and of nothing that fills them up."""
        sizes_N = (self.groups.index_NG != self.groups.batch).sum(1)
        counts = torch.bincount(sizes_N)
        size = int((counts == counts.max()).nonzero()[-1])
        chosen_N = sizes_N == size
        if size == self.size and bool(chosen_N.all()):
            return outcome

        def part(x: Tensor) -> Tensor:
            chosen: Tensor = x.unflatten(0, (-1, self.size))[chosen_N, :size]
            return chosen.flatten(0, 1)

        def maybe(x: Tensor | None) -> Tensor | None:
            return None if x is None else part(x)

        context, weights = outcome.context, outcome.weights
        return Outcome(
            WeightContext(
                context.reward_names,
                size,
                context.step,
                part(context.rewards_BK),
                utilities_B=maybe(context.utilities_B),
            ),
            replace(
                weights,
                weights_BK=part(weights.weights_BK),
                expected_BK=part(weights.expected_BK),
                actions_B=None,
                direct_B=maybe(weights.direct_B),
                residual_B=maybe(weights.residual_B),
            ),
            GroupAdvantages(*[part(x) for x in outcome.advantages]),
            outcome.profile,
        )


class Weigher:
    """Holds the weight policy of a run, in the one process that drives it.

    Args:
        settings: the settings of the run.
        context_size: d, the width of the policy model's hidden states.
    """

    def __init__(self, settings: RunSettings, context_size: int) -> None:
        assert settings.maestro is not None
        self.names = settings.reward_names
        self.policy = settings.policy(context_size)
        self.profile = resolve_profile(settings.maestro.profile)
        self.utility = settings.maestro.utility
        self.batches = 0  # the batches so far; this number keys the policy's random draws
        self._watch = Watch(healthy_ranges(self.names))

    def advantages(self, batch: TrainerBatch, rows: Rows, lengths_R: Tensor, penalty_R: Tensor | None) -> Tensor:
        """The advantages [R] of the responses that are compared; the policy learns from the batch.

        Args:
            batch: the batch.
            rows: its rows that are compared, and their groups.
            lengths_R: the number of tokens of each response that count.
            penalty_R: what verl has subtracted from each response's score for its KL; None for nothing.
        """
        filled = Filled.of(rows.groups)
        context = self._context(batch, rows, filled)
        lengths = filled.values(lengths_R.float()) if self.profile.needs_lengths else None
        comparison = Comparison(
            self.profile,
            filled.copies(None if penalty_R is None else penalty_R.float()),
            0.0 if penalty_R is None else 1.0,
            None if lengths is None else lengths.nan_to_num(0.0),
        )
        inner = self.policy.policy if isinstance(self.policy, Guarded) else self.policy
        factor = 1.0 if isinstance(inner, Static) else float(len(self.names))
        weights, found = self._weigh(context, comparison, factor)
        factors_K = torch.full((len(self.names),), factor)
        outcome = Outcome(context, weights, found, self.profile, comparison.kl_B, comparison.beta, factors_K)
        self.policy.observe(outcome)
        self.batches += 1
        batch.metrics |= self._figures(outcome, filled)
        if batch.families:
            families = [batch.families[row] for row in rows.final_R.tolist()]
            rewards_RK, weights_RK = filled.back(context.rewards_BK), filled.back(weights.expected_BK)
            by_family = family_metrics(families, self.names, rewards_RK, weights_RK, lengths_R)
            batch.metrics |= {f"maestro/{name}": value for name, value in by_family.items()}
        return filled.back(found.advantages)

    def _context(self, batch: TrainerBatch, rows: Rows, filled: Filled) -> WeightContext:
        chosen = rows.final_R
        rewards = filled.values(rows.take(batch.values_of(self.names)))
        assert rewards is not None
        context_Bd = None if batch.context_Bd is None else filled.copies(rows.take(batch.context_Bd))
        places = chosen[filled.first_NG.flatten()].tolist()
        columns = {name: [values[row] for row in places] for name, values in batch.columns.items()}
        utilities = None
        if self.utility is not None:
            utilities = filled.values(rows.take(batch.values_of((self.utility.key,)))[:, 0])
            if self.utility.labels is not None:
                assert utilities is not None
                prompts = [batch.prompts[row] for row in places]
                known = [self.utility.labels.chosen(self.batches, prompt) for prompt in prompts]
                utilities = torch.where(torch.tensor(known), utilities, float("nan"))
        return WeightContext(self.names, filled.size, self.batches, rewards, context_Bd, utilities, columns)

    def _weigh(self, context: WeightContext, comparison: Comparison, factor: float) -> tuple[Weights, GroupAdvantages]:
        found: GroupAdvantages | None = None
        if scales(self.profile):
            weights, found = weigh_scaled(self.policy, context, comparison, factor)
        else:
            weights = self.policy.weights(context)
        return weights, compare_scaled(context, weights, comparison, factor) if found is None else found

    def _figures(self, outcome: Outcome, filled: Filled) -> dict[str, float]:
        """The figures of a batch by their names in verl's log, without the responses that only fill groups up.

        Those of ``diagnose`` take groups of one size, so they are over the groups of the most frequent size.
        """
        rewards_RK, weights_RK = (filled.back(x) for x in (outcome.context.rewards_BK, outcome.weights.expected_BK))
        advantages_R = filled.back(outcome.advantages.advantages)
        figures = diagnose(filled.like_groups(outcome)) | self.policy.metrics()
        figures["frac_reward_zero_std"] = filled.back(outcome.advantages.degenerate).float().mean().item()
        figures["advantages/std"] = advantages_R.std(correction=0).item()
        figures["advantages/abs_mean"] = advantages_R.abs().mean().item()
        for k, name in enumerate(self.names):
            live = ~rewards_RK[:, k].isnan()
            if live.any():
                figures[f"rewards/{name}"] = rewards_RK[live, k].mean().item()
            figures[f"rewards/{name}/abstained"] = 1.0 - live.float().mean().item()
            figures[f"weights/{name}"] = weights_RK[:, k].mean().item()
        self._watch.see(figures)
        return {f"maestro/{name}": value for name, value in figures.items()}

    # --- checkpoints ---

    def save(self, folder: Path) -> None:
        """Writes the policy and the number of batches into ``folder``, which is made if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        save_weight_policy(folder, self.policy, self.names)
        (folder / BATCHES_FILE).write_text(json.dumps({"batches": self.batches}), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Goes on from what ``save`` wrote. A policy without a state goes on from a checkpoint of verl's own, too.

        Raises:
            ValueError: the folder holds no state, or that of another policy or of other rewards.
        """
        if not (folder / WEIGHTS_FILE).exists():
            if not self.policy.state_dict():
                return
            raise ValueError(
                f"trainer.resume_mode: {folder} holds no {WEIGHTS_FILE}, so this checkpoint was written without "
                f"adv_estimator=maestro, expected one of weights {self.policy.name}; to start anew, set "
                "trainer.resume_mode=disable and another trainer.default_local_dir"
            )
        try:
            load_weight_policy(folder, self.policy, self.names)
        except ValueError as error:
            raise ValueError(str(error).replace("resume_from_checkpoint", "trainer.resume_mode", 1)) from error
        self.batches = json.loads((folder / BATCHES_FILE).read_text(encoding="utf-8"))["batches"]
