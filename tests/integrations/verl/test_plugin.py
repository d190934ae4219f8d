"""The plugin waits until verl imports what it extends, and imports nothing by itself. These tests need no verl."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from maestro_fast.integrations.verl.when_imported import when_imported

MODULE = "value = 1\nseen = []\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that can be imported, with a module ``part``."""
    name = f"hooked_{tmp_path.name.replace('-', '_')}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(MODULE)
    (tmp_path / name / "part.py").write_text(f"from {name} import value\nvalue += 1\n")
    (tmp_path / name / "broken.py").write_text("raise RuntimeError('broken module')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def imported(name: str) -> object:
    __import__(name)
    return sys.modules[name]


def test_a_hook_runs_once_after_the_module(package: str) -> None:
    calls: list[object] = []
    when_imported(f"{package}.part", lambda module: calls.append((module.__name__, module.value)))
    imported(package)
    assert calls == [], "only the package has been imported"
    module = imported(f"{package}.part")
    imported(f"{package}.part")
    assert calls == [(f"{package}.part", 2)]
    assert module.__spec__.loader is module.__loader__ and hasattr(module.__loader__, "get_source")  # type: ignore[attr-defined]


def test_a_module_that_was_imported_before_is_hooked_at_once(package: str) -> None:
    imported(f"{package}.part")
    calls: list[str] = []
    when_imported(f"{package}.part", lambda module: calls.append(module.__name__))
    assert calls == [f"{package}.part"]


def test_registering_twice_does_no_harm(package: str) -> None:
    calls: list[int] = []
    when_imported(f"{package}.part", lambda _: calls.append(1))
    when_imported(f"{package}.part", lambda _: calls.append(2))
    imported(f"{package}.part")
    assert calls == [2]


def test_looking_for_a_module_is_not_importing_it(package: str) -> None:
    """Libraries ask whether a module is there; the hook still runs when it is imported."""
    calls: list[str] = []
    when_imported(f"{package}.part", lambda module: calls.append(module.__name__))
    assert importlib.util.find_spec(f"{package}.part") is not None and calls == []
    imported(f"{package}.part")
    assert calls == [f"{package}.part"]


def test_errors_reach_whoever_imports(package: str) -> None:
    def fails(_: object) -> None:
        raise ImportError("something is missing")

    when_imported(f"{package}.part", fails)
    for _ in range(2):  # A second try finds the plugin missing, too, and does not go on without it.
        with pytest.raises(ImportError, match="something is missing"):
            imported(f"{package}.part")
    when_imported(f"{package}.broken", fails)
    with pytest.raises(RuntimeError, match="broken module"):
        imported(f"{package}.broken")
    when_imported(f"{package}.absent", fails)
    with pytest.raises(ModuleNotFoundError, match="absent"):
        imported(f"{package}.absent")


def test_the_plugin_imports_nothing() -> None:
    """verl loads it in each of its processes."""
    code = (
        "import sys; before = {*sys.modules}; import maestro_fast.integrations.verl as plugin; "
        "new = {name.partition('.')[0] for name in {*sys.modules} - before}; "
        "assert new <= {*sys.stdlib_module_names, 'maestro_fast'}, new; "
        "ours = [n for n in sys.modules if n.startswith('maestro_fast.') and 'integrations' not in n]; "
        "assert not ours, ours"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_verl_finds_the_plugin() -> None:
    found = [point for point in entry_points(group="verl.plugins") if point.name == "maestro_fast"]
    assert [point.value for point in found] == ["maestro_fast.integrations.verl"]
