"""A compiled module that is missing, does not load, is of another Python, or from before a change of the C++ code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import maestro_fast
from maestro_fast import _C
from maestro_fast.ops.backend import SERVED_BY, resolve
from maestro_fast.ops.cpp import check_build

PACKAGE = Path(maestro_fast.__file__).parent
REMEDY = "pip install . in a checkout builds it, where there is a C++ compiler"
# What stands in the place of the compiled module, as a file's name and content, in checkouts that are otherwise alike.
CASES: dict[str, tuple[str, bytes] | None] = {
    "missing": None,
    "another Python": ("_C.cpython-399-x86_64-linux-gnu.so", b""),
    "not a library": (f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", b"\x7fELF and nothing else"),
    "a library that misses one": ("_C.py", b"import no_such_library"),
    "stale": ("_C.py", b"def group_advantages(): ..."),
}
# Every checkout is tried in a child of its own of one process, so that torch is imported once.
PROGRAM = """
import json, os, sys, torch
torch.set_num_threads(1)

def error_of(call, *arguments, **keywords):
    try:
        call(*arguments, **keywords)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def answer():
    import maestro_fast
    assert maestro_fast.__file__.startswith(folder), maestro_fast.__file__
    from maestro_fast import ops
    from maestro_fast.ops import backend, cpp
    x = torch.ones(4, 2)
    try:
        cpp.obstacle(())
    except ImportError as error:
        return {"import": str(error), "group_advantages": error_of(ops.group_advantages, x, None, 2)}
    return {
        "obstacle": cpp.obstacle(()),
        "served": {op: backend.resolve(op, None, x) for op in ops.SERVED_BY},
        "group_advantages": error_of(ops.group_advantages, x, None, 2, backend="cpp"),
        "pack_sequences": error_of(ops.pack_sequences, [1], 1, backend="cpp"),
        "balance_sequences": error_of(ops.balance_sequences, [1], 1, backend="cpp"),
        "operator": error_of(
            torch.ops.maestro_fast.conductor_weights,
            *(x, None, None, x[:2], x[0], 1.0, 0.0, 0.3, False, 0, 0, 0, 0),
        ),
        "bins": ops.pack_sequences([3, 4, 5], 7),
        "parts": ops.balance_sequences([8, 7, 6, 5, 4], 2),
    }

for folder in sys.argv[1:]:
    if os.fork():
        os.wait()
        continue
    try:
        sys.path.insert(0, folder)
        print(json.dumps(answer()), flush=True)
    finally:
        os._exit(0)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folders = []
    for case in CASES.values():
        folders.append(tmp_path_factory.mktemp("checkout"))
        package = folders[-1] / "maestro_fast"
        package.mkdir()
        for entry in PACKAGE.iterdir():
            if not entry.name.startswith("_C."):
                (package / entry.name).symlink_to(entry)
        if case is not None:
            (package / case[0]).write_bytes(case[1])
    # Without site, because what it finds of an editable install would come before the folders here.
    command = [sys.executable, "-S", "-c", PROGRAM, *map(str, folders)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, cwd=folders[0].parent, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(CASES), done.stderr
    return {case: json.loads(line) for case, line in zip(CASES, lines, strict=True)}


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("missing", f"maestro_fast._C is not built; {REMEDY}"),
        (
            "another Python",
            f"maestro_fast._C is not built for this Python (there is _C.cpython-399-x86_64-linux-gnu.so); {REMEDY}",
        ),
    ],
)
def test_a_module_that_is_not_built_is_said_to_be_so(
    answers: dict[str, dict[str, Any]], case: str, reason: str
) -> None:
    assert answers[case]["obstacle"] == reason


@pytest.mark.parametrize(
    ("case", "error"),
    [("not a library", "file too short"), ("a library that misses one", "No module named 'no_such_library'")],
)
def test_a_module_that_does_not_load_is_not_mistaken_for_one_that_is_not_built(
    answers: dict[str, dict[str, Any]], case: str, error: str
) -> None:
    reason = answers[case]["obstacle"]
    assert reason.startswith("maestro_fast._C is there but does not load (") and reason.endswith(f"; {REMEDY}")
    assert error in reason and "not built" not in reason


@pytest.mark.parametrize("case", [case for case in CASES if case != "stale"])
def test_without_the_module_cpp_refuses_and_the_reference_serves(answers: dict[str, dict[str, Any]], case: str) -> None:
    answer = answers[case]
    for op in ("group_advantages", "pack_sequences", "balance_sequences"):
        assert answer[op] == f"ValueError: backend: 'cpp' cannot serve {op} here: {answer['obstacle']}"
    assert answer["operator"] == f"ImportError: {answer['obstacle']}"
    assert answer["served"] == dict.fromkeys(SERVED_BY, "torch")
    assert answer["bins"] == [[2], [0, 1]] and answer["parts"] == [[0, 2], [1, 3, 4]]


def test_a_stale_build_is_named(answers: dict[str, dict[str, Any]]) -> None:
    check_build(_C)
    stale = SimpleNamespace(group_advantages=None, conductor_weights=None, counterfactual_advantages=None)
    with pytest.raises(
        ImportError,
        match=r"_C has no AdvantageProfile, Partition, LogitRows, HeadNumbers, pack_sequences, balance_sequences, "
        r"row_statistics, dlogits, number_keys, number_session_keys, order_by_group, examine_mask, spread_over_tokens, "
        r"sum_over_tokens: .* rebuild it",
    ):
        check_build(stale)
    raised = answers["stale"]["import"]
    assert answers["stale"]["group_advantages"] == f"ImportError: {raised}"
    assert raised.startswith("maestro_fast._C has no AdvantageProfile, Partition, LogitRows, HeadNumbers, ")
    assert "older than the Python code, rebuild it" in raised


def test_lengths_are_packed_by_cpp_whatever_derivatives_are_wanted_elsewhere() -> None:
    with forward_ad.dual_level():
        assert resolve("pack_sequences", None) == resolve("balance_sequences", "cpp") == "cpp"
        assert resolve("group_advantages", None, torch.ones(2, 2)) == "torch"
