"""Checkpoints that are there whole or not at all.

A checkpoint is written to ``.saving`` in the run directory, flushed to the disk, and renamed. Whatever kills the run,
the last ``checkpoint-*`` is complete; older ones are deleted only after that. A folder that is replaced waits under
``.old-<name>`` until its successor stands: if that never did, ``recover`` puts it back.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import Accelerator

STAGING = ".saving"
_REPLACED = ".old-"


@contextlib.contextmanager
def staged(run_dir: Path, accelerator: Accelerator) -> Iterator[Path]:
    """A folder in which all processes write; what it holds then takes its place in ``run_dir``, replacing its like."""
    folder = run_dir / STAGING

    def clear() -> None:
        recover(run_dir)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    _once_per_disk(accelerator, clear)
    yield folder
    accelerator.wait_for_everyone()
    _once_per_disk(accelerator, lambda: _publish(folder, run_dir))


def recover(run_dir: Path) -> None:
    """Puts back what a run that was killed between two renames had moved away."""
    for old in run_dir.glob(f"{_REPLACED}*"):
        target = run_dir / old.name.removeprefix(_REPLACED)
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)


def _once_per_disk(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """On the main process, then on that of every other node: their disks may be their own. A second time must do."""
    if accelerator.is_main_process:
        action()
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process and not accelerator.is_main_process:
        action()
    accelerator.wait_for_everyone()


def _publish(folder: Path, run_dir: Path) -> None:
    if not folder.exists():
        return
    for path in sorted(folder.rglob("*"), reverse=True):
        _flush(path)
    for new in sorted(folder.iterdir()):
        target = run_dir / new.name
        if target.exists():
            target.rename(run_dir / f"{_REPLACED}{new.name}")
        new.rename(target)
    _flush(run_dir)
    recover(run_dir)
    shutil.rmtree(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
