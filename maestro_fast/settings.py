"""From plain mappings (YAML, command line) to config dataclasses; every error names the field it is about."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
SHORTHANDS = {
    "weights": "policy",
    "generation": "engine",
}  # sections that may be a mere name, and the setting that the name stands for


class SettingsError(ValueError):
    """A setting that is missing, unknown or of the wrong type; the message starts with its dotted name."""


def build(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """An instance of dataclass ``cls`` from a mapping.

    Nested dataclasses, lists, tuples, dictionaries with string keys, ``Literal`` and unions are understood; an int
    serves as float, and so does a string such as "1e-5", which YAML 1.1 reads as text. A bool is no number.

    Args:
        cls: a dataclass.
        values: field names to values.
        path: dotted name of ``values`` itself, for messages.

    Raises:
        SettingsError: an unknown or missing field, a wrong type, or what the dataclass itself refuses.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(f"{path or cls.__name__}: got {_show(values)}, expected a mapping")
    assert is_dataclass(cls)
    known = {item.name: item for item in fields(cls) if item.init}
    for name in values:
        if name not in known:
            expected = f"expected one of {', '.join(sorted(known))}" if known else "there are none here"
            raise SettingsError(f"{_join(path, name)}: unknown setting, {expected}")
    for name, item in known.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise SettingsError(f"{_join(path, name)}: missing, it has no default")
    hints = get_type_hints(cls)
    arguments = {name: _convert(value, hints[name], _join(path, name)) for name, value in values.items()}
    try:
        return cls(**arguments)
    except SettingsError:
        raise
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{path}.{error}" if path else str(error)) from error


def override(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets ``values["a"]["b"]`` for the dotted name ``a.b``, in place.

    A section that is missing or empty is created. One that is a mere name becomes a mapping: ``weights.alpha`` makes
    ``{policy: conductor, alpha: ...}`` of ``weights: conductor``.

    Raises:
        SettingsError: something on the way is a plain value or a list.
    """
    *parents, last = dotted.split(".")
    at = values
    for i, name in enumerate(parents):
        path, nested = ".".join(parents[: i + 1]), at.get(name)
        if nested is None:
            nested = {}
        elif isinstance(nested, str) and path in SHORTHANDS:
            nested = {SHORTHANDS[path]: nested}
        if not isinstance(nested, dict):
            raise SettingsError(f"{path}: is {_show(nested)}, cannot set {dotted} inside it")
        at[name] = at = nested
    at[last] = value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else str(name)


def _show(value: Any) -> str:
    return f"{type(value).__name__} {value!r}" if value is not None else "nothing"


def _convert(value: Any, hint: Any, path: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(hint), path)
    if origin is Literal:
        if not any(value == option and type(value) is type(option) for option in get_args(hint)):  # True == 1
            raise SettingsError(f"{path}: got {_show(value)}, expected one of {', '.join(map(str, get_args(hint)))}")
        return value
    if is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else build(hint, value, path)
    if (origin or hint) in (list, tuple):
        return _convert_sequence(value, hint, path)
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise SettingsError(f"{path}: got {_show(value)}, expected a mapping")
        inner = get_args(hint)[1] if get_args(hint) else Any
        return {str(name): _convert(item, inner, _join(path, str(name))) for name, item in value.items()}
    return _convert_scalar(value, hint, path)


def _convert_union(value: Any, options: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    refusals = []
    for option in rest:
        try:
            return _convert(value, option, path)
        except SettingsError as error:
            refusals.append(str(error))
    inside = [words for words in refusals if not words.startswith(f"{path}: ")]  # the right kind, wrong further in
    if inside or len(refusals) == 1:
        raise SettingsError((inside or refusals)[-1])
    expected = " or ".join(words.rpartition("expected ")[2] for words in refusals)
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
    items = [_convert(item, of, f"{path}[{i}]") for i, (item, of) in enumerate(zip(value, inner, strict=True))]
    return tuple(items) if is_tuple else items


def _convert_scalar(value: Any, hint: Any, path: str) -> Any:
    if hint is float and not isinstance(value, bool):
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise SettingsError(f"{path}: got {_show(value)}, expected {hint.__name__}")
