"""What a checkpoint holds, with a checksum of each file: ``manifest.json``, written last and checked first.

A checkpoint is renamed into place when it is whole, so a kill leaves no half of one. What may still go wrong are disks,
copies and hands: a file that is cut, a byte that is another, a file of another checkpoint under the right name. Some of
that would be loaded without a word, and the run would go on with other parameters. The checksums guard against
accidents, not against somebody who writes a manifest of his own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FORMAT = 1
_PREFIX = "checkpoint"  # of the names of checkpoints, as transformers.trainer_utils.PREFIX_CHECKPOINT_DIR
_PIECE = 1 << 28  # The bytes of a sum: a large file has several, so that several threads can share it.
_CHUNK = 1 << 20


def write_manifest(folder: Path) -> None:
    """Writes what is in ``folder``, to which nobody may write any more.

    Of each file it holds the size, and the SHA-256 sum of each 256 MiB.
    """
    sums = _sums(folder, _files(folder))
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sums[name]} for name in sums}
    text = json.dumps({"format": _FORMAT, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def check_manifest(folder: Path) -> bool:
    """Checks that the files in ``folder`` are those that the manifest names, byte for byte.

    Files that it does not name are left alone, with a warning.

    Returns:
        False if there is no manifest, as in checkpoints of older versions.

    Raises:
        ValueError: a file is missing or is another one, or the manifest itself cannot be read.
    """
    if not (folder / MANIFEST).exists():
        return False
    named = _named(folder)
    if unknown := sorted({*_files(folder)} - {*named}):
        logger.warning("%s holds files that are not of the checkpoint: %s", folder, ", ".join(unknown))
    for name, about in named.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(folder, f"{name} is missing")
        if (size := path.stat().st_size) != about["bytes"]:
            raise _damaged(folder, f"{name} has {size:,} bytes, expected {about['bytes']:,}")
    for name, found in _sums(folder, [*named]).items():
        if found != named[name]["sha256"]:
            raise _damaged(folder, f"{name} is not as it was written")
    return True


@contextmanager
def tensors_of(file: Path) -> Iterator[Any]:
    """Opens a file of safetensors, as ``safetensors.safe_open`` gives it.

    Raises:
        ValueError: it is damaged, or it is another kind of file.
    """
    try:
        with safe_open(file, framework="pt") as found:
            yield found
    except SafetensorError as error:
        raise ValueError(f"{file}: is damaged, or no file of safetensors ({error})") from error


def _files(folder: Path) -> list[str]:
    """The files below ``folder`` but for the manifest, by their names from there on."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST)


def _named(folder: Path) -> dict[str, dict[str, Any]]:
    """What the manifest says of each file."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = found["format"]
        files = {str(name): {"bytes": int(x["bytes"]), "sha256": [*x["sha256"]]} for name, x in found["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read ({error})") from error
    if version != _FORMAT:
        raise _damaged(folder, f"{MANIFEST} has format {version!r}, expected {_FORMAT}")
    return files


def _sums(folder: Path, names: list[str]) -> dict[str, list[str]]:
    """The SHA-256 sums of each file, by name. Pieces are read side by side, since hashing leaves Python's lock free."""
    pieces = [(name, start) for name in names for start in range(0, (folder / name).stat().st_size or 1, _PIECE)]
    found: dict[str, list[str]] = {name: [] for name in names}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (name, _), digest in zip(pieces, pool.map(lambda at: _sha256(folder / at[0], at[1]), pieces), strict=True):
            found[name].append(digest)
    return found


def _sha256(path: Path, start: int) -> str:
    found, left = hashlib.sha256(), _PIECE
    with path.open("rb") as file:
        file.seek(start)
        while left and (chunk := file.read(min(_CHUNK, left))):
            found.update(chunk)
            left -= len(chunk)
    return found.hexdigest()


def _damaged(folder: Path, what: str) -> ValueError:
    """The error of a checkpoint that cannot be resumed from. It names the one before, should there be one."""
    steps = {_step(path): path.name for path in folder.absolute().parent.iterdir()}
    others = [step for step in steps if 0 <= step < _step(folder)]
    advice = "the run has no checkpoint before it"
    if others:
        advice = f"move it away to go on from {steps[max(others)]}"
    return ValueError(f"resume_from_checkpoint: {folder} is damaged: {what}; {advice}")


def _step(folder: Path) -> int:
    """The step of a checkpoint by its name; -1 for a folder of another name."""
    prefix, _, number = folder.name.partition("-")
    return int(number) if prefix == _PREFIX and number.isdecimal() else -1
