"""EntropyReward by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from maestro_fast.records import RewardBatch
from maestro_fast.rewards import EntropyReward

MakeBatch = Callable[..., RewardBatch]


@pytest.mark.parametrize("chat", [False, True])
def test_values_and_abstention_without_tokens(chat: bool, make_batch: MakeBatch) -> None:
    batch = make_batch(["a b", "", "c"], chat=chat, mean_entropies_B=torch.tensor([0.5, float("nan"), 2.0]))
    assert EntropyReward()(batch) == [-0.5, None, -2.0]
    assert EntropyReward("minimise")(batch) == [-0.5, None, -2.0]
    assert EntropyReward("maximise")(batch) == [0.5, None, 2.0]


def test_sums_and_the_estimate_from_samples(make_batch: MakeBatch) -> None:
    """Two, no and three tokens; EM-RL-token is the sum of entropies, EM-RL-sequence the log-prob of the response."""
    means = {"mean_entropies_B": torch.tensor([0.5, 0.0, 2.0]), "mean_logprobs_B": torch.tensor([-0.25, 0.0, -1.0])}
    batch = make_batch(["a b", "", "c d e"], **means)
    assert EntropyReward(reduction="sum")(batch) == [-1.0, None, -6.0]
    assert EntropyReward(estimate="sampled")(batch) == [-0.25, None, -1.0]
    assert EntropyReward(estimate="sampled", reduction="sum")(batch) == [-0.5, None, -3.0]
    assert EntropyReward("maximise", estimate="sampled", reduction="sum")(batch) == [0.5, None, 3.0]
    with pytest.raises(ValueError, match=r"reward 'entropy': mean_logprobs_B is missing, expected \(1,\)"):
        EntropyReward(estimate="sampled")(make_batch(["a"], mean_entropies_B=torch.zeros(1)))


def test_asks_for_the_entropy() -> None:
    reward = EntropyReward()
    assert (reward.name, reward.needs_entropy, reward.needs_policy) == ("entropy", True, False)


@pytest.mark.parametrize(
    ("entropies", "words"),
    [
        (None, r"reward 'entropy': mean_entropies_B is missing, expected \(2,\)"),
        (torch.zeros(3), r"reward 'entropy': mean_entropies_B is of shape \(3,\), expected \(2,\)"),
    ],
)
def test_entropies_must_be_there(entropies: Tensor | None, words: str, make_batch: MakeBatch) -> None:
    with pytest.raises(ValueError, match=words):
        EntropyReward()(make_batch(["a", "b"], mean_entropies_B=entropies))


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"estimate: 'both', expected one of \('exact', 'sampled'\)"):
        EntropyReward(estimate="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reduction: None, expected one of \('mean', 'sum'\)"):
        EntropyReward(reduction=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"direction: 'up', expected one of \('minimise', 'maximise'\)"):
        EntropyReward("up")  # type: ignore[arg-type]
