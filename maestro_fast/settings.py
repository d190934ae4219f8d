"""Builds config dataclasses from plain mappings (YAML, the command line). Every error names the setting at fault.

A section that comes in several types, such as a reward, has one dataclass for each, and ``type:`` says which:

    @dataclass(frozen=True)
    class RunConfig:
        loss: Annotated[PolicyLossConfig | FunctionLoss, Choice({"policy_loss": PolicyLossConfig, ...})]

A field marked ``REST`` takes the settings of its own mapping that no other field names. So the options of a type stand
beside what all types have in common, as in ``{type: length, target: 12, where: {family: poem}}``.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
logger = logging.getLogger(__name__)
_SHOWN = 200  # characters of a value in a message

REST: Final = "the settings that no other field names"
SHORTHANDS = ("weights", "generation", "loss", "anchor")  # These sections may be a mere name, see ``Choice``.
OLD_TYPE_KEYS = {"weights": "policy", "generation": "engine"}  # In release 0.1 the key `type` had these names.
_FOR_ONE_RELEASE = "The old one is read in this release and refused in the next."
_said: set[str] = set()  # the keys of the warnings that ``say_once`` has logged


class SettingsError(ValueError):
    """A setting is missing, unknown or of the wrong type. The message starts with its dotted name."""


class UnknownSetting(SettingsError):
    """A setting that there is not.

    Attributes:
        name: its dotted name.
        value: the value that it was given.
    """

    def __init__(self, name: str, value: Any, expected: str) -> None:
        super().__init__(f"{name}: unknown setting, {expected}")
        self.name, self.value = name, value


@dataclass(frozen=True)
class Choice:
    """The dataclasses among which the key ``type`` of an entry chooses.

    An entry is a mapping with a ``type`` and the fields of its dataclass. A mere name stands for a mapping with that
    ``type`` alone, and "file.py:name" for ``{function: "file.py:name"}``. An entry with a ``function`` and without a
    ``type`` is of the type ``function``, where there is one.

    Attributes:
        types: the dataclass of each type.
        default: the type of an entry that names none; None means that every entry has to name one.
        what: the word for an entry in error messages, such as "reward".
        modernise: brings an entry of an older release up to date in place. It gets the entry and its dotted name.
    """

    types: Mapping[str, type[Any]]
    default: str | None = None
    what: str = "entry"
    modernise: Callable[[dict[str, Any], str], None] | None = None

    def entry(self, value: Any, path: str) -> dict[str, Any]:
        """Returns the mapping that ``value`` stands for, with the keys of this release.

        Raises:
            SettingsError: ``value`` is neither a mapping nor a name.
        """
        if not isinstance(value, str | Mapping):
            raise SettingsError(
                f"{path}: got {_show(value)}, expected the type of a {self.what} or a mapping with it under 'type'"
            )
        options = _named_entry(value) if isinstance(value, str) else dict(value)
        if self.modernise is not None:
            self.modernise(options, path)
        return options

    def build(self, value: Any, path: str) -> Any:
        """Builds the dataclass that an entry describes; a ``value`` that is such a dataclass already is returned.

        Raises:
            SettingsError: the type is unknown, or ``build`` refuses the settings of its dataclass.
        """
        if isinstance(value, tuple(self.types.values())):
            return value
        options = self.entry(value, path)
        name = options.pop("type", "function" if {"function"} <= self.types.keys() & options.keys() else self.default)
        if not isinstance(name, str) or name not in self.types:
            got = "missing" if name is None else repr(name)
            own = "; a function of your own is named by function: 'package.module:name' or 'path/to/file.py:name'"
            raise SettingsError(
                f"{_join(path, 'type')}: {got}, expected one of {', '.join(self.types)}"
                f"{own if 'function' in self.types else ''}{near(name, self.types)}"
            )
        return build(self.types[name], options, path)


class Setting(NamedTuple):
    """A field of a config dataclass, with its type hint and how it is marked."""

    field: Field[Any]
    hint: Any
    choice: Choice | None
    takes_rest: bool

    @property
    def required(self) -> bool:
        return self.field.default is MISSING and self.field.default_factory is MISSING


def settings_of(cls: Any) -> dict[str, Setting]:
    """The settings of a config dataclass by name."""
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for item in fields(cls):
        hint, *marks = get_args(hints[item.name]) if get_origin(hints[item.name]) is Annotated else (hints[item.name],)
        choice = next((mark for mark in marks if isinstance(mark, Choice)), None)
        if item.init:
            found[item.name] = Setting(item, hint, choice, REST in marks)
    return found


def sentences(cls: type[Any]) -> dict[str, str]:
    """What each setting of a config dataclass means, read from ``Attributes`` in its docstring and its bases' ones."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        block = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")[2].partition("\n\n")[0]
        for item in re.split(r"\n(?=    \S)", block):
            names, _, sentence = item.partition(": ")
            words = " ".join(sentence.split()).removesuffix(".")
            if re.match(r"[a-z]+\b(?!_)", words):  # The sentence begins with a word, not with a name such as w_r.
                words = f"{words[0].upper()}{words[1:]}"
            found |= {name.strip(): f"{words}." for name in names.split(",") if words}
    return found


