"""The control runs of the quickstart: each trains another way, in a process of its own beside the adaptive run.

The quickstart starts ``python -m maestro_fast.quickstart.control CONFIG [--resume]``. Standard input of that process is
a pipe that nothing is written to. The pipe closes when the quickstart ends, however it ends, and then the control run
ends too, since nobody would wait for it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


@contextlib.contextmanager
def control_run(raw: dict[str, Any], out: Path, lock: int) -> Iterator[subprocess.Popen[bytes] | None]:
    """Runs the config ``raw`` in a process that ends with this one. Yields it, or None if the run has finished already.

    The process writes its output to a file in ``out`` that has the name of the run, such as equal.log. It also holds
    the ``lock`` on ``out``, so that no other quickstart begins there before the control run has ended.
    """
    run_dir = Path(raw["run_dir"])
    if (run_dir / "final").exists():
        yield None
        return
    config = out / f"{run_dir.name}.yaml"
    config.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "maestro_fast.quickstart.control", str(config)]
    if has_checkpoint(run_dir):
        command.append("--resume")
    with (out / f"{run_dir.name}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(lock,),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            yield process
        except KeyboardInterrupt:  # The control run has got the signal, too, and saves itself.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            raise
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


def wait_for(process: subprocess.Popen[bytes] | None, log: Path) -> None:
    """Waits for a control run to end.

    Raises:
        RuntimeError: It failed; the message shows the end of its output.
    """
    if process is not None and process.wait() != 0:
        tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"the run {log.stem} failed, its output in {log} ends with:\n{tail}")


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run can be resumed. If it was killed before its first checkpoint, its directory is removed.

    Such a run begins anew and gives the same result bit by bit.
    """
    from transformers.trainer_utils import get_last_checkpoint

    if run_dir.exists() and get_last_checkpoint(str(run_dir)) is None:
        shutil.rmtree(run_dir)
    return run_dir.exists()


def end_with_parent(descriptor: int = 0) -> None:
    """Starts a thread that ends this process, as a kill would, as soon as the pipe closes."""

    def wait() -> None:
        os.read(descriptor, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(arguments: list[str]) -> None:
    """Trains the run of a config. Its curves are in the report of the anchored run, so it gets none of its own."""
    end_with_parent()
    # These imports take seconds, so the pipe is watched before they begin.
    from maestro_fast.reporting.recorded_run import recorded_train
    from maestro_fast.training import read_config
    from maestro_fast.training.interrupt import Interrupted

    run = read_config(Path(arguments[0]))
    try:
        recorded_train(run, resume="--resume" in arguments)
    except Interrupted as stopped:
        print("\n".join([str(stopped), *stopped.__notes__]))
        sys.exit(128 + stopped.signal)


if __name__ == "__main__":
    main(sys.argv[1:])
