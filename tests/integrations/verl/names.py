"""Names that the harness shares with the modules that verl loads into the processes of a run."""

from __future__ import annotations

ROLLOUT = "hf_cpu"  # verl's name of the rollout engine
DUMPS = "VERL_TEST_DUMPS"  # the variable with the folder for the dumps of the steps
HOLD = "VERL_TEST_HOLD"  # the variable with the step after whose advantages a run waits to be ended


def dump_name(step: int) -> str:
    """The file in that folder with what verl's queue held in a step."""
    return f"step_{step}.pt"
