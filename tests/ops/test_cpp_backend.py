"""The C++ kernels against float64, beside the PyTorch reference in float32; and that nothing but the input decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maestro_fast.ops import (
    PROFILES,
    AdvantageProfile,
    ConductorParams,
    Groups,
    conductor_weights,
    counterfactual_advantages,
    group_advantages,
    maestro_advantages,
)
from maestro_fast.specs import Center, Scale, ScoreCenter, ScoreScale
from tests.ops.awkward import (
    MAGNITUDES,
    POISONS,
    check_a_weight_that_is_not_a_number,
    check_any_magnitude,
    check_no_epsilon_and_no_spread,
    check_poison_reaches_only_what_is_compared,
)
from tests.ops.helpers import assert_as_accurate

NAN = float("nan")
GROUP_PROFILES = [
    name for name, p in PROFILES.items() if {p.score_center, p.score_scale} <= {"none", "group", "leave_one_out"}
]
FIELDS = ("advantages", "scores", "normalized_rewards", "mean", "std")


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def case(
    batch: int = 40, K: int = 5, *, missing: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards_BK = torch.randn(batch, K, generator=generator).to(dtype)
    rewards_BK[torch.rand(batch, K, generator=generator) < missing] = NAN
    weights_BK = torch.rand(batch, K, generator=generator) + 0.05
    return {"rewards": rewards_BK, "weights": weights_BK}


def extras(profile: AdvantageProfile, batch: int) -> dict[str, Any]:
    """A KL and lengths for the profiles that take them."""
    generator = torch.Generator().manual_seed(9)
    kl = {"kl": torch.rand(batch, generator=generator), "beta": 0.1} if profile.kl_in == "score" else {}
    lengths = torch.randint(0, 900, (batch,), generator=generator)
    return kl | ({"lengths": lengths} if profile.needs_lengths else {})


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return {name: wide(value) for name, value in arguments.items()}


def ragged_ids(batch: int, seed: int = 0) -> list[int]:
    return torch.randint(0, max(batch // 5, 1), (batch,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_against_float64(arguments: dict[str, Any], groups: Any, profile: Any, epsilon: float) -> None:
    ours = group_advantages(**arguments, groups=groups, profile=profile, backend="cpp")
    plain = group_advantages(**arguments, groups=groups, profile=profile, backend="torch")
    truth = group_advantages(**widened(arguments), groups=groups, profile=profile, backend="torch")
    assert torch.equal(ours.degenerate, truth.degenerate)
    for name in FIELDS:
        ours_x, truth_x = getattr(ours, name), getattr(truth, name)
        assert ours_x.dtype == torch.float32
        scale = max(float(truth_x.abs().max()), 1.0) if truth_x.numel() else 1.0
        assert_as_accurate(ours_x, getattr(plain, name), truth_x, epsilon=epsilon * scale)


# --- group advantages ---


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("missing", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("groups", [1, 4, 20, "ragged"])
def test_every_profile_is_as_accurate_as_the_reference(profile: str, dtype: Any, missing: float, groups: Any) -> None:
    arguments = case(missing=missing, dtype=dtype) | extras(PROFILES[profile], 40)
    # The kernel computes in float64, and rounds to float32 once.
    assert_against_float64(arguments, ragged_ids(40) if groups == "ragged" else groups, profile, 1e-7)


@pytest.mark.parametrize("K", range(1, 14))
@pytest.mark.parametrize("weights", ["BK", "K", None])
def test_every_width_and_form_of_weights(K: int, weights: Any) -> None:
    for missing in (0.0, 0.3):
        arguments: dict[str, Any] = case(33, K, missing=missing)
        arguments["weights"] = {"BK": arguments["weights"], "K": arguments["weights"][0], None: None}[weights]
        for profile in ("maestro", "grpo"):
            for groups in (3, 11, ragged_ids(33)):
                assert_against_float64(arguments, groups, profile, 1e-7)


@pytest.mark.parametrize("offset", [1e3, 1e6, -1e6])
@pytest.mark.parametrize("profile", PROFILES)
def test_beside_a_large_offset(offset: float, profile: str) -> None:
    arguments = case() | extras(PROFILES[profile], 40)
    arguments["rewards"] = arguments["rewards"] + offset
    arguments["weights"] = torch.ones(5)
    truth = group_advantages(**widened(arguments), groups=8, profile=profile).advantages
    ours = group_advantages(**arguments, groups=8, profile=profile, backend="cpp").advantages
    assert_as_accurate(
        ours, truth, truth, epsilon=2e-6 * max(float(truth.abs().max()), 1.0)
    )  # the plain op's error is not allowed on top


any_profile = st.builds(
    AdvantageProfile,
    st.sampled_from(get_args(Center)),
    st.sampled_from(get_args(Scale)),
    st.sampled_from(get_args(ScoreCenter)),
    st.sampled_from(get_args(ScoreScale)),
    ddof=st.sampled_from([0, 1]),
    singleton=st.sampled_from(["zero", "raw"]),
    missing=st.sampled_from(["zero", "renormalize"]),
    score_eps_in=st.sampled_from(["std", "variance"]),
)


@settings(max_examples=150)
@given(st.data(), any_profile)
def test_any_profile_groups_and_abstentions(data: st.DataObject, profile: AdvantageProfile) -> None:
    batch, K = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 6))
    ids = data.draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch))
    # Rewards are quarters, whose sums and differences are exact, so that every backend finds the same groups flat.
    value = st.just(NAN) | st.integers(-8, 8).map(lambda i: i / 4)
    rewards = data.draw(st.lists(st.lists(value, min_size=K, max_size=K), min_size=batch, max_size=batch))
    arguments: dict[str, Any] = {"rewards": torch.tensor(rewards), "weights": torch.rand(batch, K) + 0.1}
    arguments |= extras(profile, batch)
    ours = group_advantages(**arguments, groups=ids, profile=profile, backend="cpp")
    truth = group_advantages(**widened(arguments), groups=ids, profile=profile)
    agreed = ours.degenerate == truth.degenerate  # a group may be flat but for the last bit of float64
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(ours, name)[agreed].double(), getattr(truth, name)[agreed], rtol=2e-6, atol=2e-6
        )
    assert (ours.advantages[~agreed].abs() < 1e-6).all() and (truth.advantages[~agreed].abs() < 1e-6).all()


def test_a_large_batch_of_many_chunks() -> None:
    for groups in (16, 4096, Groups.of(ragged_ids(4096), 4096)):
        for profile in PROFILES:
            arguments = case(4096, 3, missing=0.01) | extras(PROFILES[profile], 4096)
            assert_against_float64(arguments, groups, profile, 1e-7)


def test_a_batch_scale_of_nearly_equal_scores_does_not_cancel() -> None:
    rewards_B = 1e4 + torch.arange(2048).remainder(2) * 2.0**-10
    result = group_advantages(rewards_B, None, 8, profile="grpo_batch", backend="cpp")
    truth = group_advantages(rewards_B.double(), None, 8, profile="grpo_batch")
    torch.testing.assert_close(result.std.double(), truth.std, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.advantages.double(), truth.advantages, rtol=1e-6, atol=0)


# --- counterfactual advantages ---


@pytest.mark.parametrize("profile", GROUP_PROFILES)
@pytest.mark.parametrize("missing", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("groups", [1, 2, 8, "ragged"])
def test_counterfactuals_are_what_recomputing_gives(profile: str, missing: float, groups: Any) -> None:
    arguments: dict[str, Any] = case(24, 3, missing=missing) | extras(PROFILES[profile], 24)
    actions_AK = torch.cat([torch.eye(3), torch.rand(4, 3, generator=torch.Generator().manual_seed(1))])
    ids = ragged_ids(24) if groups == "ragged" else groups
    ours = counterfactual_advantages(**arguments, action_weights=actions_AK, groups=ids, profile=profile, backend="cpp")
    assert ours.shape == (24, 7) and ours.dtype == torch.float32
    truth = torch.empty(24, 7, dtype=torch.float64)
    plain = torch.empty(24, 7)
    for a, action_K in enumerate(actions_AK):
        for j in range(24):
            weights_BK = arguments["weights"].clone()
            weights_BK[j] = action_K
            changed = arguments | {"weights": weights_BK}
            truth[j, a] = group_advantages(**widened(changed), groups=ids, profile=profile).advantages[j]
            plain[j, a] = group_advantages(**changed, groups=ids, profile=profile, backend="torch").advantages[j]
    assert_as_accurate(ours, plain, truth, epsilon=1e-7 * max(float(truth.abs().max()), 1.0))


@pytest.mark.parametrize("profile", GROUP_PROFILES)
def test_the_own_action_gives_the_own_advantage_to_the_bit_where_it_is_degenerate(profile: str) -> None:
    for K in (1, 3, 5, 8):
        flat_BK = torch.full((7, K), 1 / 3)
        varied = case(9, K)["rewards"]
        weights_K = torch.linspace(0.1, 0.7, K)
        rewards_BK, ids = torch.cat([flat_BK, varied]), [0] * 7 + [1] * 9
        ours = counterfactual_advantages(rewards_BK, weights_K, weights_K[None], ids, profile=profile, backend="cpp")
        own = group_advantages(rewards_BK, weights_K, ids, profile=profile, backend="cpp").advantages
        assert (ours[:7] == 0).all()
        torch.testing.assert_close(ours[:, 0], own, rtol=1e-6, atol=1e-6)
        assert (ours[7:] != 0).any()


def test_an_outlier_is_compared_with_identical_others_without_cancelling() -> None:
    rewards_BK = torch.tensor([[1e7, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    profile = replace(PROFILES["grpo"], score_eps=0.0)
    weights_K, actions_AK = torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 1.0]])
    ours = counterfactual_advantages(rewards_BK, weights_K, actions_AK, 4, profile=profile, backend="cpp")
    assert ours[0].item() == 0.0  # under the other weights all four scores are the same


# --- the Conductor ---


def head(size: int, K: int, *, massive: bool = False, seed: int = 0) -> tuple[Tensor, ConductorParams]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(50, size, generator=generator)
    if massive:
        h[:, 1] += 3000.0
    weight = torch.randn(K, size, generator=generator) / size**0.5
    return h, ConductorParams(h.mean(0), 1 / h.std(0), weight, torch.randn(K, generator=generator))


def doubled(params: ConductorParams) -> ConductorParams:
    return ConductorParams(*(None if x is None else x.double() for x in params.tensors))


@pytest.mark.parametrize("size", [1, 7, 8, 65, 2048])
@pytest.mark.parametrize("K", [1, 3, 4, 9])
@pytest.mark.parametrize("mode", ["sample", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_conductor_is_as_accurate_as_the_reference(size: int, K: int, mode: Any, dtype: torch.dtype) -> None:
    h, params = head(size, K, massive=size > 1)
    h = h.to(dtype)
    options: dict[str, Any] = {"tau": 0.5, "min_prob": 0.02, "mode": mode, "seed": 2**64 - 5, "step": 2**32 - 1}
    options["offset"] = 2**40 + 1
    ours = conductor_weights(h, params, **options, backend="cpp")
    plain = conductor_weights(h, params, **options, backend="torch")
    truth = conductor_weights(h.double(), doubled(params), **options)
    # Each lane sums size / 8 terms in float32. The reference has another order, which may be luckier by chance.
    epsilon = 3e-6
    assert_as_accurate(ours.probs, plain.probs, truth.probs, epsilon=epsilon)
    assert_as_accurate(ours.entropy, plain.entropy, truth.entropy, epsilon=epsilon)
    settled = ours.actions == truth.actions
    assert settled.sum() >= 49
    assert_as_accurate(ours.weights[settled], plain.weights[settled], truth.weights[settled], epsilon=epsilon)
    chosen = truth.probs.log().gather(1, ours.actions[:, None])[:, 0]
    assert_as_accurate(ours.log_probs, chosen, chosen, epsilon=2e-5)


def test_peaked_logits_underflow_to_zero_and_not_to_nan() -> None:
    _, params = head(4, 3)
    peaked = replace(params, weight=params.weight * 1e4)
    h = head(4, 3)[0]
    for min_prob in (0.0, 0.05):
        ours = conductor_weights(h, peaked, min_prob=min_prob, backend="cpp")
        truth = conductor_weights(h.double(), doubled(peaked), min_prob=min_prob)
        torch.testing.assert_close(ours.probs.double(), truth.probs, rtol=1e-5, atol=2e-3)
        torch.testing.assert_close(ours.entropy.double(), truth.entropy, rtol=1e-3, atol=1e-2)
        assert (ours.probs.max(1).values > 0.8).any() and ours.log_probs.isfinite().all()


def test_an_mlp_head_takes_its_first_layer_from_torch() -> None:
    h, linear = head(6, 3)
    weight = torch.randn(3, 16)
    params = ConductorParams(linear.mean, linear.rstd, weight, linear.bias, torch.randn(16, 6), torch.randn(16))
    ours, truth = conductor_weights(h, params, backend="cpp"), conductor_weights(h.double(), doubled(params))
    torch.testing.assert_close(ours.probs.double(), truth.probs, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.actions, truth.actions)


def test_a_response_gets_the_same_bits_in_any_shard() -> None:
    h, params = head(100, 5)
    whole = conductor_weights(h, params, seed=3, offset=7)
    for cut in (0, 1, 13, 49):
        parts = [conductor_weights(h[s], params, seed=3, offset=7 + s.start) for s in (slice(0, cut), slice(cut, 50))]
        for name in whole._fields:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


def test_the_adaptive_step_is_its_two_parts() -> None:
    h, params = head(64, 5)
    arguments = case(50, 5, missing=0.1)
    sample, advantages = maestro_advantages(arguments["rewards"], params, 10, h=h, seed=4, backend="cpp")
    alone = conductor_weights(h, params, seed=4, backend="cpp")
    expected = group_advantages(arguments["rewards"], alone.weights, 10, backend="cpp")
    assert all(torch.equal(x, y) for x, y in zip((*sample, *advantages), (*alone, *expected), strict=True))


# --- where backends could disagree ---


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("profile", PROFILES)
def test_without_an_epsilon_no_spread_is_zero(profile: str, backend: Any) -> None:
    check_no_epsilon_and_no_spread(profile, backend)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("profile", ["maestro", "grpo", "verl_grpo"])
def test_a_weight_that_is_not_a_number_shows(profile: str, backend: Any) -> None:
    check_a_weight_that_is_not_a_number(profile, backend)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("profile", PROFILES)
def test_poison_reaches_only_what_is_compared(profile: str, poison: str, backend: Any) -> None:
    check_poison_reaches_only_what_is_compared(profile, poison, backend)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("size", MAGNITUDES)
@pytest.mark.parametrize("profile", PROFILES)
def test_rewards_of_any_magnitude(profile: str, size: float, backend: Any) -> None:
    check_any_magnitude(profile, size, backend)
