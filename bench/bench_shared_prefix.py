"""Times scoring and training on the responses to one prompt on the CPU, with the prompt computed once and G times.

    python -m pytest bench/bench_shared_prefix.py [--model FOLDER] [--groups PxRxG,...] [--rounds N]

The G responses of R tokens have a prompt of P tokens in common. The contenders:

    shared   the prompt and then its responses, each of which sees the prompt and itself
    packed   one prompt for each response, several responses to a row; with equal lengths a row holds one
    padded   one prompt and one response to a row
    auto     what ``Layouts`` chooses between shared and packed by its estimate of the cost
    TRL      GRPOTrainer's own scoring and its own loss, without gradient checkpointing; on devices without Triton its
             head scores prompts, too

The model is a random one of SmolLM2-135M's shape, or the checkpoint in --model. All contenders train the same model on
the same tokens and, before they are timed, give the same log-probs and gradients.

Contenders take turns, in another order in each round. A time is the processor time of the process, which does not count
what other processes take. A ratio is the geometric mean of the rounds' ratios, with its 95 % interval by Student's t.
The memory is that of the tensors that are alive at once, counted operation by operation; the weights are left out, and
gradients count. What an operation allocates for itself is not seen.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bench.shared_prefix import Batch, Group, Step, step
from bench.tables import emit
from maestro_fast.evals.statistics import paired_difference
from maestro_fast.model import Layouts
from maestro_fast.model.layouts import cost_of_a_pair
from maestro_fast.model.rows import Rows
from tests.tiny import tiny_tokenizer
from tests.training.live_memory import LiveMemory

pytest.importorskip("trl")

from trl import GRPOConfig, GRPOTrainer

GROUPS = "16x32x8,64x16x4,256x32x8"
ROUNDS = 4
MIB = 1 << 20
SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
# The largest differences from padded rows: of log-probs and entropies, and relative ones of the gradient of a weight.
LOGPROBS, GRADIENTS = 1e-4, 1e-4


def trl_trainer(model: Any, group: Group, folder: Path) -> Any:
    """TRL's trainer of the model, which is told that it accumulates no gradients."""
    args = GRPOConfig(
        str(folder),
        per_device_train_batch_size=group.G,
        num_generations=group.G,
        max_completion_length=group.R,
        loss_type="dapo",
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    data = Dataset.from_list([{"prompt": "Tell a story about the sea."}])
    trainer = GRPOTrainer(model, _no_reward, args, data, processing_class=tiny_tokenizer())
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _no_reward(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [0.0] * len(completion_ids)


def trl_step(trainer: Any, batch: Batch) -> Step:
    """Scores and trains with TRL's forward and TRL's loss."""
    _, R, G = batch.group
    ids = torch.cat([batch.prompt_GP, batch.completion_GR], 1)
    with torch.no_grad():
        logprobs_GR, entropies_GR = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), R, batch_size=G, compute_entropy=True
        )[:2]
    inputs = {
        "prompt_ids": batch.prompt_GP,
        "prompt_mask": torch.ones_like(batch.prompt_GP),
        "completion_ids": batch.completion_GR,
        "completion_mask": torch.ones_like(batch.completion_GR),
        "advantages": batch.advantages_G,
        "old_per_token_logps": logprobs_GR,
        "num_items_in_batch": torch.tensor(G * R),
    }
    trainer._compute_loss(trainer.model, inputs).backward()
    return Step(logprobs_GR.flatten(), entropies_GR.flatten())


@dataclass
class Contender:
    """What is timed.

    Attributes:
        name: The name in the table.
        step: Makes one step.
        rows: The rows of the model's input; None if TRL makes them.
        seconds: The processor time of each round.
        peak: The bytes of tensors that are alive at once, without the weights.
    """

    name: str
    step: Callable[[], Step]
    rows: Rows | None = None
    seconds: list[float] = field(default_factory=list)
    peak: int = 0


def contenders(model: Any, batch: Batch, folder: Path) -> dict[str, Contender]:
    """All contenders by name, and TRL's last, since its trainer changes the model's forward."""
    cost = cost_of_a_pair(model.config.get_text_config())
    layouts = {
        "shared": Layouts("packed", "always", cost),
        "packed": Layouts("packed"),
        "padded": Layouts("padded"),
        "auto": Layouts("packed", "auto", cost),
    }

    def of(name: str) -> Contender:
        return Contender(name, lambda: step(model, batch, layouts[name]), layouts[name].rows_of(batch.sequences))

    trainer = trl_trainer(model, batch.group, folder)
    return {**{name: of(name) for name in layouts}, "TRL": Contender("TRL", lambda: trl_step(trainer, batch))}


def check(model: Any, found: dict[str, Contender]) -> None:
    """Makes a step with each contender, and refuses to time one that does not compute what padded rows compute.

    This is also the step in which the memory is counted.
    """
    weights = sum(x.untyped_storage().nbytes() for x in (*model.parameters(), *model.buffers()))
    expected: tuple[Step, list[Tensor]] | None = None
    for name in sorted(found, key=lambda name: name != "padded"):
        model.zero_grad()
        with LiveMemory() as memory:
            made = found[name].step()
        found[name].peak = memory.peak - weights
        gradients = [x.grad for x in model.parameters()]
        if expected is None:
            expected = made, [x.clone() for x in gradients]
        for one, other in zip(made, expected[0], strict=True):
            error = ((one - other).abs() / other.abs().clamp(min=1.0)).max().item()
            assert error < LOGPROBS, f"{name}: log-probs or entropies differ from those of padded rows by {error:.2g}"
        for (weight, _), one, other in zip(model.named_parameters(), gradients, expected[1], strict=True):
            error = ((one - other).norm() / other.norm()).item()
            assert error < GRADIENTS, f"{name}: the gradient of {weight} differs from padded rows' by {error:.2g}"
    model.zero_grad()


