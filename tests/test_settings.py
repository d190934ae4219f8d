"""From mappings to dataclasses: what is understood, and that every error begins with the setting it is about."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
import yaml

from maestro_fast.settings import REST, Choice, SettingsError, build, override, rename_key, sentences


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count: {self.count}, expected at least 1")
        if self.rate > 100:
            raise TypeError(f"rate: {self.rate}, expected less")


@dataclass
class Everything:
    name: str
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    limit: int | None = None
    rate: float = 1.0
    flag: bool = False
    mode: Literal["fast", "slow"] | None = "fast"
    level: Literal[1, 2] = 1
    switch: Literal[True] = True
    targets: str | list[str] = "all"
    steps: list[int] | str = "all"
    number: int | float = 0
    numbers: list[float] = field(default_factory=list)
    plain: list = field(default_factory=list)  # type: ignore[type-arg]
    both: tuple[float, float] = (0.0, 1.0)
    many: tuple[int, ...] = ()
    loose: tuple = ()  # type: ignore[type-arg]
    pair: tuple[int, str] = (0, "")
    inners: list[Inner] = field(default_factory=list)
    by_name: dict[str, float] = field(default_factory=dict)
    nested: dict[str, dict[str, Inner]] = field(default_factory=dict)
    raw: dict = field(default_factory=dict)  # type: ignore[type-arg]
    anything: Any = None
    derived: int = field(default=7, init=False)


@dataclass
class Outer:
    section: Everything


@dataclass
class Empty:
    pass


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("limit: 3", "limit", 3),
        ("limit: null", "limit", None),
        ("rate: 2", "rate", 2.0),
        ("rate: 1e-5", "rate", 1e-5),  # YAML 1.1 reads text
        ("rate: '-3'", "rate", -3.0),
        ("flag: true", "flag", True),
        ("mode: slow", "mode", "slow"),
        ("mode: null", "mode", None),
        ("level: 2", "level", 2),
        ("switch: true", "switch", True),
        ("targets: q", "targets", "q"),
        ("targets: [q, k]", "targets", ["q", "k"]),
        ("number: 2", "number", 2),
        ("number: 2.5", "number", 2.5),
        ("numbers: [1, 2e-3, 0.5]", "numbers", [1.0, 0.002, 0.5]),
        ("plain: [1, a]", "plain", [1, "a"]),
        ("both: [1, 2]", "both", (1.0, 2.0)),
        ("many: [1, 2, 3]", "many", (1, 2, 3)),
        ("loose: [1, a]", "loose", (1, "a")),
        ("pair: [1, a]", "pair", (1, "a")),
        ("inner: {rate: 3}", "inner", Inner(3.0, 1)),
        ("maybe: {count: 2}", "maybe", Inner(0.5, 2)),
        ("maybe: null", "maybe", None),
        ("inners: [{rate: 1}, {}]", "inners", [Inner(1.0), Inner()]),
        ("by_name: {a: 1, 2: 0.5}", "by_name", {"a": 1.0, "2": 0.5}),
        ("nested: {x: {y: {count: 4}}}", "nested", {"x": {"y": Inner(0.5, 4)}}),
        ("raw: {a: [1], b: {c: x}}", "raw", {"a": [1], "b": {"c": "x"}}),
        ("anything: {a: [1, x]}", "anything", {"a": [1, "x"]}),
    ],
)
def test_what_is_understood(text: str, name: str, expected: Any) -> None:
    value = getattr(build(Everything, {"name": "n", **yaml.safe_load(text)}), name)
    assert value == expected
    assert type(value) is type(expected)
    if isinstance(expected, list | tuple):
        assert list(map(type, value)) == list(map(type, expected))


def test_defaults_stay_and_instances_pass() -> None:
    inner = Inner(2.0, 2)
    built = build(Everything, {"name": "n", "maybe": inner, "anything": inner})
    assert built == Everything("n", maybe=inner, anything=inner)
    assert built.maybe is inner


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("limit: 2.0", "limit: got float 2.0, expected int"),
        ("limit: '2'", "limit: got str '2', expected int"),
        ("limit: true", "limit: got bool True, expected int"),
        ("rate: true", "rate: got bool True, expected float"),
        ("rate: fast", "rate: got str 'fast', expected float"),
        ("rate: null", "rate: got nothing, expected float"),
        ("rate: [1]", "rate: got list [1], expected float"),
        ("flag: 1", "flag: got int 1, expected bool"),
        ("flag: 'yes'", "flag: got str 'yes', expected bool"),
        ("name: 3", "name: got int 3, expected str"),
        ("mode: quick", "mode: got str 'quick', expected one of fast, slow"),
        ("mode: [fast]", "mode: got list ['fast'], expected one of fast, slow"),
        ("level: true", "level: got bool True, expected one of 1, 2"),
        ("switch: 1", "switch: got int 1, expected one of True"),
        ("targets: 3", "targets: got int 3, expected str or a list"),
        ("targets: [q, 3]", "targets[1]: got int 3, expected str"),
        ("steps: [1, x]", "steps[1]: got str 'x', expected int"),
        ("steps: 1.5", "steps: got float 1.5, expected a list or str"),
        ("number: x", "number: got str 'x', expected int or float"),
        ("number: true", "number: got bool True, expected int or float"),
        ("numbers: 1", "numbers: got int 1, expected a list"),
        ("numbers: '12'", "numbers: got str '12', expected a list"),
        ("numbers: {a: 1}", "numbers: got dict {'a': 1}, expected a list"),
        ("numbers: [1, x]", "numbers[1]: got str 'x', expected float"),
        ("plain: 1", "plain: got int 1, expected a list"),
        ("both: [1]", "both: got 1 items, expected 2"),
        ("both: [1, x]", "both[1]: got str 'x', expected float"),
        ("many: [1, 2, true]", "many[2]: got bool True, expected int"),
        ("pair: [a, 1]", "pair[0]: got str 'a', expected int"),
        ("pair: [1, a, b]", "pair: got 3 items, expected 2"),
        ("inner: 3", "inner: got int 3, expected a mapping"),
        ("inner: null", "inner: got nothing, expected a mapping"),
        ("inner: {rat: 3}", "inner.rat: unknown setting, expected one of count, rate"),
        ("inner: {rate: x}", "inner.rate: got str 'x', expected float"),
        ("inner: {count: 0}", "inner.count: 0, expected at least 1"),
        ("inner: {rate: 101}", "inner.rate: 101.0, expected less"),
        ("maybe: {count: 0}", "maybe.count: 0, expected at least 1"),
        ("inners: [{}, {count: 0}]", "inners[1].count: 0, expected at least 1"),
        ("by_name: [1]", "by_name: got list [1], expected a mapping"),
        ("by_name: {a: x}", "by_name.a: got str 'x', expected float"),
        ("nested: {x: {y: {z: 1}}}", "nested.x.y.z: unknown setting"),
        ("raw: x", "raw: got str 'x', expected a mapping"),
        (f"rate: 1{'0' * 400}", f"rate: got int 1{'0' * 199}..., which is beyond the largest number"),
        (f"limit: {'ab' * 500}", f"limit: got str '{'ab' * 99}a..., expected int"),
        ("inner: {'': 3}", "inner.'': unknown setting"),
        ("inner: {3: 3}", "inner.3: unknown setting"),
        ("by_name: {'': x}", "by_name.'': got str 'x', expected float"),
        ("derived: 3", "derived: unknown setting"),
        ("nam: n", "nam: unknown setting, expected one of anything, "),
    ],
)
@pytest.mark.parametrize("path", ["", "section"])
def test_errors_begin_with_the_setting(text: str, words: str, path: str) -> None:
    values = {"name": "n", **yaml.safe_load(text)}
    with pytest.raises(SettingsError, match="^" + re.escape(f"section.{words}" if path else words)):
        build(Outer, {"section": values}) if path else build(Everything, values)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: build(Everything, {}), "name: missing, it has no default"),
        (lambda: build(Outer, {}), "section: missing, it has no default"),
        (lambda: build(Outer, {"section": {}}), "section.name: missing, it has no default"),
        (lambda: build(Everything, {}, "a.b"), "a.b.name: missing, it has no default"),
        (lambda: build(Inner, {"count": 0}), "count: 0, expected at least 1"),
        (lambda: build(Inner, [1], "a"), "a: got list [1], expected a mapping"),  # type: ignore[arg-type]
        (lambda: build(Inner, None), "Inner: got nothing, expected a mapping"),  # type: ignore[arg-type]
        (lambda: build(Empty, {"x": 1}), "x: unknown setting, there are none here"),
    ],
)
def test_missing_and_misplaced(attempt: Callable[[], object], words: str) -> None:
    with pytest.raises(SettingsError, match="^" + re.escape(words)):
        attempt()


def test_the_original_error_is_the_cause() -> None:
    with pytest.raises(SettingsError) as caught:
        build(Inner, {"rate": 101})
    assert isinstance(caught.value.__cause__, TypeError)


def test_not_a_number_is_a_float() -> None:
    assert math.isnan(build(Inner, yaml.safe_load("rate: .nan")).rate)


@pytest.mark.parametrize(
    ("before", "dotted", "value", "after"),
    [
        ({}, "a", 1, {"a": 1}),
        ({"a": 1}, "a", 2, {"a": 2}),
        ({"a": {"b": 1, "c": 2}}, "a.b", 3, {"a": {"b": 3, "c": 2}}),
        ({}, "a.b.c", 1, {"a": {"b": {"c": 1}}}),
        ({"a": None}, "a.b", 1, {"a": {"b": 1}}),  # an empty section of a YAML file
        ({"a": {"b": 1}}, "a", "x", {"a": "x"}),
        ({"weights": "conductor"}, "weights.alpha", 0.5, {"weights": {"type": "conductor", "alpha": 0.5}}),
        ({"weights": "conductor"}, "weights.type", "equal", {"weights": {"type": "equal"}}),
        ({"weights": {"type": "a"}}, "weights.values.b", 1, {"weights": {"type": "a", "values": {"b": 1}}}),
        ({"weights": "static"}, "weights.values.a", 1, {"weights": {"type": "static", "values": {"a": 1}}}),
        ({"weights": "m.py:f"}, "weights.columns", ["x"], {"weights": {"function": "m.py:f", "columns": ["x"]}}),
        ({}, "weights.type", "random", {"weights": {"type": "random"}}),
        ({}, "generation.type", "vllm", {"generation": {"type": "vllm"}}),
        # the keys of release 0.1
        ({"weights": "conductor"}, "weights.policy", "equal", {"weights": {"type": "equal"}}),
        ({"weights": {"policy": "a"}}, "weights.values.b", 1, {"weights": {"type": "a", "values": {"b": 1}}}),
        ({"weights": {"policy": "a"}}, "weights.type", "b", {"weights": {"type": "b"}}),
        ({"weights": {"type": "a"}}, "weights.policy", "b", {"weights": {"type": "b"}}),
        ({}, "generation.engine", "vllm", {"generation": {"type": "vllm"}}),
    ],
)
def test_override(before: dict[str, Any], dotted: str, value: Any, after: dict[str, Any]) -> None:
    override(before, dotted, value)
    assert before == after


def test_an_old_key_in_an_override_is_named_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maestro_fast.settings._said", set())
    for _ in range(2):
        override({}, "weights.policy", "equal")
    assert caplog.messages == [
        "weights.policy: this key is now called `type`: write weights.type. "
        "The old one is read in this release and refused in the next."
    ]


@dataclass(frozen=True)
class Square:
    """A square.

    Attributes:
        side: the length of a side, in metres;
            never 0.
        colour, pattern: how it looks: any words.
    """

    side: float
    colour: str = "red"
    pattern: str = "plain"


@dataclass(frozen=True)
class Cube(Square):
    """A cube.

    Attributes:
        w_0: w_0 of the formula
    """

    w_0: int = 0


@dataclass(frozen=True)
class Own:
    function: str
    options: Annotated[dict[str, Any], REST] = field(default_factory=dict)


def _modernise(entry: dict[str, Any], path: str) -> None:
    rename_key(entry, "kind", "type", path)


SHAPES = Choice({"square": Square, "dot": Empty, "function": Own}, what="shape", modernise=_modernise)


@dataclass(frozen=True)
class Drawn:
    """A shape in its place.

    Attributes:
        shape: what is drawn.
        on: where.
    """

    shape: Annotated[Square | Empty | Own, SHAPES, REST]
    on: str = "paper"


@dataclass(frozen=True)
class Picture:
    frame: Annotated[Square | Empty | Own, Choice(SHAPES.types, "dot", "frame")] = field(default_factory=Empty)
    shapes: list[Drawn] = field(default_factory=list)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("frame: {type: square, side: 2}", Picture(Square(2.0))),
        ("frame: dot", Picture()),
        ("frame: {}", Picture()),
        ("frame: a.py:f", Picture(Own("a.py:f"))),
        ("frame: {function: 'a.py:f', x: 1, options: 2}", Picture(Own("a.py:f", {"x": 1, "options": 2}))),
        ("frame: {type: function, function: f}", Picture(Own("f"))),
        (
            "shapes: [dot, {type: square, side: 1, on: wood}]",
            Picture(shapes=[Drawn(Empty()), Drawn(Square(1), "wood")]),
        ),
        ("shapes: [{kind: square, side: 1, 'on': wood}]", Picture(shapes=[Drawn(Square(1), "wood")])),
    ],
)
def test_a_type_chooses_the_dataclass(text: str, expected: Picture) -> None:
    found = build(Picture, yaml.safe_load(text))
    assert found == expected
    assert build(Picture, {"frame": expected.frame}).frame is expected.frame


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("frame: 3", "frame: got int 3, expected the type of a frame or a mapping with it under 'type'"),
        ("frame: circle", "frame.type: 'circle', expected one of square, dot, function; a function of your own is"),
        ("frame: {type: [dot]}", "frame.type: ['dot'], expected one of square"),
        ("frame: {type: null}", "frame.type: missing, expected one of square"),
        ("frame: {side: 3}", "frame.side: unknown setting, there are none here"),
        ("frame: square", "frame.side: missing, it has no default"),
        ("frame: {kind: dot}", "frame.kind: unknown setting, there are none here"),
        ("shapes: [{on: x}]", "shapes[0].type: missing, expected one of square, dot, function"),
        ("shapes: [dot, {type: square, side: x}]", "shapes[1].side: got str 'x', expected float"),
        ("shapes: [{type: square, side: 1, on: 3}]", "shapes[0].on: got int 3, expected str"),
        ("shapes: [{type: dot, kind: dot}]", "shapes[0].kind: is the old name of type, which is set too"),
        ("shapes: [[dot]]", "shapes[0]: got list ['dot'], expected the type of a shape or a mapping"),
    ],
)
def test_errors_of_a_choice_begin_with_the_setting(text: str, words: str) -> None:
    with pytest.raises(SettingsError, match="^" + re.escape(words)):
        build(Picture, yaml.safe_load(text))


def test_sentences_come_from_the_attributes() -> None:
    assert sentences(Square) == {
        "side": "The length of a side, in metres; never 0.",
        "colour": "How it looks: any words.",
        "pattern": "How it looks: any words.",
    }
    assert sentences(Empty) == {}
    assert sentences(Cube) == sentences(Square) | {"w_0": "w_0 of the formula."}  # a name keeps its case


@pytest.mark.parametrize(
    ("before", "dotted", "words"),
    [
        ({"a": 1}, "a.b", "a: is int 1, cannot set a.b inside it"),
        ({"a": {"b": [1]}}, "a.b.c.d", "a.b: is list [1], cannot set a.b.c.d inside it"),
        ({"model": "path"}, "model.path", "model: is str 'path', cannot set model.path inside it"),
        ({"a": {"weights": "x"}}, "a.weights.y", "a.weights: is str 'x', cannot set a.weights.y inside it"),
        ({"weights": 3}, "weights.alpha", "weights: is int 3, cannot set weights.alpha inside it"),
        ({"a": False}, "a.b", "a: is bool False, cannot set a.b inside it"),
    ],
)
def test_override_does_not_descend_into_values(before: dict[str, Any], dotted: str, words: str) -> None:
    untouched = deepcopy(before)
    with pytest.raises(SettingsError, match="^" + re.escape(words) + "$"):
        override(before, dotted, 5)
    assert before == untouched
