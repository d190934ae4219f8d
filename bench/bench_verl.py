"""Times verl's advantage stage on the CPU: ``compute_advantage`` as its trainers call it, with its estimators and ours.

    python -m pytest bench/bench_verl.py         in an environment with verl 0.9.1 and this package

The stage takes token-level rewards, masks and uids, and ends with an advantage for each token. The targets for
B = 4096, K = 8, L = 1024 and G = 16 on one thread are: fast_grpo in at most 0.45 of the time of verl's grpo_vectorized
and 0.04 of that of its grpo, fast_gdpo in at most 0.005 of the time of its gdpo.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.tables import emit
from maestro_fast.integrations.verl.batch import TrainerBatch, current
from maestro_fast.integrations.verl.columns import named_values
from maestro_fast.integrations.verl.estimators import register
from maestro_fast.ops import PROFILES, Groups, group_advantages
from tests.ops.helpers import assert_as_accurate

B, K, L, G = 4096, 8, 1024, 16
Call = Callable[[], Any]
pytestmark = pytest.mark.filterwarnings("ignore")  # verl and Ray warn when they are first imported


class Batch(NamedTuple):
    """A batch of verl's trainer, its rows in no order, and the same in our own terms."""

    legacy: Any
    v1: Any
    config: dict[str, Any]
    keys: list[str]
    infos: list[dict[str, Any]]
    rewards_BK: Tensor
    mask_BL: Tensor
    groups: Groups


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Lengths are uniform, from a quarter of L on. A response's score is the sum of its rewards, at its last token."""
    reason = "verl cannot be imported; see the docstring of this file"
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason=reason, exc_type=ImportError)
    from verl import DataProto

    register(core_algos)
    generator = torch.Generator().manual_seed(0)
    rewards_BK = torch.randn(B, K, generator=generator)
    lengths = torch.randint(L // 4, L + 1, (B,), generator=generator)
    mask = (torch.arange(L)[None] < lengths[:, None]).long()
    group = torch.arange(B)[torch.randperm(B, generator=generator)] // G
    uids = [f"{n:08x}-7b1c-4f3e-9a55-{n * 2654435761 % 2**48:012x}" for n in group.tolist()]
    tokens = torch.zeros(B, L)
    tokens[torch.arange(B), lengths - 1] = rewards_BK.sum(1)
    names = [f"reward_{k}" for k in range(K)]
    prompts = torch.zeros(B, 8, dtype=torch.int64)
    uid_B = np.array(uids, dtype=object)
    both = {"token_level_rewards": tokens, "token_level_scores": tokens, "response_mask": mask, "old_log_probs": tokens}
    whole = torch.cat([torch.ones_like(prompts), mask], 1)
    legacy = DataProto.from_dict(
        tensors=both | {"responses": mask, "prompts": prompts, "attention_mask": whole},
        non_tensors={"uid": uid_B, **dict(zip(names, rewards_BK.T.numpy(), strict=True))},
    )
    v1 = DataProto.from_dict(
        tensors=both | {"rm_scores": tokens, "rollout_log_probs": tokens}, non_tensors={"uid": uid_B}
    )
    infos = [{"reward_extra_info": dict(zip(names, row, strict=True))} for row in rewards_BK.tolist()]
    keys = [f"{uid}_{row}_0" for row, uid in enumerate(uids)]
    config = {"gdpo_reward_keys": names, "gdpo_reward_weights": None, "norm_adv_by_std_in_grpo": True}
    return Batch(legacy, v1, config, keys, infos, rewards_BK, mask, Groups.of_keys(uids))


def clear(batch: Batch) -> None:
    """Frees what an earlier call wrote, which takes milliseconds. The batch of a trainer has no advantages yet."""
    for data in (batch.legacy, batch.v1):
        for name in {"advantages", "returns"} & {*data.batch.keys()}:
            data.batch.pop(name)


@contextmanager
def known(batch: Batch, values_of: Callable[[Any], Tensor]) -> Iterator[None]:
    """What our trainer tells the estimators."""
    token = current.set(TrainerBatch(batch.keys, [False] * B, None, values_of))
    try:
        yield
    finally:
        current.reset(token)


def test_grpo(benchmark: Any, capsys: Any, batch: Batch) -> None:
    """Without our trainer: any code that calls verl's function, such as its legacy trainer."""
    from verl.trainer.ppo.ray_trainer import compute_advantage

    def stage(estimator: str) -> Call:
        return lambda: compute_advantage(batch.legacy, estimator, num_repeat=G, config=batch.config).batch["advantages"]

    ours, peers = stage("fast_grpo"), {name: stage(name) for name in ("grpo_vectorized", "grpo")}
    compare(benchmark, capsys, batch, "fast_grpo", ours, peers, truth(batch, batch.rewards_BK.sum(1), "verl_grpo"))


def test_grpo_in_the_v1_trainer(benchmark: Any, capsys: Any, batch: Batch) -> None:
    """By keys of sessions, as verl's default trainer calls it; verl then copies the rows that it compares."""
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    def stage(estimator: str) -> Any:
        with known(batch, lambda names: batch.rewards_BK):
            done = compute_advantage_for_multi_trajectories(
                batch.v1, batch.keys, estimator, num_repeat=G, config=batch.config
            )
        return done.batch["advantages"]

    expected = truth(batch, batch.rewards_BK.sum(1), "verl_grpo")
    peers: dict[str, Call] = {"grpo": lambda: stage("grpo")}
    compare(benchmark, capsys, batch, "fast_grpo, V1", lambda: stage("fast_grpo"), peers, expected)


@pytest.mark.parametrize("of_dicts", [False, True])
def test_gdpo(benchmark: Any, capsys: Any, batch: Batch, of_dicts: bool) -> None:
    """verl's gdpo gets the rewards in arrays from its legacy trainer, and fails in its V1 trainer.

    Ours gets them in a tensor; in the second case it takes them out of the dicts of compute_score, as in V1.
    """
    from verl.trainer.ppo.ray_trainer import compute_advantage

    def of_trainer(names: Any) -> Tensor:
        return named_values(names, batch.infos, {}, [False] * B) if of_dicts else batch.rewards_BK

    def stage(estimator: str) -> Any:
        with known(batch, of_trainer):
            done = compute_advantage(batch.legacy, estimator, num_repeat=G, config=batch.config)
        return done.batch["advantages"]

    expected = truth(batch, batch.rewards_BK, "verl_gdpo")
    peers: dict[str, Call] = {"gdpo": lambda: stage("gdpo")}
    name = "fast_gdpo, dicts" if of_dicts else "fast_gdpo"
    compare(benchmark, capsys, batch, name, lambda: stage("fast_gdpo"), peers, expected, rounds=8)


def truth(batch: Batch, rewards: Tensor, profile: str) -> Tensor:
    """The advantages [B, L] in float64."""
    lengths = {"lengths": batch.mask_BL.sum(1)} if PROFILES[profile].needs_lengths else {}
    found = group_advantages(rewards.double(), None, batch.groups, profile=profile, **lengths)
    return found.advantages[:, None] * batch.mask_BL


def compare(
    benchmark: Any,
    capsys: Any,
    batch: Batch,
    name: str,
    ours: Call,
    peers: dict[str, Call],
    expected: Tensor,
    *,
    rounds: int = 30,
) -> None:
    """Prints a line: median milliseconds and quartiles, and for each peer the quotient, ours by theirs, of each round.

    The calls alternate. Each passes over about a hundred megabytes, so no caches stay warm.
    """
    plain = [peer() for peer in peers.values()]
    assert_as_accurate(ours(), plain[-1], expected, epsilon=1e-5)  # nothing wrong is timed
    del plain
    seconds: dict[str, list[float]] = {which: [] for which in (name, *peers)}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for which, call in ((name, ours), *peers.items()):
                clear(batch)
                start = time.perf_counter()
                call()
                seconds[which].append(time.perf_counter() - start)
    finally:
        gc.enable()
    benchmark.extra_info["seconds"] = seconds
    line = f"{name:16}{spread(1e3 * np.array(seconds[name])):>26}"
    for peer in peers:
        quotient = np.array(seconds[name]) / np.array(seconds[peer])
        line += f"   {peer:16}{spread(1e3 * np.array(seconds[peer])):>26}{spread(quotient, 4):>26}"
    header = f"  {'ours':16}{'ms [quartiles]':>26}   {'verl':16}{'ms [quartiles]':>26}{'ours / verl':>26}"
    title = f"verl {version('verl')}, its advantage stage on the CPU; B = {B}, K = {K}, L = {L}, G = {G}, 1 thread"
    emit(capsys, title, [line], header=[header])
    benchmark.pedantic(ours, setup=lambda: clear(batch), rounds=20, iterations=1, warmup_rounds=1)


def spread(values: Any, digits: int = 2) -> str:
    """The median and, in brackets, the quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
