"""File systems of a test's own: a small disk that a run fills up, and folders that nobody can write to.

A program in its own namespace of users and mounts may mount what it likes, without being root outside. Everything that
it mounts is gone when it ends, so a whole scenario runs in one such program.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_NEW_USERS, _NEW_MOUNTS = 0x10000000, 0x00020000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18
_NO_NAMESPACE = 77  # an exit code
_LONGEST = 240.0  # seconds that a scenario may take


def run_scenario(scenario: Callable[..., None], *given: Any, log: Path, namespace: bool = True) -> None:
    """Runs a scenario in a program of its own, whose errors this one raises. Without a namespace the test is skipped.

    Args:
        scenario: a function of a module; it fails by an AssertionError.
        given: its arguments.
        log: the file for what it prints.
        namespace: whether it mounts anything.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.scenarios"])
    process = context.Process(target=_run, args=(scenario, given, str(log), namespace))
    process.start()
    process.join(_LONGEST)
    if process.exitcode is None:
        process.kill()
        process.join()
    if process.exitcode == _NO_NAMESPACE:
        pytest.skip("no namespace of users and mounts can be made here")
    assert process.exitcode == 0, log.read_text(encoding="utf-8", errors="replace")[-4000:]


def _run(scenario: Callable[..., None], given: tuple[Any, ...], log: str, namespace: bool) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if namespace:
        try:
            _enter_namespace()
        except OSError:
            traceback.print_exc()
            os._exit(_NO_NAMESPACE)
    scenario(*given)


def _enter_namespace() -> None:
    user, group = os.getuid(), os.getgid()
    _check(_libc.unshare(_NEW_USERS | _NEW_MOUNTS))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)
    _mount("none", "/mnt", "tmpfs", 0, "size=64k")  # Some systems make the namespace and let nothing be mounted in it.


class SmallDisk:
    """A file system of ``size`` bytes in ``folder``."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self._filler = folder, folder / "filler"
        folder.mkdir()
        _mount("none", str(folder), "tmpfs", 0, f"size={size}")

    def fill(self, spare: int = 0) -> None:
        """Takes all that is free but for ``spare`` bytes, in whole pages."""
        with self._filler.open("wb") as file:  # This frees what it has taken before.
            found = os.statvfs(self.folder)
            os.posix_fallocate(file.fileno(), 0, max(1, found.f_bavail * found.f_frsize - spare))

    def clear(self) -> None:
        """Frees what ``fill`` took."""
        self._filler.unlink()

    def resize(self, size: int) -> None:
        _mount("none", str(self.folder), "tmpfs", _REMOUNT, f"size={size}")


def make_read_only(path: Path) -> None:
    """Lets nobody write to a folder or a file, root included."""
    _mount(str(path), str(path), None, _BIND | _RECURSIVE)
    _mount("none", str(path), None, _REMOUNT | _BIND | _READ_ONLY)


def limit_files(size: int) -> None:
    """Lets no file of this program grow beyond ``size`` bytes, as a quota does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


_libc = ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = (source, target, kind)
    source_b, target_b, kind_b = (None if word is None else os.fsencode(word) for word in words)
    _check(_libc.mount(source_b, target_b, kind_b, ctypes.c_ulong(flags), None if data is None else data.encode()))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
