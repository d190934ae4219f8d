"""The plots of a report, in its order: what each shows and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from maestro_fast.reporting import diagnostic_plots, plots
from maestro_fast.reporting.history import History
from maestro_fast.reporting.json_lines import TIMINGS_FILE
from maestro_fast.reporting.stage_times import stage_times

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RecordedRun:
    directory: Path
    history: History
    others: dict[str, History]
    timings: History | None
    config: str | None


@dataclass(frozen=True)
class Plot:
    """``reading``: one sentence on how to read it."""

    name: str
    heading: str
    reading: str
    draw: Callable[[RecordedRun], Figure]


def _stage_times(run: RecordedRun) -> Figure:
    if run.timings is None or not len(run.timings):
        raise plots.MissingData(f"there is no {TIMINGS_FILE}, or nothing in it")
    return stage_times(run.timings)


PLOTS = (
    Plot(
        "weights_by_family",
        "Reward weights by task family",
        "Where a panel's lines part from the dashed one, that family's rewards are not weighted equally; where the "
        "panels differ, the weights depend on the task.",
        lambda run: plots.family_weights(run.history, run.others),
    ),
    Plot(
        "rewards",
        "Rewards",
        "Every reward has its own scale; a rising line in a narrowing band is a reward that the policy earns more "
        "reliably.",
        lambda run: plots.rewards(run.history),
    ),
    Plot(
        "rewards_by_family",
        "Rewards by task family",
        "Lines that drift apart show a reward that some families earn and others pay for.",
        lambda run: plots.family_rewards(run.history),
    ),
    Plot(
        "evaluation",
        "Rewards on held-out prompts",
        "A training reward that rises where its held-out one does not is learnt by heart.",
        lambda run: plots.evaluation(run.history),
    ),
    Plot(
        "advantages",
        "Advantages",
        "The spread is the strength of the training signal; degenerate groups, all of whose responses score the same, "
        "give none.",
        lambda run: plots.advantages(run.history),
    ),
    Plot(
        "response_length",
        "Response length",
        "Lengths that climb to the token limit, or a growing share of responses cut off by it, mean that answers are "
        "judged unfinished.",
        lambda run: plots.response_length(run.history, token_limit(run.config)),
    ),
    Plot(
        "stage_times",
        "Time per stage",
        "From the bottom, the areas at the left stack in the order and colours of the right panel, which gives each "
        "stage's mean time.",
        _stage_times,
    ),
    Plot(
        "advantage_shares",
        "What makes the advantage",
        "A reward whose line is near 100 % decides alone which responses are reinforced; a negative share is outvoted.",
        lambda run: diagnostic_plots.advantage_shares(run.history),
    ),
    Plot(
        "diagnostics",
        "Diagnostics of the weights",
        "A line outside its green range has a remedy, which the log names.",
        lambda run: diagnostic_plots.diagnostics(run.history),
    ),
    Plot(
        "conductor",
        "Conductor",
        "Entropy at its dashed maximum means equal weights; self-flattery above the green band means that the "
        "Conductor picks the rewards which flatter a response rather than those which the task needs.",
        lambda run: plots.conductor(run.history),
    ),
    Plot(
        "policy",
        "Policy update",
        "Sudden steps in the gradient, the entropy or the divergence mark the updates to look at more closely.",
        lambda run: plots.policy(run.history),
    ),
)


def token_limit(config: str | None) -> int | None:
    """``sampling.max_new_tokens`` of our configuration, else ``max_completion_length`` (TRL), wherever it stands."""
    try:
        values = yaml.safe_load(config or "")
    except yaml.YAMLError:
        return None
    for name in ("max_new_tokens", "max_completion_length"):
        pending = [values]
        while pending:
            node = pending.pop()
            if isinstance(node, dict):
                if isinstance(node.get(name), int):
                    return int(node[name])
                pending.extend(node.values())
    return None
