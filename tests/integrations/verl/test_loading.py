"""verl finds the plugin by its entry point and gets no slower to import, and verl's own tests pass with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.verl

OWN_TESTS = ("tests/trainer/ppo/test_core_algos_on_cpu.py", "tests/trainer/test_multi_trajectories_advantage_on_cpu.py")
IMPORTED = "import json, sys, verl; print(json.dumps(sorted(sys.modules)))"
RUN_OWN_TESTS = """
import sys, pytest
code = pytest.main(["-q", "-p", "no:cacheprovider", "-c", "/dev/null", *sys.argv[1:]])
print("the plugin has registered its estimators:", "maestro_fast.integrations.verl.estimators" in sys.modules)
sys.exit(code)
"""  # One of the tests clears verl's registry of estimators.


def python(code: str, *arguments: str, folder: Path, plugins: str = "auto") -> str:
    """What a fresh process prints that sees verl as a user has it, with this package installed beside it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    environment |= {"VERL_USE_EXTERNAL_PLUGINS": plugins, "VERL_USE_EXTERNAL_MODULES": ""}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def test_importing_verl_loads_the_plugin_and_nothing_for_it(tmp_path: Path) -> None:
    modules = {
        plugins: set(json.loads(python(IMPORTED, folder=tmp_path, plugins=plugins).splitlines()[-1]))
        for plugins in ("none", "auto")
    }
    package, plugin = "maestro_fast", "maestro_fast.integrations.verl"
    assert plugin in modules["auto"]
    assert not any(name.startswith(package) for name in modules["none"])
    more = modules["auto"] - modules["none"]
    assert {name for name in more if not name.startswith(package)} == set()
    assert more == {package, "maestro_fast.integrations", plugin, f"{plugin}.when_imported"}


def test_the_tests_of_verl_pass(tmp_path: Path) -> None:
    """They stand in verl's wheel."""
    files = [str(metadata.distribution("verl").locate_file(name)) for name in OWN_TESTS]
    said = python(RUN_OWN_TESTS, *files, folder=tmp_path)
    assert "25 passed" in said
    assert "the plugin has registered its estimators: True" in said
