"""Imports point downwards only, and importing the package is cheap."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "maestro_fast"
ROOT = Path(__file__).resolve().parent.parent
LAYERS = [
    {"specs"},
    {"kernels", "_C"},
    {"ops"},
    {"records", "settings", "functions", "peer_names", "manifest", "pickles"},
    {"model_path", "error_report"},
    {"config_file"},
    {"model", "rewards", "weighting"},
    {"generation", "data", "watching"},
    {"training"},
    {"integrations"},
    {"reporting"},
    {"evals", "starting"},
    {"info", "quickstart", "config_reference"},
    {"cli"},
    {"__main__"},
]
HEIGHT = {unit: height for height, layer in enumerate(LAYERS) for unit in layer}


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import, in functions and under TYPE_CHECKING too."""
    parts = module.split(".")
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom():
                base = parts[: len(parts) + is_package - node.level] if node.level else []
                origin = ".".join([*base, *filter(None, [node.module])])
                yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
            case ast.Call(
                func=ast.Name("import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def problems(source: str, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module, e.g. ``maestro_fast.ops.groups``."""
    unit = [*module.split("."), "__init__"][1]
    if unit not in HEIGHT and unit != "__init__":
        return [f"{module}: {unit} has no layer; place it in LAYERS of {Path(__file__).name}"]
    found = []
    for line, name in imported_modules(source, module, is_package):
        top, *rest = name.split(".")
        if top == "kernels":
            found.append(f"{module}:{line} imports {name}, another project; ours is {PACKAGE}.kernels")
        if top != PACKAGE or rest == ["__version__"]:
            continue
        target = rest[0] if rest else "__init__"
        if target not in HEIGHT:
            found.append(f"{module}:{line} imports {name}, which has no layer")
        elif target != unit and HEIGHT[target] >= HEIGHT.get(unit, 0):
            found.append(f"{module}:{line} imports {name}, which is not below {unit}")
    return found


def modules() -> Iterator[tuple[Path, str]]:
    for folder, prefix in [(ROOT / PACKAGE, PACKAGE), (ROOT / "kernels", f"{PACKAGE}.kernels")]:
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if (folder / parts[0]).is_symlink():
                continue  # kernels, which has its own turn, and examples, which are data
            is_package = parts[-1] == "__init__"
            yield path, ".".join([prefix, *(parts[:-1] if is_package else parts)])


def test_imports_point_downwards() -> None:
    listed = list(modules())
    found = [p for path, name in listed for p in problems(path.read_text(), name, path.stem == "__init__")]

    assert len(listed) > 5, "the modules were not found"
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "module", "complaint"),
    [
        ("import maestro_fast.ops", "maestro_fast.kernels.pool_hidden", "not below kernels"),
        ("from maestro_fast.rewards import nover", "maestro_fast.ops.pool_hidden", "not below ops"),
        ("from maestro_fast import weighting", "maestro_fast.rewards.nover", "not below rewards"),
        ("from maestro_fast.rewards.nover import f", "maestro_fast.weighting", "not below weighting"),
        ("from ..training import config", "maestro_fast.generation.vllm", "not below generation"),
        ("from .training import config", "maestro_fast.records", "not below records"),
        ("def f():\n    from maestro_fast.cli import main", "maestro_fast.evals", ":2 imports"),
        ("if TYPE_CHECKING:\n    import maestro_fast.cli", "maestro_fast.data.dataset", ":2 imports"),
        ("import_module('maestro_fast.cli')", "maestro_fast.ops", "not below ops"),
        ("importlib.import_module('maestro_fast.cli')", "maestro_fast.ops", "not below ops"),
        ("from maestro_fast import ops", "maestro_fast", "not below __init__"),
        ("import maestro_fast.helpers", "maestro_fast.ops", "no layer"),
        ("", "maestro_fast.helpers", "helpers has no layer; place it in LAYERS of test_imports.py"),
        ("from kernels import layer_norm", "maestro_fast.ops", "another project"),
    ],
)
def test_the_checker_finds(source: str, module: str, complaint: str) -> None:
    (found,) = problems(source, module)
    assert complaint in found


@pytest.mark.parametrize(
    ("source", "module", "is_package"),
    [
        ("from maestro_fast import _C", "maestro_fast.ops.pack_sequences", False),
        ("from maestro_fast.kernels import pool_hidden", "maestro_fast.ops.pool_hidden", False),
        ("from .groups import Groups", "maestro_fast.ops.group_advantages", False),
        ("from .groups import Groups\nfrom . import groups", "maestro_fast.ops", True),
        ("from ..records import Rollouts", "maestro_fast.rewards", True),
        ("from maestro_fast.evals.judge import Judge", "maestro_fast.cli", False),
        ("from maestro_fast.cli import main", "maestro_fast.__main__", False),
        ("from maestro_fast import __version__", "maestro_fast.reporting.plots", False),
        ("import torch, maestro_fastest", "maestro_fast.ops", False),
    ],
)
def test_the_checker_allows(source: str, module: str, is_package: bool) -> None:
    assert problems(source, module, is_package) == []


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def newly_loaded(name: str, *, after: str) -> set[str]:
    """Top-level names of the modules that importing ``name`` in a fresh interpreter adds."""
    code = f"import sys, json, {after}; before = set(sys.modules); import {name}"
    loaded = json.loads(run_python(f"{code}; print(json.dumps(list(set(sys.modules) - before)))"))
    return {module.split(".")[0] for module in loaded}


def test_importing_the_package_loads_nothing_but_the_standard_library() -> None:
    assert newly_loaded(PACKAGE, after="os") - sys.stdlib_module_names == {PACKAGE}


def test_importing_the_ops_loads_no_library_beyond_torch() -> None:
    """So it takes no longer than to read our own files: neither transformers nor triton, scipy or yaml is loaded."""
    assert newly_loaded(f"{PACKAGE}.ops", after="torch") - sys.stdlib_module_names == {PACKAGE}


def test_the_compiled_module_is_loaded_when_an_op_first_asks_for_it() -> None:
    loaded = "'maestro_fast._C' in sys.modules"
    code = f"import sys, maestro_fast.ops as ops; print({loaded}); ops.pack_sequences([1], 1); print({loaded})"
    assert run_python(code).split() == ["False", "True"]
