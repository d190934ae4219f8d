"""The run directory: checked before a model is loaded, and kept to one run at a time."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import gather_object
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from maestro_fast.settings import SettingsError
from maestro_fast.training.checkpoint import recover

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_PATIENCE = 5.0  # seconds: what a killed process had started may outlive it for a moment


@contextlib.contextmanager
def run_directory(path: Path, args: TrainingArguments, *, resume: bool) -> Iterator[Path]:
    """The run directory, made and proven to be writable; no other run may use it while the context is open.

    Raises:
        SettingsError: it cannot be written to, another process uses it, or it holds another run (or, to resume, none).
            On every process, whichever found it.
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
        # also the point that all have passed before config.yaml is written
        found = gather_object([problem]) if args.world_size > 1 else [problem]
        for words in filter(None, found):
            raise SettingsError(words)
        yield path


def _claim(path: Path, resume: bool, stack: contextlib.ExitStack) -> None:
    if resume and not path.is_dir():
        raise SettingsError(f"run_dir: {path} holds no checkpoint to resume from")
    _prove_writable(path)
    stack.enter_context(locked(path, "run_dir"))
    if not resume and (path / "config.yaml").exists():
        raise SettingsError(f"run_dir: {path} holds a run already, expected a new directory, or --resume")
    if resume:
        recover(path)
        if get_last_checkpoint(str(path)) is None:
            raise SettingsError(f"run_dir: {path} holds no checkpoint to resume from")


def _prove_writable(path: Path) -> None:
    """With a file of its own name: other processes do the same."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".writable-"):
            pass
    except OSError as error:
        raise SettingsError(f"run_dir: cannot write to {path}: {error.strerror}") from error


@contextlib.contextmanager
def locked(folder: Path, setting: str) -> Iterator[int]:
    """Keeps other processes out of ``folder`` until the context closes or the process dies, however it does.

    Yields:
        The descriptor of the lock. A child that inherits it holds the lock too.

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
