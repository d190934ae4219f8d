"""The anchored Conductor climbs its objective, learns from labelled groups alone, and resumes as it was."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from maestro_fast.ops import group_advantages
from maestro_fast.specs import PROFILES, AdvantageProfile
from maestro_fast.weighting import Anchored, AnchoredConfig, Outcome, WeightContext, Weights, scored
from maestro_fast.weighting.anchored.anchored import AnchoredParams, correlation, first_order
from maestro_fast.weighting.anchored.replay import standardised
from tests.weighting.helpers import NAMES, K, normal

N, G, D = 8, 6, 5
B = N * G


def anchored(**options: Any) -> Anchored:
    return AnchoredConfig(**options).build(NAMES, D)


def world(step: int, share: float = 0.5) -> WeightContext:
    """The first coordinate tells two families apart. Utility is reward 0 in one, reward 2 in the other, and noise."""
    family_N = torch.arange(N) % 2
    x_Nd = normal(N, D, seed=step) * 0.5
    x_Nd[:, 0] += 4.0 * family_N - 2.0
    rewards_BK = normal(B, K, seed=1000 + step) * torch.tensor([1.0, 5.0, 0.1])
    own_B = (2 * family_N).repeat_interleave(G)
    utilities_B = rewards_BK.gather(1, own_B[:, None])[:, 0] / torch.where(own_B == 0, 1.0, 0.1)
    utilities_B = utilities_B + 0.5 * normal(B, seed=2000 + step)
    unlabelled_N = torch.rand(N, generator=torch.Generator().manual_seed(step)) > share
    utilities_B[unlabelled_N.repeat_interleave(G)] = float("nan")
    return WeightContext(NAMES, G, step, rewards_BK, x_Nd.repeat_interleave(G, 0), utilities_B)


def run(policy: Anchored, context: WeightContext) -> Weights:
    weights = policy.weights(context)
    advantages = group_advantages(*scored(context, weights), G)
    policy.observe(Outcome(context, weights, advantages))
    return weights


def test_the_objective_by_hand() -> None:
    weights_NK = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    rewards_NGK = torch.tensor([[[1.0, 1.0], [0.0, -2.0], [-1.0, 1.0]]] * 2, dtype=torch.float64)
    utilities_NG = torch.tensor([[1.0, -1.0, 0.0]] * 2, dtype=torch.float64)
    # The scores are (1, -1, 0) and (1, 0, -1), both of std 1; their products with the utilities add up to 2 and 1.
    found = correlation(weights_NK, rewards_NGK, utilities_NG)
    torch.testing.assert_close(found, torch.tensor([2 / 3 / 1.01, 1 / 3 / 1.01]).double())
    # The mean product of a reward with the utility is 1/3 for the first and 1 for the second.
    found = first_order(weights_NK, rewards_NGK, utilities_NG)
    torch.testing.assert_close(found, torch.tensor([0.5 / 3 + 0.5, 1 / 3]).double())


def test_weights_by_hand() -> None:
    params = AnchoredParams(
        *(t.double() for t in (normal(4, D, seed=1), normal(4, seed=2), normal(3, 4, seed=3))),
        normal(3, seed=4).double(),
    )
    x_Nd = normal(2, D, seed=5).double()
    for n in range(2):
        units = [torch.tanh(params.hidden_weight[h] @ x_Nd[n] + params.hidden_bias[h]) for h in range(4)]
        z = [params.bias[k] + sum(params.weight[k, h] * units[h] for h in range(4)) / 2 for k in range(3)]
        torch.testing.assert_close(params.weights(x_Nd)[n], torch.stack(z).softmax(0))


def test_gradient_by_central_differences() -> None:
    start = AnchoredParams.start(D, K, 4, 0)
    tensors = {name: (t.detach() + 0.3 * normal(*t.shape, seed=7)).double() for name, t in start.named().items()}
    x_Nd, rewards_NGK, utilities_NG = (
        normal(2, D, seed=1).double(),
        normal(2, G, K, seed=2).double(),
        normal(2, G, seed=3).double(),
    )

    def value(named: dict[str, Tensor]) -> Tensor:
        return correlation(AnchoredParams(**named).weights(x_Nd), rewards_NGK, utilities_NG).mean()

    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    gradients = torch.autograd.grad(value(leaves), list(leaves.values()))
    for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
        for index in product(*map(range, tensor.shape)):
            step = torch.zeros_like(tensor)
            step[index] = 1e-6
            slope = (value({**tensors, name: tensor + step}) - value({**tensors, name: tensor - step})) / 2e-6
            assert gradient[index].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-8)


def test_a_prompt_unlike_all_others_is_clipped() -> None:
    found = standardised(torch.tensor([[1e6, -1e6, 3.0]]), torch.ones(3), torch.full((3,), 2.0))
    assert found.tolist() == [[4.0, -4.0, 4.0]]


def test_equal_weights_until_the_first_label() -> None:
    policy = anchored()
    for step in range(3):
        assert torch.equal(run(policy, world(step, share=0.0)).weights_BK, torch.full((B, K), 1 / K))
    assert policy.labelled == 0 and "conductor/objective" not in policy.metrics()
    run(policy, world(3, share=1.0))
    assert policy.labelled == N and policy.metrics()["conductor/labelled_groups"] == 0.0  # none yet
    assert not torch.equal(policy.weights(world(4)).weights_BK, torch.full((B, K), 1 / K))


@pytest.mark.parametrize("surrogate", ["correlation", "first_order"])
def test_it_learns_which_reward_each_kind_of_prompt_needs(surrogate: str) -> None:
    policy = anchored(surrogate=surrogate)
    for step in range(6):
        run(policy, world(step))
    weights_BK = policy.weights(world(99, share=0.0)).weights_BK
    family_B = (torch.arange(N) % 2).repeat_interleave(G)
    assert weights_BK[family_B == 0].mean(0).argmax() == 0 and weights_BK[family_B == 1].mean(0).argmax() == 2
    assert weights_BK[family_B == 0, 0].mean() > 0.6 and weights_BK[family_B == 1, 2].mean() > 0.6
    assert torch.equal(weights_BK, weights_BK[::G].repeat_interleave(G, 0))  # one weighting per prompt: no flattery


def absent_world(step: int) -> WeightContext:
    """One kind of prompt: reward 0 runs against the utility, reward 1 always abstains, and reward 2 agrees weakly."""
    rewards_BK = normal(B, K, seed=3000 + step)
    utilities_B = -rewards_BK[:, 0] + 0.3 * rewards_BK[:, 2]
    rewards_BK[:, 1] = float("nan")
    x_Bd = (normal(N, D, seed=step) * 0.1).repeat_interleave(G, 0)
    return WeightContext(NAMES, G, step, rewards_BK, x_Bd, utilities_B)


@pytest.mark.parametrize("surrogate", ["correlation", "first_order"])
def test_weight_does_not_hide_on_a_reward_that_abstains(surrogate: str) -> None:
    """Weight on it used to count as weight on nothing, while the policy was trained on reward 0 in its place."""
    policy = anchored(surrogate=surrogate)
    for step in range(4):
        weights = run(policy, absent_world(step))
        assert weights.weights_BK[:, 1].max() == 0.0
        torch.testing.assert_close(weights.weights_BK.sum(1), torch.ones(B))
        assert policy.metrics()["conductor/abstained_weight"] > 0.05  # it is seen before it is moved
    assert policy.weights(absent_world(9)).weights_BK[:, 2].min() > 0.6
    gradients = policy.params.weight.grad, policy.params.bias.grad
    assert gradients[1] is not None and gradients[1][1] == 0.0, "no credit for a reward that abstained"


@pytest.mark.parametrize("profile", ["maestro", "grpo"])
def test_the_objective_scores_as_the_profile_does_where_rewards_abstain(profile: str) -> None:
    """The correlation is that of the utility with the advantages under the same weights."""
    nan = float("nan")
    rewards_BK = normal(G, K, seed=5)
    rewards_BK[1:3, 0], rewards_BK[4, 1], rewards_BK[5] = nan, nan, nan
    weights_NK, utilities_NG = torch.tensor([[0.5, 0.3, 0.2]]), normal(1, G, seed=6)
    normalised_BK = group_advantages(rewards_BK, None, G).normalized_rewards
    normalised_BK = torch.where(rewards_BK.isnan(), nan, normalised_BK)
    scores_only = AdvantageProfile("none", "none", "group", "group", missing=PROFILES[profile].missing, score_eps=1e-2)
    expected = group_advantages(normalised_BK, weights_NK.expand(G, K), G, profile=scores_only).advantages
    found = correlation(weights_NK, normalised_BK[None], utilities_NG, PROFILES[profile])
    judged = int((~rewards_BK.isnan()).any(1).sum())
    assert judged == G - 1, "one response has no reward, and no part in the mean"
    torch.testing.assert_close(found, (expected * utilities_NG[0]).sum()[None] / judged)


def test_only_whole_labelled_groups_with_spread_are_kept() -> None:
    context = world(0, share=1.0)
    assert context.utilities_B is not None
    context.utilities_B[0] = float("nan")  # a response without a label
    context.utilities_B[G : 2 * G] = 0.5  # all responses of a group alike
    policy = anchored()
    run(policy, context)
    assert policy.labelled == N - 2
    state = policy.state_dict()
    r_NGK = group_advantages(context.rewards_BK, None, G).normalized_rewards.view(N, G, K)[2:]
    u_NG = context.utilities_B.view(N, G)[2:]
    z_NG = (u_NG - u_NG.mean(1, keepdim=True)) / (u_NG.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(state["replay.rewards"], r_NGK)
    torch.testing.assert_close(state["replay.utilities"], z_NG)
    contexts = state["replay.contexts"][state["replay.index"]]
    assert torch.equal(contexts, context.context_Bd[::G][2:])  # type: ignore[index]


def test_hybrid_scores_labelled_groups_by_their_utility() -> None:
    context, policy = world(0), anchored(hybrid=True)
    weights = run(policy, context)
    assert context.utilities_B is not None
    labelled_B = ~context.utilities_B.isnan()
    assert 0 < labelled_B.sum() < B
    for profile in ("maestro", "dr_grpo", "verl_grpo"):
        found_B = group_advantages(*scored(context, weights), G, profile=profile).advantages
        by_utility_B = group_advantages(context.utilities_B.nan_to_num(0), None, G, profile=profile).advantages
        by_rewards_B = group_advantages(context.rewards_BK, weights.weights_BK, G, profile=profile).advantages
        torch.testing.assert_close(found_B[labelled_B], by_utility_B[labelled_B], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found_B[~labelled_B], by_rewards_B[~labelled_B])


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_a_resumed_run_has_the_same_future(cut: int, tmp_path: Path) -> None:
    whole, resumed = anchored(), anchored()
    for step in range(cut):
        run(whole, world(step))
    save_file(whole.state_dict(), tmp_path / "state.safetensors")
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for step in range(cut, cut + 3):
        assert torch.equal(run(resumed, world(step)).weights_BK, run(whole, world(step)).weights_BK)
        assert resumed.metrics() == whole.metrics()
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())


def test_wrong_states_and_contexts_are_named() -> None:
    policy = anchored()
    state = policy.state_dict()
    with pytest.raises(ValueError, match=r"^state\.weight: missing, expected shape \(3, 16\)"):
        policy.load_state_dict({key: value for key, value in state.items() if key != "weight"})
    with pytest.raises(ValueError, match=r"^utilities_B: missing, this weight policy needs an anchor"):
        context = world(0)
        run(policy, WeightContext(NAMES, G, 0, context.rewards_BK, context.context_Bd))

    run(policy, world(0))
    state = policy.state_dict()
    with pytest.raises(ValueError, match=r"^state\.replay\.index: missing, beside replay\.contexts"):
        policy.load_state_dict({key: value for key, value in state.items() if key != "replay.index"})
    with pytest.raises(ValueError, match=r"^state\.replay\.utilities: shape \(1, 6\), expected"):
        policy.load_state_dict(state | {"replay.utilities": state["replay.utilities"][:1]})
    with pytest.raises(ValueError, match=r"^state\.replay\.index: points beyond the"):
        policy.load_state_dict(state | {"replay.index": state["replay.index"] + 1})
