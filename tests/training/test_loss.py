"""The loss of a micro-batch from hidden states and from log-probs: the same, and what is left out of the sweep."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maestro_fast.model.forward import completion_logprobs
from maestro_fast.model.head import LanguageHead
from maestro_fast.model.hidden_states import HiddenStates
from maestro_fast.model.rows import Sequences
from maestro_fast.ops import LossInputs, PolicyLossConfig, loss_function
from maestro_fast.ops.head import Chunk
from maestro_fast.training.batches import MicroBatch, TokenLogprobs
from maestro_fast.training.loss import loss_of_logprobs, loss_of_states

PROMPTS, COMPLETIONS = [[1, 2, 3], [4], [5, 6], [7, 8]], [[5, 1], [6, 7, 2, 9, 3], [8], [3, 3, 1]]
TOKENS = sum(map(len, COMPLETIONS))
TEMPERATURE = 0.8
CONFIGS = {
    "dapo": PolicyLossConfig("dapo"),
    "gspo": PolicyLossConfig("grpo", ratio="sequence"),
    "kl and entropy": PolicyLossConfig("bnpo", kl_coef=0.1, entropy_coef=0.1),
}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def head() -> LanguageHead:
    module = nn.Linear(6, 13, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(draw(13, 6, seed=0))
        module.bias.copy_(draw(13, seed=1))
    return LanguageHead(module, scale=1.3, softcap=5.0)


def batch(**logprobs: Tensor) -> MicroBatch:
    """Two of the four responses have advantage 0."""
    advantages = torch.tensor([0.0, 1.5, -0.5, 0.0], dtype=torch.float64)
    bounds = torch.tensor([0, *map(len, COMPLETIONS)]).cumsum(0)
    return MicroBatch(Sequences(PROMPTS, COMPLETIONS), advantages, bounds, TokenLogprobs(**logprobs), 17.0, 11.0)


def hidden() -> Tensor:
    return draw(TOKENS + sum(map(len, PROMPTS)), 6, seed=2).requires_grad_()


def states(h: Tensor) -> HiddenStates:
    return HiddenStates(h, None, Sequences(PROMPTS, COMPLETIONS))


def compared() -> dict[str, Tensor]:
    old = -draw(TOKENS, seed=3).abs() - 2
    return {"old_C": old, "ref_C": old + 0.2 * draw(TOKENS, seed=4)}


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Rows of hidden states that became logits, under "rows"."""
    count: Counter[str] = Counter()
    original = Chunk.logits

    def logits(chunk: Chunk) -> Tensor:
        count["rows"] += chunk.rows
        return original(chunk)

    monkeypatch.setattr(Chunk, "logits", logits)
    return count


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("on_policy", [False, True])
def test_from_states_and_from_logprobs(config: PolicyLossConfig, on_policy: bool) -> None:
    given = compared()
    if on_policy:
        given = {"ref_C": given["ref_C"]} if config.kl_coef else {}
    h, w, parts = hidden(), head(), batch(**given)
    ours = loss_of_states(states(h), parts, w, TEMPERATURE, config)
    entropy: Any = "grad" if config.entropy_coef else "none"
    logprobs, entropies = completion_logprobs(states(h), w, TEMPERATURE, entropy)
    expected = loss_of_logprobs(logprobs, entropies, parts, config)
    torch.testing.assert_close(ours[:2], tuple(expected), rtol=1e-12, atol=1e-14)
    worked = ours.logprobs != 0  # on-policy, responses of advantage 0 are not
    assert torch.equal(ours.logprobs[worked], logprobs.detach()[worked]) and not ours.logprobs.requires_grad
    assert worked.all() or on_policy
    leaves = [h, w.weight, w.module.bias]
    for mine, wanted in zip(
        torch.autograd.grad(ours.loss, leaves), torch.autograd.grad(expected.loss, leaves), strict=True
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-11, atol=1e-14)
        assert wanted.abs().max() > 1e-4


def test_on_policy_a_response_of_advantage_zero_is_not_even_forwarded(forwards: Counter[str]) -> None:
    loss_of_states(states(hidden()), batch(), head(), TEMPERATURE, CONFIGS["dapo"])
    assert forwards["rows"] == len(COMPLETIONS[1]) + len(COMPLETIONS[2])


@pytest.mark.parametrize("name", ["old_C", "ref_C", "sampling_C"])
def test_it_is_where_a_metric_reads_its_log_probs(forwards: Counter[str], name: str) -> None:
    loss_of_states(states(hidden()), batch(**{name: compared()["old_C"]}), head(), TEMPERATURE, CONFIGS["dapo"])
    assert forwards["rows"] == TOKENS


def test_it_is_where_it_has_an_entropy_bonus(forwards: Counter[str]) -> None:
    loss_of_states(states(hidden()), batch(), head(), TEMPERATURE, PolicyLossConfig("dapo", entropy_coef=0.1))
    assert forwards["rows"] == TOKENS


@loss_function(row_wise=True, entropies=True)
def own_loss(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The KL and entropy bonus of the options above, without a ratio."""
    assert inputs.ref_logprobs is not None and inputs.entropies is not None
    gap = inputs.ref_logprobs - inputs.logprobs
    advantages = inputs.advantages.repeat_interleave(inputs.cu_seqlens.diff())
    terms = -advantages * inputs.logprobs + 0.1 * (gap.expm1() - gap)
    loss = terms.sum() / inputs.normalizer - 0.1 * inputs.entropies.sum() / inputs.entropy_normalizer
    return loss, {"gap": gap.mean()}


def test_a_users_own_loss_from_states_and_from_logprobs() -> None:
    """Responses of advantage 0 keep the gradients that it gives them."""
    h, w, parts = hidden(), head(), batch(**compared())
    ours = loss_of_states(states(h), parts, w, TEMPERATURE, own_loss)
    logprobs, entropies = completion_logprobs(states(h), w, TEMPERATURE, "grad")
    expected = loss_of_logprobs(logprobs, entropies, parts, own_loss)
    torch.testing.assert_close(ours[:2], tuple(expected), rtol=1e-12, atol=1e-14)
    leaves = [h, w.weight, w.module.bias]
    found, wanted = (torch.autograd.grad(x.loss, leaves, retain_graph=True) for x in (ours, expected))
    for mine, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-14)
    assert (found[0] != 0).any(-1).sum() == TOKENS
    on_policy = loss_of_states(states(h), batch(), w, TEMPERATURE, lambda inputs: (inputs.logprobs.sum(), {}))
    assert (on_policy.logprobs != 0).all()


def test_all_advantages_zero_leave_metrics_and_gradients_of_zero() -> None:
    h, w = hidden(), head()
    loss, metrics, _ = loss_of_states(
        states(h), replace(batch(), advantages_B=torch.zeros(4)), w, TEMPERATURE, CONFIGS["dapo"]
    )
    assert loss == 0 and metrics["ratio"] == 1
    assert all((x == 0).all() for x in torch.autograd.grad(loss, [h, w.weight]))
