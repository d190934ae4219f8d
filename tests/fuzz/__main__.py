"""Long trials of what must not fail: ``python -m tests.fuzz kills --json tests/fuzz/kills.json``."""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path

import torch

from tests.fuzz import checkpoints, configs, data_files, groups, kills, ops, rewards

TRIALS = {
    "checkpoints": checkpoints,
    "configs": configs,
    "data_files": data_files,
    "groups": groups,
    "kills": kills,
    "ops": ops,
    "rewards": rewards,
}


def main() -> None:
    """Runs the trial that the command line names, and writes its tally."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, trial in TRIALS.items():
        about = trial.__doc__ or ""
        command = commands.add_parser(
            name, help=about.partition("\n")[0], description=about, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        trial.add_options(command)
        command.add_argument("--json", type=Path, help="where the tally is written")
        command.set_defaults(trial=trial)
    given, begun = parser.parse_args(), time.monotonic()
    tally = {**given.trial.main(given), "seconds": round(time.monotonic() - begun), **_versions()}
    if given.json:
        given.json.write_text(json.dumps(tally, indent=1) + "\n", encoding="utf-8")
    print(", ".join(f"{name} {value}" for name, value in tally.items() if not isinstance(value, list)))


def _versions() -> dict[str, str]:
    """The commit that the working tree began with, and PyTorch's version."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False).stdout
    return {"commit": commit.strip(), "torch": torch.__version__}


if __name__ == "__main__":
    main()
