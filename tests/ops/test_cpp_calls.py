"""Which backend serves a call; and threads, forks, graphs and the order of groups change no bit of its results."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from maestro_fast.ops import (
    PROFILES,
    ConductorParams,
    Groups,
    backend,
    conductor_weights,
    counterfactual_advantages,
    group_advantages,
    maestro_advantages,
)
from maestro_fast.ops.backend import resolve
from maestro_fast.specs import as_text
from tests.ops.helpers import assert_same_compiled, assert_same_fake

B, K, D = 24, 3, 10
generator = torch.Generator().manual_seed(0)
rewards_BK, weights_BK = torch.randn(B, K, generator=generator), torch.rand(B, K, generator=generator)
rewards_BK[3, 1] = rewards_BK[9] = float("nan")
h_BD = torch.randn(B, D, generator=generator)
HEAD = ConductorParams(h_BD.mean(0), 1 / h_BD.std(0), torch.randn(K, D, generator=generator), torch.zeros(K))
IDS = [b % 5 for b in range(B)]


def assert_equal(ours: Any, expected: Any) -> None:
    for x, y in zip(ours, expected, strict=True):
        assert torch.equal(x, y)


# --- threads and forks ---


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("groups", ["16", "ragged"])
def test_the_number_of_threads_changes_no_bit(groups: str, threads: Callable[[int], None]) -> None:
    batch = 65_536  # 3 * 65,536 elements are enough for three threads
    rewards, weights = torch.randn(batch, 4), torch.rand(batch, 4)
    rewards[::97, 2] = float("nan")
    partition: Any = 16 if groups == "16" else Groups.of(torch.randint(0, 5000, (batch,)), batch)
    h, head = (
        torch.randn(4096, 300),
        ConductorParams(torch.zeros(300), torch.ones(300), torch.randn(4, 300), torch.zeros(4)),
    )
    lengths = torch.randint(0, 500, (batch,))

    def everything() -> list[Tensor]:
        outputs: list[Tensor] = []
        for name in ("maestro", "grpo_batch", "gdpo", "verl_gdpo"):
            given = lengths if name == "verl_gdpo" else None
            outputs += group_advantages(rewards, weights, partition, lengths=given, profile=name, backend="cpp")
        outputs.append(counterfactual_advantages(rewards, weights, torch.eye(4), partition, backend="cpp"))
        return [*outputs, *conductor_weights(h, head, backend="cpp")]

    threads(1)
    alone = everything()
    for count in (2, 3, 4):
        threads(count)
        assert_equal(everything(), alone)
        assert_equal(everything(), alone)


FORK = """
import os, sys, torch
from maestro_fast.ops import group_advantages
torch.set_num_threads(4)
rewards = torch.randn(262_144, 4)
def run():  # as bytes: torch.equal has threads of its own, and would wait for them
    return group_advantages(rewards, None, 16, backend="cpp").advantages.numpy().tobytes()
before = run()  # starts the threads
child = os.fork()
if child == 0:
    os._exit(0 if run() == before else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_of_a_parent_with_threads_does_not_wait_for_them() -> None:
    program = subprocess.Popen([sys.executable, "-c", FORK], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output, _ = program.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)  # the child, too
        raise
    assert output.strip() == "0"


# --- the order of groups and responses ---


@pytest.mark.parametrize("profile", [name for name, p in PROFILES.items() if not p.needs_lengths])
def test_the_order_of_groups_and_the_batch_around_them_change_no_bit(profile: str) -> None:
    ids = torch.tensor(IDS)
    straight = group_advantages(rewards_BK, weights_BK, ids, profile=profile, backend="cpp")
    order = torch.cat([(ids == group).nonzero()[:, 0] for group in (3, 0, 4, 1, 2)])  # within groups as it was
    moved = group_advantages(rewards_BK[order], weights_BK[order], ids[order], profile=profile, backend="cpp")
    if "batch" in (PROFILES[profile].score_center, PROFILES[profile].score_scale):
        torch.testing.assert_close(moved.advantages, straight.advantages[order], rtol=1e-6, atol=1e-6)
        return
    assert_equal(moved, [x[order] for x in straight])
    alone = group_advantages(rewards_BK[ids == 2], weights_BK[ids == 2], int((ids == 2).sum()), profile=profile)
    assert_equal(alone, [x[ids == 2] for x in straight])


# --- who serves ---


def test_cpu_tensors_are_served_by_cpp_unless_it_cannot() -> None:
    wants_gradient = weights_BK.clone().requires_grad_()
    op = "group_advantages"
    assert resolve(op, None, rewards_BK, weights_BK) == "cpp"
    assert resolve(op, None, rewards_BK.bfloat16(), None) == "cpp"
    assert resolve(op, None, rewards_BK.double(), weights_BK) == "torch"
    assert resolve(op, None, rewards_BK, wants_gradient) == "torch"
    assert resolve(op, None, rewards_BK.to("meta"), weights_BK) == "torch"
    assert resolve(op, None, torch.nn.Parameter(weights_BK, requires_grad=False)) == "cpp"
    with torch.no_grad():
        assert resolve(op, None, rewards_BK, wants_gradient) == "cpp"
    with forward_ad.dual_level():
        assert resolve(op, None, rewards_BK) == "torch"  # it may carry a tangent
    assert resolve(op, "torch", rewards_BK) == "torch"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": rewards_BK.double()}, "backend: 'cpp' cannot serve group_advantages here: got float64"),
        ({"weights": torch.ones(K, requires_grad=True)}, "a gradient is wanted"),
        ({"rewards": torch.ones(B, K, device="meta"), "weights": None}, "got a tensor on meta, expected the CPU"),
        ({"backend": "triton"}, "'triton' cannot serve group_advantages here: got a tensor on cpu, expected a CUDA"),
        ({"backend": "numpy"}, "backend: 'numpy' does not serve group_advantages, expected one of cpp, triton, torch"),
    ],
)
def test_an_explicit_backend_is_obeyed_or_refused_by_name(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"rewards": rewards_BK, "weights": weights_BK, "groups": 4, "backend": "cpp", **changes}
    with pytest.raises(ValueError, match=message):
        group_advantages(**arguments)


