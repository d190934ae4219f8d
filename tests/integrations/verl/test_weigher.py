"""The weight policy in verl's driver, against the ops that our own trainer calls. These tests need no verl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.integrations.verl.batch import TrainerBatch
from maestro_fast.integrations.verl.rows import Rows, prompt_rank
from maestro_fast.integrations.verl.settings import run_settings
from maestro_fast.integrations.verl.weigher import Filled, Weigher
from maestro_fast.ops import Groups, group_advantages
from maestro_fast.weighting import (
    Comparison,
    Outcome,
    WeightContext,
    Weights,
    adaptive_step,
    build_weight_policy,
    compare,
)
from maestro_fast.weighting.adaptive_step import compare_scaled, weigh_scaled

NAMES, D, G = ("correct", "brief", "summary"), 6, 4
K = len(NAMES)
CONDUCTOR = {"type": "conductor", "period": 1, "learning_rate": 0.05, "seed": 3}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weigher(weights: Any = "equal", profile: str = "maestro", **section: Any) -> Weigher:
    config = {
        "algorithm": {
            "adv_estimator": "maestro",
            "gdpo_reward_keys": NAMES,
            "maestro": {"weights": weights, "profile": profile, **section},
        },
        "actor_rollout_ref": {"rollout": {"n": G}, "actor": {"use_kl_loss": True}},
    }
    settings = run_settings(config)
    assert settings is not None
    return Weigher(settings, D)


class World:
    """Batches of sessions, in the rows that verl would have: "{uid}_{session}_{output}"."""

    def __init__(self, sizes: Sequence[int] = (4, 4, 4), step: int = 0) -> None:
        self.prompts = [n for n, size in enumerate(sizes) for _ in range(size)]
        self.keys = [f"uid{n}_{i}_0" for n, size in enumerate(sizes) for i in range(size)]
        self.rewards = normal(len(self.keys), K, seed=step)
        self.rewards[2, 0] = math.nan
        self.contexts = normal(len(self.keys), D, seed=50 + step)
        self.utilities = normal(len(self.keys), seed=90 + step)
        self.lengths = torch.arange(1, len(self.keys) + 1)

    def batch(self, order: Sequence[int] | None = None) -> TrainerBatch:
        """The rows in this order; a row beyond the last one is padding."""
        at = list(range(len(self.keys))) if order is None else list(order)
        pad = [i >= len(self.keys) for i in at]
        rows = [0 if p else i for i, p in zip(at, pad, strict=True)]

        def values(names: Sequence[str]) -> Tensor:
            table = dict(zip(NAMES, self.rewards.T, strict=True)) | {"judge": self.utilities}
            found = torch.stack([table[name] for name in names], 1)[rows]
            found[torch.tensor(pad)] = math.nan
            return found

        keys = [f"pad_{i}_0" if p else self.keys[i] for i, p in zip(at, pad, strict=True)]
        prompts = [[{"role": "user", "content": str(self.prompts[i])}] for i in rows]
        return TrainerBatch(
            keys,
            pad,
            [prompt_rank(self.prompts[i]) for i in rows],
            values,
            context_Bd=self.contexts[rows],
            families=[f"family{self.prompts[i] % 2}" for i in rows],
            prompts=prompts,
        )


def play(found: Weigher, batch: TrainerBatch, lengths: Tensor, penalty: Tensor | None = None) -> Tensor:
    """The advantages of all rows of a batch."""
    rows = Rows.of_keys(batch.keys, batch.padding, batch.order)
    final = rows.final_R
    part = None if penalty is None else penalty[final]
    return rows.spread(found.advantages(batch, rows, lengths[final], part))


@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 1, 3, 2)])
def test_equal_weights_are_verl_as_it_was(sizes: Sequence[int]) -> None:
    """Under verl_dr_grpo a score is the sum of the rewards, and a response's advantage what it is above its group."""
    world = World(sizes)
    found = play(weigher(profile="verl_dr_grpo"), world.batch(), world.lengths)
    sums = world.rewards.nan_to_num(0.0).sum(1)
    ids = torch.tensor(world.prompts)
    means = torch.stack([sums[ids == n].mean() if (ids == n).sum() > 1 else sums.new_zeros(()) for n in ids])
    torch.testing.assert_close(found, sums - means)


