"""The sdist, the wheel that is built from it, one without C++, and these wheels in fresh environments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from maestro_fast.ops import balance_sequences, pack_sequences

ROOT = Path(__file__).resolve().parents[2]
TOP_LEVEL = {
    *(
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Makefile",
        "PKG-INFO",
        ".gitignore",
    ),
    *("maestro_fast", "kernels", "csrc", "tests", "bench", "examples", ".ci"),
}


@dataclass(frozen=True)
class Built:
    sdist: Path
    wheel: Path

    @property
    def in_sdist(self) -> set[str]:
        """Paths below the sdist's one folder."""
        with tarfile.open(self.sdist) as archive:
            return {member.name.partition("/")[2] for member in archive if not member.isdir()}

    @property
    def in_wheel(self) -> set[str]:
        return files_in(self.wheel)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """One call makes the sdist and then, from the sdist, the wheel. Without isolation: it asks no network."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT))
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="module")
def fresh_python(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with(built.wheel, tmp_path_factory.mktemp("fresh"))


@pytest.fixture(scope="module")
def wheel_without_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It is built where there is no compiler: nothing is on the path, and CXX names nothing."""
    out, empty = tmp_path_factory.mktemp("without_cpp"), tmp_path_factory.mktemp("empty")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--config-settings=wheel.cmake=false"]
    bare = os.environ | {"PATH": str(empty), "CC": "no-compiler", "CXX": "no-compiler"}
    run(sys.executable, "-m", "pip", "wheel", "--quiet", *options, "--wheel-dir", str(out), str(ROOT), env=bare)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def python_without_cpp(wheel_without_cpp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with(wheel_without_cpp, tmp_path_factory.mktemp("fresh_without_cpp"))


def environment_with(wheel: Path, home: Path) -> Path:
    """The Python of a new environment that has the wheel, and borrows what the wheel depends on."""
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", str(python)),
        *("install", "--quiet", "--no-deps", "--no-index", str(wheel)),
    )
    (site_packages,) = home.glob("lib/python*/site-packages")
    lenders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "borrowed.pth").write_text("\n".join(lenders))
    return python


def run(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def ask(python: Path, code: str) -> Any:
    """The value of ``answer`` after ``code``, run where the sources are not on the path."""
    code = f"{code}\nimport json; print(json.dumps(answer))"
    return json.loads(run(str(python), "-c", code, cwd=python.parent))


def files_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def files_of(folder: str) -> set[str]:
    """The sources in it: an editable install or a copy may have left a compiled module there."""
    files = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in files if "__pycache__" not in path.parts and path.suffix != ".so"}


def test_sdist_holds_the_sources_and_nothing_else(built: Built) -> None:
    assert {name.split("/")[0] for name in built.in_sdist} <= TOP_LEVEL
    assert built.in_sdist >= {"LICENSE", "README.md", "Makefile", ".ci/setup.sh"}
    for folder in ("csrc", "kernels", "examples"):
        assert built.in_sdist >= files_of(folder)


def test_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    assert {name.split("/")[0] for name in built.in_wheel} == {"maestro_fast", "maestro_fast-0.1.0.dist-info"}
    assert built.in_wheel >= files_of("maestro_fast") >= {"maestro_fast/py.typed", "maestro_fast/_C.pyi"}
    assert f"maestro_fast/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in built.in_wheel


@pytest.mark.parametrize("folder", ["kernels", "examples"])
def test_wheel_holds_what_the_symlinks_point_at(built: Built, folder: str) -> None:
    files = files_of(folder)

    assert files, f"{folder}/ is empty"
    assert built.in_wheel >= {f"maestro_fast/{name}" for name in files}


@pytest.mark.parametrize("folder", ["kernels", "examples"])
def test_linked_folders_are_no_regular_packages(folder: str) -> None:
    assert (ROOT / "maestro_fast" / folder).readlink() == Path("..") / folder
    assert not (ROOT / folder / "__init__.py").exists()


