"""The run directory: one run at a time writes into it, and each folder in it is there whole or not at all.

A checkpoint is written to ``.saving`` in the run directory, gets its manifest, is flushed to the disk, and renamed.
Whatever kills the run, the last ``checkpoint-*`` is complete; older ones are deleted only after that. A folder that is
replaced waits under ``.old-<name>`` until its successor is in place. If the run dies in between, ``recover`` puts the
old folder back. One that is deleted is renamed to ``.gone-<name>`` before, so that no part of it stays under its name.

A disk that is full or read-only is reported in a sentence that names the folder: at the start, before a model is
loaded, and whenever a checkpoint is written. Part of a checkpoint is then deleted, at the latest when the run goes on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, get_last_checkpoint, sort_checkpoints

from maestro_fast.manifest import write_manifest
from maestro_fast.settings import SettingsError

logger = logging.getLogger(__name__)

STAGING = ".saving"
_REPLACED = ".old-"
_DELETED = ".gone-"
_LOCK = ".lock"
_OF_A_STEP = ("metrics.jsonl", "final")  # A run that ended before its first step leaves none of these, and starts anew.
_LOGS = "*.jsonl"
_ROOM = 1 << 16  # bytes that have to be free at the start: config.yaml, and the first lines of the logs
_TRIAL = 1 << 20  # bytes that are written to learn why a library could not write its own
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers put the number into their words.
# PyTorch does not tell what went wrong, only where its writer noticed.
_PYTORCH_ERROR = re.compile(r"PytorchStreamWriter|unexpected pos|iostream|inline_container")
_PATIENCE = 5.0  # seconds to wait for the lock, because a child of a killed process may hold it for a moment longer


class WriteError(OSError):
    """Something could not be written to the run directory; the message names it, the directory and the reason."""


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


def check_room(run_dir: Path, model: nn.Module, args: TrainingArguments) -> None:
    """Checks before the first step that the checkpoints of the run will fit on the disk.

    What a checkpoint takes is reckoned from below: the weights that are saved, and the moments of Adam.

    Raises:
        SettingsError: there is no room for one of them; with several processes this is only a warning.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    policy = trained if hasattr(model, "peft_config") else sum(p.numel() * p.element_size() for p in model.parameters())
    saves, steps = args.save_strategy != SaveStrategy.NO, float(args.save_steps)
    optim = str(getattr(args.optim, "value", args.optim))
    each = policy + (2 * trained if saves and "adam" in optim and "bit" not in optim else 0)
    there, free = len(sort_checkpoints(str(run_dir))), shutil.disk_usage(run_dir).free
    planned = int(args.max_steps / steps) if args.save_strategy == SaveStrategy.STEPS and steps >= 1 else 1
    if args.max_steps < 1 and args.save_total_limit is not None:  # The steps follow from the data.
        planned = args.save_total_limit + 1
    if args.save_total_limit is not None and args.save_total_limit > 0:
        planned = min(planned, args.save_total_limit + 1)  # The oldest one goes when the newest stands.
    wanted = max(1, planned - there) if saves else 1
    if each * wanted <= free:
        return
    sizes = (f"{each / 1e6:,.1f} MB", f"{free / 1e6:,.1f} MB")
    words = (
        f"run_dir: a {'checkpoint' if saves else 'policy'} takes at least {sizes[0]}, and {run_dir} has {sizes[1]} free"
    )
    if each > free and args.world_size == 1:
        raise SettingsError(f"{words}, expected room for one; nothing has been trained yet")
    logger.warning(
        "%s, but the run will write %d more: free some, or set trainer.save_total_limit or trainer.save_steps",
        words,
        wanted,
    )


def _claim(path: Path, resume: bool, stack: contextlib.ExitStack) -> None:
    if resume and not path.is_dir():
        raise SettingsError(f"run_dir: {path} holds no checkpoint to resume from")
    try:
        _prove_writable(path)
    except SettingsError:
        if not (path / STAGING).is_dir():
            raise
        with locked(path, "run_dir"):  # What a failed save has left may be what fills the disk.
            shutil.rmtree(path / STAGING, ignore_errors=True)
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
    """Writes a file under a name of its own, because other processes do the same. Logs of before have to be writable.

    An empty file would find room on a disk that is full.
    """
    wanted = path
    try:
        path.mkdir(parents=True, exist_ok=True)
        _try_to_write(path, _ROOM)
        for wanted in sorted(path.glob(_LOGS)):
            with wanted.open("r+b"):
                pass
    except OSError as error:
        raise SettingsError(f"run_dir: cannot write to {wanted}: {_words(error, path)}") from error


def _try_to_write(folder: Path, size: int) -> None:
    """Raises OSError unless ``size`` bytes can be written in a folder."""
    with tempfile.TemporaryFile(dir=folder, prefix=".writable-", buffering=0) as file:
        left = size
        while left:  # One call may write a part of it.
            left -= file.write(bytes(left))
        os.fsync(file.fileno())


@contextlib.contextmanager
def locked(folder: Path, setting: str) -> Iterator[int]:
    """Keeps other processes out of ``folder`` until the context closes or this process dies.

    Yields:
        The descriptor of the lock. A child process that inherits it holds the lock too.

    Raises:
        SettingsError: another process has the lock; the message starts with the name of the ``setting``.
    """
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise SettingsError(f"{setting}: cannot write to {folder / _LOCK}: {error.strerror}") from error
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
    same name there. With an error, nothing of it stays in a run of one process; with several, others may still write.

    Raises:
        WriteError: something could not be written, for example because the disk is full.
    """
    folder = run_dir / STAGING

    def clear() -> None:
        recover(run_dir)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    try:
        _once_per_disk(accelerator, clear)
        yield folder
        accelerator.wait_for_everyone()
        _once_per_disk(accelerator, lambda: _publish(folder, run_dir))
    except Exception as error:
        told = _write_error(error, folder, run_dir)
        if accelerator.num_processes == 1:  # Others may still be writing.
            recover(run_dir)
            shutil.rmtree(folder, ignore_errors=True)
        if told is None:
            raise
        raise told from error


def _write_error(error: Exception, folder: Path, run_dir: Path) -> WriteError | None:
    """The error in a sentence if something could not be written to the disk, whichever library tried; None if not."""
    words = _disk_words(error, run_dir)
    if words is None:
        return None
    written = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    what = ", ".join(written) or "a checkpoint"
    told = WriteError(f"run_dir: {what} could not be written to {run_dir}: {words}")
    told.errno = getattr(error, "errno", None)
    return told


def _disk_words(error: Exception, run_dir: Path) -> str | None:
    """Why something could not be written; None if the error is of another kind."""
    if isinstance(error, OSError):
        return _words(error, run_dir) if error.errno in _OF_THE_DISK else None
    if found := _RUST_ERROR.search(str(error)):
        number = int(found[1])
        return _words(OSError(number, os.strerror(number)), run_dir) if number in _OF_THE_DISK else None
    if isinstance(error, RuntimeError) and _PYTORCH_ERROR.search(str(error)):
        try:
            _try_to_write(run_dir, _TRIAL)
        except OSError as reason:
            return _words(reason, run_dir)
        return f"PyTorch could not write its file ({error})"
    return None


def _words(error: OSError, folder: Path) -> str:
    """The words of an error, with the room that is left where that is the matter."""
    words = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            words += f" ({shutil.disk_usage(folder).free / 1e6:,.1f} MB are free)"
    return words


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
