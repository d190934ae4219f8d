"""The estimators give what verl's own functions give, on batches of every kind, and say what they need.

The tests of the first half run beside verl, those of the second half need none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from maestro_fast.integrations.verl.batch import ESTIMATORS, TrainerBatch, current
from maestro_fast.integrations.verl.columns import named_values
from maestro_fast.integrations.verl.estimators import (
    fast_dr_grpo,
    fast_gdpo,
    fast_grpo,
    fast_rloo,
    maestro,
    register,
)
from maestro_fast.integrations.verl.rows import Rows
from maestro_fast.ops import cpp, group_advantages

L = 12
# verl adds up in float32. Near 0, the difference of a score to the mean of its group has the rounding of the score.
TOLERANCE = {"rtol": 1e-5, "atol": 3e-6}
CASES = ["even", "ragged", "singletons", "holes", "empty rows", "numbers", "floating mask"]


class Case(NamedTuple):
    """A batch as verl's trainer has it. Rewards are [B, K]; a response's score is their sum, at its last token."""

    rewards_BK: Tensor
    token_level_rewards: Tensor
    mask_BL: Tensor
    uids: Any

    @property
    def names(self) -> list[str]:
        return [f"r{k}" for k in range(self.rewards_BK.shape[1])]


def make(name: str, K: int) -> Case:
    generator = torch.Generator().manual_seed(CASES.index(name))
    sizes = {"ragged": [1, 5, 2, 7, 3], "singletons": [1, 1, 4, 1, 1]}.get(name, [4] * 6)
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    group = group[torch.randperm(len(group), generator=generator)]
    B = len(group)
    rewards_BK = torch.randn(B, K, generator=generator) * torch.logspace(-1, 1, K) + 1.0
    lengths = torch.randint(2, L + 1, (B,), generator=generator)
    mask = (torch.arange(L)[None] < lengths[:, None]).long()
    tokens = 0.1 * torch.randn(B, L, generator=generator) * mask  # a penalty at each token
    tokens[torch.arange(B), lengths - 1] += rewards_BK.sum(1)
    if name == "holes":
        mask[:, 1] = 0  # the turn of a tool
        mask[::3, 0] = 0
    elif name == "empty rows":
        mask[::5] = 0
    elif name == "floating mask":
        mask = mask.float()
    uids = group.numpy() * 7 if name == "numbers" else np.array([f"uid_{g:x}" for g in group.tolist()], dtype=object)
    return Case(rewards_BK, tokens, mask, uids)


@contextmanager
def trainer_batch(
    rewards_BK: Tensor, keys: Sequence[str], padding: Sequence[bool] | None = None
) -> Iterator[TrainerBatch]:
    """The batch that our trainer leaves for the estimators; its rewards are called r0, r1, ..."""

    def values_of(names: Sequence[str]) -> Tensor:
        return rewards_BK[:, [int(name.removeprefix("r")) for name in names]]

    batch = TrainerBatch(keys, [False] * len(keys) if padding is None else padding, None, values_of)
    token = current.set(batch)
    try:
        yield batch
    finally:
        current.reset(token)


def keys_of(case: Case) -> list[str]:
    """Keys in which every row is a session of its own."""
    return [f"{uid}_{row}_0" for row, uid in enumerate(case.uids)]


def check(found: tuple[Tensor, Tensor], expected: Tensor) -> None:
    advantages, returns = found
    assert advantages is returns and advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, expected.float(), **TOLERANCE)
    assert expected.abs().max() > 0.3


# --- beside verl ---


@pytest.fixture
def core_algos() -> Any:
    """verl's module with our estimators; one of verl's own tests clears its registry, so they are registered again."""
    from verl.trainer.ppo import core_algos

    register(core_algos)
    return core_algos


@pytest.mark.verl
@pytest.mark.parametrize("K", [1, 8])
@pytest.mark.parametrize("name", CASES)
def test_the_fast_estimators_are_those_of_verl(core_algos: Any, name: str, K: int) -> None:
    """Called as verl's functions are, by uids."""
    case = make(name, K)
    batch = (case.token_level_rewards, case.mask_BL, case.uids)
    grpo, vectorized = (core_algos.get_adv_estimator_fn(which) for which in ("grpo", "grpo_vectorized"))
    for flag in (True, False):
        config = {"norm_adv_by_std_in_grpo": flag}
        for verls in (grpo, vectorized):
            expected = verls(*batch, norm_adv_by_std_in_grpo=flag)[0]
            check(fast_grpo(*batch, config=config), expected)
            check(fast_grpo(*batch, norm_adv_by_std_in_grpo=flag), expected)
            if not flag:
                check(fast_dr_grpo(*batch), expected)
    check(fast_grpo(*batch), grpo(*batch)[0])
    check(fast_rloo(*batch), core_algos.get_adv_estimator_fn("rloo")(*batch)[0])
    expected = core_algos.get_adv_estimator_fn("rloo_vectorized")(*batch)[0]
    uids = list(case.uids)
    several = torch.tensor([uids.count(uid) > 1 for uid in uids])  # a singleton it gives 0, unlike verl's own ``rloo``
    found = fast_rloo(*batch)[0]
    torch.testing.assert_close(found[several], expected[several].float(), **TOLERANCE)


