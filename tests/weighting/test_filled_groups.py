"""Groups that were filled up with responses from which every reward abstains act as they would by themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.weighting import (
    Comparison,
    Outcome,
    WeightContext,
    WeightPolicy,
    Weights,
    build_weight_policy,
    weigh_and_compare,
)
from maestro_fast.weighting.utilities import labelled_groups, standardised_utilities
from tests.weighting.helpers import NAMES, K, normal

N, G, D, WIDE = 6, 3, 5, 5


def plain(step: int) -> WeightContext:
    """Groups of G, in which a reward abstains now and then, and half of which have a utility."""
    rewards = normal(N * G, K, seed=step)
    rewards[1, 0] = rewards[7, 2] = float("nan")
    utilities = normal(N * G, seed=100 + step)
    utilities[G * (N // 2) :] = float("nan")
    prompts = normal(N, D, seed=200 + step).repeat_interleave(G, 0)
    return WeightContext(NAMES, G, step, rewards, prompts, utilities)


def filled(context: WeightContext) -> WeightContext:
    """The same groups of WIDE."""

    def wider(x: Tensor | None, fill: float | None) -> Tensor | None:
        if x is None:
            return None
        groups = x.unflatten(0, (-1, G))
        more = groups[:, :1] if fill is None else torch.full_like(groups[:, :1], fill)
        return torch.cat([groups, more.repeat_interleave(WIDE - G, 1)], 1).flatten(0, 1)

    rewards = wider(context.rewards_BK, float("nan"))
    assert rewards is not None
    return replace(
        context,
        group_size=WIDE,
        rewards_BK=rewards,
        context_Bd=wider(context.context_Bd, None),
        utilities_B=wider(context.utilities_B, float("nan")),
    )


def own(x: Tensor) -> Tensor:
    """The rows of ``filled`` that ``plain`` has, too."""
    return x.unflatten(0, (-1, WIDE))[:, :G].flatten(0, 1)


def play(policy: WeightPolicy, context: WeightContext, profile: str) -> tuple[Weights, Tensor]:
    weights, found = weigh_and_compare(policy, context, Comparison(profile))
    policy.observe(Outcome(context, weights, found, profile))
    return weights, found.advantages


SOFT = {"type": "conductor", "context": "prompt_mean", "mode": "soft", "period": 1, "learning_rate": 0.05}


@pytest.mark.parametrize("profile", ["maestro", "verl_grpo", "rloo"])
@pytest.mark.parametrize(
    "entry",
    [
        "equal",
        "saw",
        "dvao",
        "weakest_first",
        "exp3",
        "anchored",
        {"type": "anchored", "residual": True, "steps": 5},
        {"type": "reward_model", "hybrid": True, "steps": 5},
        "utility",
        {"type": "anchored", "hybrid": True, "guard": {"window": 2, "warmup": 2, "held_back": 0.5}},
        {**SOFT, "estimator": "pathwise", "objective": "first_order"},
    ],
    ids=lambda entry: entry if isinstance(entry, str) else "-".join(map(str, entry.values()))[:40],
)
def test_nothing_changes(entry: Any, profile: str) -> None:
    """Neither weights nor advantages change, nor, over several batches, what a policy has learnt."""
    one, two = (build_weight_policy(entry, NAMES, D) for _ in range(2))
    for step in range(5):
        weights, advantages = play(one, plain(step), profile)
        wide_weights, wide_advantages = play(two, filled(plain(step)), profile)
        torch.testing.assert_close(own(wide_advantages), advantages, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own(wide_weights.weights_BK), weights.weights_BK, rtol=1e-4, atol=1e-5)
        assert not wide_advantages.unflatten(0, (-1, WIDE))[:, G:].any()
    learnt = one.state_dict()
    assert {name: x.shape for name, x in learnt.items() if "replay" not in name and "buffer" not in name} == {
        name: x.shape for name, x in two.state_dict().items() if "replay" not in name and "buffer" not in name
    }


@pytest.mark.parametrize("estimator", ["reinforce", "baseline", "all_actions"])
def test_a_conductor_learns_from_no_response_that_fills_a_group(estimator: str) -> None:
    """Draws are keyed by the place of a response, so weights differ; what is kept are the real responses alone."""
    entry = {"type": "conductor", "context": "response", "estimator": estimator, "period": 9}
    policy = build_weight_policy(entry, NAMES, D)
    context = filled(plain(0))
    play(policy, context, "maestro")
    kept = policy.state_dict()["buffer.0.h"]
    assert 0 < len(kept) <= N * G
    if estimator == "all_actions":
        assert len(kept) == N * G


def test_labels_need_no_utility_of_a_response_that_fills_a_group() -> None:
    context = plain(3)
    wide = filled(context)
    assert torch.equal(labelled_groups(wide), labelled_groups(context)) and labelled_groups(context).sum() == N // 2
    z, wide_z = standardised_utilities(context), standardised_utilities(wide)
    torch.testing.assert_close(own(wide_z), z, equal_nan=True)
    assert not wide_z.unflatten(0, (-1, WIDE))[: N // 2, G:].any()
    lost = wide.utilities_B
    assert lost is not None
    lost[1] = float("nan")  # A real response without its utility still leaves its group unlabelled.
    assert labelled_groups(wide).sum() == N // 2 - 1


def test_groups_of_different_sizes_are_kept_together() -> None:
    policy = build_weight_policy("anchored", NAMES, D)
    play(policy, plain(0), "maestro")
    play(policy, filled(plain(1)), "maestro")
    play(policy, plain(2), "maestro")
    state = policy.state_dict()
    assert state["replay.rewards"].shape == (3 * (N // 2), WIDE, K)
    again = build_weight_policy("anchored", NAMES, D)
    again.load_state_dict(state)
    for name, x in state.items():
        torch.testing.assert_close(again.state_dict()[name], x, rtol=0.0, atol=0.0, equal_nan=True)
