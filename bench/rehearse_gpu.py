"""Rehearses a run on a GPU machine, as far as that is possible without a GPU.

    python -m bench.rehearse_gpu [STEP...]

Run it with the Python of an environment that holds the GPU machine's versions of torch, Triton, numpy, transformers,
pytest, pytest-xdist, scikit-build-core, pybind11, cmake and ninja. The steps are:

    extension               builds the extension for this Python into maestro_fast/, and maestro_fast.egg-info beside
                            it, so that both can be copied to the GPU machine
    collection              collects the tests that bench/gpu.sh runs
    compilation             compiles the launches of tests/kernels/test_aot.py for sm_90 and sm_100, timed, from an
                            empty cache
    test_aot.py             runs the assertions of that file
    launches of tests       compiles all launches of the kernels' tests in the same way
    gpu.sh first, ...       runs the parts of bench/gpu.sh with tiny sizes in Triton's interpreter

It ends with a table of verdicts. The exit status is 1 if a step failed.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (90, 100)  # H100 and H200, B200
PARTS = ("first", "second", "third")
# Triton 3.6's interpreter converts an array with one element to an integer, which NumPy 2.5 refuses.
MENDED_INTERPRETER = """
import os
if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter
    plain = interpreter._patch_lang_tensor
    def mended(tensor, scope):
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
    interpreter._patch_lang_tensor = mended
"""


def python(*arguments: str, **variables: str) -> str:
    """What this Python prints, run with these arguments and environment variables. See ``output``."""
    return output([sys.executable, *arguments], **variables)


def output(command: list[str], **variables: str) -> str:
    """What a command prints, run with these environment variables.

    Raises:
        RuntimeError: The command failed; its output has been printed.
    """
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-4000:] + done.stderr[-4000:])
        raise RuntimeError(f"exit status {done.returncode}, see above")
    return done.stdout


def versions() -> str:
    """The versions of Python and of the packages that matter."""
    names = ("torch", "triton", "numpy", "transformers")
    found = python("-c", f"import importlib.metadata as m; print(*(f'{{n}} {{m.version(n)}}' for n in {names}))")
    return f"Python {sys.version.split()[0]}, {found.strip()}"


def extension() -> str:
    """Builds the extension as part of a wheel, copies it into maestro_fast/, and imports it from there."""
    with tempfile.TemporaryDirectory() as folder:
        python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, str(ROOT))
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"maestro_fast/_C{sysconfig.get_config_var('EXT_SUFFIX')}", ROOT)
            (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            info = ROOT / "maestro_fast.egg-info" / "PKG-INFO"  # the package asks for its version, and is not installed
            info.parent.mkdir(exist_ok=True)
            info.write_bytes(archive.read(metadata))
    # torch is imported first, because the extension is linked against its libraries.
    return "imports: " + python("-c", "import torch, maestro_fast._C as c; print(c.__file__)").strip()


def collection() -> str:
    """Collects the tests that bench/gpu.sh runs. The others need packages that the GPU machine lacks."""
    marked = [path for path in ROOT.glob("tests/**/test_*.py") if "pytest.mark.gpu" in path.read_text()]
    files = ["bench/sanitize.py", "tests/kernels", *map(str, marked), *map(str, ROOT.glob("bench/bench_gpu_*.py"))]
    lines = python("-m", "pytest", "-q", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider", *files)
    return lines.strip().splitlines()[-1]


def compilation() -> str:
    """Compiles the launches of tests/kernels/test_aot.py, which have the sizes that matter."""
    from tests.kernels import test_aot
    from tests.kernels.aot import recorded

    def launches(arch: int) -> Iterator[Any]:
        makers: list[Callable[[], Any]] = [*test_aot.OPS, lambda: test_aot.head_product(arch)]
        for launcher in (launcher for maker in makers for launcher in maker()):
            yield from recorded(launcher)

    return compile_all(launches)


def suite() -> str:
    """Compiles the launches that the kernels' tests and bench/sanitize.py make in the interpreter."""
    from bench.record_launches import read, rebuilt
    from tests.kernels.aot import Launch

    with tempfile.TemporaryDirectory() as folder:
        recorded_file = Path(folder) / "launches"
        given = {"TRITON_INTERPRET": "1", "BENCH_DRY": "1", "LAUNCHES": str(recorded_file)}
        files = ["-m", "not vllm", "bench/sanitize.py", "tests/kernels"]
        python("-m", "pytest", "-q", "-p", "bench.record_launches", "-p", "no:cacheprovider", *files, **given)
        found = read(recorded_file)

    def launches(arch: int) -> Iterator[Any]:
        for launch in found:
            kernel = getattr(importlib.import_module(launch.module), launch.name)
            arguments = {name: rebuilt(value) for name, value in launch.arguments}
            yield Launch(kernel, (), arguments, dict(launch.options))

    return compile_all(launches)


