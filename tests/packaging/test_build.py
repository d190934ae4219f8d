"""The sdist, the wheel that is built from it, and that wheel in a fresh environment."""

from __future__ import annotations

import json
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

ROOT = Path(__file__).resolve().parents[2]
TOP_LEVEL = {
    *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "PKG-INFO", ".gitignore"),
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
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """One call makes the sdist and then, from the sdist, the wheel. Without isolation: it asks no network."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT))
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="module")
def fresh_python(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that has the wheel, and borrows what the wheel depends on."""
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", str(python)),
        *("install", "--quiet", "--no-deps", "--no-index", str(built.wheel)),
    )
    (site_packages,) = home.glob("lib/python*/site-packages")
    lenders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "borrowed.pth").write_text("\n".join(lenders))
    return python


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def ask(python: Path, code: str) -> Any:
    """The value of ``answer`` after ``code``, run where the sources are not on the path."""
    code = f"{code}\nimport json; print(json.dumps(answer))"
    return json.loads(run(str(python), "-c", code, cwd=python.parent))


def files_of(folder: str) -> set[str]:
    files = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in files if "__pycache__" not in path.parts}


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
