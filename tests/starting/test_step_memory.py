"""The memory that is foretold for a step is the memory that a trainer's step is counted to hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from maestro_fast.data.dataset import PromptDataset
from maestro_fast.generation import SamplingConfig, TransformersConfig
from maestro_fast.ops import PolicyLossConfig
from maestro_fast.records import Prompts, Rollouts
from maestro_fast.rewards import build_rewards
from maestro_fast.starting.activations import Growth, LiveMemory, Shape, measure
from maestro_fast.starting.memory import About, Room, StepMemory, step_memory
from maestro_fast.training import MaestroTrainer, Method
from maestro_fast.training.batches import BatchConfig
from maestro_fast.weighting import build_weight_policy
from tests.tiny import tiny_tokenizer

ROOM = Room("a test", 2**40, 0)
GROUP, PROMPTS, COMPLETION = 4, 2, 40


class UnevenGenerator:
    """Gives responses of ``COMPLETION`` tokens, every second one a token shorter, and samples nothing."""

    concurrent_parts = 0

    def generate(self, model: Any, prompts: Prompts, *, seed: int) -> Rollouts:
        completions = [[20 + (7 * i + 3 * t) % 200 for t in range(COMPLETION - i % 2)] for i in range(len(prompts))]
        return Rollouts(prompts, completions, [""] * len(prompts), torch.zeros(len(prompts), dtype=torch.bool))


def parity(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [float(sum(ids) % 5) for ids in completion_ids]


class Case(NamedTuple):
    """A run whose memory is foretold and counted."""

    lora: bool = False
    kl: float = 0.0
    micro_batch: int = 2
    sharing: Any = "never"
    tied: bool = True
    samples: bool = False
    width: int = 64


def trainer_of(folder: Path, case: Case) -> MaestroTrainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": case.width, "intermediate_size": 2 * case.width, "num_hidden_layers": 2}
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=case.tied,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
            **sizes,
        )
    )
    if case.lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    rewards = build_rewards([parity, {"type": "length", "target": 5}])
    prompts = [{"prompt": f"{n} {'Name a colour. ' * 12}"} for n in (1, 2)]  # They are of one length, and begin apart.
    return MaestroTrainer(
        model,
        tiny_tokenizer(),
        PromptDataset(prompts),
        rewards,
        build_weight_policy("conductor", rewards.names, case.width),
        TrainingArguments(
            str(folder), max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
        ),
        Method(
            SamplingConfig(group_size=GROUP, max_new_tokens=COMPLETION),
            BatchConfig(prompts_per_batch=PROMPTS, micro_batch=case.micro_batch),
            PolicyLossConfig(kl_coef=case.kl),
            profile="grpo",
            sharing=case.sharing,
        ),
        generator=None if case.samples else UnevenGenerator(),
    )


def foretold(trainer: MaestroTrainer, model: Any, case: Case) -> StepMemory:
    longest = max(map(len, _prompt_ids(trainer)))
    shape = Shape(longest, COMPLETION, case.micro_batch, GROUP)
    reference = None
    if case.kl and not case.lora:
        assert trainer.step.reference is not None
        with trainer.step.reference() as (own, _):
            reference = own
    passes = measure(trainer.step, model, shape, samples=case.samples)
    about = About(trainer.args, TransformersConfig(), reference, ())
    found = step_memory(trainer.step, model, passes, (shape, replace(shape, responses=GROUP * PROMPTS)), about, ROOM)
    return replace(found, samples=case.samples)


def _prompt_ids(trainer: MaestroTrainer) -> list[list[int]]:
    data: Any = trainer.train_dataset
    return data.prompts([*data.rows], tiny_tokenizer()).token_ids  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "case",
    [
        Case(width=256),  # weights and optimiser are most of it
        Case(kl=0.1, tied=False, micro_batch=4, sharing="always"),
        Case(micro_batch=8, sharing="auto", width=128),  # one micro-batch: its gradients replace its activations
        Case(lora=True, kl=0.1, micro_batch=8, sharing="always"),
    ],
    ids=lambda case: ", ".join(f"{name} {value}" for name, value in case._asdict().items()),
)
def test_the_memory_of_a_step_is_what_a_step_is_counted_to_hold(tmp_path: Path, case: Case) -> None:
    trainer = trainer_of(tmp_path, case)
    model: Any = trainer.model
    found = foretold(trainer, model, case)
    with LiveMemory() as memory:
        trainer.train()

    assert found.peak == pytest.approx(memory.peak, rel=0.03)


@pytest.mark.parametrize("words", [1, 60], ids=["the cache grows", "the prompts are most"])
def test_the_memory_of_sampling_is_what_sampling_is_counted_to_hold(tmp_path: Path, words: int) -> None:
    case = Case(samples=True)
    trainer = trainer_of(tmp_path, case)
    model: Any = trainer.model
    data = PromptDataset([{"prompt": f"{n} {'sea ' * words}"} for n in (1, 2)])
    prompts = data.prompts(data.rows, tiny_tokenizer()).repeat(GROUP)
    shape = Shape(len(prompts.token_ids[0]), COMPLETION, GROUP * PROMPTS, GROUP)
    expected = sum(measure(trainer.step, model, shape, samples=True).sampling(shape))
    with LiveMemory() as memory:
        memory.see([*model.parameters()])
        before = memory.live
        rollouts = trainer.step.sampler(model, prompts, 0)

    assert int(rollouts.completion_lengths_B.max()) == COMPLETION
    assert expected == pytest.approx(memory.peak - before, rel=0.05)


def test_measuring_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Case())
    model: Any = trainer.model
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    training = model.training
    foretold(trainer, model, Case(samples=True))

    assert model.training == training and all(value.grad is None for value in model.parameters())
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name][0]) and value.requires_grad == before[name][1]


def test_the_largest_micro_batch_is_the_largest_that_fits(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Case())
    model: Any = trainer.model
    found = foretold(trainer, model, Case())
    sizes = [found.with_micro_batch(m).peak for m in (1, 2, 4)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]

    tight = replace(found, room=replace(ROOM, free=int(found.with_micro_batch(4).peak / 0.85) + 1))
    assert (tight.largest_micro_batch(8), tight.largest_micro_batch(8, 2)) == (4, 2)
    assert replace(found, room=replace(ROOM, free=1000)).largest_micro_batch(8) is None


def test_a_rule_goes_through_its_measurements() -> None:
    rule = Growth(100.0, 7.0, 0.25)
    points = [(r, w, rule.bytes(r, w)) for r, w in ((4, 32), (2, 32), (2, 64), (2, 96))]

    assert Growth.through(points).bytes(8, 4096) == pytest.approx(rule.bytes(8, 4096), rel=1e-9)
    straight = [(r, w, 100.0 + 7.0 * r * w - w) for r, w, _ in points]
    assert Growth.through(straight).pair >= 0.0
