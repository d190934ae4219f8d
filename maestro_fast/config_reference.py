"""The reference of all settings of a training config: type, default and meaning, read off the config dataclasses.

``maestro-fast train --help`` prints it, and training/CONFIG.md holds it. This command writes that file again:

    python -m maestro_fast.config_reference > maestro_fast/training/CONFIG.md
"""

from __future__ import annotations

import inspect
import math
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

from maestro_fast.settings import Setting, sentences, settings_of
from maestro_fast.training.arguments import TRAINER_DEFAULTS
from maestro_fast.training.config import TrainConfig

_SCALARS = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "anything", type(None): "null"}


@dataclass(frozen=True)
class Row:
    """One setting: its dotted name, its type in words, its default ("" if it has to be set), and its sentence."""

    name: str
    kind: str
    default: str
    sentence: str


@dataclass(frozen=True)
class Section:
    """The settings of one dataclass.

    Attributes:
        name: the dotted name of the section, or "" for the top level.
        variant: the ``type:`` to which the settings belong, or "" where the section has no types.
        about: the first paragraph of the dataclass' docstring.
        rows: the settings.
    """

    name: str
    variant: str
    about: str
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        return f"{self.name}, type: {self.variant}" if self.variant else self.name or "top level"


def sections() -> list[Section]:
    """All settings of a training config, section by section, in the order of their dataclasses."""
    return list(_sections(TrainConfig, ""))


def as_text() -> str:
    """The reference for a terminal."""
    lines = []
    for section in sections():
        lines += [f"{section.title}:", *textwrap.wrap(section.about, 108, initial_indent="  ", subsequent_indent="  ")]
        for row in section.rows:
            lines.append(f"    {row.name}: {row.kind}{f' = {row.default}' if row.default else ', required'}")
            lines += textwrap.wrap(row.sentence, 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
        lines.append("")
    return "\n".join(lines).replace("``", "`")


def as_markdown() -> str:
    """The reference as CONFIG.md holds it."""
    lines = [
        "# Settings of a training config",
        "",
        "This file is made from the config dataclasses: `python -m maestro_fast.config_reference`.",
        "",
        "A section that comes in several types has a key `type`, and the settings of that type beside it. A mere name",
        "stands for a type: `weights: conductor` is `weights: {type: conductor}`. A mere `file.py:name` stands for a",
        "function of your own: `{type: function, function: file.py:name}`. On the command line a setting has its",
        "dotted name, as in `--sampling.group_size 16`.",
        "",
        "A relative path in a config file starts in the folder of that file, and one on the command line in the",
        "working directory. A name such as `org/model` is one of the hub, unless there is such a file or folder.",
    ]
    for section in sections():
        lines += ["", f"## {_title(section)}", "", section.about, ""]
        if section.rows:
            lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
        for row in section.rows:
            default = f"`{row.default}`" if row.default else "required"
            lines.append(f"| `{row.name}` | {_cell(row.kind)} | {_cell(default)} | {_cell(row.sentence)} |")
    return "\n".join(lines).replace("``", "`") + "\n"


def _title(section: Section) -> str:
    if section.variant:
        return f"`{section.name}`, `type: {section.variant}`"
    return f"`{section.name}`" if section.name else "Top level"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _sections(
    cls: type[Any], name: str, variant: str = "", seen: dict[type[Any], str] | None = None
) -> Iterator[Section]:
    """Yields the section of ``cls``, then those of the dataclasses in its fields that have not been ``seen`` yet."""
    seen = {} if seen is None else seen
    seen.setdefault(cls, name)
    settings, about = settings_of(cls), sentences(cls)
    rows: list[Row] = []
    for field, setting in settings.items():
        words = about.get(field, "")
        if setting.choice is not None and setting.takes_rest:
            rows.insert(
                0, Row(_dotted(name, "type"), ", ".join(setting.choice.types), setting.choice.default or "", words)
            )
        elif setting.takes_rest:
            rows.append(Row(_dotted(name, "*"), "anything", "{}", words))
        else:
            rows.append(Row(_dotted(name, field), _kind(setting, seen), _default(setting), words))
    yield Section(name, variant, _about(cls), tuple(rows))
    for field, setting in settings.items():
        yield from _nested(setting, name if setting.takes_rest else _dotted(name, field), seen)
    if cls is TrainConfig:
        yield _trainer()


def _nested(setting: Setting, name: str, seen: dict[type[Any], str]) -> Iterator[Section]:
    """Yields the sections of the dataclasses that a field may hold, without those that were seen before."""
    if setting.choice is not None:
        for variant, option in setting.choice.types.items():
            if option not in seen:
                yield from _sections(option, name, variant, seen)
        return
    for found, listed in _dataclasses(setting.hint):
        if found not in seen:
            yield from _sections(found, f"{name}[]" if listed else name, "", seen)


def _trainer() -> Section:
    rows = (
        Row(f"trainer.{name}", _SCALARS[type(value)], _shown(value), sentence)
        for name, (value, sentence) in TRAINER_DEFAULTS.items()
    )
    about = "Any field of ``transformers.TrainingArguments``. The fields listed here have defaults of our own."
    return Section("trainer", "", about, tuple(rows))


def _dataclasses(hint: Any, listed: bool = False) -> Iterator[tuple[type[Any], bool]]:
    """Yields the config dataclasses in a type hint, and for each whether it stands in a list."""
    if isinstance(hint, type) and is_dataclass(hint):
        yield hint, listed
    for inner in get_args(hint):
        yield from _dataclasses(inner, listed or get_origin(hint) in (list, tuple))


def _dotted(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _about(cls: type[Any]) -> str:
    return " ".join(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].split())


def _kind(setting: Setting, seen: dict[type[Any], str]) -> str:
    """The type of a setting in words. If an earlier section has the same settings, it is named."""
    before = next((seen[found] for found, _ in _dataclasses(setting.hint) if found in seen), None)
    if setting.choice is not None:
        return f"section of type {' or '.join(setting.choice.types)}"
    return _words(setting.hint) + (f", as `{before}`" if before else "")


def _words(hint: Any) -> str:
    """A type hint in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(_words(option) for option in inner)
    if origin in (list, tuple, Sequence):
        return f"list of {_items(inner[0])}"
    if origin is dict or hint is dict:
        return f"mapping of names to {_items(inner[1] if inner else Any)}"
    if origin is Callable:
        return "function"
    return "section" if is_dataclass(hint) else _SCALARS[hint]


def _items(hint: Any) -> str:
    """What a list or a mapping holds, in words."""
    if hint is Any or get_origin(hint) in (Union, types.UnionType):
        return "values"
    words = _words(hint)
    return {"section": "sections", "number": "numbers", "integer": "integers"}.get(words, words)


def _default(setting: Setting) -> str:
    if setting.required:
        return ""
    value = setting.field.default
    if value is MISSING and setting.field.default_factory is not MISSING:
        value = setting.field.default_factory()
    if setting.choice is not None:
        return next(name for name, option in setting.choice.types.items() if type(value) is option)
    return _shown(value)


def _shown(value: Any) -> str:
    """A default as one would write it in YAML."""
    if is_dataclass(value):
        choices = [setting.choice for setting in settings_of(type(value)).values() if setting.takes_rest]
        return next((choice.default for choice in choices if choice and choice.default), "{}")
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isinf(value):
        return "-.inf" if value < 0 else ".inf"
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, str):
        return value if value.isprintable() and value.strip() else repr(value).replace("'", '"')
    return str(value)


if __name__ == "__main__":
    print(as_markdown(), end="")
