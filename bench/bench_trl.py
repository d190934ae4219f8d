"""Measures what our TRL class adds to a step of TRL's GRPOTrainer, and what it saves, stage by stage in one run.

    python -m pytest bench/bench_trl.py [--model FOLDER] [--rounds N]

All contenders generate the same responses with the same model and train on them, and they take turns. A stage's time
leaves out the stages that it calls. The model is a small random one whose forwards are cheap, so the shares of our
stages are upper bounds, or the checkpoint in --model. A ratio is the geometric mean of the rounds' ratios, with its
95 % interval by Student's t. The seconds of every round go to the file that BENCH_JSON names.
"""

from __future__ import annotations

import math
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
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from bench.tables import record
from maestro_fast.evals.statistics import paired_difference

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
        trainer.model.zero_grad()
        trainer.backward(trainer._compute_loss(trainer.model, output))
        self.rounds.append(dict(self.clock.seconds))
        return output

    def milliseconds(self, stage: str) -> float:
        """The median of a stage over the rounds."""
        return 1e3 * median(seconds.get(stage, 0.0) for seconds in self.rounds)

    def totals(self, *, generation: bool = True) -> list[float]:
        """The seconds of the whole step in each round, with or without its generation."""
        left_out = set() if generation else {STAGES["_generate"][0]}
        return [sum(s for stage, s in seconds.items() if stage not in left_out) for seconds in self.rounds]


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


def model(checkpoint: str | None) -> Any:
    if checkpoint is not None:
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 8192, "head_dim": 32}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, eos_token_id=0, pad_token_id=1, bos_token_id=None))


def first(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [float(ids[0] % 7) for ids in completion_ids]


def last(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [float(ids[-1] % 5) for ids in completion_ids]


def contenders(folder: Path, checkpoint: str | None) -> list[Contender]:
    """TRL's trainer and ours, with one update per batch and with two, where hidden states come free."""
    tokenizer = tiny_tokenizer() if checkpoint is None else AutoTokenizer.from_pretrained(checkpoint)

    def make(cls: type, iterations: int, **options: Any) -> Any:
        args = GRPOConfig(
            str(folder),
            per_device_train_batch_size=G * PROMPTS,
            num_generations=G,
            max_completion_length=LENGTH,
            generation_kwargs={"min_new_tokens": LENGTH},  # No response ends early, which would leave TRL with padding.
            num_iterations=iterations,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        data = Dataset.from_list([{"prompt": f"Tell a story about the sea, number {i}."} for i in range(PROMPTS)])
        return cls(model(checkpoint), [first, last], args, data, processing_class=tokenizer, **options)

    once, twice = "TRL, one update", "TRL, two updates"
    return [
        Contender(once, make(GRPOTrainer, 1), once),
        Contender("equal", make(MaestroGRPOTrainer, 1), once),
        Contender("conductor", make(MaestroGRPOTrainer, 1, weights="conductor"), once),
        Contender("our head and loss", make(MaestroGRPOTrainer, 1, loss="maestro_fast"), once),
        Contender(twice, make(GRPOTrainer, 2), twice),
        Contender("conductor, h free", make(MaestroGRPOTrainer, 2, weights="conductor"), twice),
        Contender("and our loss", make(MaestroGRPOTrainer, 2, weights="conductor", loss="maestro_fast"), twice),
    ]


def table(found: list[Contender]) -> str:
    """A table of milliseconds by stage, with the whole step as a multiple of TRL's own."""
    by_name = {contender.name: contender for contender in found}
    lines = [f"\n{'median ms':28}" + "".join(f"{contender.name:>19}" for contender in found)]
    for stage, ours in STAGES.values():
        marked = f"{'+ ' if ours else '  '}{stage}"
        lines.append(f"{marked:28}" + "".join(f"{contender.milliseconds(stage):19.2f}" for contender in found))
    for name, generation in (("all", True), ("all but generation", False)):
        totals = [1e3 * median(contender.totals(generation=generation)) for contender in found]
        lines.append(f"{'  ' + name:28}" + "".join(f"{total:19.2f}" for total in totals))
        cells = "".join(f"{_multiple(x, by_name[x.beside], generation=generation):>19}" for x in found)
        lines.append(f"{'  as a multiple of TRL':28}{cells}")
    added = (
        sum(c.milliseconds(stage) for stage, ours in STAGES.values() if ours) / (1e3 * median(c.totals()))
        for c in found
    )
    lines.append(f"{'  share of what has a +':28}" + "".join(f"{share:19.2%}" for share in added))
    return "\n".join(lines)


def _multiple(ours: Contender, theirs: Contender, *, generation: bool) -> str:
    """How many times as long as ``theirs`` a step of ``ours`` takes, with its interval."""
    if ours is theirs:
        return "1"
    logs = (torch.tensor(each.totals(generation=generation)).log() for each in (ours, theirs))
    found = paired_difference(*logs)
    return f"{math.exp(found.mean):.2f} [{math.exp(found.low):.2f}, {math.exp(found.high):.2f}]"


@pytest.mark.filterwarnings("ignore")
def test_a_step_of_trl(capsys: Any, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    checkpoint = pytestconfig.getoption("--model")
    found = contenders(tmp_path, checkpoint)
    outputs = [contender.step() for contender in found]
    for output in outputs:  # a step with a wrong result is not timed
        assert torch.equal(output["completion_ids"], outputs[0]["completion_ids"])
    trl, equal, _, sweep, *_ = found
    torch.testing.assert_close(outputs[1]["advantages"], outputs[0]["advantages"], rtol=1e-5, atol=1e-6)
    for ours in (equal, sweep):
        for mine, theirs in zip(*(x.trainer.model.parameters() for x in (ours, trl)), strict=True):
            assert (mine.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm()
    for contender in found:
        contender.rounds.clear()
    for _ in range(pytestconfig.getoption("--rounds") or ROUNDS):
        for contender in found:
            contender.step()
    sizes = {"prompts": PROMPTS, "group": G, "completion_tokens": LENGTH}
    rounds = {contender.name: contender.rounds for contender in found}
    record({"op": "trl_step, CPU", "checkpoint": checkpoint is not None, "sizes": sizes, "seconds": rounds})
    with capsys.disabled():
        print(table(found))
