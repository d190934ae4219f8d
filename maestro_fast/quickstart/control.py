"""The process of the run with equal weights: ``python -m maestro_fast.quickstart.control CONFIG [--resume]``.

Its standard input is a pipe that nothing is written to. The pipe closes with the process that holds its other end,
whatever ends that, and this one ends then too: nobody would wait for it.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path


def end_with_parent(descriptor: int = 0) -> None:
    """Ends this process, as a kill would, as soon as the pipe closes."""

    def wait() -> None:
        os.read(descriptor, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(arguments: list[str]) -> None:
    """Trains the run of a config, and writes its report."""
    end_with_parent()
    # imported under watch: it takes seconds
    from maestro_fast.reporting.recorded_run import recorded_train, try_report
    from maestro_fast.training import read_config

    run = read_config(Path(arguments[0]))
    recorded_train(run, resume="--resume" in arguments)
    print(try_report(Path(run["run_dir"])))


if __name__ == "__main__":
    main(sys.argv[1:])
