"""Reads the YAML file of a run and the settings of the command line, and makes all paths in them absolute.

A relative path in the file starts in the folder of the file, and one on the command line in the working directory. What
``read_config`` returns means the same wherever it is written, so the ``config.yaml`` of a run directory can be trained
with, too. This module imports neither torch nor transformers: a wrong path to the config is answered at once.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from maestro_fast.model_path import check_model_path
from maestro_fast.peer_names import our_name
from maestro_fast.settings import SettingsError, override

logger = logging.getLogger(__name__)

# A reward entry, which may have another one in its gate. Anything else in an entry with a function of the user's own is
# an argument of that function, and stays as it is.
_ENTRY = r"(?:rewards\[\d+\]|anchor)(?:\.gate\.on)*"
# Here stand paths, paths or names of the hub, and functions, which may be "path/to/file.py:name".
_PATHS = re.compile(
    rf"run_dir|generation\.folder|trainer\.(?:deepspeed|fsdp_config|accelerator_config)|{_ENTRY}\.cache"
)
_PATHS_OR_NAMES = re.compile(rf"model\.path|(?:evaluation\.)?data(?:\[\d+\])?\.path|{_ENTRY}\.model")
_FUNCTIONS = re.compile(rf"{_ENTRY}(?:\.function)?|(?:weights|loss)(?:\.function)?|weights\.meta_reward")
_LONGEST = 255  # bytes of a file's name on Linux
_FILE = re.compile(r"[./~]|.*/.*/|.*\.(?:jsonl?|csv|tsv|parquet|arrow|txt|gz|zst|bz2|xz|zip)$|.*/$")


def read_config(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads the mapping of a YAML file, and sets the ``--a.b value`` pairs of the command line in it.

    Args:
        path: the file.
        overrides: the words of the command line.

    Returns:
        The mapping, in which every path is absolute. A name of the hub, such as "org/model", stays one unless there is
        a file or folder of that name.

    Raises:
        SettingsError: the file cannot be read, it is no YAML mapping, a key stands in it twice, an override is broken,
            or a path is relative to the working directory where it should be relative to the file.
    """
    values = read_plain(path)
    given = list(settings_of_words(overrides))
    taken = tuple(name for name, _ in given)
    folder, here = path.absolute().parent, Path.cwd()
    located: dict[str, Any] = _located(
        values, "", lambda text, name: text if _replaced(name, taken) else _in_file(text, name, folder)
    )
    for name, value in given:
        override(located, name, _located(value, name, lambda text, at: _absolute(text, at, here)))
    return located


def read_run_config(path: Path) -> dict[str, Any]:
    """Reads the config.yaml that a run has written. In those of version 0.1 relative paths start where the run started.

    That is taken to be the working directory. Later runs have written absolute paths.

    Raises:
        SettingsError: the file cannot be read, or it is no YAML mapping.
    """
    return absolute_paths(read_plain(path), Path.cwd())


