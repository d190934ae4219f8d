"""Loads a user's own function by its name, "package.module:attribute" or "path/to/file.py:attribute"."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

_loaded: set[str] = set()


def load_function(target: str, *, field: str = "function", base_dir: str | Path = ".") -> Callable[..., Any]:
    """Loads the function that ``target`` names.

    Args:
        target: "package.module:attribute" or "path/to/file.py:attribute". A file is run once in a process, under a
            module name of its own. Its folder is not put on the import path.
        field: the name of the setting that holds ``target``. Every error begins with this name.
        base_dir: the folder in which relative file paths start.

    Raises:
        ValueError: ``target`` has neither form, or there is no such file, module or attribute.
        TypeError: ``target`` is not a string, or the attribute is not callable.
        Exception: the module may raise anything while it is run; a note on the error names the field.
    """
    if not isinstance(target, str):
        raise TypeError(f"{field}: got {target!r}, expected 'package.module:attribute' or 'path/to/file.py:attribute'")
    source, _, attribute = target.rpartition(":")
    if not source or not attribute:
        raise ValueError(f"{field}: {target!r}, expected 'package.module:attribute' or 'path/to/file.py:attribute'")
    note = f"while loading {field}: {target!r}"
    if source.endswith(".py"):
        module = _load_file((Path(base_dir) / Path(source).expanduser()).resolve(), field, note)
    else:
        module = _load_module(source, field, note)
    if getattr(module, "__file__", None):
        _loaded.add(str(module.__file__))
    if not hasattr(module, attribute):
        public = sorted(k for k, v in vars(module).items() if callable(v) and not k.startswith("_"))
        raise ValueError(f"{field}: {source} has no {attribute!r}; its callables are {', '.join(public) or 'none'}")
    function = getattr(module, attribute)
    if not callable(function):
        raise TypeError(f"{field}: {target!r} is a {type(function).__name__}, expected a callable")
    return function  # type: ignore[no-any-return]


def loaded_files() -> frozenset[str]:
    """The files of the user's own functions that were loaded in this process."""
    return frozenset(_loaded)


@contextlib.contextmanager
def _noted(note: str) -> Iterator[None]:
    """Adds a note to an error that the user's module raises while it is run."""
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


def _load_module(source: str, field: str, note: str) -> ModuleType:
    try:
        with _noted(note):
            return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{source}.".startswith(f"{error.name}."):
            raise  # The module is there, but something that it imports is missing.
        raise ValueError(f"{field}: there is no module {error.name!r}") from None


def _load_file(path: Path, field: str, note: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{field}: there is no file {path}")
    name = f"maestro_fast_user_{sha256(str(path).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # A .py file always has a loader.
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            with _noted(note):
                spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
