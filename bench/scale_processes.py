"""Counts and times what processes exchange in a real run, beside the formulas of ``bench/scale.py``.

``python -m bench.scale --measure DIR`` starts this program with 1, 2 and 4 processes that talk by gloo over 127.0.0.1.
Each trains some steps of a small model on fixed responses and notes every call of ``Processes``: the stage, the bytes
that this process gives, and the seconds. Before each call the processes wait for each other, and that wait is not
counted: it is the time in which some are still busy. Then they ping: all-gathers of tensors and of pickled texts of
many sizes, to which alpha and beta are fitted. So the times of the run are predicted from the pings alone. Of every
call, in the run and in the pings, the least seconds count, because other work of the machine only adds to them. Before
each ping 32 MiB are written, so that the caches are as empty as behind a forward.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback, TrainingArguments

from bench.scale import Batch, Exchange, Texts, exchanges
from bench.tables import machine
from maestro_fast.generation import SamplingConfig
from maestro_fast.ops import PolicyLossConfig
from maestro_fast.records import Prompts, Rollouts
from maestro_fast.rewards import build_anchor, build_rewards
from maestro_fast.training import BatchConfig, MaestroTrainer, Method, PromptDataset, build
from maestro_fast.training.batches import Processes
from maestro_fast.weighting import build_weight_policy
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
COUNTS = (1, 2, 4)
STEPS, WARM_UP = 14, 2
PINGS, REPEATS = (8, 1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20), 25


@dataclass(frozen=True)
class Call:
    """One exchange: who made it, whether of objects, the bytes that this process gave, and the seconds it took.

    Of figures of the log, ``figures`` has the names and over how many values each is a mean.
    """

    stage: str
    objects: bool
    size: int
    seconds: float
    figures: dict[str, int]


@dataclass(frozen=True)
class CountingProcesses(Processes):
    """Notes every exchange. With ``aligned``, the processes wait for each other before it."""

    calls: list[Call] = field(default_factory=list)
    aligned: bool = False

    def gather(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        return self._noted(False, size, lambda: super(CountingProcesses, self).gather(tensor), {})

    def gather_objects(self, values: list[Any]) -> list[Any]:
        size = len(pickle.dumps(values))
        states = [value for value in values if isinstance(value, dict)]
        figures = {name: count for state in states for name, (_, count) in state.items()}
        return self._noted(True, size, lambda: super(CountingProcesses, self).gather_objects(values), figures)

    def _noted(self, objects: bool, size: int, call: Callable[[], Any], figures: dict[str, int]) -> Any:
        if self.aligned and self.count > 1:
            torch.distributed.barrier()
        began = time.perf_counter()
        found = call()
        self.calls.append(Call(_caller(), objects, size, time.perf_counter() - began, figures))
        return found


def _caller() -> str:
    """The function that exchanges something: the first one above that is not of this file or of ``Processes``."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or frame.f_code.co_name == "gather_rows":
        frame = frame.f_back
    name: str = frame.f_code.co_qualname
    return name.partition(".")[0] if name.endswith(".__call__") else name.rpartition(".")[2]


@contextlib.contextmanager
def counted(aligned: bool = False) -> Iterator[list[Call]]:
    """Trainers that are built inside the context note their exchanges in the list."""
    calls: list[Call] = []
    own, build.Processes = build.Processes, lambda a: CountingProcesses(a, calls, aligned)  # type: ignore[misc,assignment]
    try:
        yield calls
    finally:
        build.Processes = own  # type: ignore[misc]


# --- a run on fixed responses ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What a run is made of: N, G, K, d and U, the bytes of a completion, the context, whether there is a utility."""

    prompts: int = 8
    group_size: int = 4
    rewards: int = 3
    width: int = 32
    updates: int = 1
    completion_bytes: int = 40
    context: str = "response"
    anchor: bool = False


class FixedGenerator:
    """Responses of a few tokens whose texts have a given size and differ from each other."""

    concurrent_parts = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def generate(self, model: Any, prompts: Prompts, *, seed: int) -> Rollouts:
        del model
        ids = [[20 + (7 * i + 3 * t + seed) % 200 for t in range(3 + i % 4)] for i in range(len(prompts))]
        texts = [f"{i:06d}".ljust(self.size, "x")[: self.size] for i in range(len(prompts))]
        logprobs = torch.full((sum(map(len, ids)),), -5.0)
        return Rollouts(prompts, ids, list(texts), torch.zeros(len(ids), dtype=torch.bool), logprobs)


