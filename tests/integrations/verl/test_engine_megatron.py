"""verl's Megatron engine gives hidden states with its log-probs, however the model and its tokens are split.

The engines run in processes of their own on CPUs, see megatron_ranks.py for what has a stand-in there. The tests need
Megatron-Core (``pip install --no-deps megatron-core``), and are skipped without it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.integrations.verl.ranks import results

pytestmark = [
    pytest.mark.verl,
    pytest.mark.skipif(not find_spec("megatron") or not find_spec("megatron.core"), reason="needs megatron-core"),
]
KINDS = ("response", "response_mean", "prompt_last", "prompt_mean")
LAYOUTS = ("packed", "packed, dynamic", "padded", "padded, dynamic", "bucketed")
SPLITS = {"whole": (1, 1, 1), "tensor": (2, 1, 1), "pipeline": (1, 2, 1), "context": (1, 1, 2)}
FIELD = "maestro_h"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results("megatron_ranks.py", 1, tmp_path_factory.mktemp("whole"), "1", "1", "1")[0]


@pytest.fixture(scope="module", params=SPLITS)
def ranks(
    request: pytest.FixtureRequest, whole: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What all processes have found; those of the first stage of a pipeline have nothing to give."""
    if request.param == "whole":
        return [whole]
    sizes = [str(size) for size in SPLITS[request.param]]
    found = results("megatron_ranks.py", 2, tmp_path_factory.mktemp(request.param), *sizes)
    if request.param == "pipeline":
        first = found.pop(0)
        assert not any(outputs for layout in LAYOUTS for outputs in first[layout].values())
        assert first["left"] == (0, False)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_contexts_are_those_of_each_sequence_by_itself(
    ranks: list[dict[str, Any]], whole: dict[str, Any], layout: str, kind: str
) -> None:
    _, prompts = whole["sequences"]
    want = []
    for states, prompt in zip(whole["truth"]["states"], prompts, strict=True):
        spans = {"response": states[-1:], "response_mean": states[prompt:]}
        spans |= {"prompt_last": states[prompt - 1 : prompt], "prompt_mean": states[:prompt]}
        want.append(spans[kind].mean(0))
    for rank in ranks:
        found = rank[layout][kind]
        assert {h.dtype for h in found[FIELD]} == {torch.float32}
        torch.testing.assert_close(torch.stack(found[FIELD]), torch.stack(want), rtol=0, atol=1e-5)
        for log_probs, row in zip(found["log_probs"], whole["truth"]["log_probs"], strict=True):
            torch.testing.assert_close(log_probs[:-1], row, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_who_asks_for_nothing_gets_nothing(ranks: list[dict[str, Any]], layout: str) -> None:
    for rank in ranks:
        unasked = rank[layout]["unasked"]
        assert set(unasked) == {"log_probs", "entropy"}
        for kind in KINDS:
            assert set(rank[layout][kind]) == {"log_probs", "entropy", FIELD}
            for name, rows in unasked.items():
                assert all(torch.equal(*pair) for pair in zip(rank[layout][kind][name], rows, strict=True))
        assert rank["left"] == (0, False), "a hook or hidden states outlive the forward"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("use_fused_kernels", "use_fused_kernels=True: no hidden states can be read"),
        ("dynamic_context_parallel", "dynamic_context_parallel=True: no hidden states can be read"),
        ("mtp.enable", "mtp.enable=True: no hidden states can be read"),
        ("other tokens", "hidden states: shape (1, 5, 32), expected (1, 6, d)"),
        ("not seen", "hidden states: the forward of the module that makes them was not seen"),
    ],
)
def test_refusals(whole: dict[str, Any], case: str, message: str) -> None:
    assert message in whole["refusals"][case]
