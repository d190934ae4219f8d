"""What a run shows, in sentences: what changed beyond the noise of its steps, and what to look at next.

``verdict`` reads the log alone. It names a change only where ``reporting/change.py`` finds one beyond noise. It says so
where there is none, and where the run was too short to tell.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from maestro_fast.reporting.change import LEAST, PARTS, Change, change, late_mean
from maestro_fast.reporting.history import FloatArray, History
from maestro_fast.weighting.diagnostics import healthy_ranges

_PRINTED = 3  # so many things to look at are printed when a run ends
_FAILURES = ("errors", "timeouts", "failed", "malformed")
_PLOT_OF = {  # the plot that shows a metric, by the beginning of its name
    "eval_": "evaluation",
    "rewards_correlation": "diagnostics",
    "reward": "rewards",
    "weights": "weights_by_family",
    "families": "weights_by_family",
    "completions": "response_length",
    "advantage_share": "advantage_shares",
    "advantages": "advantages",
    "frac_reward_zero_std": "advantages",
    "conductor": "conductor",
    "diagnostics/flat_groups": "advantages",
    "diagnostics": "diagnostics",
    "anchor": "diagnostics",
    "guard": "diagnostics",
}
_IN_CONDUCTOR_PLOT = ("conductor/entropy", "conductor/self_flattery", "conductor/objective", "conductor/grad_norm")


@dataclass(frozen=True)
class Finding:
    """A sentence of the verdict.

    Attributes:
        text: The sentence, or two.
        plot: The plot of the report that shows it.
        urgency: 0 for a fact. What is greater should be looked at, the greatest first.
    """

    text: str
    plot: str
    urgency: int = 0


@dataclass(frozen=True)
class Verdict:
    """The findings on a run.

    Attributes:
        headline: What the rewards did.
        facts: What else there is to say, in a fixed order.
        next: What to look at next, the most urgent first.
        note: How the changes were measured; empty if none was.
    """

    headline: tuple[Finding, ...]
    facts: tuple[Finding, ...]
    next: tuple[Finding, ...]
    note: str

    def text(self, width: int = 100) -> str:
        """The verdict as it is printed when a run ends: its headline, and the first things to look at."""
        lines = [textwrap.fill(finding.text, width) for finding in self.headline]
        if self.next:
            lines.append("To look at next:")
        for number, finding in enumerate(self.next[:_PRINTED], 1):
            lines.append(textwrap.fill(finding.text, width, initial_indent=f"{number}. ", subsequent_indent="   "))
        if len(self.next) > _PRINTED:
            lines.append(f"The report has {len(self.next) - _PRINTED} more.")
        return "\n".join(lines)


def verdict(
    history: History,
    others: Mapping[str, History] | None = None,
    *,
    alarms: Sequence[Mapping[str, Any]] = (),
    policy: str | None = None,
) -> Verdict:
    """Judges a run by its log.

    Args:
        history: The metrics of the run.
        others: The metrics of runs to compare with, by label.
        alarms: The lines of alarms.jsonl, see ``AlarmsLog``.
        policy: The name of the weight policy, see ``policy_name``; None if it is not known.
    """
    rewards = [*_rewards(history), *_utility(history)]
    found = [
        *_alarms(alarms),
        *_held_out(history),
        *_responses(history),
        *_policy(history),
        *_signal(history),
        *_abstentions(history),
        *_failures(history),
        *_weights(history, policy),
        *_ranges(history),
        *(finding for label, other in (others or {}).items() for finding in _against(history, label, other)),
    ]
    urgent = sorted((f for f in (*found, *rewards) if f.urgency), key=lambda finding: -finding.urgency)
    calm, headline = (tuple(f for f in findings if not f.urgency) for findings in (found, rewards))
    return Verdict(headline, calm, tuple(urgent), _note(history) if len(history) >= LEAST else "")


def _note(history: History) -> str:
    first, last = _steps(history, 0), _steps(history, PARTS - 1)
    return (
        f"Changes are those from the first to the last fifth of the steps ({first}, and {last}). ± is a 95 % interval "
        "which allows for the correlation of neighbouring steps; of twenty figures that do not change, one is named "
        "all the same."
    )


def policy_name(config: str | None) -> str | None:
    """The name of the weight policy in the text of a config, or None if it names none."""
    try:
        values = yaml.safe_load(config or "")
    except yaml.YAMLError:
        return None
    weights = values.get("weights") if isinstance(values, dict) else None
    name = weights.get("type") if isinstance(weights, dict) else weights
    return name if isinstance(name, str) else None


def _alarms(alarms: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """One sentence for each alarm that rang, those of one metric and one condition together."""
    kinds: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in alarms:
        kinds.setdefault((line["metric"], line["condition"]), []).append(line)
    for (metric, condition), lines in kinds.items():
        stopped = lines[-1]["action"] == "stop"
        times = f" {len(lines)} times, the last time" if len(lines) > 1 else ""
        yield Finding(
            f"An alarm rang{times} at step {lines[-1]['step']}: {metric} was {lines[-1]['value']:.4g} ({condition})"
            f"{'. It ended the run' if stopped else ''}.",
            plot_of(metric),
            100 if stopped else 95,
        )


def plot_of(metric: str) -> str:
    """The plot that shows a metric."""
    if metric.startswith("conductor/") and metric not in _IN_CONDUCTOR_PLOT:
        return "diagnostics"
    return next((plot for start, plot in _PLOT_OF.items() if metric.startswith(start)), "policy")


def _rewards(history: History) -> Iterator[Finding]:
    """What rose, what fell, and what did not move beyond noise."""
    names = [name for name in history.rewards if history.has(f"rewards/{name}/mean")]
    if not names:
        return
    if len(history) < LEAST:
        yield Finding(
            f"{len(history)} logged steps are too few to tell a change from noise ({LEAST} are needed), so no trend "
            "is named here.",
            "rewards",
        )
        return
    changes = {name: change(history.get(f"rewards/{name}/mean")) for name in names}
    known = {name: moved for name, moved in changes.items() if moved is not None}
    for direction, verb in ((1, "Rose"), (-1, "Fell")):
        if moved := [_moved(name, c) for name, c in known.items() if c.direction == direction]:
            yield Finding(f"{verb}: {'; '.join(moved)}.", "rewards")
    if still := [f"{name} ({_signed(c)})" for name, c in known.items() if c.direction == 0]:
        yield Finding(f"No change beyond noise: {', '.join(still)}.", "rewards")
    if rare := [name for name in names if name not in known]:
        yield Finding(f"Logged in too few steps to tell: {', '.join(rare)}.", "rewards")
    for name, c in known.items():
        if c.direction < 0:
            yield Finding(
                f"{name} fell from {_pair(c)}. See in the samples whether another reward was gained at its cost.",
                "rewards",
                60,
            )
        elif (part := c.turned()) is not None:
            yield Finding(
                f"{name} was at {_number(c.means[part], c)} in the middle of the run ({_steps(history, part)}) and "
                f"came back to {_number(c.last, c)}. A checkpoint from there may be the better one.",
                "rewards",
                55,
            )


def _utility(history: History) -> Iterator[Finding]:
    c = change(history.get("anchor/utility"))
    if c is None:
        return
    if c.direction == 0:
        yield Finding(f"The known utility shows no change beyond noise ({_signed(c)}).", "diagnostics")
    else:
        verb = "rose" if c.direction > 0 else "FELL"
        yield Finding(f"The known utility {verb} from {_pair(c)}.", "diagnostics", 0 if c.direction > 0 else 85)


def _held_out(history: History) -> Iterator[Finding]:
    """Whether held-out prompts follow the training prompts. Their figures have no interval, so the words are careful.

    A reward counts as moved there if it moved by a quarter of what it changed by in training.
    """
    moves: dict[str, list[str]] = {"along": [], "against": [], "other": []}
    spans = []
    for name in history.rewards:
        values = history.get(f"eval_rewards/{name}/mean")
        live = np.flatnonzero(np.isfinite(values))
        if len(live) < 2:
            continue
        spans.append((len(live), int(history.steps[live[0]]), int(history.steps[live[-1]])))
        training, gap = change(history.get(f"rewards/{name}/mean")), float(values[live[-1]] - values[live[0]])
        digits = _digits(max(abs(gap), training.half_width if training else 0.0, 0.01 * abs(values[live[-1]])))
        where = "other"
        if training is not None and training.direction and abs(gap) >= 0.25 * abs(training.difference):
            where = "along" if gap * training.direction > 0 else "against"
        moves[where].append(f"{name} {values[live[0]]:.{digits}f} to {values[live[-1]]:.{digits}f}")
    if spans:
        count, first, last = max(spans)
        span = f"{count} evaluations from step {first} to {last}, without an interval"
        if moves["along"]:
            yield Finding(
                f"Held-out prompts went the way of the training prompts ({span}): {', '.join(moves['along'])}.",
                "evaluation",
            )
        if moves["other"]:
            words = "The rest on held-out prompts" if moves["along"] else f"On held-out prompts ({span})"
            yield Finding(f"{words}: {', '.join(moves['other'])}.", "evaluation")
        if moves["against"]:
            yield Finding(
                f"Held-out prompts did NOT go the way of the training prompts ({span}): {', '.join(moves['against'])}. "
                "What was learnt may hold for the training prompts alone.",
                "evaluation",
                70,
            )
    utility = history.get("eval_utility")
    live = np.flatnonzero(np.isfinite(utility))
    if len(live) > 1:
        best = int(live[np.argmax(utility[live])])
        yield Finding(
            f"The utility on held-out prompts went from {utility[live[0]]:.3g} to {utility[live[-1]]:.3g}; it was best "
            f"at step {int(history.steps[best])}, with {utility[best]:.3g}.",
            "evaluation",
        )


def _responses(history: History) -> Iterator[Finding]:
    """Lengths, and how many responses the token limit cut off."""
    length = change(history.get("completions/mean_length"))
    if length is not None:
        verb = ("did not change beyond noise", "got longer", "got shorter")[length.direction]
        yield Finding(f"The responses {verb}: {_pair(length)} tokens ({_signed(length)}).", "response_length")
    cut = _late(history.get("completions/clipped_ratio"))
    if cut is None:
        return
    yield Finding(f"The token limit cut off {_percent(cut)} of the responses at the end of the run.", "response_length")
    if cut >= 0.25:
        yield Finding(
            f"{_percent(cut)} of the responses are cut off, so the rewards judge unfinished answers. Raise "
            "sampling.max_new_tokens, or leave truncated responses out of the loss (batch.truncated: mask).",
            "response_length",
            80 if cut >= 0.5 else 50,
        )


def _policy(history: History) -> Iterator[Finding]:
    """The policy's entropy and its distance from the reference."""
    entropy, kl = change(history.get("entropy")), change(history.get("kl"))
    for name, moved in (("The entropy of the policy", entropy), ("The KL from the reference", kl)):
        if moved is not None:
            verb = ("shows no change beyond noise", "rose", "fell")[moved.direction]
            yield Finding(f"{name} {verb}: {_pair(moved)} nats per token ({_signed(moved)}).", "policy")
    if entropy is not None and entropy.direction < 0 and entropy.last < 0.5 * entropy.first:
        yield Finding(
            f"The policy lost more than half of its entropy ({_pair(entropy)} nats per token): the responses of a "
            "group become alike. Raise sampling.temperature or loss.clip_high, or lower the learning rate.",
            "policy",
            65,
        )