def one_round(model: Any, found: dict[str, Contender]) -> None:
    """Times a step of each contender, in another order each time, so that none always comes after the same one."""
    for contender in random.sample(list(found.values()), len(found)):
        model.zero_grad()
        start = time.process_time()
        contender.step()
        contender.seconds.append(time.process_time() - start)


class Ratio(NamedTuple):
    """A ratio of times with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @staticmethod
    def of(ours: Contender, other: Contender) -> Ratio:
        gap = paired_difference(*(torch.tensor(x.seconds).log() for x in (ours, other)))
        return Ratio(math.exp(gap.mean), math.exp(gap.low), math.exp(gap.high))


def targets(group: Group, found: dict[str, Contender], chosen: str) -> Iterator[str]:
    """A line for each target that the case has, and for what it says of the rule."""
    shared, packed, padded, auto = (found[x] for x in ("shared", "packed", "padded", "auto"))
    others = (padded, packed)
    bound = {(256, 32, 8): 0.3, (16, 32, 8): 1.0}.get(tuple(group))
    for other in others if bound else ():
        ratio = Ratio.of(shared, other)
        verdict = "met" if ratio.high <= bound else "MISSED" if ratio.low > bound else "open, it is in the interval"
        yield f"target: shared / {other.name} <= {bound:g}: {ratio}, {verdict}"
    if group == (256, 32, 8):
        least = min(x.peak for x in others)
        yield f"target: less memory: {shared.peak / least:.2f} of it, {'met' if shared.peak < least else 'MISSED'}"
    best = min(others, key=lambda x: Ratio.of(x, padded).value)
    ratio = Ratio.of(auto, best)
    verdict = "met" if ratio.low <= 1.0 else "MISSED"
    yield f"target: auto, which chose {chosen}, / {best.name} <= 1 within the interval: {ratio}, {verdict}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs the benchmark with every group of --groups."""
    try:
        groups = [Group.parse(text) for text in (metafunc.config.getoption("--groups") or GROUPS).split(",")]
    except ValueError as error:
        raise pytest.UsageError(f"--groups: {error}") from None
    metafunc.parametrize("group", groups, ids=str)


@pytest.fixture(scope="module")
def model(pytestconfig: pytest.Config) -> Any:
    """The checkpoint of --model, or a random model, in float32."""
    if folder := pytestconfig.getoption("--model"):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M, attn_implementation="sdpa"))


@pytest.mark.filterwarnings("ignore")
def test_score_and_train(
    benchmark: Any, capsys: Any, tmp_path: Path, pytestconfig: pytest.Config, model: Any, group: Group
) -> None:
    forward = model.forward
    found = contenders(model, Batch(group, model.config.vocab_size), tmp_path)
    check(model, found)
    of_auto = found["auto"].rows
    chosen = "shared" if of_auto is not None and of_auto.trees is not None else "packed"
    rounds = pytestconfig.getoption("--rounds") or ROUNDS
    random.seed(0)
    benchmark.pedantic(lambda: one_round(model, found), rounds=rounds, iterations=1)
    model.forward = forward  # TRL's trainer has put its own in this place.

    tokens = {name: x.rows.input_ids.numel() if x.rows else group.tokens for name, x in found.items()}
    ratios = {x.name: (Ratio.of(x, found["padded"]), Ratio.of(x, found["packed"])) for x in found.values()}
    lines = [group.title]
    for name, x in found.items():
        of_padded, of_packed = (str(ratio) if ratio.value != 1 else "1" for ratio in ratios[name])
        middle = sorted(x.seconds)[len(x.seconds) // 2]
        shown = f"auto: {chosen}" if name == "auto" else name
        lines.append(f"  {shown:16}{tokens[name]:8}{middle:10.2f}{of_padded:>26}{of_packed:>26}{x.peak / MIB:12.0f}")
    lines += [f"  {line}" for line in targets(group, found, chosen)]
    benchmark.extra_info |= {
        "tokens": tokens,
        "seconds": {name: x.seconds for name, x in found.items()},
        "of_padded": {name: ratio for name, (ratio, _) in ratios.items()},
        "peak_bytes": {name: x.peak for name, x in found.items()},
        "auto": chosen,
    }
    size = sum(x.numel() for x in model.parameters()) / 1e6
    title = (
        f"Score and train on one group, {type(model).__name__} of {size:.0f} M parameters, float32, "
        f"{torch.get_num_threads()} thread, {rounds} rounds; processor time; MiB of tensors beyond the weights"
    )
    names = ("tokens", "median s"), ("/ padded, 95 %", "/ packed, 95 %")
    header = f"  {'':18}{names[0][0]:>8}{names[0][1]:>10}{names[1][0]:>26}{names[1][1]:>26}{'peak MiB':>12}"
    emit(capsys, title, lines, header=[header])
