"""Advantages against TRL's own code, against the formula in float64, and against what they must mean."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maestro_fast.ops import PROFILES, AdvantageProfile, Groups, group_advantages
from maestro_fast.specs import Center, Scale, ScoreCenter, ScoreScale, Singleton, resolve_profile
from tests.ops.helpers import assert_as_accurate, assert_same_compiled, assert_same_fake
from tests.ops.trl_oracle import trl_advantages

NAN = float("nan")
TRL_PROFILES = ["grpo", "dr_grpo", "grpo_batch", "gdpo", "rloo"]
PLAIN = AdvantageProfile("none", "none", "none", "none")  # the advantage is the score
AWKWARD = (0.1, 1 / 3, 1e4 + 0.1, -7.7e-3)  # sums of these are rounded


def random_rewards(batch: int, rewards: int, *, missing: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rewards_BK = torch.randn(batch, rewards, dtype=torch.float64, generator=generator)
    rewards_BK[torch.rand(batch, rewards, generator=generator) < missing] = NAN
    return rewards_BK


def tokens(profile: str | AdvantageProfile, batch: int) -> dict[str, Tensor]:
    """The lengths that the profile needs, of ``batch`` completions."""
    return {"lengths": torch.arange(batch) * 5 % 7 + 1} if resolve_profile(profile).needs_lengths else {}


# --- TRL's own code ---


@pytest.mark.parametrize("profile", TRL_PROFILES)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
def test_equals_trl(profile: str, size: int, dtype: torch.dtype, tolerance: float) -> None:
    weights_K = torch.tensor([0.7, -0.3, 1.9], dtype=dtype)
    rewards_BK = random_rewards(24, 3, missing=0.2, seed=size).to(dtype)
    rewards_BK[5] = NAN  # a response without a reward
    rewards_BK[8:16, 1] = NAN  # a reward that abstains for whole groups
    rewards_BK[17:24] = NAN  # groups of 8 have one response left
    ours = group_advantages(rewards_BK, weights_K, size, profile=profile).advantages
    theirs = trl_advantages(profile, rewards_BK, weights_K, size)
    # TRL's count / (count - 1) is a float32 in float64, too.
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert size == 1 or ours.abs().max() > 0.1


@pytest.mark.parametrize("profile", TRL_PROFILES)
def test_equals_trl_on_one_reward_without_weights(profile: str) -> None:
    rewards_B = random_rewards(20, 1, seed=3)[:, 0]
    ours = group_advantages(rewards_B, None, 5, profile=profile).advantages
    theirs = trl_advantages(profile, rewards_B[:, None], torch.ones(1, dtype=torch.float64), 5)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("profile", ["grpo", "dr_grpo", "grpo_batch", "gdpo"])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_as_accurate_as_trl_beside_a_large_offset(profile: str, offset: float) -> None:
    rewards_BK = (random_rewards(32, 2, seed=1) + offset).float()
    weights_K = torch.tensor([1.0, 0.5])
    truth = trl_advantages(profile, rewards_BK.double(), weights_K.double(), 8)
    theirs = trl_advantages(profile, rewards_BK, weights_K, 8)
    ours = group_advantages(rewards_BK, weights_K, 8, profile=profile).advantages
    assert_as_accurate(ours, theirs, truth, epsilon=1e-6)


# --- the formula a second time, in loops over Python floats ---


@dataclass
class Column:
    """One reward or the scores: values, which of them count, and the groups and lengths of their responses."""

    values: list[float]
    live: list[bool]
    ids: list[int]
    lengths: list[int]
    singleton: str

    def among(self, b: int, scope: str) -> list[float]:
        """The live values that ``scope`` compares response b with."""
        return [
            value
            for j, value in enumerate(self.values)
            for _ in range(self.lengths[j] if scope == "tokens" else 1)
            if self.live[j]
            and (scope in ("batch", "tokens") or self.ids[j] == self.ids[b])
            and not (scope == "leave_one_out" and j == b)
        ]

    def raw(self, b: int, scope: str) -> bool:
        """Whether the scope is a group that has mean 0 and deviation 1 by definition."""
        return self.singleton == "raw" and scope in ("group", "leave_one_out") and len(self.among(b, "group")) == 1

    def standardised(self, b: int, center: str, scale: str, eps: float, ddof: int, eps_in: str = "std") -> float:
        mean = 0.0
        if center != "none" and not self.raw(b, center):
            others = self.among(b, center) or [self.values[b]]
            mean = math.fsum(others) / len(others)
        if scale == "none":
            return self.values[b] - mean
        values = self.among(b, scale) or [0.0]
        middle = math.fsum(values) / len(values)
        squares = math.fsum((value - middle) ** 2 for value in values)
        variance = 1.0 if self.raw(b, scale) else squares / max(len(values) - ddof, 1)
        return (self.values[b] - mean) / (
            math.sqrt(variance + eps) if eps_in == "variance" else math.sqrt(variance) + eps
        )


def direct_rewards(
    rewards: list[list[float]], ids: list[int], lengths: list[int], p: AdvantageProfile
) -> list[list[float]]:
    """Normalised rewards [B][K], with 0 for one that abstained or has nothing to be compared with."""
    normalized = [[0.0] * len(row) for row in rewards]
    for k in range(len(rewards[0])):
        live = [not math.isnan(row[k]) for row in rewards]
        column = Column([row[k] for row in rewards], live, ids, lengths, p.singleton)
        decisive = p.reward_center if p.reward_scale == "none" else p.reward_scale
        scope = "batch" if decisive == "batch" else "group"
        untouched = p.reward_center == p.reward_scale == "none"
        for b in range(len(rewards)):
            compared = len(column.among(b, scope)) > 1 or column.raw(b, scope)
            if column.live[b] and (untouched or compared):
                normalized[b][k] = column.standardised(b, p.reward_center, p.reward_scale, p.reward_eps, p.ddof)
    return normalized


def direct_scores(
    rewards: list[list[float]], weights: list[list[float]], ids: list[int], lengths: list[int], p: AdvantageProfile
) -> Column:
    """The scores before the KL."""
    scores, live = [], []
    for row, row_weights, values in zip(rewards, weights, direct_rewards(rewards, ids, lengths, p), strict=True):
        known = [k for k, reward in enumerate(row) if not math.isnan(reward)]
        kept, factor = math.fsum(row_weights[k] for k in known), 1.0
        live.append(bool(known))
        if p.missing == "renormalize" and 0 < len(known) < len(row):
            live[-1] = kept != 0
            factor = math.fsum(row_weights) / kept if live[-1] else 0.0
        scores.append(math.fsum(factor * row_weights[k] * values[k] for k in known))
    return Column(scores, live, ids, lengths, p.singleton)


def direct(
    rewards_BK: Tensor,
    weights_BK: Tensor,
    ids: list[int],
    p: AdvantageProfile,
    penalty_B: Tensor,
    flat_B: Tensor,
    lengths_B: Tensor | None = None,
) -> Tensor:
    """Advantages [B]. The caller says which groups are flat, because that hangs on the last bit of the scores."""
    lengths = [1] * len(ids) if lengths_B is None else lengths_B.tolist()
    scores = direct_scores(rewards_BK.tolist(), weights_BK.tolist(), ids, lengths, p)
    for b, flat in enumerate(flat_B.tolist()):
        values = scores.among(b, "group")
        assert not flat or len(values) < 2 or max(values) - min(values) < 1e-12
        assert flat or len(values) > 1
    scores.values = [score - penalty for score, penalty in zip(scores.values, penalty_B.tolist(), strict=True)]
    advantages = [
        scores.standardised(b, p.score_center, p.score_scale, p.score_eps, p.ddof, p.score_eps_in)
        if live and (not flat or scores.raw(b, "group"))
        else 0.0
        for b, (live, flat) in enumerate(zip(scores.live, flat_B.tolist(), strict=True))
    ]
    return torch.tensor(advantages, dtype=torch.float64)


any_profile = st.builds(
    AdvantageProfile,
    st.sampled_from(get_args(Center)),
    st.sampled_from(get_args(Scale)),
    st.sampled_from(get_args(ScoreCenter)),
    st.sampled_from(get_args(ScoreScale)),
    ddof=st.sampled_from([0, 1]),
    singleton=st.sampled_from(get_args(Singleton)),
    missing=st.sampled_from(["zero", "renormalize"]),
    score_eps_in=st.sampled_from(["std", "variance"]),
)


@settings(max_examples=200, deadline=None)
@given(st.data(), any_profile | st.sampled_from(list(PROFILES.values())))
def test_equals_the_formula(data: st.DataObject, profile: AdvantageProfile) -> None:
    batch, K = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    ids = data.draw(st.lists(st.integers(0, 3), min_size=batch, max_size=batch))
    value = st.just(NAN) | st.integers(-8, 8).map(lambda i: i / 4)
    rewards = data.draw(st.lists(st.lists(value, min_size=K, max_size=K), min_size=batch, max_size=batch))
    rewards_BK = torch.tensor(rewards, dtype=torch.float64)
    weights_BK = random_rewards(batch, K, seed=batch).abs()
    weights_BK[weights_BK > 1.5] = 0.0
    kl_B = random_rewards(batch, 1, seed=4)[:, 0]
    options: dict[str, Any] = {}
    if profile.needs_lengths:
        lengths = data.draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch).filter(any))
        options["lengths"] = torch.tensor(lengths)
    if profile.kl_in == "score":
        options.update(kl=kl_B, beta=0.2)
    result = group_advantages(rewards_BK, weights_BK, ids, profile=profile, **options)
    penalty_B = 0.2 * kl_B if "kl" in options else torch.zeros(batch)
    expected = direct(rewards_BK, weights_BK, ids, profile, penalty_B, result.degenerate, options.get("lengths"))
    torch.testing.assert_close(result.advantages, expected, rtol=1e-9, atol=1e-9)


def plain_maestro(rewards_BK: Tensor, weights_BK: Tensor, size: int) -> Tensor:
    """The formula as one writes it in torch, in the dtype of the inputs."""
    r_NGK = rewards_BK.view(-1, size, rewards_BK.shape[1])
    r_NGK = (r_NGK - r_NGK.mean(1, keepdim=True)) / (r_NGK.std(1, keepdim=True) + 1e-4)
    s_NG = (weights_BK.view_as(r_NGK) * r_NGK).sum(-1)
    return ((s_NG - s_NG.mean(1, keepdim=True)) / (s_NG.std(1, keepdim=True) + 1e-4)).flatten()


@pytest.mark.parametrize("size", [2, 4, 16])
@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_maestro_in_float32_is_as_accurate_as_the_plain_formula(size: int, offset: float, missing: float) -> None:
    rewards_BK = (random_rewards(16, 4, missing=missing, seed=size) + offset).float()
    weights_BK = torch.rand(16, 4, generator=torch.Generator().manual_seed(1))
    ids = [b // size for b in range(16)]
    ours = group_advantages(rewards_BK, weights_BK, ids)
    wide = rewards_BK.double(), weights_BK.double()
    truth = direct(*wide, ids, PROFILES["maestro"], torch.zeros(16), ours.degenerate)
    plain = truth if missing else plain_maestro(rewards_BK, weights_BK, size)  # the plain formula knows no abstentions
    assert_as_accurate(ours.advantages, plain, truth, epsilon=3e-6)
    assert ours.advantages.abs().max() > 0.1


# --- groups without spread ---


def constant_groups(size: int, K: int) -> tuple[Tensor, list[int]]:
    """One group per awkward value, all of its rewards the same multiples of it, and a last group that has spread."""
    factor_K = torch.linspace(0.3, 1.0, K)
    flat = [(value * factor_K).expand(size, K) for value in AWKWARD]
    ids = [group for group in range(len(AWKWARD) + 1) for _ in range(size)]
    return torch.cat([*flat, random_rewards(size, K).float()]), ids


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("size", range(2, 14))
def test_identical_rewards_give_exactly_zero(profile: str, size: int) -> None:
    for K in (1, 5, 8):
        rewards_BK, ids = constant_groups(size, K)
        weights_K = torch.linspace(0.1, 0.7, K)
        for layout in (rewards_BK, rewards_BK.T.contiguous().T):  # strided rows are summed in another order
            for weights in (None, weights_K):
                result = group_advantages(layout, weights, ids, profile=profile, **tokens(profile, len(ids)))
                assert (result.advantages[:-size] == 0).all()
                assert result.degenerate[:-size].all() and not result.degenerate[-size:].any()
                assert (result.advantages[-size:] != 0).any()


def test_identical_rewards_under_different_weights_give_exactly_zero() -> None:
    rewards_BK, ids = constant_groups(7, 3)
    weights_BK = torch.rand(len(ids), 3, generator=torch.Generator().manual_seed(0))
    for profile in ("maestro", "gdpo", "verl_gdpo"):
        result = group_advantages(rewards_BK, weights_BK, ids, profile=profile, **tokens(profile, len(ids)))
        assert (result.advantages[:-7] == 0).all() and (result.scores[:-7] == 0).all()


@pytest.mark.parametrize("profile", PROFILES)
def test_one_response_or_one_live_response_is_degenerate(profile: str) -> None:
    rewards_BK = torch.tensor([[5.0, 1.0], [2.0, 3.0], [NAN, NAN], [NAN, NAN], [1.0, 0.0], [0.0, 3.0]])
    result = group_advantages(rewards_BK, None, [0, 1, 1, 2, 3, 3], profile=profile, **tokens(profile, 6))
    assert result.degenerate.tolist() == [True, True, True, True, False, False]
    if PROFILES[profile].singleton == "zero":
        assert result.advantages.tolist()[:4] == [0.0] * 4
    else:
        assert (result.advantages[:2] != 0).all() and result.advantages.tolist()[2:4] == [0.0] * 2
    assert (result.advantages[4:] != 0).all()


def test_a_raw_singleton_keeps_its_score() -> None:
    rewards_BK = torch.tensor([[5.0, 1.0], [2.0, 3.0], [NAN, NAN], [1.0, 0.0], [0.0, 3.0]])
    for name, divisor in (("verl_grpo", 1 + 1e-6), ("verl_dr_grpo", 1.0)):
        result = group_advantages(rewards_BK, torch.tensor([0.5, 1.0]), [0, 1, 1, 2, 2], profile=name)
        torch.testing.assert_close(result.advantages[:3], torch.tensor([3.5, 4.0, 0.0]) / divisor)
        assert result.mean.tolist()[:2] == [0.0, 0.0] and result.std.tolist()[:2] == [1.0, 1.0]
        assert result.degenerate.tolist() == [True, True, True, False, False]
    leave_one_out = replace(PROFILES["rloo"], singleton="raw")
    assert group_advantages(rewards_BK, None, [0, 1, 1, 2, 2], profile=leave_one_out).advantages[0] == 6.0


def test_a_raw_singleton_is_judged_per_reward() -> None:
    profile = replace(PLAIN, reward_center="group", reward_scale="group", reward_eps=0.0, singleton="raw")
    rewards_BK = torch.tensor([[5.0, 1.0], [NAN, 3.0], [7.0, NAN]])
    normalized = group_advantages(rewards_BK, None, [0, 0, 1], profile=profile).normalized_rewards
    torch.testing.assert_close(normalized, torch.tensor([[5.0, -(0.5**0.5)], [0.0, 0.5**0.5], [7.0, 0.0]]))


# --- lengths ---


def test_a_length_is_a_number_of_copies() -> None:
    profile = replace(PLAIN, score_center="tokens", score_scale="tokens", score_eps=0.0)
    rewards_BK, lengths_B = random_rewards(6, 2, missing=0.2, seed=1), torch.tensor([3, 1, 0, 2, 5, 1])
    few = group_advantages(rewards_BK, None, 3, lengths=lengths_B, profile=profile)
    ids = torch.tensor([0, 0, 0, 1, 1, 1]).repeat_interleave(lengths_B)
    ones_B = torch.ones(len(ids))
    many = group_advantages(rewards_BK.repeat_interleave(lengths_B, 0), None, ids, lengths=ones_B, profile=profile)
    torch.testing.assert_close(few.advantages.repeat_interleave(lengths_B), many.advantages, rtol=1e-12, atol=1e-12)
    assert abs((few.advantages * lengths_B).sum()) < 1e-12
    torch.testing.assert_close(many.advantages.std(), torch.ones((), dtype=torch.float64))


def test_a_response_without_tokens_is_live_in_its_group_alone() -> None:
    rewards_BK, lengths_B = random_rewards(6, 2, seed=1), torch.tensor([3, 1, 0, 2, 5, 1])
    result = group_advantages(rewards_BK, None, 3, lengths=lengths_B, profile="verl_gdpo")
    assert not result.degenerate.any() and result.advantages[2] != 0  # though no token carries that advantage
    wholly = group_advantages(rewards_BK, None, 3, lengths=lengths_B * 0, profile="verl_gdpo")
    assert wholly.advantages.isfinite().all() and (wholly.std == 0).all()


def test_the_scale_of_the_lengths_enters_only_through_ddof() -> None:
    profile = replace(PROFILES["verl_gdpo"], ddof=0)
    rewards_BK, lengths_B = random_rewards(8, 3, seed=2), torch.arange(8)
    one = group_advantages(rewards_BK, None, 4, lengths=lengths_B, profile=profile)
    ten = group_advantages(rewards_BK, None, 4, lengths=lengths_B * 10.0, profile=profile)
    torch.testing.assert_close(one.advantages, ten.advantages, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("profile", PROFILES)
def test_nothing_live_gives_zeros_and_no_nan(profile: str) -> None:
    result = group_advantages(torch.full((6, 2), NAN), torch.rand(6, 2), 3, profile=profile, **tokens(profile, 6))
    assert result.degenerate.all()
    for name, value in result._asdict().items():
        assert name == "degenerate" or (value == 0).all(), name


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("groups", [4, []])
def test_an_empty_batch_gives_empty_results(profile: str, groups: Any) -> None:
    result = group_advantages(torch.zeros(0, 3), None, groups, profile=profile, **tokens(profile, 0))
    assert [tuple(x.shape) for x in result] == [(0,), (0,), (0, 3), (0,), (0,), (0,)]


# --- abstained rewards ---


def test_renormalize_scales_the_live_weights_to_the_sum_of_the_row() -> None:
    rewards_BK = torch.tensor([[3.0, NAN], [NAN, 5.0], [1.0, 2.0], [4.0, NAN]])
    weights_BK = torch.tensor([[0.5, 1.5], [0.5, 1.5], [0.5, 1.5], [0.0, 2.0]])
    scores = group_advantages(rewards_BK, weights_BK, 4, profile=PLAIN).scores
    # The scores are 3 * (0.5 + 1.5), 5 * (0.5 + 1.5) and 0.5 + 3; the last response has nothing to scale up.
    assert scores.tolist() == [6.0, 10.0, 3.5, 0.0]
    scores = group_advantages(rewards_BK, weights_BK, 4, profile=replace(PLAIN, missing="zero")).scores
    assert scores.tolist() == [1.5, 7.5, 3.5, 0.0]


def test_all_weight_on_an_abstained_reward_is_left_out_of_the_mean() -> None:
    profile = replace(PLAIN, score_center="group")
    rewards_BK = torch.tensor([[1.0, 0.0], [3.0, 0.0], [9.0, NAN]])
    weights_BK = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    result = group_advantages(rewards_BK, weights_BK, 3, profile=profile)
    assert result.advantages.tolist() == [-1.0, 1.0, 0.0]
    assert result.mean.tolist() == [2.0, 2.0, 2.0]


def test_a_reward_without_another_in_its_scope_is_zero() -> None:
    rewards_BK = torch.tensor([[1.0, 5.0], [3.0, NAN]])

    def normalized(**scopes: Any) -> list[list[float]]:
        return group_advantages(rewards_BK, None, [0, 1], profile=replace(PLAIN, **scopes)).normalized_rewards.tolist()

    assert normalized() == [[1.0, 5.0], [3.0, 0.0]]
    assert normalized(reward_center="group") == [[0.0, 0.0], [0.0, 0.0]]
    assert normalized(reward_center="batch") == [[-1.0, 0.0], [1.0, 0.0]]
    assert normalized(reward_center="batch", reward_scale="group") == [[0.0, 0.0], [0.0, 0.0]]
    assert normalized(reward_scale="group") == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("profile", PROFILES)
def test_an_unscorable_response_changes_nothing_for_the_others(profile: str) -> None:
    rewards_BK = random_rewards(8, 2, seed=2)
    ids = [0, 0, 0, 0, 1, 1, 1, 1]
    without = group_advantages(rewards_BK, None, ids, profile=profile, **tokens(profile, 8))
    more = torch.cat([rewards_BK, torch.full((2, 2), NAN, dtype=torch.float64)])
    beside = group_advantages(more, None, [*ids, 0, 1], profile=profile, **tokens(profile, 10))
    for name in ("advantages", "scores", "mean", "std", "normalized_rewards"):
        torch.testing.assert_close(getattr(beside, name)[:8], getattr(without, name), rtol=1e-12, atol=1e-13)
    assert (beside.advantages[8:] == 0).all()


# --- the KL ---


def test_the_kl_is_subtracted_from_the_score() -> None:
    rewards_B, kl_B = torch.tensor([1.0, 2.0, 4.0, 9.0]), torch.tensor([0.5, 1.0, 0.0, -2.0])
    result = group_advantages(rewards_B, None, 2, kl=kl_B, beta=2.0, profile=replace(PLAIN, score_center="group"))
    assert result.scores.tolist() == [0.0, 0.0, 4.0, 13.0]
    assert result.advantages.tolist() == [0.0, 0.0, -4.5, 4.5]
    assert result.degenerate.tolist() == [False] * 4  # the first group had spread before the KL


def test_degenerate_is_judged_before_the_kl() -> None:
    result = group_advantages(torch.ones(3), None, 3, kl=torch.tensor([0.1, 0.5, 0.9]), beta=1.0)
    assert result.degenerate.all() and (result.advantages == 0).all()
    assert result.scores.tolist() == pytest.approx([-0.1, -0.5, -0.9])


def test_the_kl_of_an_unscorable_response_counts_nowhere() -> None:
    rewards_B = torch.tensor([1.0, 2.0, NAN])
    result = group_advantages(rewards_B, None, 3, kl=torch.tensor([0.0, 0.0, NAN]), beta=1.0)
    assert result.advantages.isfinite().all() and result.scores[2] == 0
    assert result.mean.isfinite().all() and result.std.isfinite().all()


# --- invariances ---


@pytest.mark.parametrize("profile", PROFILES)
def test_the_order_of_the_responses_does_not_matter(profile: str) -> None:
    rewards_BK, weights_BK = random_rewards(13, 3, missing=0.2), random_rewards(13, 3, seed=9).abs()
    ids = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3])
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    lengths = tokens(profile, 13)
    straight = group_advantages(rewards_BK, weights_BK, ids, profile=profile, **lengths)
    moved = {name: x[order] for name, x in lengths.items()}
    shuffled = group_advantages(rewards_BK[order], weights_BK[order], 5 - ids[order], profile=profile, **moved)
    for ours, expected in zip(shuffled, straight, strict=True):
        torch.testing.assert_close(ours, expected[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_constant_added_to_a_reward_of_a_group_changes_nothing(profile: str) -> None:
    rewards_BK, weights_K = random_rewards(12, 3), torch.tensor([0.5, 0.2, 1.0], dtype=torch.float64)
    moved = rewards_BK.clone()
    moved[:4, 1] += 3.7
    moved[4:8, 2] -= 11.0
    before, after = (
        group_advantages(x, weights_K, 4, profile=profile, **tokens(profile, 12)) for x in (rewards_BK, moved)
    )
    if profile == "grpo_batch":  # its scale is the spread of the whole batch, so groups matter to each other
        before, after = (x._replace(advantages=x.advantages * (x.std + 1e-4)) for x in (before, after))
    torch.testing.assert_close(after.advantages, before.advantages, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e6])
def test_the_scale_of_a_reward_enters_maestro_only_through_eps(factor: float) -> None:
    rewards_BK, weights_BK = random_rewards(12, 3), random_rewards(12, 3, seed=1).abs()
    without_eps = AdvantageProfile(reward_eps=0.0)
    scaled = rewards_BK * torch.tensor([1.0, factor, 1.0], dtype=torch.float64)
    before, after = (group_advantages(x, weights_BK, 4, profile=without_eps) for x in (rewards_BK, scaled))
    torch.testing.assert_close(after.advantages, before.advantages, rtol=1e-9, atol=1e-10)
    with_eps = group_advantages(rewards_BK * factor, weights_BK, 4, profile=AdvantageProfile(reward_eps=1e-4 * factor))
    expected = group_advantages(rewards_BK, weights_BK, 4)
    torch.testing.assert_close(with_eps.advantages, expected.advantages, rtol=1e-9, atol=1e-10)


def test_gdpo_whitens_over_the_batch() -> None:
    """TRL has one weight per reward, under which all groups have mean 0; with weights per response they have not."""
    weights_BK = random_rewards(12, 3, seed=1).abs()
    result = group_advantages(random_rewards(12, 3), weights_BK, 4, profile="gdpo")
    assert abs(result.advantages.mean()) < 1e-12 and abs(result.advantages.std() - 1) < 1e-3
    assert (result.advantages.view(3, 4).mean(1).abs() > 0.01).all()


def test_group_scopes_do_not_see_the_rest_of_the_batch() -> None:
    rewards_BK, weights_BK = random_rewards(12, 2), random_rewards(12, 2, seed=1).abs()
    for profile in ("maestro", "grpo", "dr_grpo", "rloo", "verl_grpo", "verl_dr_grpo"):
        whole = group_advantages(rewards_BK, weights_BK, 4, profile=profile)
        alone = group_advantages(rewards_BK[4:8], weights_BK[4:8], 4, profile=profile)
        for ours, expected in zip(whole, alone, strict=True):
            torch.testing.assert_close(ours[4:8], expected, rtol=1e-12, atol=1e-12)


# --- inputs in every form ---


def test_forms_of_groups_weights_and_rewards_agree() -> None:
    rewards_BK, weights_K = random_rewards(12, 2).float(), torch.tensor([0.25, 2.0])
    expected = group_advantages(rewards_BK, weights_K, 4)

    def variants() -> Iterator[Any]:
        ids = [b // 4 for b in range(12)]
        yield from (group_advantages(rewards_BK, weights_K, g) for g in (ids, torch.tensor(ids), Groups.of(ids, 12)))
        yield group_advantages(rewards_BK, weights_K.expand(12, 2), 4)
        yield group_advantages(rewards_BK.T.contiguous().T, weights_K, 4)
        yield group_advantages(rewards_BK, weights_K.to(torch.bfloat16), 4, profile=AdvantageProfile())

    for result in variants():
        assert all(torch.equal(ours, wanted) for ours, wanted in zip(result, expected, strict=True))
    one = group_advantages(rewards_BK[:, 0], None, 4)
    two = group_advantages(rewards_BK[:, :1], torch.ones(1), 4)
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rewards_are_computed_in_float32(dtype: torch.dtype) -> None:
    rewards_BK, weights_BK, kl_B = (
        random_rewards(12, 2).to(dtype),
        torch.rand(12, 2).to(dtype),
        torch.rand(12).to(dtype),
    )
    half = group_advantages(rewards_BK, weights_BK, 4, kl=kl_B, beta=0.1)
    full = group_advantages(rewards_BK.float(), weights_BK.float(), 4, kl=kl_B.float(), beta=0.1)
    assert all(x.dtype in (torch.float32, torch.bool) for x in half)
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(half, full, strict=True))


def test_huge_rewards() -> None:
    rewards_BK, weights_BK = random_rewards(12, 2).float(), torch.rand(12, 2) + 0.1
    expected = group_advantages(rewards_BK, weights_BK, 4, profile=AdvantageProfile(reward_eps=0.0))
    huge = group_advantages(rewards_BK * 1e17, weights_BK, 4)
    torch.testing.assert_close(huge.advantages, expected.advantages, rtol=1e-5, atol=1e-5)
    for profile in PROFILES:  # the squares are beyond float32, so no signal is left, and no NaN either
        result = group_advantages(rewards_BK * 1e30, weights_BK, 4, profile=profile, **tokens(profile, 12))
        assert result.advantages.isfinite().all()


# --- gradients, graphs, errors ---


@pytest.mark.parametrize("profile", PROFILES)
def test_gradient_of_the_weights(profile: str) -> None:
    rewards_BK, ids = random_rewards(11, 3, missing=0.2, seed=5), [0, 0, 0, 0, 1, 2, 2, 2, 3, 3, 3]
    rewards_BK[5:8] = rewards_BK[5]  # a group without spread
    weights_BK = (random_rewards(11, 3, seed=6).abs() + 0.1).requires_grad_()

    def outputs(weights: Tensor) -> tuple[Tensor, ...]:
        result = group_advantages(rewards_BK, weights, ids, profile=profile, **tokens(profile, 11))
        live = ~result.degenerate
        return result.advantages, result.scores, result.mean[live], result.std[live]

    assert all(x.requires_grad for x in outputs(weights_BK))  # gradcheck passes over outputs that do not
    assert torch.autograd.gradcheck(outputs, (weights_BK,))


@pytest.mark.parametrize("profile", PROFILES)
def test_gradients_are_finite_where_nothing_is_live(profile: str) -> None:
    rewards_BK = torch.tensor([[NAN, NAN], [1.0, NAN], [2.0, 2.0], [2.0, 2.0]])
    weights_BK = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    result = group_advantages(rewards_BK, weights_BK, 2, profile=profile, **tokens(profile, 4))
    (gradient,) = torch.autograd.grad(result.advantages.sum() + result.std.sum() + result.scores.sum(), weights_BK)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("profile", ["maestro", "gdpo", "verl_gdpo"])
def test_compiles_to_one_graph(profile: str) -> None:
    lengths = tokens(profile, 8)
    groups = Groups.of([0, 0, 1, 1, 1, 0, 2, 2], 8)
    kl_B = torch.rand(8) if profile == "maestro" else None

    def op(rewards: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        beta = 0.0 if kl_B is None else 0.1
        return group_advantages(rewards, weights, groups, kl=kl_B, beta=beta, profile=profile, **lengths)

    assert_same_compiled(op, random_rewards(8, 2, missing=0.2).float(), torch.rand(8, 2).requires_grad_())


@pytest.mark.parametrize("profile", PROFILES)
def test_runs_on_fake_tensors(profile: str) -> None:
    def op(rewards: Tensor, weights: Tensor, *lengths: Tensor) -> tuple[Tensor, ...]:
        return group_advantages(rewards, weights, 4, profile=profile, **dict(zip(["lengths"], lengths, strict=False)))

    assert_same_fake(op, torch.rand(8, 2), torch.rand(8, 2), *tokens(profile, 8).values())


def test_two_runs_are_bitwise_equal() -> None:
    rewards_BK, weights_BK = random_rewards(64, 5).float(), torch.rand(64, 5)
    first, second = (group_advantages(rewards_BK, weights_BK, 8) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rewards": torch.ones(4, 2, dtype=torch.int64)}, TypeError, "rewards: dtype torch.int64"),
        ({"rewards": torch.ones(4, 2, 1)}, ValueError, r"rewards: shape \(4, 2, 1\)"),
        ({"rewards": torch.ones(4, 0)}, ValueError, r"rewards: shape \(4, 0\)"),
        ({"weights": torch.ones(4)}, ValueError, r"weights: shape \(4,\), expected \(4, 2\) or \(2,\)"),
        ({"weights": torch.ones(4, 1)}, ValueError, r"weights: shape \(4, 1\)"),
        ({"weights": torch.ones(2, dtype=torch.bool)}, TypeError, "weights: dtype torch.bool"),
        ({"weights": torch.ones(2, device="meta")}, ValueError, "weights: on meta, expected cpu"),
        ({"groups": None}, TypeError, "groups: missing"),
        ({"groups": 3}, ValueError, "groups: 4 responses"),
        ({"kl": torch.ones(3)}, ValueError, r"kl: shape \(3,\), expected \(4,\)"),
        ({"kl": torch.ones(4, device="meta")}, ValueError, "kl: on meta"),
        (
            {"kl": torch.ones(4, dtype=torch.complex64)},
            TypeError,
            "kl: dtype torch.complex64, expected a floating dtype",
        ),
        ({"beta": 0.1}, ValueError, "beta: 0.1 without kl"),
        ({"beta": NAN, "kl": torch.ones(4)}, ValueError, "beta: nan, expected a finite number"),
        ({"beta": "0.1", "kl": torch.ones(4)}, TypeError, "beta: got str '0.1', expected a number"),
        ({"kl": torch.ones(4), "profile": "grpo"}, ValueError, "kl: given, but this profile has the KL in the loss"),
        ({"profile": "verl_gdpo"}, ValueError, r"lengths: missing, expected \(4,\)"),
        ({"lengths": torch.ones(4)}, ValueError, "lengths: given, but no scope of this profile is 'tokens'"),
        (
            {"lengths": torch.ones(4, 1), "profile": "verl_gdpo"},
            ValueError,
            r"lengths: shape \(4, 1\), expected \(4,\)",
        ),
        ({"lengths": torch.ones(4).bool(), "profile": "verl_gdpo"}, TypeError, "lengths: dtype torch.bool"),
        ({"lengths": torch.ones(4).to(torch.uint32), "profile": "verl_gdpo"}, TypeError, "lengths: dtype torch.uint32"),
        ({"lengths": torch.ones(4, device="meta"), "profile": "verl_gdpo"}, ValueError, "lengths: on meta"),
        ({"lengths": torch.tensor([1, 2, -1, 3]), "profile": "verl_gdpo"}, ValueError, "lengths: negative"),
        (
            {"lengths": torch.tensor([1, 2, NAN, 3]), "profile": "verl_gdpo"},
            ValueError,
            "lengths: negative or not finite",
        ),
        ({"profile": "ppo"}, ValueError, "profile: 'ppo'"),
        ({"backend": "cuda"}, ValueError, "backend: 'cuda' does not serve group_advantages"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"rewards": torch.ones(4, 2), "groups": 2, **changes}
    with pytest.raises(error, match=message):
        group_advantages(**arguments)