@pytest.mark.verl
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_through_the_function_that_verls_trainers_call(core_algos: Any, name: str, flag: bool) -> None:
    """It hands the flag to its own ``grpo``, and to others the config alone."""
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    case = make(name, 8)
    found = {}
    for estimator in ("grpo", "rloo", *ESTIMATORS[1:4]):
        data = DataProto.from_dict(
            tensors={"token_level_rewards": case.token_level_rewards, "response_mask": case.mask_BL},
            non_tensors={"uid": np.array(case.uids, dtype=object)},
        )
        config = {"norm_adv_by_std_in_grpo": flag}
        done = compute_advantage(data, estimator, num_repeat=4, norm_adv_by_std_in_grpo=flag, config=config)
        found[estimator] = done.batch["advantages"], done.batch["returns"]
    check(found["fast_grpo"], found["grpo"][0])
    check(found["fast_rloo"], found["rloo"][0])
    if not flag:
        check(found["fast_dr_grpo"], found["grpo"][0])


@pytest.mark.verl
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 0.0, 2.0, 0.1, 3.0, 1.5, 0.7]])
@pytest.mark.parametrize("K", [1, 8])
@pytest.mark.parametrize("name", CASES)
def test_fast_gdpo_is_that_of_verl(core_algos: Any, name: str, K: int, weights: list[float] | None) -> None:
    """verl's ``gdpo`` gets its rewards as the legacy trainer hands them over, ours from the V1 trainer's batch."""
    case = make(name, K)
    config = {"gdpo_reward_keys": case.names, "gdpo_reward_weights": None if weights is None else weights[:K]}
    batch = {"token_level_rewards": case.token_level_rewards, "response_mask": case.mask_BL, "index": case.uids}
    prompts = torch.zeros(len(case.uids), 3, dtype=torch.int64)
    both = torch.cat([torch.ones_like(prompts), case.mask_BL.long()], 1)
    rewards = {key: case.rewards_BK[:, k].numpy() for k, key in enumerate(case.names)}
    for flag in (True, False):
        expected = core_algos.get_adv_estimator_fn("gdpo")(
            **batch,
            config=config,
            norm_adv_by_std_in_grpo=flag,
            non_tensor_batch=rewards,
            batch={"prompts": prompts, "attention_mask": both},
        )[0]
        with trainer_batch(case.rewards_BK, keys_of(case)):
            check(fast_gdpo(**batch, config=config | {"norm_adv_by_std_in_grpo": flag}), expected)
            check(fast_gdpo(**batch, config=config, norm_adv_by_std_in_grpo=flag), expected)


@pytest.mark.verl
def test_groups_of_identical_rewards_are_zero_where_verl_has_noise(core_algos: Any) -> None:
    uids = np.arange(35) // 7
    scores = torch.zeros(35, L)
    scores[:, 0] = 0.1 + torch.from_numpy(uids).float() / 3
    batch = (scores, torch.ones(35, L, dtype=torch.int64), uids)
    assert core_algos.compute_grpo_outcome_advantage(*batch)[0].abs().max() > 0
    for ours in (fast_grpo, fast_dr_grpo, fast_rloo):
        assert torch.equal(ours(*batch)[0], torch.zeros(35, L))
    with trainer_batch(scores[:, :1], [f"{uid}_{row}_0" for row, uid in enumerate(uids)]):
        assert torch.equal(fast_gdpo(*batch, config={"gdpo_reward_keys": ["r0"]})[0], torch.zeros(35, L))