def compile_all(launches: Callable[[int], Iterator[Any]]) -> str:
    """Compiles the launches for every architecture, one by one, and prints the processor time of each.

    Raises:
        RuntimeError: A launch did not compile, or spills registers.
    """
    from tests.kernels.aot import compiled

    seconds, bad, count = dict.fromkeys(ARCHITECTURES, 0.0), [], 0
    for arch in ARCHITECTURES:
        for launch in launches(arch):
            start = sum(os.times()[:4])  # this includes the time of the assembler, which is a child process
            try:
                needs = compiled(launch, arch)
            except Exception as error:
                verdict = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                verdict = f"{needs.stack} bytes spilled" if needs.stack else ""
            took = sum(os.times()[:4]) - start
            seconds[arch] += took
            count += 1
            print(f"  sm_{arch:<4}{launch.name:48}{took:7.2f} s  {verdict}", flush=True)
            if verdict:
                bad.append(f"{launch.name}, sm_{arch}: {verdict}")
                types = {n: str(x.dtype) for n, x in launch.arguments.items() if hasattr(x, "dtype")}
                print(f"    {launch.arguments | types} {launch.options}")
    if bad:
        raise RuntimeError(f"{len(bad)} of {count} launches: " + "; ".join(bad[:3]))
    sums = ", ".join(f"{total:.0f} s for sm_{arch}" for arch, total in seconds.items())
    return f"{count} launches without a spill; sum {sums}"


def instructions() -> str:
    """Runs the assertions of tests/kernels/test_aot.py about tensor cores and the like. Kernels come from the cache."""
    found = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_aot.py", "-k", "90 or 100")
    return found.strip().splitlines()[-1]


def part(name: str) -> str:
    """Rehearses one part of bench/gpu.sh, and returns its summary."""
    with tempfile.TemporaryDirectory() as folder:
        lines = output(["bash", "bench/gpu.sh", name], BENCH_DRY="1", OUT=folder, PYTHON=sys.executable, VIRTUAL_ENV="")
    return next(line for line in lines.splitlines() if line.startswith(f"== {name}:")).removeprefix("== ")


def main() -> None:
    """Runs the steps of the command line, or all of them."""
    steps: dict[str, Callable[[], str]] = {
        "versions": versions,
        "extension": extension,
        "collection": collection,
        "compilation": compilation,
        "test_aot.py": instructions,
        "launches of tests": suite,
        **{f"gpu.sh {name}": lambda name=name: part(name) for name in PARTS},
    }
    wanted = sys.argv[1:] or list(steps)
    rows, failures = [], 0
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as first_on_the_path:
        os.environ["TRITON_CACHE_DIR"] = cache  # Triton reads it when it is imported
        Path(first_on_the_path, "sitecustomize.py").write_text(MENDED_INTERPRETER)
        os.environ["PYTHONPATH"] = first_on_the_path
        for name, step in ((name, steps[name]) for name in wanted):
            start = time.perf_counter()
            try:
                verdict = step()
            except Exception as error:
                verdict, failures = f"FAILED: {type(error).__name__}: {error}", failures + 1
            rows.append(f"  {name:20}{time.perf_counter() - start:6.0f} s  {verdict}")
            print(rows[-1], flush=True)
    print("\n".join(["", "Rehearsal of a GPU run, no GPU in it", *rows]))
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
