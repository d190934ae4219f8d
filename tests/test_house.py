"""The shape of the code base, measured and bounded: ``python -m tests.test_house`` prints the table.

The bounds keep the house as CONTRIBUTING.md describes it: one idea on one page, few carriers, no cycles.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.test_imports import ROOT, imported_modules, modules

SHORT = 60  # lines
MANY = 8  # parameters
# Functions whose parameters another library dictates. Each is documented as such where it stands.
CALLED_BY_OTHERS: dict[str, str] = {}


class Module(NamedTuple):
    """A file of the package, its lines and its syntax tree."""

    path: Path
    is_package: bool
    lines: int
    tree: ast.Module


@cache
def sources() -> dict[str, Module]:
    """Every module of the package, kernels included, by its dotted name."""
    found = {}
    for path, name in modules():
        text = path.read_text(encoding="utf-8")
        found[name] = Module(path, path.stem == "__init__", len(text.splitlines()), ast.parse(text))
    return found


def inside(folder: str) -> list[str]:
    """The modules of one folder of the package and of the folders in it."""
    return [name for name in sources() if f"{name}.".startswith(f"maestro_fast.{folder}.")]


def short_files() -> list[str]:
    """Files under 60 lines. Those that only export or start something (``__init__``, ``__main__``) do not count."""
    return [
        f"{module.path.relative_to(ROOT)}: {module.lines} lines"
        for name, module in sources().items()
        if module.lines < SHORT and not module.is_package and not name.endswith("__main__")
    ]


def exported() -> set[str]:
    """The names in any ``__all__``: what users call, with every option spelt out."""
    names = set()
    for module in sources().values():
        for node in module.tree.body:
            if isinstance(node, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
            ):
                names |= set(ast.literal_eval(node.value))
    return names


def functions(node: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function under ``node``, with the class or function that it stands in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{owner}{child.name}", child
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from functions(child, f"{owner}{child.name}." if named else owner)


def long_signatures() -> list[str]:
    """Functions of more than 8 parameters that are neither public doors nor compiled by Triton."""
    found, public = [], exported()
    for name, module in sources().items():
        for place, node in functions(module.tree):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            number = len(arguments) - (arguments[:1] != [] and arguments[0].arg in ("self", "cls"))
            jitted = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            is_public = place.removesuffix(".__init__") in public
            if number > MANY and not jitted and not is_public and f"{name}.{place}" not in CALLED_BY_OTHERS:
                found.append(f"{name}.{place}: {number} parameters")
    return found


def untyped_in_kernels() -> list[str]:
    """Every ``Any`` in the code of kernels."""
    return [
        f"{name}:{node.lineno}"
        for name in inside("kernels")
        for node in ast.walk(sources()[name].tree)
        if isinstance(node, ast.Name) and node.id == "Any"
    ]


@cache
def imports(name: str) -> frozenset[str]:
    """The modules of ours that a module names in an import, also in a function or under ``TYPE_CHECKING``."""
    module, found = sources()[name], set()
    for _, target in imported_modules(module.path.read_text(encoding="utf-8"), name, module.is_package):
        while target and target not in sources():
            target = target.rpartition(".")[0]
        if target and target not in (name, "maestro_fast"):
            found.add(target)
    return frozenset(found)


def needed(start: str) -> set[str]:
    """All modules that ``start`` imports, and those import, and so on, itself included."""
    found, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imports(name)
    return found


def cycles() -> list[str]:
    """Groups of modules that import each other."""
    found = {frozenset(other for other in needed(name) if name in needed(other)) for name in sources()}
    return [" <-> ".join(sorted(group)) for group in found if len(group) > 1]


def files_of_pool_hidden() -> list[str]:
    """What a reader of ``ops.pool_hidden`` opens to follow it down to the GPU."""
    return sorted(name for name in needed("maestro_fast.ops.pool_hidden") if not sources()[name].is_package)


def records() -> dict[str, dict[str, str]]:
    """The annotated fields of every dataclass and named tuple, by the class' name."""
    found: dict[str, dict[str, str]] = {}
    for module in sources().values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and any(
                word in ast.unparse(mark)
                for mark in (*node.decorator_list, *node.bases)
                for word in ("dataclass", "NamedTuple")
            ):
                fields = [x for x in node.body if isinstance(x, ast.AnnAssign)]
                found[node.name] = {ast.unparse(x.target): ast.unparse(x.annotation) for x in fields}
    return found


def carriers_of_rewards() -> list[str]:
    """Records with a tensor of rewards among their fields, or with such a record: all that a reward passes through
    between its function and the log."""
    known = records()
    found = {name for name, fields in known.items() if any("rewards" in x and "Tensor" in fields[x] for x in fields)}
    while True:
        words = {name: set(re.findall(r"\w+", " ".join(fields.values()))) for name, fields in known.items()}
        more = {name for name in known if name not in found and words[name] & found}
        if not more:
            return sorted(found)
        found |= more


class Bound(NamedTuple):
    """A property of the house: what is listed, and how many there may be."""

    what: str
    listed: Callable[[], list[str]]
    most: int


BOUNDS = [
    Bound("files in ops/", lambda: inside("ops"), 23),
    Bound("files in training/", lambda: inside("training"), 24),
    Bound("files under 60 lines", short_files, 10),
    Bound("functions with more than 8 parameters", long_signatures, 0),
    Bound("Any in kernels/", untyped_in_kernels, 0),
    Bound("import cycles", cycles, 0),
    Bound("files that ops.pool_hidden needs", files_of_pool_hidden, 8),
    Bound("carriers of a reward", carriers_of_rewards, 7),
]


@pytest.mark.parametrize("bound", BOUNDS, ids=[bound.what for bound in BOUNDS])
def test_the_house_stays_within_its_bounds(bound: Bound) -> None:
    listed = bound.listed()

    assert len(listed) <= bound.most, "\n".join(listed)


def test_the_measures_see_what_they_measure() -> None:
    """A bound of 0 says little if the measure is blind."""
    assert len(sources()) > 100
    assert "maestro_fast.ops.gpu" in needed("maestro_fast.ops.pool_hidden")
    assert "pool_hidden" in exported()
    assert any(name.endswith("_sums") for name, _ in functions(sources()["maestro_fast.kernels.pool_hidden"].tree))
    assert len(carriers_of_rewards()) > 1


if __name__ == "__main__":
    for bound in BOUNDS:
        listed = bound.listed()
        print(f"{bound.what:42} {len(listed):4}   at most {bound.most}")
        if len(listed) > bound.most or bound.most < 10:
            print("".join(f"    {entry}\n" for entry in listed), end="")