# Sessions of up to three outputs out of order, groups that differ in size, a uid with underscores, and padding.
SESSIONS = ["p_0_0", "q_1_0_1", "p_1_0", "p_0_2", "q_1_1_0", "p_0_1", "q_1_0_0", "s_0_0", "p_2_0", "pad_0_0", "pad_1_0"]


def sessions(flagged: bool = True) -> tuple[Any, Tensor, list[bool]]:
    """verl's data for ``SESSIONS``, rewards [B, 2] and which rows are padding. Masks are int64, some with holes."""
    from verl import DataProto

    generator = torch.Generator().manual_seed(5)
    B = len(SESSIONS)
    padding = [key.startswith("pad") for key in SESSIONS]
    mask = (torch.rand(B, L, generator=generator) < 0.6).long()
    mask[:, 4] = 1
    mask[1::2] = (torch.arange(L) < 7).long()
    mask[torch.tensor(padding)] = 0
    rewards_BK = torch.randn(B, 2, generator=generator)
    tokens = torch.zeros(B, L)
    tokens[:, 3] = rewards_BK.sum(1)
    tokens[torch.tensor(padding)] = 0
    uids = np.array([key.rsplit("_", 2)[0] for key in SESSIONS], dtype=object)
    data = DataProto.from_dict(
        tensors={"token_level_rewards": tokens, "response_mask": mask},
        non_tensors={"uid": uids, **{f"r{k}": rewards_BK[:, k].numpy() for k in range(2)}},
    )
    return data, rewards_BK, padding if flagged else [False] * B


@pytest.mark.verl
@pytest.mark.parametrize("flagged", [True, False])
@pytest.mark.parametrize("flag", [True, False])
def test_several_outputs_of_a_session_as_verl_has_them(core_algos: Any, flag: bool, flagged: bool) -> None:
    """Through the function that verl's V1 trainer calls. Padding changes nothing, also if it is not known for such."""
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories as compute

    found = {}
    for estimator in ("grpo", "fast_grpo", *([] if flag else ["fast_dr_grpo"])):
        data, rewards_BK, padding = sessions(flagged)
        with trainer_batch(rewards_BK, SESSIONS, padding):
            config = {"norm_adv_by_std_in_grpo": flag}
            done = compute(data, SESSIONS, estimator, norm_adv_by_std_in_grpo=flag, config=config)
        assert done.batch["advantages"] is done.batch["returns"] or estimator == "grpo"
        found[estimator] = done.batch["advantages"]
    for ours in found.values():
        torch.testing.assert_close(ours, found["grpo"], **TOLERANCE)
    assert found["grpo"].abs().max() > 0.3


@pytest.mark.verl
def test_fast_rloo_and_fast_gdpo_compare_the_last_outputs_alone(core_algos: Any) -> None:
    """verl would compare all outputs; these do what it does for ``grpo``. What is compared gets verl's own values."""
    from verl.trainer.ppo.ray_trainer import compute_advantage

    data, rewards_BK, padding = sessions()
    final = Rows.of_keys(SESSIONS, padding).final_R
    assert sorted(SESSIONS[row] for row in final) == ["p_0_2", "p_1_0", "p_2_0", "q_1_0_1", "q_1_1_0", "s_0_0"]
    config = {"gdpo_reward_keys": ["r0", "r1"], "gdpo_reward_weights": [2.0, 0.5]}
    for verls in ("rloo", "gdpo"):
        alone = sessions()[0].select_idxs(final.tolist())
        alone.batch["prompts"] = torch.zeros(len(final), 2, dtype=torch.int64)
        alone.batch["attention_mask"] = torch.ones(len(final), 2 + L, dtype=torch.int64)
        expected = compute_advantage(alone, verls, config=config).batch["advantages"]
        with trainer_batch(rewards_BK, SESSIONS, padding):
            whole = compute_advantage(data, f"fast_{verls}", config=config).batch["advantages"]
        torch.testing.assert_close(whole[final], expected, **TOLERANCE)
        per_row = whole.sum(1) / data.batch["response_mask"].sum(1)
        by_key = dict(zip(SESSIONS, per_row.tolist(), strict=True))
        assert by_key["p_0_0"] == pytest.approx(by_key["p_0_2"]) == pytest.approx(by_key["p_0_1"])
        assert (whole[torch.tensor(padding)] == 0).all()


