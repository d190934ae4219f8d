"""What can be tried of a run on a GPU machine without one, with the versions that it has.

    python -m bench.rehearse_gpu [STEP...]

Run it by the Python of an environment that holds the GPU machine's versions of torch, Triton, numpy, transformers,
pytest, pytest-xdist, scikit-build-core, pybind11, cmake and ninja. It builds the extension for this Python into
maestro_fast/, and maestro_fast.egg-info beside it, for the GPU machine to take along; collects what bench/gpu.sh runs;
compiles the launches of tests/kernels/test_aot.py, and those of the kernels' tests, for sm_90 and sm_100, timed, from
an empty cache; and rehearses bench/gpu.sh.

Ends with a table of verdicts, and with 1 if one of them is bad.
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
# Triton 3.6's interpreter makes an integer of an array with one element, which NumPy 2.5 refuses.
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
    """Output of this Python.

    Raises:
        RuntimeError: it ended with another status than 0.
    """
    return output([sys.executable, *arguments], **variables)


def output(command: list[str], **variables: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-4000:] + done.stderr[-4000:])
        raise RuntimeError(f"exit status {done.returncode}, see above")
    return done.stdout


def versions() -> str:
    names = ("torch", "triton", "numpy", "transformers")
    found = python("-c", f"import importlib.metadata as m; print(*(f'{{n}} {{m.version(n)}}' for n in {names}))")
    return f"Python {sys.version.split()[0]}, {found.strip()}"


def extension() -> str:
    """Builds it as a wheel does, and imports it from the folder."""
    with tempfile.TemporaryDirectory() as folder:
        python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, str(ROOT))
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"maestro_fast/_C{sysconfig.get_config_var('EXT_SUFFIX')}", ROOT)
            (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            info = ROOT / "maestro_fast.egg-info" / "PKG-INFO"  # the package is not installed, and asks its version
            info.parent.mkdir(exist_ok=True)
            info.write_bytes(archive.read(metadata))
    # torch first: its libraries are the ones that the extension is linked against
    return "imports: " + python("-c", "import torch, maestro_fast._C as c; print(c.__file__)").strip()


def collection() -> str:
    """What bench/gpu.sh runs: the other tests need packages that the GPU machine has not."""
    marked = [path for path in ROOT.glob("tests/**/test_*.py") if "pytest.mark.gpu" in path.read_text()]
    files = ["bench/sanitize.py", "tests/kernels", *map(str, marked), *map(str, ROOT.glob("bench/bench_gpu_*.py"))]
    lines = python("-m", "pytest", "-q", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider", *files)
    return lines.strip().splitlines()[-1]


def compilation() -> str:
    """The launches of tests/kernels/test_aot.py, at the sizes that matter."""
    from tests.kernels import test_aot
    from tests.kernels.aot import recorded

    def launches(arch: int) -> Iterator[Any]:
        makers: list[Callable[[], Any]] = [*test_aot.OPS, lambda: test_aot.head_product(arch)]
        for launcher in (launcher for maker in makers for launcher in maker()):
            yield from recorded(launcher)

    return compile_all(launches)


def suite() -> str:
    """The launches of the kernels' tests and of bench/sanitize.py, as they come in the interpreter."""
    from bench.launches import read, rebuilt
    from tests.kernels.aot import Launch

    with tempfile.TemporaryDirectory() as folder:
        noted = Path(folder) / "launches"
        given = {"TRITON_INTERPRET": "1", "BENCH_DRY": "1", "LAUNCHES": str(noted)}
        files = ["-m", "not vllm", "bench/sanitize.py", "tests/kernels"]
        python("-m", "pytest", "-q", "-p", "bench.launches", "-p", "no:cacheprovider", *files, **given)
        found = read(noted)

    def launches(arch: int) -> Iterator[Any]:
        for launch in found:
            kernel = getattr(importlib.import_module(launch.module), launch.name)
            arguments = {name: rebuilt(value) for name, value in launch.arguments}
            yield Launch(kernel, (), arguments, dict(launch.options))

    return compile_all(launches)


def compile_all(launches: Callable[[int], Iterator[Any]]) -> str:
    """Each launch by itself; the seconds are the processor's, so that what else this machine does is not in them.

    Raises:
        RuntimeError: one did not compile, or spills.
    """
    from tests.kernels.aot import compiled

    seconds, bad, count = dict.fromkeys(ARCHITECTURES, 0.0), [], 0
    for arch in ARCHITECTURES:
        for launch in launches(arch):
            start = sum(os.times()[:4])  # with those of the assembler, a process of its own
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
    """The assertions of the test itself, about tensor cores and the like; nothing is compiled anew."""
    found = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_aot.py", "-k", "90 or 100")
    return found.strip().splitlines()[-1]


def part(name: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        lines = output(["bash", "bench/gpu.sh", name], BENCH_DRY="1", OUT=folder, PYTHON=sys.executable, VIRTUAL_ENV="")
    return next(line for line in lines.splitlines() if line.startswith(f"== {name}:")).removeprefix("== ")


def main() -> None:
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
        os.environ["TRITON_CACHE_DIR"] = cache  # before Triton is imported
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