def test_license_ships_in_full(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        shipped = archive.read("maestro_fast-0.1.0.dist-info/licenses/LICENSE")

    assert shipped == (ROOT / "LICENSE").read_bytes()


def test_installed_metadata_names_the_license(fresh_python: Path) -> None:
    code = "from importlib.metadata import metadata; fields = metadata('maestro-fast')"
    names = "answer = [fields['License-Expression'], *fields.get_all('License-File')]"

    assert ask(fresh_python, f"{code}; {names}") == ["Apache-2.0", "LICENSE"]


def test_pip_lists_the_license_among_the_files(fresh_python: Path) -> None:
    shown = run(sys.executable, "-m", "pip", "--python", str(fresh_python), "show", "--files", "maestro-fast")

    assert "maestro_fast-0.1.0.dist-info/licenses/LICENSE" in shown


def test_installed_package_works(fresh_python: Path) -> None:
    code = "import maestro_fast; from maestro_fast.ops.pack_sequences import pack_sequences"
    version, bins, path = ask(
        fresh_python,
        f"{code}; answer = [maestro_fast.__version__, pack_sequences([3, 4, 5], 7), maestro_fast.__file__]",
    )

    assert (version, bins) == ("0.1.0", [[2], [0, 1]])
    assert Path(path).is_relative_to(fresh_python.parents[1]), "another maestro_fast was imported"
    assert (fresh_python.parent / "maestro-fast").exists()


def test_installed_kernels_are_a_namespace_package(fresh_python: Path) -> None:
    code = "import maestro_fast.kernels as k; answer = [getattr(k, '__file__', None), *k.__path__]"
    file, path = ask(fresh_python, code)

    assert file is None
    assert Path(path).is_relative_to(fresh_python.parents[1])


def test_a_wheel_without_cpp_is_the_same_for_every_machine_and_has_all_but_the_compiled_module(
    wheel_without_cpp: Path,
) -> None:
    files = files_in(wheel_without_cpp)

    assert wheel_without_cpp.name == "maestro_fast-0.1.0-py3-none-any.whl"
    assert {name for name in files if Path(name).name.startswith("_C.")} == {"maestro_fast/_C.pyi"}
    assert not any(name.endswith(".so") for name in files)
    assert files >= files_of("maestro_fast")
    for folder in ("kernels", "examples"):
        assert files >= {f"maestro_fast/{name}" for name in files_of(folder)}


WITHOUT_CPP = """
import maestro_fast, torch
from maestro_fast import ops

torch.manual_seed(0)
rewards, h, K = torch.randn(8, 3), torch.randn(8, 16), 3
head = ops.ConductorParams(torch.zeros(16), torch.ones(16), torch.randn(K, 16), torch.zeros(K))
sample, advantages = ops.maestro_advantages(rewards, head, 4, h=h)
parts = ops.conductor_weights(h, head), ops.group_advantages(rewards, sample.weights, 4)
states, lm_head = torch.randn(40, 16, requires_grad=True), torch.randn(50, 16)
bounds = torch.arange(0, 41, 5)
loss = ops.linear_policy_loss(
    states, lm_head, torch.arange(40), advantages.advantages, bounds, config=ops.PolicyLossConfig("grpo")
).loss
loss.backward()
try:
    ops.group_advantages(rewards, None, 4, backend="cpp")
except ValueError as error:
    refusal = str(error)
answer = {
    "path": maestro_fast.__file__,
    "whole step is its parts": all(map(torch.equal, (*sample, *advantages), (*parts[0], *parts[1]))),
    "own action": torch.allclose(
        ops.counterfactual_advantages(rewards, sample.weights, sample.weights, 4).diagonal(),
        advantages.advantages, atol=1e-5,
    ),
    "gradient": float(states.grad.abs().sum()),
    "refusal": refusal,
    "bins": ops.pack_sequences(range(1, 300), 512),
    "parts": ops.balance_sequences(range(1, 301), 6, equal_size=True),
}
"""


def test_a_package_without_cpp_works_and_says_what_it_lacks(python_without_cpp: Path) -> None:
    answer = ask(python_without_cpp, WITHOUT_CPP)

    assert Path(answer["path"]).is_relative_to(python_without_cpp.parents[1]), "another maestro_fast was imported"
    assert answer["whole step is its parts"] and answer["own action"] and answer["gradient"] > 0
    reason = "maestro_fast._C is not built; pip install . in a checkout builds it, where there is a C++ compiler"
    assert answer["refusal"] == f"backend: 'cpp' cannot serve group_advantages here: {reason}"
    assert answer["bins"] == pack_sequences(range(1, 300), 512, backend="cpp")
    assert answer["parts"] == balance_sequences(range(1, 301), 6, equal_size=True, backend="cpp")