@pytest.mark.verl
def test_the_flag_comes_from_every_kind_of_config(core_algos: Any) -> None:
    """The legacy trainer has a dataclass of verl's, the V1 trainer OmegaConf's."""
    from omegaconf import OmegaConf
    from verl.trainer.config.algorithm import AlgoConfig

    case = make("ragged", 1)
    batch = (case.token_level_rewards, case.mask_BL, case.uids)
    with_std, without = fast_grpo(*batch)[0], fast_dr_grpo(*batch)[0]
    assert not torch.allclose(with_std, without)
    for flag, expected in ((True, with_std), (False, without)):
        for config in (
            AlgoConfig(norm_adv_by_std_in_grpo=flag),
            OmegaConf.create({"norm_adv_by_std_in_grpo": flag}),
            {"norm_adv_by_std_in_grpo": flag},
        ):
            assert torch.equal(fast_grpo(*batch, config=config)[0], expected)
    assert torch.equal(fast_grpo(*batch, config=OmegaConf.create({}))[0], with_std)


@pytest.mark.verl
def test_verl_knows_the_estimators_by_name(core_algos: Any) -> None:
    """Registering them twice does no harm; verl refuses another function under a name that is taken."""
    register(core_algos)
    found = [core_algos.get_adv_estimator_fn(name) for name in ESTIMATORS]
    assert found == [maestro, fast_grpo, fast_dr_grpo, fast_rloo, fast_gdpo]


@pytest.mark.verl
def test_importing_verls_module_is_enough(tmp_path: Path) -> None:
    """A process that imports verl's estimators and nothing else has ours, which the entry point sees to."""
    code = (
        "import sys, verl.trainer.ppo.core_algos as verls; "
        "print([verls.get_adv_estimator_fn(name).__name__ for name in sys.argv[1:]])"
    )
    hidden = ("PYTHONPATH", "VERL_USE_EXTERNAL_MODULES", "VERL_USE_EXTERNAL_PLUGINS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-c", code, *ESTIMATORS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.splitlines()[-1] == str([*ESTIMATORS])


# --- without verl ---


def test_each_name_gets_its_function() -> None:
    registry: dict[str, Any] = {}

    def register_adv_est(name: str) -> Callable[[Any], Any]:
        return lambda function: registry.setdefault(name, function)

    register(SimpleNamespace(register_adv_est=register_adv_est))
    assert {name: function.__name__ for name, function in registry.items()} == {name: name for name in ESTIMATORS}


def test_other_dtypes_of_the_scores_are_served() -> None:
    """float64 goes through PyTorch."""
    case = make("holes", 1)
    for estimator in (fast_grpo, fast_dr_grpo, fast_rloo):
        single = estimator(case.token_level_rewards, case.mask_BL, case.uids)[0]
        double = estimator(case.token_level_rewards.double(), case.mask_BL.bool(), case.uids.tolist())[0]
        assert double.dtype == torch.float64
        torch.testing.assert_close(single, double.float(), **TOLERANCE)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_rewards_that_abstain_count_as_in_our_own_op(weights: list[float] | None) -> None:
    """compute_score returned None for them. verl has no such thing, so ``group_advantages`` is what they are held to.

    The batch has sessions of two outputs, whose first ones are not compared, and rows of padding.
    """
    case = make("ragged", 3)
    B = len(case.uids)
    present = torch.rand(B, 3, generator=torch.Generator().manual_seed(1)) < 0.7
    present[torch.from_numpy(case.uids == case.uids[0]), 1] = False  # nobody in this group
    rewards_BK = torch.where(present, case.rewards_BK, torch.nan)
    expected = group_advantages(
        rewards_BK,
        None if weights is None else torch.tensor(weights),
        torch.tensor([int(str(uid).removeprefix("uid_"), 16) for uid in case.uids]),
        lengths=case.mask_BL.sum(1),
        profile="verl_gdpo",
    ).advantages

    infos: list[Any] = [
        dict(zip(case.names, [None if value != value else value for value in row], strict=True))
        for row in rewards_BK.tolist()
    ]
    keys = [*(f"{uid}_{row}_1" for row, uid in enumerate(case.uids)), f"{case.uids[2]}_2_0", "pad_0_0", "pad_1_0"]
    padding = [key.startswith("pad") for key in keys]
    fields = [{"reward_extra_info": info} for info in (*infos, dict.fromkeys(case.names, 50.0), {}, {})]
    place = torch.tensor([*range(B), 2, 0, 0])
    mask = case.mask_BL[place]
    mask[torch.tensor(padding)] = 0
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(2)).tolist()
    batch = TrainerBatch(
        [keys[i] for i in order],
        [padding[i] for i in order],
        None,
        lambda names: named_values(names, [fields[i] for i in order], {}, [padding[i] for i in order]),
    )
    token = current.set(batch)
    try:
        config = {"gdpo_reward_keys": case.names, "gdpo_reward_weights": weights}
        found = fast_gdpo(torch.zeros(len(keys), L), mask[order], np.array(batch.keys), config=config)
    finally:
        current.reset(token)
    check(found, (expected[place, None] * mask)[order])