@pytest.mark.parametrize("profile", ["verl_grpo", "verl_gdpo", "maestro", "rloo", "grpo"])
def test_advantages_are_those_of_the_ops(profile: str) -> None:
    """Of K times the policy's weights, in groups of several sizes."""
    world = World((4, 1, 3, 2))
    values = {"correct": 0.2, "brief": 0.5, "summary": 0.1}
    row = torch.tensor([*values.values()])
    fixed = {"type": "static", "values": values}
    scheduled = {"type": "schedule", "points": [{"step": 0, "values": values}]}
    for weights, used in ((fixed, row), (scheduled, K * row)):
        found = play(weigher(weights, profile), world.batch(), world.lengths)
        lengths = world.lengths if profile == "verl_gdpo" else None
        expected = group_advantages(
            world.rewards.double(), used.double(), world.prompts, profile=profile, lengths=lengths
        )
        torch.testing.assert_close(found.double(), expected.advantages, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("profile", ["maestro", "verl_grpo", "verl_dr_grpo"])
@pytest.mark.parametrize("residual", [{"type": "anchored", "hybrid": False}, {"type": "reward_model"}])
def test_a_learnt_residual_is_scored_in_groups_of_several_sizes(residual: dict[str, Any], profile: str) -> None:
    """What fills a group up takes no part in the residual, and the figures are those of the groups of one size."""
    entry = {**residual, "steps": 5, "context": "none"}
    ours, policy = weigher(entry, profile, utility={"key": "judge"}), build_weight_policy(entry, NAMES, D)
    whole = [0, 1, 2, 3, 7, 8, 9, 10]  # the groups of 4, by the calls that our trainer makes
    for step in range(3):
        world = World((4, 3, 4), step)
        policy.load_state_dict(ours.policy.state_dict())
        found = play(ours, world.batch(), world.lengths)
        context = WeightContext(NAMES, G, step, world.rewards[whole])
        weights = policy.weights(context)
        assert (weights.residual_B is None) is (step == 0)
        expected = compare_scaled(context, weights, Comparison(profile), float(K)).advantages
        torch.testing.assert_close(found[whole], expected, rtol=1e-4, atol=1e-5)

    filled = Filled.of(Groups.of([0, 0, 1, 2, 2], 5))
    weights_BK, six_B = torch.ones(6, 1), torch.arange(6.0)
    context = WeightContext(("r",), 2, 0, six_B[:, None])
    weights = Weights(weights_BK, weights_BK, residual_B=six_B, residual_factor=0.5)
    part = filled.like_groups(Outcome(context, weights, compare(context, weights, Comparison())))
    assert part.weights.residual_B is not None and part.weights.residual_factor == 0.5
    assert part.weights.residual_B.tolist() == [0.0, 1.0, 4.0, 5.0]


@pytest.mark.parametrize("entry", [CONDUCTOR, {**CONDUCTOR, "estimator": "all_actions", "context": "prompt_last"}])
def test_the_conductor_is_that_of_our_trainer(entry: dict[str, Any]) -> None:
    """Weights, advantages and what is learnt over several batches are those of the calls that our trainer makes."""
    ours = weigher(entry)
    policy = build_weight_policy(entry, NAMES, D)
    for step in range(4):
        world = World(step=step)
        found = play(ours, world.batch(), world.lengths)
        context = WeightContext(NAMES, G, step, world.rewards, world.contexts)
        comparison = Comparison("maestro")
        weights, expected = weigh_scaled(policy, context, comparison, float(K))
        expected = compare_scaled(context, weights, comparison, float(K)) if expected is None else expected
        policy.observe(Outcome(context, weights, expected, "maestro", factors_K=torch.full((K,), float(K))))
        torch.testing.assert_close(found, expected.advantages, rtol=0.0, atol=0.0)
    for name, tensor in policy.state_dict().items():
        torch.testing.assert_close(ours.policy.state_dict()[name], tensor, rtol=0.0, atol=0.0)


def test_a_conductors_weights_and_advantages_are_one_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is called once for each batch, and the single ops are not."""
    calls: list[str] = []

    def counting(name: str, function: Any) -> Any:
        return lambda *args, **kwargs: (calls.append(name), function(*args, **kwargs))[1]

    fused = counting("fused", adaptive_step.maestro_advantages)
    monkeypatch.setattr(adaptive_step, "maestro_advantages", fused)
    for name in ("group_advantages", "compare"):
        monkeypatch.setattr(adaptive_step, name, counting(name, getattr(adaptive_step, name)))
    found = weigher(CONDUCTOR)
    for step in range(3):
        world = World((4, 3, 4), step)
        play(found, world.batch(), world.lengths)
    assert calls == ["fused"] * 3


def test_the_order_of_the_rows_does_not_matter() -> None:
    """verl balances its batches by length, and pads them."""
    straight, shuffled = weigher(CONDUCTOR), weigher(CONDUCTOR)
    for step in range(3):
        world = World((4, 3, 4), step)
        order = torch.randperm(13, generator=torch.Generator().manual_seed(step)).tolist()
        one = play(straight, world.batch(), world.lengths)
        lengths = torch.tensor([1 if i >= 11 else int(world.lengths[i]) for i in order])
        two = play(shuffled, world.batch(order), lengths)
        back = torch.tensor([order.index(i) for i in range(13)])
        torch.testing.assert_close(two[back][:11], one, rtol=0.0, atol=0.0)
        assert not two[back][11:].any()


def test_verls_kl_penalty_is_subtracted_from_the_score() -> None:
    world = World((4, 3, 2))
    penalty = normal(9, seed=7).abs()
    found = play(weigher(), world.batch(), world.lengths, penalty)
    ones = torch.ones(K, dtype=torch.float64)
    expected = group_advantages(
        world.rewards.double(), ones, world.prompts, kl=penalty.double(), beta=1.0, profile="maestro"
    )
    torch.testing.assert_close(found.double(), expected.advantages, rtol=1e-5, atol=1e-6)


def test_anchored_weights_learn_from_the_utility() -> None:
    """The utility is judged within groups, also in those that lost a session, for the share that the labels name."""
    found = weigher({"type": "anchored", "steps": 3}, utility={"key": "judge"})
    few = weigher({"type": "anchored", "steps": 3}, utility={"key": "judge", "labels": {"share": 0.4, "seed": 1}})
    for step in range(4):
        world = World((4, 3, 4), step)
        batch, other = world.batch(), world.batch()
        play(found, batch, world.lengths)
        play(few, other, world.lengths)
        labelled = batch.metrics["maestro/conductor/labelled_groups"]
        assert labelled == 3 * step, "counted before the batch itself is learnt from"
    assert 0 < other.metrics["maestro/conductor/labelled_groups"] < labelled
    assert "maestro/conductor/correlation" in batch.metrics


def test_figures_leave_out_what_fills_groups_up() -> None:
    """Their names all begin with maestro/; weights sum to 1; a mean is over the responses that there are."""
    world = World((4, 1, 3))
    batch = world.batch()
    play(weigher(CONDUCTOR), batch, world.lengths)
    assert all(name.startswith("maestro/") and isinstance(value, float) for name, value in batch.metrics.items())
    assert sum(batch.metrics[f"maestro/weights/{name}"] for name in NAMES) == pytest.approx(1.0, abs=1e-6)
    assert batch.metrics["maestro/rewards/correct/abstained"] == pytest.approx(1 / 8)
    assert batch.metrics["maestro/rewards/correct"] == pytest.approx(world.rewards[:, 0].nanmean().item(), abs=1e-6)
    assert batch.metrics["maestro/families/family1/completion_length"] == 5.0


def test_diagnostics_leave_out_what_fills_groups_up() -> None:
    """One group of sixteen and many of two: nearly everything is filling."""
    world = World((16, 2, 2, 2, 2, 2))
    world.rewards[2, 0] = 0.5
    batch = world.batch()
    play(weigher(), batch, world.lengths)
    assert batch.metrics["maestro/diagnostics/abstained_weight"] == 0.0
    assert batch.metrics["maestro/diagnostics/entropy"] == pytest.approx(1.0)
    expected = World((2, 2, 2, 2, 2))
    expected.rewards = world.rewards[16:]
    alone = expected.batch()
    play(weigher(), alone, expected.lengths)
    for name in (
        "maestro/rewards_correlation/mean",
        "maestro/advantage_share/correct",
        "maestro/diagnostics/self_flattery",
    ):
        assert batch.metrics[name] == pytest.approx(alone.metrics[name], abs=1e-5), name


def test_a_saved_policy_goes_on(tmp_path: Path) -> None:
    one = weigher(CONDUCTOR)
    for step in range(2):
        play(one, World(step=step).batch(), World().lengths)
    one.save(tmp_path / "maestro")
    two = weigher(CONDUCTOR)
    two.load(tmp_path / "maestro")
    assert two.batches == 2
    for step in range(2, 4):
        world = World(step=step)
        assert torch.equal(play(one, world.batch(), world.lengths), play(two, world.batch(), world.lengths))


def test_checkpoints_that_do_not_fit_are_named(tmp_path: Path) -> None:
    weigher("equal").load(tmp_path)  # One of verl's own, and a policy that has no state.
    with pytest.raises(ValueError, match=r"^trainer\.resume_mode: .* written without adv_estimator=maestro"):
        weigher(CONDUCTOR).load(tmp_path)
    weigher("saw").save(tmp_path)
    with pytest.raises(ValueError, match=r"^trainer\.resume_mode: .* is of policy saw, this run has conductor"):
        weigher(CONDUCTOR).load(tmp_path)
