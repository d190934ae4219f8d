"""Measures what our TRL class adds to a step of TRL's GRPOTrainer, and what it saves, stage by stage in one run.

All contenders generate the same responses with the same model and train on them, and they take turns. A stage's time
leaves out the stages that it calls. The model is small and its forwards are cheap, so the shares of our stages are
upper bounds.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM

pytest.importorskip("trl")

from trl import GRPOConfig, GRPOTrainer

from maestro_fast.integrations.trl import MaestroGRPOTrainer
from tests.tiny import tiny_tokenizer

G, PROMPTS, LENGTH, ROUNDS = 8, 2, 32, 5

# The methods of the trainer that are timed, each with its stage and whether the stage is ours.
STAGES = {
    "_generate": ("generation", False),
    "_get_per_token_logps_and_entropies": ("forward for log-probs", False),
    "_calculate_rewards": ("rewards", False),
    "_generate_and_score_completions": ("TRL: padding, advantages, log", False),
    "_compute_loss": ("loss from log-probs", False),
    "backward": ("backward", False),
    "_context": ("hidden states", True),
    "_weigh": ("weights", True),
    "_finish": ("advantages, policy, log", True),
}


@dataclass
class Contender:
    """A trainer whose stages are timed.

    Attributes:
        name: The name in the table.
        trainer: The trainer.
        beside: The name of the contender that does the same step without our class.
        rounds: Seconds by stage, for each round.
    """

    name: str
    trainer: Any
    beside: str
    rounds: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.backward = lambda loss: loss.backward()
        self.clock = Clock()
        for method, (stage, _) in STAGES.items():
            if hasattr(self.trainer, method):
                setattr(self.trainer, method, self.clock.timed(stage, getattr(self.trainer, method)))

    def step(self) -> dict[str, Any]:
        """Makes one generation batch and the gradient of one update, and returns the batch."""
        trainer = self.trainer
        torch.manual_seed(0)
        self.clock.seconds.clear()
        rows = [trainer.train_dataset[i] for i in range(PROMPTS) for _ in range(G)]
        output: dict[str, Any] = trainer._generate_and_score_completions(rows)
        trainer.backward(trainer._compute_loss(trainer.model, output))
        trainer.model.zero_grad()
        self.rounds.append(dict(self.clock.seconds))
        return output

    def milliseconds(self, stage: str) -> float:
        """The median of a stage over the rounds."""
        return 1e3 * median(seconds.get(stage, 0.0) for seconds in self.rounds)

    @property
    def total(self) -> float:
        """The median of the whole step over the rounds, in milliseconds."""
        return 1e3 * median(sum(seconds.values()) for seconds in self.rounds)


class Clock:
    """Adds up the seconds of each stage, without those of the stages that it calls."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def timed(self, stage: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps ``method`` so that its time is added to ``stage``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self.seconds[stage] += spent - self._inner.pop()
                self._inner[-1] += spent

        return run


def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 8192, "head_dim": 32}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, eos_token_id=0, pad_token_id=1, bos_token_id=None))


def first(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [float(ids[0] % 7) for ids in completion_ids]


def last(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [float(ids[-1] % 5) for ids in completion_ids]


def contenders(folder: Path) -> list[Contender]:
    """TRL's trainer and ours, with one update per batch and with two, where hidden states come free."""

    def make(cls: type, iterations: int, **options: Any) -> Any:
        args = GRPOConfig(
            str(folder),
            per_device_train_batch_size=G * PROMPTS,
            num_generations=G,
            max_completion_length=LENGTH,
            num_iterations=iterations,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        data = Dataset.from_list([{"prompt": f"Tell a story about the sea, number {i}."} for i in range(PROMPTS)])
        return cls(model(), [first, last], args, data, processing_class=tiny_tokenizer(), **options)

    once, twice = "TRL, one update", "TRL, two updates"
    return [
        Contender(once, make(GRPOTrainer, 1), once),
        Contender("equal", make(MaestroGRPOTrainer, 1), once),
        Contender("conductor", make(MaestroGRPOTrainer, 1, weights="conductor"), once),
        Contender(twice, make(GRPOTrainer, 2), twice),
        Contender("conductor, h free", make(MaestroGRPOTrainer, 2, weights="conductor"), twice),
        Contender("and our loss", make(MaestroGRPOTrainer, 2, weights="conductor", loss="maestro_fast"), twice),
    ]


def table(found: list[Contender]) -> str:
    """A table of milliseconds by stage, with the whole step as a multiple of TRL's own."""
    totals = {contender.name: contender.total for contender in found}
    lines = [f"\n{'median ms':32}" + "".join(f"{contender.name:>18}" for contender in found)]
    for stage, ours in STAGES.values():
        marked = f"{'+ ' if ours else '  '}{stage}"
        lines.append(f"{marked:32}" + "".join(f"{contender.milliseconds(stage):18.2f}" for contender in found))
    lines.append(f"{'  all':32}" + "".join(f"{total:18.2f}" for total in totals.values()))
    ratios = (totals[contender.name] / totals[contender.beside] for contender in found)
    lines.append(f"{'  as a multiple of TRL':32}" + "".join(f"{ratio:18.3f}" for ratio in ratios))
    added = (sum(c.milliseconds(stage) for stage, ours in STAGES.values() if ours) / c.total for c in found)
    lines.append(f"{'  share of what has a +':32}" + "".join(f"{share:18.2%}" for share in added))
    return "\n".join(lines)


@pytest.mark.filterwarnings("ignore")
def test_a_step_of_trl(capsys: Any, tmp_path: Path) -> None:
    found = contenders(tmp_path)
    outputs = [contender.step() for contender in found]
    for output in outputs:  # a step with a wrong result is not timed
        assert torch.equal(output["completion_ids"], outputs[0]["completion_ids"])
    torch.testing.assert_close(outputs[1]["advantages"], outputs[0]["advantages"], rtol=1e-5, atol=1e-6)
    for contender in found:
        contender.rounds.clear()
    for _ in range(ROUNDS):
        for contender in found:
            contender.step()
    with capsys.disabled():
        print(table(found))