def build(cls: type[T], values: Mapping[str, Any] | str, path: str = "") -> T:
    """Builds an instance of dataclass ``cls`` from a mapping.

    Nested dataclasses, ``Choice``, lists, tuples, dictionaries with string keys, ``Literal`` and unions are understood.
    An int serves as a float, and so does a string such as "1e-5", which YAML 1.1 reads as text. A bool does not serve
    as a number.

    Args:
        cls: a dataclass.
        values: the value of each field by its name. A mere name will do where ``cls`` has a ``Choice`` that takes the
            rest.
        path: the dotted name of ``values`` itself, for messages.

    Raises:
        SettingsError: a field is unknown or missing, a value has the wrong type, or the dataclass itself refuses one.
    """
    own = dict(settings_of(cls))
    rest = next((name for name, setting in own.items() if setting.takes_rest), None)
    taking = None if rest is None else own.pop(rest)
    if taking is not None and taking.choice is not None:
        values = taking.choice.entry(values, path)
    if not isinstance(values, Mapping):
        raise SettingsError(f"{path or cls.__name__}: got {_show(values)}, expected a mapping")
    # YAML 1.1 reads a key `on` as true.
    given: dict[Any, Any] = {"on" if isinstance(name, bool) and name else name: value for name, value in values.items()}
    others = {name: given.pop(name) for name in list(given) if name not in own}
    if others and taking is None:
        name, value = next(iter(others.items()))
        expected = f"expected one of {', '.join(sorted(own))}{near(name, own)}" if own else "there are none here"
        raise UnknownSetting(_join(path, name), value, expected)
    for name, setting in own.items():
        if name not in given and setting.required:
            raise SettingsError(f"{_join(path, name)}: missing, it has no default")
    arguments = {name: _convert_setting(value, own[name], _join(path, name)) for name, value in given.items()}
    if rest is not None and taking is not None:
        arguments[rest] = _convert_setting(others, taking, path)
    try:
        return cls(**arguments)
    except SettingsError:
        raise
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{path}.{error}" if path else str(error)) from error