def _signal(history: History) -> Iterator[Finding]:
    """The share of groups that teach nothing."""
    silent = _late(history.get("frac_reward_zero_std"))
    if silent is not None:
        yield Finding(f"At the end {_percent(silent)} of the groups gave no signal.", "advantages")
    drawn = _late(history.get("dynamic_sampling/no_signal"))
    if drawn is not None:
        yield Finding(f"Before others took their place, {_percent(drawn)} of the drawn groups had none.", "advantages")
    for name in history.rewards:
        spread = history.get(f"rewards/{name}/std")
        known = spread[np.isfinite(spread)]
        flat = int((known == 0).sum())
        if len(known) and 2 * flat >= len(known):
            yield Finding(
                f"{name} had the same value for all responses of a batch in {flat} of {len(known)} steps, so it could "
                "teach nothing there. Check its scale and bounds.",
                "rewards",
                75,
            )


def _abstentions(history: History) -> Iterator[Finding]:
    shares = {name: _late(history.get(f"rewards/{name}/abstained")) for name in history.rewards}
    some = {name: share for name, share in shares.items() if share is not None and share >= 0.005}
    if some:
        yield Finding(
            f"Rewards abstained from responses: {', '.join(f'{n} from {_percent(s)}' for n, s in some.items())}.",
            "rewards",
        )
    for name, share in some.items():
        if share > 0.9:
            yield Finding(
                f"{name} abstained from {_percent(share)} of the responses. Unless that is meant, check the columns "
                "that it reads and its `where`.",
                "rewards",
                58,
            )