@pytest.mark.parametrize("estimator", [maestro, fast_gdpo])
def test_who_reads_rewards_by_name_says_where_they_are_missing(estimator: Any) -> None:
    case = make("even", 2)
    config = {"gdpo_reward_keys": case.names}
    with pytest.raises(RuntimeError, match=rf"adv_estimator={estimator.__name__}: .*trainer.use_v1=True"):
        estimator(case.token_level_rewards, case.mask_BL, case.uids, config=config)


def test_what_verl_passes_besides_changes_nothing() -> None:
    """verl hands ``reward_baselines`` to every estimator where a batch has them."""
    case = make("ragged", 1)
    batch = (case.token_level_rewards, case.mask_BL, case.uids)
    for estimator in (fast_grpo, fast_dr_grpo, fast_rloo):
        assert torch.equal(estimator(*batch, reward_baselines=torch.ones(1))[0], estimator(*batch)[0])


@pytest.mark.parametrize("penalised", [True, False])
def test_maestro_gets_the_rows_that_are_compared(penalised: bool) -> None:
    """With their lengths, and with verl's penalty where there is one: scores less token-level rewards."""
    keys = ["p_0_0", "p_1_1", "p_1_0", "pad_0_0", "p_2_0"]
    mask = (torch.arange(6)[None] < torch.tensor([3, 5, 2, 0, 6])[:, None]).long()
    tokens = torch.arange(30.0).view(5, 6) * mask
    penalty_B = torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0])
    seen: list[Any] = []

    def advantages(batch: TrainerBatch, rows: Rows, lengths_R: Tensor, penalty_R: Tensor | None) -> Tensor:
        seen.append((batch, rows.final_R.tolist(), lengths_R.tolist(), penalty_R))
        return torch.tensor([1.0, 2.0, 3.0])

    with trainer_batch(torch.zeros(5, 1), keys, [key.startswith("pad") for key in keys]) as batch:
        batch.advantages = advantages
        batch.scores_B = tokens.sum(1) + penalty_B if penalised else None
        found, returns = maestro(tokens, mask, np.array(["p"] * 5))
    assert found is returns and torch.equal(found, torch.tensor([1.0, 2.0, 2.0, 0.0, 3.0])[:, None] * mask)
    ((given, final, lengths, penalty),) = seen
    assert given is batch and final == [0, 1, 4] and lengths == [3, 5, 6]
    if penalised:
        torch.testing.assert_close(penalty, penalty_B[[0, 1, 4]])
    else:
        assert penalty is None


# --- the fast path ---


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "maestro"])
def test_every_pass_over_the_batch_is_made_once_and_in_cpp(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys, token rewards, mask, advantages and tokens: C++ sees each of them once, and PyTorch no [B, L]."""
    case = make("ragged", 3)
    calls: list[str] = []
    native = cpp._C

    class Counting:
        def __getattr__(self, attribute: str) -> Any:
            found = getattr(native, attribute)
            if not attribute.islower():
                return found  # A class, such as that of a partition.
            calls.append(attribute)
            return found

    monkeypatch.setattr(cpp, "_C", Counting())
    config = {"gdpo_reward_keys": case.names}
    estimator = {"fast_grpo": fast_grpo, "fast_dr_grpo": fast_dr_grpo, "fast_rloo": fast_rloo, "fast_gdpo": fast_gdpo}
    with trainer_batch(case.rewards_BK, keys_of(case)):
        estimator[name](case.token_level_rewards, case.mask_BL, case.uids, config=config)
    expected = ["examine_mask", "group_advantages", "number_session_keys", "order_by_group", "spread_over_tokens"]
    assert sorted(calls) == (expected if name == "fast_gdpo" else sorted([*expected, "sum_over_tokens"]))