def override(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets ``values["a"]["b"]`` for the dotted name ``a.b``, in place.

    A section that is missing or empty is created. One that is a mere name becomes a mapping: ``weights.alpha`` makes
    ``{type: conductor, alpha: ...}`` of ``weights: conductor``.

    Raises:
        SettingsError: one of the sections that the name goes through is a plain value or a list.
    """
    *parents, last = dotted.split(".")
    at = values
    for i, name in enumerate(parents):
        path, nested = ".".join(parents[: i + 1]), at.get(name)
        if nested is None:
            nested = {}
        elif isinstance(nested, str) and path in SHORTHANDS:
            nested = _named_entry(nested)
        if not isinstance(nested, dict):
            raise SettingsError(f"{path}: is {_show(nested)}, cannot set {dotted} inside it")
        at[name] = at = nested
        if path in OLD_TYPE_KEYS:
            rename_key(at, OLD_TYPE_KEYS[path], "type", path)
            if f"{path}.{OLD_TYPE_KEYS[path]}" == dotted:
                say_once(f"{dotted}: this key is now called `type`: write {path}.type. {_FOR_ONE_RELEASE}")
                last = "type"
    at[last] = value


def rename_key(entry: dict[str, Any], old: str, new: str, path: str) -> None:
    """Renames a key of an older release in place, and says so once for every such key.

    Raises:
        SettingsError: the entry has both keys.
    """
    if old not in entry:
        return
    if new in entry:
        raise SettingsError(f"{path}.{old}: is the old name of {new}, which is set too, expected {new} alone")
    entry[new] = entry.pop(old)
    what = f"{path.partition('[')[0].rpartition('.')[2]}: the key `{old}` is now called `{new}`"
    say_once(f"{what}: write `{new}: {entry[new]}` in {path}. {_FOR_ONE_RELEASE}", key=what)


def say_once(message: str, key: str | None = None) -> None:
    """Logs a warning, unless one with the same ``key`` (by default the message) was logged before in this process."""
    if (key or message) not in _said:
        _said.add(key or message)
        logger.warning("%s", message)


def near(name: object, names: Iterable[str]) -> str:
    """Ends a message with the one of ``names`` that was probably meant; "" if none is close to ``name``."""
    found = difflib.get_close_matches(name, list(names), 1) if isinstance(name, str) else []
    return f"; did you mean {found[0]!r}?" if found else ""


def _named_entry(name: str) -> dict[str, Any]:
    return {"function": name} if ":" in name else {"type": name}


def _join(path: str, name: object) -> str:
    """The dotted name of a key in a section; one that is no text, or none at all, as Python writes it."""
    shown = name if isinstance(name, str) and name else repr(name)
    return f"{path}.{shown}" if path else shown


def _show(value: Any) -> str:
    """A value in the words of a message, which a long value does not fill."""
    if value is None:
        return "nothing"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= _SHOWN else f'{text[:_SHOWN]}...'}"


def _convert_setting(value: Any, setting: Setting, path: str) -> Any:
    return convert(value, setting.hint, path) if setting.choice is None else setting.choice.build(value, path)


def convert(value: Any, hint: Any, path: str) -> Any:
    """Converts ``value`` to what the type hint asks for, as ``build`` does for each field.

    Raises:
        SettingsError: the value has another type. The message starts with ``path``.
    """
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(hint), path)
    if origin is Literal:
        if not any(value == option and type(value) is type(option) for option in get_args(hint)):  # True == 1
            options = [str(option) for option in get_args(hint)]
            raise SettingsError(
                f"{path}: got {_show(value)}, expected one of {', '.join(options)}{near(value, options)}"
            )
        return value
    if is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else build(hint, value, path)
    if (origin or hint) in (list, tuple, Sequence):
        return _convert_sequence(value, hint, path)
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise SettingsError(f"{path}: got {_show(value)}, expected a mapping")
        inner = get_args(hint)[1] if get_args(hint) else Any
        return {str(name): convert(item, inner, _join(path, name)) for name, item in value.items()}
    if origin is Callable:
        if not callable(value):
            raise SettingsError(f"{path}: got {_show(value)}, expected a function")
        return value
    return _convert_scalar(value, hint, path)


def _convert_union(value: Any, options: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    refusals: list[SettingsError] = []
    for option in rest:
        try:
            return convert(value, option, path)
        except SettingsError as error:
            refusals.append(error)
    # If an option takes such a value as a whole, and refuses only something inside it, that refusal is reported.
    inside = [error for error in refusals if not str(error).startswith(f"{path}: ")]
    if inside or len(refusals) == 1:
        raise (inside or refusals)[-1]
    expected = " or ".join(str(error).rpartition("expected ")[2] for error in refusals)
    raise SettingsError(f"{path}: got {_show(value)}, expected {expected}")


def _convert_sequence(value: Any, hint: Any, path: str) -> Any:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise SettingsError(f"{path}: got {_show(value)}, expected a list")
    inner = get_args(hint) or (Any,)
    is_tuple = (get_origin(hint) or hint) is tuple
    if is_tuple and get_args(hint) and inner[-1] is not Ellipsis:
        if len(value) != len(inner):
            raise SettingsError(f"{path}: got {len(value)} items, expected {len(inner)}")
    else:
        inner = inner[:1] * len(value)
    items = [convert(item, of, f"{path}[{i}]") for i, (item, of) in enumerate(zip(value, inner, strict=True))]
    return tuple(items) if is_tuple else items


def _convert_scalar(value: Any, hint: Any, path: str) -> Any:
    if hint is float and not isinstance(value, bool):
        if isinstance(value, (int, float)):
            try:
                return float(value)
            except OverflowError:
                raise SettingsError(f"{path}: got {_show(value)}, which is beyond the largest number") from None
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise SettingsError(f"{path}: got {_show(value)}, expected {hint.__name__}")