def _failures(history: History) -> Iterator[Finding]:
    """Rewards that failed and abstained therefore, under ``on_error: abstain`` or as judges."""
    for name in history.rewards:
        steps = {figure: int((history.get(f"rewards/{name}/{figure}") > 0).sum()) for figure in _FAILURES}
        if said := [f"{figure} in {count}" for figure, count in steps.items() if count]:
            text = f"{name} had {', '.join(said)} of {len(history)} logged steps, and abstained there."
            yield Finding(text, "rewards", 57)


def _weights(history: History, policy: str | None) -> Iterator[Finding]:
    """How far the weights are from equal, and whether they depend on the task family."""
    names = [name for name in history.rewards if history.has(f"weights/{name}")]
    if len(names) < 2:
        return
    if policy == "equal":
        yield Finding("The weights were equal by configuration.", "weights_by_family")
        return
    equal, late = 1 / len(names), {}
    for name in names:
        value = _late(history.get(f"weights/{name}"))
        late[name] = equal if value is None else value
    in_families = [_late(history.get(f"families/{f}/weights/{n}")) for f in history.families for n in names]
    furthest = max(abs(value - equal) for value in (*late.values(), *in_families) if value is not None)
    if furthest < 0.05 * equal:
        yield Finding(
            f"The weights ended within {furthest:.2g} of equal ({equal:.3g}), so this run does NOT differ from one "
            "with equal weights in anything that the weights could do.",
            "weights_by_family",
            40,
        )
        return
    order = sorted(late, key=lambda name: -late[name])
    yield Finding(
        f"At the end {order[0]} had the most weight ({late[order[0]]:.2f}) and {order[-1]} the least "
        f"({late[order[-1]]:.2f}); equal is {equal:.2f}.",
        "weights_by_family",
    )
    spread = history.get("diagnostics/family_spread")
    beyond = late_mean(spread - history.get("diagnostics/family_spread_shuffled"))
    if beyond is None:
        return
    mean, half = beyond
    figures = f"{_late(spread):.3f} between families, {mean:.3f} ± {half:.3f} more than with the families shuffled"
    if mean - half > 0:
        yield Finding(f"The weights depend on the task family: their spread was {figures}.", "diagnostics")
    else:
        yield Finding(
            f"The weights do NOT depend on the task family beyond chance: their spread was {figures}. One set of "
            "weights for all prompts would have done the same.",
            "diagnostics",
            45,
        )


