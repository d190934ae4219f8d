"""The guard: it watches the utility of labelled groups that the weight policy does not see, and steps in when it falls.

If proxies are optimised for long enough, they come apart from what they stand for: weighted rewards rise while utility
falls. The guard compares windows of ``window`` batches, out of the batches that had held-back labels, and steps in if

    u_best - u_now > margin * sqrt(var(u_best) / window + var(u_now) / window)      and      s_now > s_best

u is the batch mean of held-back utility, and s that of the weighted rewards, with each reward in units of its standard
deviation during the first window. A learnt residual has no part in s, since it has no unit that lasts. "now" is the
last window. "best" is the window of highest u among those that ended before the last one began. The margin is wide
because the best of many windows is high by chance, too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from maestro_fast.ops.philox import uniform
from maestro_fast.weighting.conductor.experience import RunningStatistics
from maestro_fast.weighting.policy import Outcome, WeightContext, WeightPolicy, Weights, in_reward_order, same_weights
from maestro_fast.weighting.utilities import hide_utilities, labelled_groups

logger = logging.getLogger(__name__)
_STREAM = 0x6775617264  # It keeps the guard's draws apart from those of a policy with the same seed.


@dataclass(frozen=True)
class GuardConfig:
    """Options of ``guard``, which any weight policy may have beside its own options.

    Attributes:
        action: What the guard does: "freeze" the policy's weights as they are, replace them by "static" ones, or "stop"
            training.
        values: The static weights, by reward name. If it is empty, they are equal.
        held_back: The share of the labelled groups that is watched. The policy neither sees their labels nor trains on
            them.
        window: The number of batches with held-back labels in one window.
        warmup: The number of such batches before the guard may step in.
        margin: By how many standard errors utility must have fallen.
        seed: The seed of the choice of groups.
    """

    action: Literal["freeze", "static", "stop"] = "freeze"
    values: dict[str, float] = field(default_factory=dict)
    held_back: float = 0.2
    window: int = 15
    warmup: int = 20
    margin: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_back <= 1:
            raise ValueError(f"held_back: {self.held_back}, expected 0 < held_back <= 1")
        if self.window < 2:
            raise ValueError(f"window: {self.window}, expected at least 2")
        if not self.margin >= 0:
            raise ValueError(f"margin: {self.margin}, expected a number >= 0")
        if self.values and self.action != "static":
            raise ValueError(f"values: given with action {self.action!r}, expected them with 'static' only")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: {self.seed}, expected 0 <= seed < 2**63")


class Guarded:
    """A weight policy under guard. It has the name of the policy inside, which is its attribute ``policy``."""

    def __init__(self, policy: WeightPolicy, config: GuardConfig, reward_names: tuple[str, ...]) -> None:
        if config.values:
            in_reward_order(config.values, reward_names, "values")
        self.policy, self.config = policy, config
        self.name, self.needs_context, self.context_kind = policy.name, policy.needs_context, policy.context_kind
        self.needs_columns, self.needs_group_scores = policy.needs_columns, policy.needs_group_scores
        self.static = torch.tensor([config.values.get(name, 1 / len(reward_names)) for name in reward_names])
        self.tripped = False
        self._statistics = RunningStatistics(len(reward_names))
        self._history: list[tuple[float, float]] = []  # utility and score of each batch with held-back labels
        self._metrics: dict[str, float] = {}

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Lets the policy check the rows of the data, if it does so (``Router`` does)."""
        check = getattr(self.policy, "check_rows", None)
        if check is not None:
            check(rows)

    @property
    def should_stop(self) -> bool:
        """True once the guard has stepped in with the action "stop"."""
        return self.tripped and self.config.action == "stop"

    def weights(self, context: WeightContext) -> Weights:
        """The policy's weights, or the static ones once the guard has put them in their place."""
        found = self.policy.weights(self._for_policy(context))
        return same_weights(self.static, context) if self.tripped and self.config.action == "static" else found

    def observe(self, outcome: Outcome) -> None:
        """Hands the outcome on without the held-back labels, and looks at these. A frozen policy learns no more."""
        context = outcome.context
        if not self.tripped:
            self.policy.observe(replace(outcome, context=self._for_policy(context)))
        held_back_N = self._held_back(context)
        if held_back_N.any():
            self._watch(context, outcome.weights, held_back_N)
        self._metrics["guard/tripped"] = float(self.tripped)

    def _held_back(self, context: WeightContext) -> Tensor:
        """bool [N] on the CPU: the labelled groups that are held back. The same step gives the same groups."""
        labelled_N = labelled_groups(context)
        key = self.config.seed ^ _STREAM
        return labelled_N & (uniform(key, context.step, 0, len(labelled_N), labelled_N.device) < self.config.held_back)

    def _for_policy(self, context: WeightContext) -> WeightContext:
        """The context without the held-back labels."""
        return hide_utilities(context, self._held_back(context))

    def _watch(self, context: WeightContext, weights: Weights, held_back_N: Tensor) -> None:
        """Adds the batch to the history, and steps in if there is a reason to."""
        assert context.utilities_B is not None
        utility = context.utilities_B.float().cpu().view(-1, context.group_size)[held_back_N].nanmean().item()
        rewards_BK = context.rewards_BK.float().cpu()
        if len(self._history) < self.config.window:
            self._statistics.update(rewards_BK[~rewards_BK.isnan().any(1)])
        mean, rstd = self._statistics.standardisation()
        units_BK = torch.where(rewards_BK.isnan(), 0.0, (rewards_BK - mean) * rstd)
        score = (weights.expected_BK.float().cpu() * units_BK).sum(1).mean().item()
        self._history.append((utility, score))
        self._metrics |= {"guard/utility": utility, "guard/score": score}
        if not self.tripped and (reason := verdict(self._history, self.config)):
            self.tripped = True
            logger.warning("guard: %s; action: %s", reason, self.config.action)

    def metrics(self) -> dict[str, float]:
        """The policy's figures and the guard's own."""
        return self.policy.metrics() | self._metrics

    def state_dict(self) -> dict[str, Tensor]:
        """The policy's state under ``policy.`` and the guard's own under ``guard.``."""
        return {
            **{f"policy.{name}": tensor for name, tensor in self.policy.state_dict().items()},
            **self._statistics.state_dict("guard.statistics."),
            "guard.history": torch.tensor(self._history, dtype=torch.float64).view(-1, 2),
            "guard.tripped": torch.tensor(self.tripped),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over a ``state_dict``.

        Raises:
            ValueError: The state was saved without a guard, or the policy refuses its part.
        """
        if "guard.history" not in state:
            raise ValueError("state.guard.history: missing, this state was saved without a guard")
        own = {name.removeprefix("policy."): tensor for name, tensor in state.items() if name.startswith("policy.")}
        self.policy.load_state_dict(own)
        self._statistics.load_state_dict(state, "guard.statistics.")
        self._history = [(u, s) for u, s in state["guard.history"].tolist()]
        self.tripped = bool(state["guard.tripped"])


def verdict(history: list[tuple[float, float]], config: GuardConfig) -> str:
    """The reason to step in, in words, or "" if there is none. ``history`` holds utility and score, batch by batch."""
    window = config.window
    if len(history) < max(2 * window, config.warmup):
        return ""
    table = torch.tensor(history, dtype=torch.float64)
    windows = table.unfold(0, window, 1)  # [windows, 2, window]
    mean, variance = windows.mean(-1), windows.var(-1)
    best = int(mean[:-window, 0].argmax())
    fallen = (mean[best, 0] - mean[-1, 0]).item()
    error = math.sqrt(((variance[best, 0] + variance[-1, 0]) / window).item())
    if fallen <= config.margin * error or mean[-1, 1] <= mean[best, 1]:
        return ""
    return (
        f"held-back utility fell from {mean[best, 0]:.4g} to {mean[-1, 0]:.4g}, {fallen / max(error, 1e-300):.1f} "
        f"standard errors, while the weighted rewards rose from {mean[best, 1]:.4g} to {mean[-1, 1]:.4g}"
    )
