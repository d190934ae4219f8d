"""How long a step of a run may take, from the seconds that a trial of a few responses took.

Every figure is for a step whose completions all reach ``sampling.max_new_tokens``, so most steps are quicker.

Sampling calls the policy once for each token. How long a call takes for a whole batch, where the trial sampled one
group at a time, depends on the device: on a GPU that is not full it takes no longer, and on a CPU longer in proportion
to the responses. So it is given from the one to the other. The passes over whole sequences, scoring, reference and
training, take a time in proportion to their tokens, which neglects that attention grows faster in long sequences.
Rewards take a time in proportion to the responses; a reward that asks a server for many at once is quicker.
"""

from __future__ import annotations

from dataclasses import dataclass

from maestro_fast.reporting.tables import Table
from maestro_fast.starting.activations import Shape
from maestro_fast.starting.trial import Trial
from maestro_fast.training.step import Step


@dataclass(frozen=True)
class Stage:
    """The seconds of one stage of a generation batch, from ``least`` to ``most``, and how they were found."""

    name: str
    least: float
    most: float
    how: str


def stages(step: Step, trial: Trial, batch: Shape) -> list[Stage]:
    """The stages of a generation batch.

    Args:
        step: the parts of the run's steps.
        trial: what was tried, with its training pass if that was tried.
        batch: all responses of a batch, at their longest.
    """
    tokens, responses = batch.responses * (batch.prompt + batch.completion), len(trial.rollouts)
    call = trial.seconds["sampling"] / max(1, trial.steps_sampled)
    least = call * batch.completion
    found = [
        Stage(
            "sampling",
            least,
            least * max(1.0, batch.responses / trial.group_size),
            f"{trial.steps_sampled} calls for {trial.group_size} responses each",
        )
    ]
    scoring = trial.seconds["scoring"] * tokens / trial.tokens
    if step.scoring.source == "scoring":
        found.append(Stage("scoring", scoring, scoring, f"a forward of {trial.tokens} tokens"))
    if step.terms.reads_reference:
        found.append(Stage("reference", scoring, scoring, "as long as scoring"))
    judged = sum(each.seconds for each in trial.judged) * batch.responses / responses
    found.append(Stage("rewards", judged, judged, f"{responses} responses"))
    if trial.trained:
        training = trial.seconds["training"] * tokens / trial.trained
        found.append(Stage("training", training, training, f"a forward and backward of {trial.trained} tokens"))
    return found


def pace_table(found: list[Stage], batch: Shape) -> Table:
    """The stages as a table."""
    rows = [(stage.name, duration(stage.least), duration(stage.most), stage.how) for stage in found]
    least, most = sum(stage.least for stage in found), sum(stage.most for stage in found)
    return Table(
        f"Time of a generation batch of {batch.responses} responses, each of {batch.completion} tokens, about; syncs, "
        "evaluations and checkpoints come on top",
        ("stage", "from", "to", "measured on"),
        (*rows, ("together", duration(least), duration(most), "")),
    )


def duration(seconds: float) -> str:
    """Seconds with two digits or so, in the unit that suits them."""
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s" if seconds >= 0.1 else "< 0.1 s"
