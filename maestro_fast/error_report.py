"""Says what ended a command: one sentence where a setting is wrong, and the user's own lines where their code failed.

A reward, loss or weight function of the user's own may raise anything. What matters then is the place in their file,
not the thirty frames of the trainer around it, so only the part of the traceback that lies in their files is shown.
"""

from __future__ import annotations

import site
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from traceback import FrameSummary

from maestro_fast.functions import loaded_files
from maestro_fast.settings import SettingsError

_LIBRARIES = {"accelerate", "datasets", "peft", "torch", "transformers", "triton", "trl", "vllm"}
_PACKAGE = str(Path(__file__).parent)
_SENTENCES = (ValueError, TypeError, OSError, ImportError)  # Such an error may be due to a setting, and says which.


def explain(error: BaseException) -> str | None:
    """What a command prints about an error in place of its traceback; None if the whole traceback is needed."""
    for cause in _causes(error):
        if isinstance(cause, SettingsError) and not _in_loaded_files(cause):
            break  # Its sentence says all, wherever the libraries on the way to it are installed.
        frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if _is_users(frame.filename)]
        broken = isinstance(cause, SyntaxError) and _is_users(cause.filename or "")
        if frames or broken:
            return _of_user(cause, frames)
    if not isinstance(error, _SENTENCES):
        return None
    notes = getattr(error, "__notes__", [])
    place = _foreign_place(error)
    sentence = str(error) or type(error).__name__
    return "\n".join([f"maestro-fast: {sentence}", *notes, *([place] if place else [])])


def _of_user(error: BaseException, frames: list[FrameSummary]) -> str:
    """Where in the user's files an error was raised, what it is, and the notes on it, such as the reward's name."""
    raised = traceback.TracebackException.from_exception(error).format_exception_only()
    shown = "".join([*traceback.StackSummary.from_list(frames).format(), *raised]).rstrip("\n")
    return f"maestro-fast: your own code failed (-v shows the whole traceback):\n{shown}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised ``from``."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _in_loaded_files(error: BaseException) -> bool:
    return any(frame.filename in loaded_files() for frame in traceback.extract_tb(error.__traceback__))


def _is_users(filename: str) -> bool:
    """Whether a file is neither Python's nor a library's nor ours, or holds a function that a config names."""
    if filename in loaded_files():
        return True
    if not filename or filename.startswith("<"):
        return False
    parts = Path(filename).parts
    if {"site-packages", "dist-packages"} & {*parts} or any(part.startswith("torchinductor_") for part in parts):
        return False
    if filename in _files_of_libraries():
        return False
    return not any(Path(filename).is_relative_to(folder) for folder in _library_folders())


def _files_of_libraries() -> set[str]:
    """The files of the libraries that a run loads, which may be installed in an editable way, as a clone."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in _LIBRARIES]
    return {str(module.__file__) for module in modules if getattr(module, "__file__", None)}


def _library_folders() -> list[str]:
    known = sysconfig.get_paths()
    libraries = (known[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    return [_PACKAGE, *libraries, *site.getsitepackages()]


def _foreign_place(error: BaseException) -> str:
    """Where a library raised an error that does not name a setting; "" if it was raised here, where all errors do."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or Path(frames[-1].filename).is_relative_to(_PACKAGE):
        return ""
    path = Path(frames[-1].filename)
    return f"{type(error).__name__} at {'/'.join(path.parts[-3:])}:{frames[-1].lineno}; -v shows the whole traceback"