def _rewards(count: int) -> list[Any]:
    def reward(k: int) -> Any:
        def value(completion_ids: list[list[int]], **columns: object) -> list[float]:
            return [float(sum(ids) % (3 + k)) for ids in completion_ids]

        value.__name__ = f"reward_{k}"
        return value

    return [reward(k) for k in range(count)]


def utility(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [float(sum(ids) % 11) for ids in completion_ids]


def policy(width: int) -> Any:
    """One layer, so that a forward costs little beside what is exchanged."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=320,
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=256,
            eos_token_id=0,
            bos_token_id=None,
            pad_token_id=1,
        )
    )


class Marks(TrainerCallback):
    """Notes how many calls there had been at the end of each step."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls, self.at = calls, [0]

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at.append(len(self.calls))


def rows_of(shape: Shape, steps: int) -> list[dict[str, str]]:
    """Prompts that name their number in four digits, of families with names of their own, for a run of one epoch."""
    return [{"prompt": f"prompt {i:04d}", "family": f"family {i:04d}"} for i in range(shape.prompts * steps)]


def trained(
    shape: Shape, steps: int, run_dir: Path, *, aligned: bool = False
) -> tuple[list[list[Call]], MaestroTrainer]:
    """The calls of each generation batch of a run but the first, and its trainer.

    A batch begins behind the log line of the one before, so what follows that line counts as the next batch's.
    """
    with counted(aligned) as calls:
        names = tuple(f"reward_{k}" for k in range(shape.rewards))
        marks = Marks(calls)
        args = TrainingArguments(
            output_dir=str(run_dir),
            max_steps=steps * shape.updates,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            optim="sgd",
            seed=0,
        )
        weights: dict[str, Any] = {
            "none": {"type": "equal"},
            "response": {"type": "conductor", "period": 1},
            "reference": {"type": "anchored"},
        }[shape.context]
        each = shape.prompts * shape.group_size // args.world_size // shape.updates
        trainer = MaestroTrainer(
            policy(shape.width),
            tiny_tokenizer(),
            PromptDataset(rows_of(shape, steps)),
            build_rewards(_rewards(shape.rewards)),
            build_weight_policy(weights, names, shape.width),
            args,
            Method(
                SamplingConfig(group_size=shape.group_size),
                BatchConfig(shape.prompts, each, shape.updates),
                PolicyLossConfig(),
            ),
            anchor=build_anchor(utility) if shape.anchor else None,
            generator=FixedGenerator(shape.completion_bytes),
            callbacks=[marks],
        )
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            trainer.train()
    bounds = marks.at[shape.updates :: shape.updates][:steps]  # The last line is the summary of the run.
    return [calls[a:b] for a, b in pairwise(bounds)], trainer


def expected(shape: Shape, processes: int, calls: list[Call]) -> list[Exchange]:
    """What the formula says of one generation batch of the run. Of ``calls`` it takes the figures of the log alone."""
    n = shape.prompts // processes
    return exchanges(
        Batch(
            n,
            shape.group_size,
            shape.rewards,
            shape.width,
            Texts([len("family 0000")] * n, shape.group_size),
            Texts([len("prompt 0000")] * n, shape.group_size),
            Texts([shape.completion_bytes] * (n * shape.group_size)),
            shape.updates,
            shape.context,
            shape.anchor,
            [call.figures for call in calls if call.stage == "log"],
            processes,
        )
    )


def by_stage(calls: list[Call] | list[Exchange]) -> dict[tuple[str, bool], list[int]]:
    """The bytes of each call, in order, by stage and by whether objects are exchanged."""
    found: dict[tuple[str, bool], list[int]] = {}
    for call in calls:
        sizes = (call.size,) if isinstance(call, Call) else call.sizes
        found.setdefault((call.stage, call.objects), []).extend(sizes)
    return found


# --- one process of a measurement ------------------------------------------------------------------------------------

MEASURED = {
    "small": Shape(prompts=8, group_size=4, width=256, completion_bytes=200, context="reference", anchor=True),
    "large": Shape(prompts=32, group_size=8, width=1024, completion_bytes=4000, context="reference", anchor=True),
}


def ping(processes: Processes, size: int, objects: bool) -> float:
    """The least seconds of an all-gather to which each process gives ``size`` bytes."""
    texts = ["x" * 61 + f"{i:03d}" for i in range(max(1, size // 67))] if objects else []
    tensor = torch.zeros(size, dtype=torch.uint8)
    seconds, evicting = [], torch.zeros(32 << 20, dtype=torch.int8)
    for _ in range(REPEATS):
        evicting.add_(1)
        if processes.count > 1:
            torch.distributed.barrier()
        began = time.perf_counter()
        _ = processes.gather_objects(texts) if objects else processes.gather(tensor)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def process(out: Path) -> None:
    """What one of the processes does: it trains, compares the bytes, and pings. The first one writes the results."""
    found: dict[str, Any] = {"runs": {}}
    for name, shape in MEASURED.items():
        batches, trainer = trained(shape, STEPS, out / name, aligned=True)
        processes = trainer.step.processes
        for calls in batches:
            ours, theirs = by_stage(calls), by_stage(expected(shape, processes.count, calls))
            if ours != theirs:
                raise AssertionError(f"{name}, {processes.count} processes: counted {ours}, the formula says {theirs}")
        late = batches[WARM_UP - 1 :]
        found["runs"][name] = [
            {
                "stage": same[-1].stage,
                "objects": same[-1].objects,
                "sizes": [same[-1].size],
                "seconds": min(call.seconds for call in same),
            }
            for same in zip(*late, strict=True)
        ]
    plain = Processes(processes.accelerator)
    found["pings"] = [
        {"objects": objects, "size": size, "seconds": ping(plain, size, objects)}
        for objects in (False, True)
        for size in PINGS
    ]
    if processes.rank == 0:
        (out / f"{processes.count}.json").write_text(json.dumps(found), encoding="utf-8")


# --- the measurement -------------------------------------------------------------------------------------------------


def launch(count: int, out: Path) -> dict[str, Any]:
    """Runs ``count`` processes and returns what the first one found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", "--master_addr=127.0.0.1"]
    command += [f"--master_port={port}", "-m", "bench.scale_processes", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "Error" in line]
        raise RuntimeError(f"{count} processes ended with {done.returncode}: " + "; ".join(said[:3]))
    found: dict[str, Any] = json.loads((out / f"{count}.json").read_text(encoding="utf-8"))
    return found


def fitted(pings: list[dict[str, Any]], count: int, objects: bool) -> tuple[float, float]:
    """alpha in seconds and 1 / beta in seconds a byte received: least squares of relative errors, neither below 0."""
    points = [(p["size"], p["seconds"]) for p in pings if p["objects"] == objects]
    rows = torch.tensor([[1.0, max(1, count - 1) * size] for size, _ in points], dtype=torch.float64)
    seconds = torch.tensor([s for _, s in points], dtype=torch.float64)
    scale = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    solved = torch.linalg.lstsq(rows * scale / seconds[:, None], torch.ones(len(points), 1, dtype=torch.float64))
    alpha, slope = (solved.solution[:, 0] * scale).tolist()
    return max(alpha, 0.0), max(slope, 0.0)


def predicted(run: list[dict[str, Any]], fits: dict[bool, tuple[float, float]], count: int) -> list[dict[str, Any]]:
    """The rows of a run with what the pings say of each."""
    rows = []
    for row in run:
        alpha, slope = fits[row["objects"]]
        seconds = sum(alpha + slope * max(1, count - 1) * size for size in row["sizes"])
        rows.append({**row, "predicted": seconds})
    return rows


def measure(out: Path) -> None:
    """Measures with each number of processes, prints the comparison and writes ``scale.json``."""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(), "processes": {}}
    print(f"{'run':6} {'R':>2} {'calls':>5} {'bytes given':>12} {'measured ms':>12} {'predicted ms':>13} {'ratio':>6}")
    for count in COUNTS:
        found = launch(count, out)
        fits = {objects: fitted(found["pings"], count, objects) for objects in (False, True)}
        runs = {name: predicted(run, fits, count) for name, run in found["runs"].items()}
        results["processes"][count] = {
            "alpha_beta": {
                "objects" if kind else "tensors": {"alpha_us": 1e6 * a, "ns_per_byte": 1e9 * s}
                for kind, (a, s) in fits.items()
            },
            "pings": found["pings"],
            "runs": runs,
        }
        for name, rows in runs.items():
            ours, theirs = (sum(row[key] for row in rows) for key in ("seconds", "predicted"))
            calls, size = sum(len(row["sizes"]) for row in rows), sum(sum(row["sizes"]) for row in rows)
            print(
                f"{name:6} {count:>2} {calls:>5} {size:>12,} {1e3 * ours:>12.3f} {1e3 * theirs:>13.3f} "
                f"{theirs / ours:>6.2f}",
                flush=True,
            )
    (out / "scale.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    process(Path(sys.argv[1]))
