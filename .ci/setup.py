"""The second half of setup.sh makes an environment ready and prints its Python. It needs the standard library only.

An environment is ready when it holds the project's requirements and an editable installation of this checkout, which
was made from the present pyproject.toml and csrc/. A stamp in the environment remembers that. An installed torch that
is new enough is never touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAME = PYPROJECT["project"]["name"]
OLDEST_TORCH = (2, 11)
STAMP = Path(sys.prefix, f"{NAME}.stamp.json")
CONSTRAINTS = Path(sys.prefix, f"{NAME}.constraints.txt")


def main(torch_requirement: str, *extras: str) -> None:
    if sys.prefix == sys.base_prefix:
        continue_in_own_environment()
    if not is_ready(extras):
        make_ready(torch_requirement, extras)
    print(sys.executable)


def continue_in_own_environment() -> None:
    """Replaces this process by one in .venv. A new .venv sees the torch of this Python if that is new enough."""
    python = ROOT / ".venv" / "bin" / "python"
    if not python.exists():
        torch = installed_torch()
        reuse = torch is not None and is_new_enough(torch)
        say(f"making .venv around the torch {torch} of {sys.prefix}" if reuse else "making .venv")
        venv.create(ROOT / ".venv", system_site_packages=reuse, symlinks=True, with_pip=True)
    os.execv(python, [str(python), __file__, *sys.argv[1:]])


def make_ready(torch_requirement: str, extras: tuple[str, ...]) -> None:
    if util.find_spec("pip") is None:
        run("ensurepip", "--upgrade")
    provide_torch(torch_requirement)
    install([*PYPROJECT["build-system"]["requires"], *requirements_with(extras)])
    install(build_tools())
    say(f"building and installing {NAME}")
    offline = ["--no-index", "--no-build-isolation", "--no-deps"]
    run("pip", "install", "--quiet", *offline, "--editable", str(ROOT))
    STAMP.write_text(json.dumps({"digest": digest(), "extras": sorted({*stamped_extras(), *extras})}))


def provide_torch(requirement: str) -> None:
    if installed_torch() is None:
        say(f"installing {requirement}")
        run("pip", "install", "--quiet", *shlex.split(requirement))
    torch = metadata.version("torch")
    if not is_new_enough(torch):
        oldest = ".".join(map(str, OLDEST_TORCH))
        sys.exit(f"error: {NAME} needs torch {oldest} or newer, and {sys.prefix} has {torch}: update it there.")
    CONSTRAINTS.write_text(f"torch=={torch}\n")


def install(requirements: list[str]) -> None:
    """Installs the requirements that are missing. If none is, nothing asks the network."""
    if requirements and not are_satisfied(requirements):
        say("installing " + ", ".join(requirements))
        run("pip", "install", "--quiet", "--constraint", str(CONSTRAINTS), *requirements)


def are_satisfied(requirements: list[str]) -> bool:
    trial = ["install", "--quiet", "--dry-run", "--no-index", "--no-deps", "--report", "-", *requirements]
    pip = subprocess.run([sys.executable, "-m", "pip", *trial], capture_output=True, text=True)
    return pip.returncode == 0 and not json.loads(pip.stdout)["install"]


def requirements_with(extras: tuple[str, ...]) -> list[str]:
    """The requirements of the project and of these extras. torch is left out, because ``provide_torch`` installs it."""
    optional: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]

    def expand(requirements: list[str]) -> Iterator[str]:
        for requirement in requirements:
            if own := re.fullmatch(rf"{NAME}\[(.*)\]", requirement):
                for extra in own[1].split(","):
                    yield from expand(optional[extra])
            elif not re.match(r"torch\b", requirement):
                yield requirement

    return list(expand([*PYPROJECT["project"]["dependencies"], f"{NAME}[{','.join(extras)}]"]))


def build_tools() -> list[str]:
    """The build backend's further requirements: cmake and ninja, if the machine lacks them."""
    ask = "import json, scikit_build_core.build as b; print(json.dumps(b.get_requires_for_build_editable()))"
    answer = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    requirements: list[str] = json.loads(answer.stdout)
    return requirements


def installed_torch() -> str | None:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def is_new_enough(torch: str) -> bool:
    major, minor = torch.split(".")[:2]
    return (int(major), int(minor)) >= OLDEST_TORCH


def is_ready(extras: tuple[str, ...]) -> bool:
    return set(extras) <= set(stamped_extras()) and installed_from() == ROOT.as_uri()


def stamped_extras() -> list[str]:
    """The extras that the environment was made ready with, if the sources have not changed since."""
    stamp: dict[str, Any] = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    return stamp["extras"] if stamp.get("digest") == digest() else []


def installed_from() -> str | None:
    try:
        source = metadata.distribution(NAME).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    return json.loads(source)["url"] if source else None


def digest() -> str:
    """A hash of everything that decides what gets installed, including this script."""
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    files = [ROOT / "pyproject.toml", Path(__file__), *sources]
    content = b"\0".join(path.name.encode() + b"\0" + path.read_bytes() for path in files)
    return hashlib.sha256(content + sys.version.encode()).hexdigest()


def run(module: str, *arguments: str) -> None:
    """Runs a module of this environment. Its output goes to stderr, because stdout is the answer of setup.sh."""
    code = subprocess.run([sys.executable, "-m", module, *arguments], stdout=sys.stderr).returncode
    if code:
        sys.exit(code)


def say(text: str) -> None:
    print(f"[setup] {text}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
