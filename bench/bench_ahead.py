"""Times training steps with a vLLM server on the CPU, with the next batch sampled ahead (``ahead: 1``) and without.

    python -m bench.bench_ahead [--model FOLDER] [--rounds N] [--steps N] [--prompts N] [--tokens N]

It needs two cores, and an environment with vLLM for the CPU, such as the one that ``make test-vllm`` sets up. The
server is pinned to one core and the trainer to the other. All runs train the same model on the same prompts; a round
has one with and one without, in turn first. Only the middle steps of a run count: not the first two, in which all is
slow and nothing has been sampled ahead yet, nor the last, which has no next batch.

Without, a step takes the wait for the responses and then the rest; with, at best the longer of the two, so the defaults
make both about as long. 0.5 would be perfect then, but the sync of the weights, in which both sides take part, cannot
overlap. It counts as waiting without, and as a part of the rest with. A ratio is the geometric mean of the rounds'
ratios of mean step times, with its 95 % interval by Student's t.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.tables import record
from maestro_fast.evals.statistics import paired_difference
from maestro_fast.training import parse_config, train
from tests.tiny import tiny_tokenizer
from tests.vllm_serving import Serving

WARM_UP = 2  # steps
GROUP_SIZE = 8


def random_model(folder: Path) -> Path:
    """A Llama of 11 million parameters with random weights, large enough that its matrix products cost something."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=384,
        intermediate_size=1056,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        eos_token_id=0,
        bos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def config_of(options: argparse.Namespace, model: Path, url: str, folder: Path, ahead: int) -> dict[str, Any]:
    """The run: rewards that cost nothing, so that sampling and training are what takes time."""
    data = folder / "prompts.jsonl"
    rows = [{"prompt": f"Tell story number {i} about the sea."} for i in range(64)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    weights = folder / "weights"
    return {
        "run_dir": str(Path(tempfile.mkdtemp(dir=folder)) / "run"),
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"path": str(data)},
        "rewards": [{"type": "length", "name": name, "target": target} for name, target in (("a", 40), ("b", 400))],
        "sampling": {"group_size": GROUP_SIZE, "max_new_tokens": options.tokens},
        "batch": {"prompts_per_batch": options.prompts, "micro_batch": GROUP_SIZE},
        "loss": {"sampler_correction": "token_truncate"},
        "generation": {"type": "vllm_server", "url": url, "weights": "folder", "folder": str(weights), "ahead": ahead},
        "trainer": {
            "max_steps": WARM_UP + options.steps + 1,
            "learning_rate": 1e-5,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        },
    }


def timed(raw: dict[str, Any]) -> dict[str, float]:
    """Trains once. Returns the mean seconds of the steps that count: in total, waiting for responses, and syncing."""
    timings: list[dict[str, float]] = []

    def note(timing: dict[str, float]) -> None:
        timings.append(timing)
        print(f"  step {timing['step']:.0f}: {shown(timing)}", flush=True)

    train(parse_config(raw), raw, timing_observers=[note])
    counted = timings[WARM_UP:-1]
    return {name: statistics.mean(line.get(name, 0.0) for line in counted) for name in ("total", "generate", "sync")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint, else a random model")
    parser.add_argument("--rounds", type=int, default=4, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=8, help="steps of a run that count")
    parser.add_argument("--prompts", type=int, default=6, help=f"prompts of a batch, with {GROUP_SIZE} responses each")
    parser.add_argument("--tokens", type=int, default=48, help="the most tokens of a response")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("bench_ahead: one core, expected two: one for the server and one for the trainer")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # The server has to end as well.
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    rounds: list[dict[int, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, serving = Path(name), Serving(Path(name))
        serving.model = options.model or random_model(folder / "random")
        try:
            os.sched_setaffinity(0, cores[:1])  # The server inherits its core.
            serving.start()
            os.sched_setaffinity(0, cores[1:2])
            for i in range(options.rounds):
                found = {}
                for ahead in (i % 2, 1 - i % 2):
                    found[ahead] = timed(config_of(options, serving.model, serving.url, folder, ahead))
                    print(f"round {i + 1}, ahead: {ahead}: " + shown(found[ahead]), flush=True)
                rounds.append(found)
        finally:
            serving.kill()
    print(summary(rounds))


def shown(seconds: dict[str, float]) -> str:
    rest = seconds["total"] - seconds["generate"]
    return (
        f"{seconds['total']:.2f} s, of which {seconds['generate']:.2f} s waiting for responses, {rest:.2f} s the rest "
        f"({seconds.get('sync', 0.0):.2f} s sync)"
    )


def summary(rounds: list[dict[int, dict[str, float]]]) -> str:
    """The ratio of the step times, and what it could be at best with these times of sampling and the rest."""
    with_1, without = (
        torch.tensor([found[ahead]["total"] for found in rounds], dtype=torch.float64).log() for ahead in (1, 0)
    )
    waits = statistics.mean(found[0]["generate"] for found in rounds)
    total = statistics.mean(found[0]["total"] for found in rounds)
    best = max(waits, total - waits) / total
    record({"bench": "ahead", "rounds": [{f"ahead_{k}": v for k, v in found.items()} for found in rounds]})
    if len(rounds) < 2:
        return f"step time with ahead: 1 over without: {math.exp(with_1.item() - without.item()):.3f} (best {best:.2f})"
    gap = paired_difference(with_1, without)
    low, high = math.exp(gap.mean - gap.half_width), math.exp(gap.mean + gap.half_width)
    return (
        f"step time with ahead: 1 over without: {math.exp(gap.mean):.3f}, 95 % [{low:.3f}, {high:.3f}] over "
        f"{len(rounds)} rounds; with the times of the runs without, {best:.2f} is the best that overlap can give"
    )


if __name__ == "__main__":
    main()
