"""Long trials of what must not fail: ``python -m tests.fuzz kills --json tests/fuzz/kills.json``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from tests.fuzz import configs, data_files, kills, ops

TRIALS = {"configs": configs, "data_files": data_files, "kills": kills, "ops": ops}


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
    given = parser.parse_args()
    tally = {**given.trial.main(given), "torch": torch.__version__}
    if given.json:
        given.json.write_text(json.dumps(tally, indent=1) + "\n", encoding="utf-8")
    print(", ".join(f"{name} {value}" for name, value in tally.items() if not isinstance(value, list)))


if __name__ == "__main__":
    main()
