"""Peak tensor memory of a training step does not grow with vocabulary times tokens.

A larger vocabulary V costs what has a row per entry: weights of embedding and head, their gradients, the optimiser's
moments. It must not cost more where there are more tokens T. The ops on the head hold logits of a chunk of tokens, the
chunk shorter the larger V is, so what remains of [T, V] is the same few chunks of 2 MiB (on a CPU) for every V and T.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

from maestro_fast.data.dataset import PromptDataset
from maestro_fast.generation import SamplingConfig
from maestro_fast.ops import LinearPolicyLoss, PolicyLossConfig, policy_loss
from maestro_fast.ops.token_logprobs import TokenLogprobs
from maestro_fast.records import Prompts, Rollouts
from maestro_fast.rewards import build_rewards
from maestro_fast.training import MaestroTrainer, Method
from maestro_fast.training.batches import BatchConfig
from maestro_fast.weighting import build_weight_policy
from tests.ops.helpers import reference_token_logprobs
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.live_memory import LiveMemory

VOCABULARIES = (512, 8192)
LENGTHS = (32, 160)  # tokens of each of 8 completions: T = 256 and 1,280
WIDTH = 32
ADDED = VOCABULARIES[1] - VOCABULARIES[0]
WEIGHTS = 2 * ADDED * WIDTH * 4  # bytes that V adds to embedding and head together: 1.9 MiB
ROWS = 64  # rows of a chunk
CHUNK = ROWS * VOCABULARIES[1] * 4
LOGITS = 8 * LENGTHS[1] * ADDED * 4  # bytes that V would add to the logits of all tokens: 37.5 MiB


@dataclass
class FixedGenerator:
    """Gives completions of one length, so that nothing is sampled and T is known."""

    length: int
    concurrent_parts = 0

    def generate(self, model: Any, prompts: Prompts, *, seed: int) -> Rollouts:
        completions = [[20 + (7 * i + 3 * t) % 200 for t in range(self.length)] for i in range(len(prompts))]
        return Rollouts(prompts, completions, [""] * len(prompts), torch.zeros(len(prompts), dtype=torch.bool))


def parity(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [float(sum(ids) % 5) for ids in completion_ids]


def test_the_counter_counts_storages_once_and_forgets_what_is_freed() -> None:
    before = torch.zeros(100)
    with LiveMemory() as memory:
        view = before.view(10, 10)
        assert memory.live == 400
        kept = torch.zeros(1000)
        assert memory.live == 4400
        (kept[:10] * 2, kept.t())
        assert (memory.live, memory.peak) == (4400, 4440)
        leaf = torch.ones(50, requires_grad=True)
        graph = leaf.exp()  # the graph alone holds its result, once the name is gone
        total = graph.sum()
        del graph
        assert memory.live == 4400 + 200 + 200 + 4
        del total
    assert memory.live == 4600 and view.shape == (10, 10)


def peak_of_a_step(folder: Path, vocabulary: int, length: int, loss: PolicyLossConfig, micro_batch: int) -> int:
    """The peak in bytes of one step of the trainer, from the scoring forward, if there is one, to the optimiser."""
    model = tiny_model()
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    rewards = build_rewards(["entropy", parity])
    trainer = MaestroTrainer(
        model,
        tiny_tokenizer(),
        PromptDataset([{"prompt": "Name a colour."}, {"prompt": "Tell a story."}]),
        rewards,
        build_weight_policy({"type": "conductor", "period": 1}, rewards.names, WIDTH),
        TrainingArguments(
            str(folder), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
        ),
        Method(SamplingConfig(group_size=4), BatchConfig(prompts_per_batch=2, micro_batch=micro_batch), loss),
        generator=FixedGenerator(length),
    )
    with LiveMemory() as memory:
        trainer.train()
    return memory.peak


def growth_with_the_vocabulary(folder: Path, loss: PolicyLossConfig, micro_batch: int) -> list[int]:
    """How many bytes the larger vocabulary adds to the peak, at each number of tokens."""
    small, large = VOCABULARIES
    large_peaks, small_peaks = (
        [peak_of_a_step(folder, vocabulary, n, loss, micro_batch) for n in LENGTHS] for vocabulary in (large, small)
    )
    return [more - less for more, less in zip(large_peaks, small_peaks, strict=True)]


@pytest.mark.parametrize(
    "loss",
    [PolicyLossConfig(), PolicyLossConfig(kl_coef=0.1, entropy_coef=0.01)],
    ids=["entropy read", "entropy trained, with a reference"],
)
@pytest.mark.parametrize("micro_batch", [8, 4], ids=["log-probs, then the loss", "both in one sweep"])
def test_the_peak_of_a_step_does_not_grow_with_vocabulary_times_tokens(
    tmp_path: Path, loss: PolicyLossConfig, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: ROWS)
    monkeypatch.setattr("maestro_fast.ops.head.product_rows", lambda device: ROWS)
    few, many = growth_with_the_vocabulary(tmp_path, loss, micro_batch)

    assert many - few <= CHUNK < LOGITS / 10
    # weights, gradients, two moments, one in the making, the reference; and logits, probabilities, their gradients
    assert max(few, many) <= 6 * WEIGHTS + 4 * CHUNK < LOGITS


@pytest.mark.parametrize("where", ["log-probs", "sweep"])
def test_logits_of_all_tokens_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def all_logits(*args: Any, entropy: str = "none", strategy: str = "chunked", **kwargs: Any) -> TokenLogprobs:
        return reference_token_logprobs(*args, **kwargs)

    def loss_of_all_logits(
        hidden: Tensor, lm_head: Tensor, targets: Tensor, *args: Any, **kwargs: Any
    ) -> LinearPolicyLoss:
        head = {name: kwargs.pop(name) for name in ("bias", "logit_scale", "softcap", "temperature")}
        del kwargs["active"]
        logprobs = all_logits(hidden, lm_head, targets, **head).logprobs
        return LinearPolicyLoss(*policy_loss(logprobs, *args, **kwargs), logprobs.detach())

    if where == "log-probs":
        monkeypatch.setattr("maestro_fast.model.forward.token_logprobs", all_logits)
    else:
        monkeypatch.setattr("maestro_fast.training.loss.linear_policy_loss", loss_of_all_logits)
    few, many = growth_with_the_vocabulary(tmp_path, PolicyLossConfig(), 8 if where == "log-probs" else 4)

    assert many - few > LOGITS / 2 and many > LOGITS