def test_the_default_is_the_kernel_and_not_the_reference() -> None:
    by_name = {name: group_advantages(rewards_BK, weights_BK, 4, backend=name) for name in ("cpp", "torch")}  # type: ignore[arg-type]
    assert_equal(group_advantages(rewards_BK, weights_BK, 4), by_name["cpp"])
    assert not torch.equal(by_name["cpp"].advantages, by_name["torch"].advantages)  # or the line above says nothing


def test_groups_on_another_device_are_refused() -> None:
    groups = Groups.of(IDS, B).to(torch.device("meta"))
    with pytest.raises(ValueError, match="groups: on meta, expected the CPU"):
        group_advantages(rewards_BK, weights_BK, groups, backend="cpp")


def test_every_served_backend_is_one_that_resolve_knows() -> None:
    assert {name for names in backend.SERVED_BY.values() for name in names} <= {"cpp", "torch", "triton"}


# --- graphs ---


@pytest.mark.parametrize("groups", [4, "ragged"])
def test_compiled_graphs_run_the_same_kernels(groups: Any) -> None:
    partition = Groups.of(IDS, B) if groups == "ragged" else groups

    def advantages(rewards: Tensor, weights: Tensor) -> Any:
        return group_advantages(rewards, weights, partition, backend="cpp")

    def counterfactuals(rewards: Tensor, weights: Tensor) -> Any:
        return counterfactual_advantages(rewards, weights, weights[:2], partition, backend="cpp")

    def step(rewards: Tensor, h: Tensor, *values: Tensor) -> Any:
        return maestro_advantages(
            rewards, ConductorParams(*values), partition, h=h, seed=2**63 + 1, offset=2**33, backend="cpp"
        )

    head = (HEAD.mean, HEAD.rstd, HEAD.weight, HEAD.bias)
    for function, arguments in (
        (advantages, (rewards_BK, weights_BK)),
        (counterfactuals, (rewards_BK, weights_BK)),
        (step, (rewards_BK, h_BD, *head)),
    ):
        assert_same_compiled(function, *arguments)


def test_fake_tensors_take_the_reference() -> None:
    assert_same_fake(lambda r, w: counterfactual_advantages(r, w, w[:2], 4), rewards_BK, weights_BK)
    assert_same_fake(lambda r, h: maestro_advantages(r, HEAD_OF(h), 4, h=h)[1], rewards_BK, h_BD)


def HEAD_OF(h: Tensor) -> ConductorParams:
    return ConductorParams(h.mean(0), h.std(0), h[:K], h.mean(0)[:K])


@pytest.mark.parametrize("op", ["group_advantages", "counterfactual_advantages", "conductor_weights"])
def test_the_operators_pass_torch_s_own_check(op: str) -> None:
    groups = Groups.of(IDS, B)
    common = (0, groups.offsets_N1, groups.order_B, as_text(PROFILES["maestro"]))
    arguments: dict[str, tuple[Any, ...]] = {
        "group_advantages": (rewards_BK, weights_BK, None, 0.0, None, *common),
        "counterfactual_advantages": (rewards_BK, None, weights_BK[:2], None, 0.0, *common),
        "conductor_weights": (h_BD, None, None, HEAD.weight, HEAD.bias, 1.0, 0.05, 0.3, False, 1, 2, 3, 4),
    }
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.maestro_fast, op).default, arguments[op], test_utils=tests)