def read_plain(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file as it stands there.

    Raises:
        SettingsError: the file cannot be read, it is no YAML mapping, or a key stands in it twice.
    """
    if not path.exists():
        raise SettingsError(f"config: no file {path}")
    try:
        values = _yaml(path.read_text(encoding="utf-8"), f"config: {path}")
    except OSError as error:
        raise SettingsError(f"config: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"config: {path} is not a text in UTF-8, see byte {error.start}") from error
    _check_nesting(values, f"config: {path}")
    if not isinstance(values, dict):
        got = "nothing" if values is None else f"a {type(values).__name__}"
        raise SettingsError(f"config: {path} holds {got}, expected a mapping of settings")
    return values


_DEEPEST = 64


class _Loader(yaml.SafeLoader):
    """Refuses a mapping in which a key stands twice, where YAML would silently keep the last one."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._checked: list[yaml.MappingNode] = []

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Resolves the merges (``<<``) of a mapping, which puts the keys of others into it, so it is checked before."""
        if not any(node is other for other in self._checked):
            self._checked.append(node)
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        raise yaml.MarkedYAMLError(
                            problem=f"the key {key.value!r} stands there twice", problem_mark=key.start_mark
                        )
                    seen.add(key.value)
        super().flatten_mapping(node)


def _yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise SettingsError(f"{what}{where}: is not valid YAML: {problem}") from error
    except ValueError as error:  # a date that there is not, a number of thousands of digits
        raise SettingsError(f"{what}: is not valid YAML: {error}") from error
    except RecursionError:  # The traceback of it would hold a thousand equal lines.
        raise SettingsError(f"{what}: nests too deep, expected at most {_DEEPEST} levels") from None


def _check_nesting(value: Any, what: str, around: tuple[Any, ...] = ()) -> None:
    """Refuses values that hold themselves, as YAML's anchors allow, or that nest deeper than any config does."""
    if not isinstance(value, dict | list):
        return
    if any(value is other for other in around):
        raise SettingsError(f"{what}: holds an anchor that stands within itself, expected none")
    if len(around) == _DEEPEST:
        raise SettingsError(f"{what}: nests too deep, expected at most {_DEEPEST} levels")
    for item in value.values() if isinstance(value, dict) else value:
        _check_nesting(item, what, (*around, value))


def settings_of_words(words: Sequence[str]) -> list[tuple[str, Any]]:
    """The dotted names and the values of ``--a.b value`` and ``--a.b=value``, from the words of a command line.

    Raises:
        SettingsError: a word is no setting, a value is missing, or it is not YAML.
    """
    rest, found = list(words), []
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            hint = our_name(word.partition("=")[0])
            raise SettingsError(f"{word}: expected --section.setting VALUE{f'; {hint}' if hint else ''}")
        name, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise SettingsError(f"{name}: missing its value")
            text = rest.pop(0)
        found.append((name, _yaml(text, f"{name}: {text!r}")))
    return found


def _located(value: Any, name: str, place: Callable[[str, str], str]) -> Any:
    """A copy of ``value``, the setting ``name``, in which ``place`` has replaced every text by its absolute path."""
    if isinstance(value, dict):
        keep: set[str] = set()
        if re.fullmatch(_ENTRY, name):  # A judge's model is a name on its server.
            keep = {"model", "cache"} if "function" in value else {"model"} if value.get("type") == "judge" else set()
        names = {key: "on" if key is True else str(key) for key in value}  # YAML 1.1 reads a key `on` as true.
        return {
            key: item if key in keep else _located(item, f"{name}.{names[key]}" if name else names[key], place)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_located(item, f"{name}[{i}]", place) for i, item in enumerate(value)]
    return place(value, name) if isinstance(value, str) else value


def _replaced(name: str, overrides: Sequence[str]) -> bool:
    """Whether the command line sets this setting or the section around it."""
    return any(re.match(rf"{re.escape(other)}(?:[.\[]|$)", name) for other in overrides)


def absolute_paths(values: dict[str, Any], base: Path) -> dict[str, Any]:
    """A copy of a run's mapping in which all paths are absolute. Relative ones start at ``base``."""
    located: dict[str, Any] = _located(values, "", lambda text, name: _absolute(text, name, base))
    return located


def check_paths(values: dict[str, Any]) -> None:
    """Finds models, data and files of functions that are missing, before anything slow is imported to read them.

    Args:
        values: what ``read_config`` returned. Names of the hub are not looked up.

    Raises:
        SettingsError: there is no such file or folder, or the folder of the policy holds no checkpoint.
    """

    def check(text: str, name: str) -> str:
        path, attribute = _path_in(text, name)
        if path is not None and name == "model.path":
            check_model_path(path)
        elif path is not None and os.path.isabs(path) and not _PATHS.fullmatch(name) and not os.path.exists(path):
            kind = "file" if attribute or re.search(r"data(?:\[\d+\])?\.path$", name) else "folder"
            raise SettingsError(f"{name}: there is no {kind} {path}")
        return text

    _located(values, "", check)


def _in_file(text: str, name: str, folder: Path) -> str:
    """As ``_absolute``, but refuses a path that leads somewhere from the working directory alone."""
    path, _ = _path_in(text, name)
    if path is not None and not _expanded(path, name).is_absolute():
        inside, here = folder / path, Path.cwd() / path
        if not os.path.exists(inside) and os.path.exists(here):
            if name != "run_dir":
                raise SettingsError(
                    f"{name}: {path} is not in {folder}, where the relative paths of this config start, but in the "
                    f"working directory, expected {os.path.relpath(here, folder)}"
                )
            logger.warning("run_dir: is %s, beside the config; %s is another directory", inside, here)
    return _absolute(text, name, folder)


def _absolute(text: str, name: str, base: Path) -> str:
    """The absolute path that the setting ``name`` means, if relative ones start at ``base``; else the text itself."""
    path, attribute = _path_in(text, name)
    if path is None:
        return text
    # The system follows a link before it goes up by "..", so the base may hold none when the text is shortened.
    found = os.path.normpath(base.resolve() / _expanded(path, name))
    if _PATHS_OR_NAMES.fullmatch(name) and not _FILE.match(path) and not os.path.exists(found):
        return text
    return found + attribute


def _expanded(path: str, name: str) -> Path:
    """The path with the folder of a user in place of "~" or "~user". One that no file can have is refused."""
    if "\0" in path or any(len(os.fsencode(part)) > _LONGEST for part in path.split("/")):
        raise SettingsError(f"{name}: {path[:_LONGEST]!r}... is no path that a file can have")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise SettingsError(f"{name}: {path!r} begins with the folder of a user whom there is not") from error


def _path_in(text: str, name: str) -> tuple[str | None, str]:
    """The path in a setting's text, and what follows it; None if the text is certainly no path."""
    if _FUNCTIONS.fullmatch(name):
        source, colon, attribute = text.rpartition(":")
        return (source, colon + attribute) if source.endswith(".py") else (None, "")
    if "://" in text or not text or not (_PATHS.fullmatch(name) or _PATHS_OR_NAMES.fullmatch(name)):
        return None, ""
    return text, ""
