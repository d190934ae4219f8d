"""The replay keeps the labelled groups up to its capacity, and the context of each prompt once."""

from __future__ import annotations

import torch

from maestro_fast.specs import resolve_profile
from maestro_fast.weighting.anchored.anchored import correlation, entropy
from maestro_fast.weighting.anchored.replay import Replay, standardised
from tests.weighting.anchored.test_anchored import anchored, run, world
from tests.weighting.helpers import normal

D, G, K, P = 64, 4, 3, 5


def visits(replay: Replay, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Adds groups of P prompts, three at a time, and returns all that went in."""
    known = normal(P, D, seed=0)
    rows = [(3 * turn + j) % P for turn in range(count) for j in range(3)]
    contexts, rewards, utilities = known[rows], normal(3 * count, G, K, seed=1), normal(3 * count, G, seed=2)
    for turn in range(count):
        at = slice(3 * turn, 3 * turn + 3)
        replay.add(contexts[at], rewards[at], utilities[at])
    return contexts, rewards, utilities


def size(replay: Replay) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in replay.state_dict().values())


def test_everything_is_there_in_its_order_and_each_context_once() -> None:
    replay = Replay(D, K)
    contexts, rewards, utilities = visits(replay, 7)
    assert len(replay) == 21 and replay.contexts.shape == (P, D)
    assert torch.equal(replay.contexts[replay.index], contexts)
    assert torch.equal(replay.rewards, rewards) and torch.equal(replay.utilities, utilities)


def test_it_grows_by_what_it_says() -> None:
    sizes = []
    for turns in (7, 8):
        replay = Replay(D, K)
        visits(replay, turns)
        sizes.append(size(replay))
    group = 4 * (G * K + G + 1)
    assert sizes == [21 * group + 4 * P * D, 24 * group + 4 * P * D]


def test_a_loaded_one_knows_the_contexts() -> None:
    """A loaded replay stores no context twice, and tensors that were handed out stay as they were."""
    whole = Replay(D, K)
    visits(whole, 4)
    state = whole.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    loaded = Replay(D, K)
    loaded.load_state_dict(state)
    for replay in (whole, loaded):
        visits(replay, 5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert whole.contexts.shape == loaded.contexts.shape == (P, D)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in whole.state_dict().items())
    loaded.load_state_dict({})
    assert len(loaded) == 0 and loaded.state_dict() == {}


def test_the_prompt_with_most_groups_loses_its_oldest() -> None:
    """Prompts 0, 1 and 2 have three, one and two groups, the oldest of all is that of prompt 1."""
    replay, known = Replay(D, K, capacity=6), normal(4, D, seed=0)
    order = [1, 0, 0, 2, 0, 2]
    for number, prompt in enumerate(order):
        replay.add(known[[prompt]], torch.full((1, G, K), float(number)), torch.zeros(1, G))

    def held() -> list[tuple[int, int]]:
        """Number and prompt of the groups that are there."""
        prompts = [int((known == replay.contexts[row]).all(1).nonzero()) for row in replay.index.tolist()]
        return list(zip(map(int, replay.rewards[:, 0, 0].tolist()), prompts, strict=True))

    def add(number: int, prompt: int) -> None:
        replay.add(known[[prompt]], torch.full((1, G, K), float(number)), torch.zeros(1, G))

    assert held() == [*enumerate(order)]
    add(6, 3)
    assert held() == [(0, 1), (2, 0), (3, 2), (4, 0), (5, 2), (6, 3)]  # the first of the three groups of prompt 0
    add(7, 3)
    assert held() == [(0, 1), (3, 2), (4, 0), (5, 2), (6, 3), (7, 3)]  # three prompts had two, and 0 the oldest


def test_where_all_contexts_differ_the_last_groups_stay() -> None:
    """A context goes with its last group; one that comes back later is a new one."""
    replay, known = Replay(D, K, capacity=4), normal(10, D, seed=0)
    for first in (0, 3, 6):
        replay.add(known[first : first + 3], normal(3, G, K, seed=first), normal(3, G, seed=first))
    assert torch.equal(replay.contexts[replay.index], known[5:9]) and len(replay.contexts) == 4
    replay.add(known[:1], normal(1, G, K, seed=9), normal(1, G, seed=9))
    assert torch.equal(replay.contexts[replay.index], torch.cat([known[6:9], known[:1]]))


def test_a_full_one_goes_on_alike_after_loading() -> None:
    """One that was saved when full goes on as the other, and a smaller one takes of it what it has room for."""
    whole, loaded, smaller = Replay(D, K, capacity=9), Replay(D, K, capacity=9), Replay(D, K, capacity=3)
    visits(whole, 5)
    sizes = size(whole)
    loaded.load_state_dict(whole.state_dict())
    for replay in (whole, loaded):
        visits(replay, 3)
        assert len(replay) == 9 and size(replay) == sizes
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in whole.state_dict().items())
    smaller.load_state_dict(whole.state_dict())
    assert len(smaller) == 3 and len(smaller.contexts) == 3


def test_a_repeated_prompt_counts_at_every_visit() -> None:
    """The gradient is that of the mean over all groups, here written out without the index."""
    policy = anchored(steps=1, entropy_coef=0.1)
    for step in (0, 1, 0, 0):
        run(policy, world(step, share=1.0))
    replay = policy.replay
    assert len(replay) == 32 and len(replay.contexts) == 16
    params = policy.params
    x = standardised(replay.contexts[replay.index], *policy.statistics.standardisation(4e-4))
    weights = params.weights(x)
    value = correlation(weights, replay.rewards, replay.utilities).mean() + 0.1 * entropy(weights).mean()
    objective = value - policy.config.l2 * params.weight.square().sum() / 3
    expected = torch.autograd.grad(-objective, list(params.named().values()))
    state = policy.state_dict()
    policy._learn(resolve_profile("maestro"))
    policy.load_state_dict(state)  # loading leaves the gradients of the last step where they are
    for gradient, parameter in zip(expected, params.named().values(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