def _ranges(history: History) -> Iterator[Finding]:
    """The figures that ended outside their healthy range, with the remedy. A short run has only begun to learn."""
    if len(history) < LEAST:
        return
    for key, healthy in healthy_ranges(history.rewards or ("",)).items():
        value = _late(history.get(key))
        if value is None or healthy.low <= value <= healthy.high:
            continue
        bound = f"below {healthy.low:g}" if value < healthy.low else f"above {healthy.high:g}"
        yield Finding(f"{key} ended at {value:.3g}, {bound}: {healthy.remedy}.", plot_of(key), 48)


def _against(history: History, label: str, other: History) -> Iterator[Finding]:
    """Compares the ends of two runs, step by step where both have logged."""
    keys = {"the known utility": "anchor/utility"} | {name: f"rewards/{name}/mean" for name in history.rewards}
    _, ours, theirs = np.intersect1d(history.steps, other.steps, return_indices=True)
    found = {name: late_mean(history.get(key)[ours] - other.get(key)[theirs]) for name, key in keys.items()}
    gaps = {name: gap for name, gap in found.items() if gap is not None}
    texts = {name: f"{name} {_plus_minus(*gap)}" for name, gap in gaps.items()}
    differ = [name for name, (mean, half) in gaps.items() if abs(mean) > half]
    alike = [name for name in gaps if name not in differ]
    if differ:
        listed = ", ".join(texts[name] for name in differ)
        yield Finding(f"This run minus {label}, over the last fifth of the steps: {listed}.", "rewards")
    if alike:
        yield Finding(
            f"No difference from {label} beyond noise: {', '.join(texts[name] for name in alike)}.", "rewards"
        )
    utility = gaps.get("the known utility")
    if utility is not None and utility[0] < -utility[1]:
        yield Finding(f"The known utility is LOWER than in {label}: {_plus_minus(*utility)}.", "diagnostics", 90)
    elif utility is not None and abs(utility[0]) <= utility[1]:
        yield Finding(
            f"The known utility does not differ from {label} beyond noise ({_plus_minus(*utility)}), so the two runs "
            "do NOT show that the weights helped.",
            "diagnostics",
            50,
        )
    elif utility is None and gaps and not differ:
        yield Finding(f"No reward differs from {label} beyond noise: the weights changed nothing here.", "rewards", 50)


def _late(values: FloatArray) -> float | None:
    """The mean of the last fifth of the finite values, of at least one."""
    known = values[np.isfinite(values)]
    return float(known[-math.ceil(len(known) / PARTS) :].mean()) if len(known) else None


def _steps(history: History, part: int) -> str:
    steps = np.array_split(history.steps, PARTS)[part]
    return f"steps {int(steps[0])} to {int(steps[-1])}"


def _moved(name: str, c: Change) -> str:
    return f"{name}, {_pair(c)} ({_signed(c)})"


def _pair(c: Change) -> str:
    return f"{_number(c.first, c)} to {_number(c.last, c)}"


def _signed(c: Change) -> str:
    return _plus_minus(c.difference, c.half_width)


def _plus_minus(mean: float, half_width: float) -> str:
    digits = _digits(half_width or abs(mean))
    return f"{mean:+.{digits}f} ± {half_width:.{digits}f}"


def _number(value: float, c: Change) -> str:
    return f"{value:.{_digits(c.half_width or abs(c.difference))}f}"


def _digits(size: float) -> int:
    """The number of decimals that shows two digits of a figure of this size."""
    return 2 if size <= 0 else min(max(1 - math.floor(math.log10(size)), 0), 6)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 or share == 0 else "less than 1 %"
