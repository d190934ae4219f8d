"""The run directory: one run at a time writes into it, and each folder in it is there whole or not at all.

A checkpoint is written to ``.saving`` in the run directory, gets its manifest, is flushed to the disk, and renamed.
Whatever kills the run, the last ``checkpoint-*`` is complete; older ones are deleted only after that. A folder that is
replaced waits under ``.old-<name>`` until its successor is in place. If the run dies in between, ``recover`` puts the
old folder back. One that is deleted is renamed to ``.gone-<name>`` before, so that no part of it stays under its name.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, sort_checkpoints

from maestro_fast.manifest import write_manifest
from maestro_fast.settings import SettingsError

logger = logging.getLogger(__name__)

STAGING = ".saving"
_REPLACED = ".old-"
_DELETED = ".gone-"
_LOCK = ".lock"
_OF_A_STEP = ("metrics.jsonl", "final")  # A run that ended before its first step leaves none of these, and starts anew.
_PATIENCE = 5.0  # seconds to wait for the lock, because a child of a killed process may hold it for a moment longer


@contextlib.contextmanager
def open_run_directory(path: Path, args: TrainingArguments, *, resume: bool) -> Iterator[Path]:
    """Makes the run directory and proves that it can be written to. No other run may use it until the context closes.

    Raises:
        SettingsError: the directory cannot be written to, another process uses it, it holds another run, or there is no
            run to resume. All processes raise if one has found the problem.
    """
    with contextlib.ExitStack() as stack:
        problem = None
        try:
            if args.process_index == 0:
                _claim(path, resume, stack)
            else:
                _prove_writable(path)
        except SettingsError as error:
            problem = str(error)
        # Here each process waits for the others, so that all have looked before config.yaml is written.
        found = gather_object([problem]) if args.world_size > 1 else [problem]
        for words in filter(None, found):
            raise SettingsError(words)
        yield path


def _claim(path: Path, resume: bool, stack: contextlib.ExitStack) -> None:
    if resume and not path.is_dir():
        raise SettingsError(f"run_dir: {path} holds no checkpoint to resume from")
    _prove_writable(path)
    stack.enter_context(locked(path, "run_dir"))
    recover(path)
    if resume and get_last_checkpoint(str(path)) is None:
        raise SettingsError(f"run_dir: {path} holds no checkpoint to resume from, start the run without --resume")
    if not resume and holds_run(path):
        raise SettingsError(f"run_dir: {path} holds a run already, expected a new directory, or --resume")


def holds_run(path: Path) -> bool:
    """Whether a run in this directory has come as far as its first step."""
    finished = path.is_dir() and get_last_checkpoint(str(path)) is not None
    return finished or any((path / name).exists() for name in _OF_A_STEP)


def _prove_writable(path: Path) -> None:
    """Writes a file under a name of its own, because other processes do the same."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".writable-"):
            pass
    except OSError as error:
        raise SettingsError(f"run_dir: cannot write to {path}: {error.strerror}") from error


@contextlib.contextmanager
def locked(folder: Path, setting: str) -> Iterator[int]:
    """Keeps other processes out of ``folder`` until the context closes or this process dies.

    Yields:
        The descriptor of the lock. A child process that inherits it holds the lock too.

    Raises:
        SettingsError: another process has the lock; the message starts with the name of the ``setting``.
    """
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, folder, setting)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, setting: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise SettingsError(
                    f"{setting}: another process works in {folder}, expected a directory of its own"
                ) from error
            time.sleep(0.05)
        except OSError as error:
            logger.warning("%s has no locks (%s): see that no other process works in it", folder, error.strerror)
            return


@contextlib.contextmanager
def staged(run_dir: Path, accelerator: Accelerator) -> Iterator[Path]:
    """Gives a folder in which all processes write.

    When the context closes without an error, everything in that folder moves to ``run_dir`` and replaces what has the
    same name there.
    """
    folder = run_dir / STAGING

    def clear() -> None:
        recover(run_dir)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    _once_per_disk(accelerator, clear)
    yield folder
    accelerator.wait_for_everyone()
    _once_per_disk(accelerator, lambda: _publish(folder, run_dir))


def rotate(run_dir: Path, limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints, as transformers' ``rotate_checkpoints`` does, but whole or not at all.

    Args:
        run_dir: the run directory.
        limit: how many may stay; None and numbers below 1 delete nothing.
        best: the path of the best checkpoint, which stays as the newest does, or None.
    """
    checkpoints = sort_checkpoints(str(run_dir))
    if limit is None or limit < 1 or not checkpoints:
        return
    protected = {checkpoints[-1], *([] if best is None else [str(Path(best))])}
    surplus = max(0, len(checkpoints) - max(limit, len(protected)))
    for name in [name for name in checkpoints if name not in protected][:surplus]:
        gone = run_dir / f"{_DELETED}{Path(name).name}"
        try:
            Path(name).rename(gone)
        except OSError as error:
            logger.warning("%s could not be deleted: %s", name, error.strerror)
        else:
            _delete(gone)


def _delete(gone: Path) -> None:
    """Deletes a checkpoint that was renamed for it. One that cannot be deleted is no reason to end the run."""
    try:
        shutil.rmtree(gone)
    except OSError as error:
        logger.warning("%s could not be deleted: %s", gone, error.strerror)


def recover(run_dir: Path) -> None:
    """Puts back the folders that a run had moved away when it was killed between two renames, and ends deletions."""
    for gone in run_dir.glob(f"{_DELETED}*"):
        _delete(gone)
    for old in run_dir.glob(f"{_REPLACED}*"):
        target = run_dir / old.name.removeprefix(_REPLACED)
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)


def _once_per_disk(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """Runs ``action`` on the main process, then on the main process of every other node, which may have its own disk.

    If the nodes share a disk, ``action`` runs there several times, so a repetition must do no harm.
    """
    if accelerator.is_main_process:
        action()
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process and not accelerator.is_main_process:
        action()
    accelerator.wait_for_everyone()


def _publish(folder: Path, run_dir: Path) -> None:
    if not folder.exists():
        return
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        write_manifest(checkpoint)
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
