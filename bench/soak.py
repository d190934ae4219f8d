"""Trains a tiny model for many steps and tells what grows: memory, time, checkpoints, files, what Python holds.

    python -m bench.soak --steps 2000 --out DIR [--weights anchored|conductor] [--every N]

The run is a real one: a random Qwen3 of two layers and width 32 answers 64 prompts, all records are written
(rollouts.jsonl, metrics.jsonl, timings.jsonl), every fiftieth step has a checkpoint and every hundredth an evaluation.
Half of the prompts have a known utility, so the anchored Conductor learns and its replay, here of 256 groups at most,
is full after some 130 steps. Everything runs in one process with one thread.

What is measured, and how:

memory        Resident memory after every step. Its slope is a straight line through the medians of twenty blocks of the
              last three quarters of the run, with the 95 % interval by Student's t; in some steps the allocator holds a
              few MiB more for a moment, which a median leaves out. The first quarter is left out because the log in
              memory fills up in it (``training.progress.LOG_LINES``).
heap          Every ``--every`` steps, behind a collection of garbage: the bytes that malloc has handed out and the
              blocks that Python has, which say more than resident memory of what is really held; live tensors, objects
              that the collector knows, open files, threads. The notes of this program are 7 blocks and 0.3 KiB a step.
steps         Processor and wall seconds from one step's beginning to its end, without checkpoints and evaluations. The
              ratio is the median of the last tenth over that of the second tenth; the first tenth is warm-up, in which
              the replay fills. Where others use the machine, processor seconds grow, too: the caches are shared.
              So before each step a fixed piece of work is timed, and ``steady`` is the ratio in units of it.
checkpoints   The bytes of every file of each checkpoint, where it lies when the step after it begins.

``DIR/soak.json`` gets all of it, ``DIR/soak.png`` a plot.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import linregress, t
from transformers import TrainerCallback

from bench.tables import machine
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.training import MaestroTrainer
from tests.tiny import tiny_checkpoint

GROUP_SIZE = 4
REPLAY = 256  # labelled groups
SAVE_EVERY, EVALUATE_EVERY = 50, 100  # steps
BLOCKS = 20
MIB = 2**20

REWARDS = """
def vowels(completions, **columns):
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


def utility(completion_ids, **columns):
    return [float(sum(ids) % 17) for ids in completion_ids]
"""


def write_data(folder: Path, prompts: int = 64) -> None:
    """Writes prompts of four families, held-out ones, a reward and a utility."""
    families = ("fact", "story", "list", "rhyme")
    for name, first, count in (("train", 0, prompts), ("held_out", prompts, 8)):
        rows = [
            {"prompt": f"Tell me of thing number {i}.", "family": families[i % 4]} for i in range(first, first + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "own.py").write_text(REWARDS, encoding="utf-8")


def config_of(folder: Path, steps: int, weights: str) -> dict[str, Any]:
    """The config of the run; ``folder`` has the model and the data."""
    policies = {
        "anchored": {"type": "anchored", "capacity": REPLAY},
        "conductor": {"type": "conductor", "period": 1, "learning_rate": 0.01},
    }
    return {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"path": str(folder / "train.jsonl")},
        "rewards": [
            "format",
            {"type": "length", "name": "brevity", "target": 4},
            "entropy",
            {"type": "function", "name": "vowels", "function": f"{folder}/own.py:vowels"},
        ],
        "anchor": {"type": "function", "function": f"{folder}/own.py:utility", "labels": {"share": 0.5}},
        "weights": policies[weights],
        "sampling": {"group_size": GROUP_SIZE, "max_new_tokens": 8},
        "batch": {"prompts_per_batch": 4, "micro_batch": 4 * GROUP_SIZE},
        "evaluation": {"data": {"path": str(folder / "held_out.jsonl")}, "samples": 1},
        "alarms": [{"metric": "kl", "above": 1e9}],
        "loss": {"kl_coef": 0.01},
        "trainer": {
            "max_steps": steps,
            "learning_rate": 1e-3,
            "save_steps": SAVE_EVERY,
            "eval_steps": EVALUATE_EVERY,
            "save_total_limit": 3,
            "disable_tqdm": True,
            "use_cpu": True,
        },
    }


class Samples(TrainerCallback):
    """Notes what a run holds and takes.

    Attributes:
        steps: for each step its processor and wall seconds, the processor seconds of a fixed piece of work before it,
            and the resident memory in MiB behind it.
        objects: every few steps, what the process holds.
        checkpoints: for each checkpoint the bytes of its files.
        trainer: the trainer of the run, once it is there.
    """

    def __init__(self, run_dir: Path, every: int) -> None:
        self._run_dir, self._every = run_dir, every
        self.steps: list[dict[str, float]] = []
        self.objects: list[dict[str, int]] = []
        self.checkpoints: dict[int, dict[str, int]] = {}
        self.trainer: MaestroTrainer | None = None
        self._began, self._yardstick = (0.0, 0.0), 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look_at_checkpoints()
        self._yardstick = yardstick()
        self._began = (time.process_time(), time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        cpu, wall = time.process_time() - self._began[0], time.perf_counter() - self._began[1]
        self.steps.append(
            {
                "step": state.global_step,
                "cpu": cpu,
                "wall": wall,
                "steady": cpu / self._yardstick,
                "mib": resident() / MIB,
            }
        )
        if state.global_step % self._every == 0:
            self.objects.append({"step": state.global_step, **held(), **self._of_the_run(state)})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look_at_checkpoints()

    def _look_at_checkpoints(self) -> None:
        for folder in self._run_dir.glob("checkpoint-*"):
            step = int(folder.name.partition("-")[2])
            if step not in self.checkpoints:
                files = [path for path in folder.rglob("*") if path.is_file()]
                self.checkpoints[step] = {str(path.relative_to(folder)): path.stat().st_size for path in files}

    def _of_the_run(self, state: Any) -> dict[str, int]:
        """Sizes of what is known to hold things from step to step."""
        assert self.trainer is not None
        replay = getattr(self.trainer.step.weights, "replay", None)
        kept = {} if replay is None else {"replay_groups": len(replay), "replay_contexts": len(replay.contexts)}
        return {"log_lines": len(state.log_history), "prompt_contexts": len(self._contexts()), **kept}

    def _contexts(self) -> dict[Any, Any]:
        assert self.trainer is not None
        return self.trainer.step.prompt_contexts._known


def resident() -> int:
    """The resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class _MallocInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def heap() -> int:
    """The bytes that malloc has handed out and not got back; 0 where the C library does not tell."""
    call = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if call is None:
        return 0
    call.restype = _MallocInfo
    found = call()
    return int(found.uordblks + found.hblkhd)


def yardstick() -> float:
    """The processor seconds of a fixed piece of work of the kind that a step does: small tensors, and Python."""
    began = time.process_time()
    weight = torch.ones(64, 32, requires_grad=True)
    for _ in range(40):
        (weight @ weight.T).tanh().sum().backward()
    json.dumps(list(range(4000)))
    return time.process_time() - began


def held() -> dict[str, int]:
    """What this process holds, once the garbage is collected."""
    gc.collect()
    found = gc.get_objects()
    tensors = sum(issubclass(type(value), torch.Tensor) for value in found)
    return {
        "tensors": tensors,
        "objects": len(found),
        "heap_bytes": heap(),
        "python_blocks": sys.getallocatedblocks(),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def slope(points: list[tuple[float, float]], blocks: int = BLOCKS) -> dict[str, float]:
    """The slope per 1,000 steps of (step, value) points, and the half-width of its 95 % interval.

    The line goes through the medians of at most ``blocks`` consecutive blocks.
    """
    size = -(-len(points) // blocks)
    parts = [points[i : i + size] for i in range(0, len(points) - size + 1, size)]
    x, y = ([statistics.median(point[j] for point in part) for part in parts] for j in (0, 1))
    line = linregress(x, y)
    half = float(t.ppf(0.975, len(parts) - 2) * line.stderr)
    return {"per_1000_steps": 1000 * float(line.slope), "half_width": 1000 * half, "blocks": len(parts)}


def summary(samples: Samples) -> dict[str, Any]:
    """The figures of a run, from what was noted."""
    steps, count = samples.steps, len(samples.steps)
    tenth, late = max(1, count // 10), steps[count // 4 :]
    ratios = {
        kind: statistics.median(row[kind] for row in steps[-tenth:])
        / statistics.median(row[kind] for row in steps[tenth : 2 * tenth])
        for kind in ("cpu", "wall", "steady")
    }
    sizes = {step: sum(files.values()) for step, files in sorted(samples.checkpoints.items())}
    settled = {step: size for step, size in sizes.items() if step >= count // 4}
    objects = [row for row in samples.objects if row["step"] >= count // 4]
    return {
        "steps": count,
        "memory_mib": {"first": steps[0]["mib"], "last": steps[-1]["mib"]}
        | slope([(row["step"], row["mib"]) for row in late]),
        "heap_mib": slope([(row["step"], row["heap_bytes"] / MIB) for row in objects]),
        "step_seconds": {
            "cpu_median": statistics.median(row["cpu"] for row in steps[-tenth:]),
            "wall_median": statistics.median(row["wall"] for row in steps[-tenth:]),
            "cpu_last_tenth_over_second": ratios["cpu"],
            "wall_last_tenth_over_second": ratios["wall"],
            "steady_last_tenth_over_second": ratios["steady"],
        },
        "checkpoint_bytes": {
            "first": next(iter(sizes.values()), 0),
            "last": next(reversed(sizes.values()), 0),
            "least_of_last_three_quarters": min(settled.values(), default=0),
            "most_of_last_three_quarters": max(settled.values(), default=0),
        },
        "held_in_last_three_quarters": {
            name: {"first": objects[0][name], "last": objects[-1][name], "most": max(row[name] for row in objects)}
            for name in (objects[0] if objects else {})
            if name != "step"
        },
    }


def plot(samples: Samples, found: dict[str, Any], path: Path) -> None:
    """Draws memory, step seconds, checkpoints and what is held over the steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    (memory, seconds), (sizes, objects) = axes
    x = [row["step"] for row in samples.steps]
    memory.plot(x, [row["mib"] for row in samples.steps], lw=0.6)
    line = found["memory_mib"]
    memory.set(
        title=f"Resident memory: {line['per_1000_steps']:+.2f} ± {line['half_width']:.2f} MiB per 1,000 steps",
        ylabel="MiB",
    )
    window = max(1, len(x) // 100)
    seconds.plot(x, [row["steady"] for row in samples.steps], ".", ms=1, alpha=0.3, label="each step")
    medians = [
        statistics.median(row["steady"] for row in samples.steps[i : i + window]) for i in range(0, len(x), window)
    ]
    seconds.plot(x[::window], medians, label=f"median of {window}")
    ratio = found["step_seconds"]["steady_last_tenth_over_second"]
    seconds.set(title=f"Step time: last tenth / second tenth = {ratio:.3f}", ylabel="in units of a fixed piece of work")
    seconds.set_ylim(0, 3 * medians[-1])
    seconds.legend()
    steps = sorted(samples.checkpoints)
    names = sorted({name for files in samples.checkpoints.values() for name in files})
    largest = sorted(names, key=lambda name: -max(files.get(name, 0) for files in samples.checkpoints.values()))[:6]
    for name in largest:
        sizes.plot(steps, [samples.checkpoints[step].get(name, 0) / 1024 for step in steps], label=name)
    sizes.set(title="Checkpoint, its six largest files", ylabel="KiB", xlabel="step", ylim=(0, None))
    sizes.legend(fontsize=7)
    for name in samples.objects[0] if samples.objects else ():
        if name not in ("step", "objects", "heap_bytes", "python_blocks"):
            objects.plot([r["step"] for r in samples.objects], [r[name] for r in samples.objects], label=name)
    objects.set(title="What the process holds", ylabel="number", xlabel="step", yscale="symlog", ylim=(0, None))
    objects.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def soak(out: Path, steps: int, weights: str, every: int) -> tuple[Samples, dict[str, Any]]:
    """Makes the model and the data in ``out``, trains, and returns what was noted and its summary."""
    out.mkdir(parents=True, exist_ok=True)
    tiny_checkpoint(out / "model")
    write_data(out)
    raw = config_of(out, steps, weights)
    samples = Samples(Path(raw["run_dir"]), every)

    def attach(trainer: MaestroTrainer) -> None:
        samples.trainer = trainer

    recorded_train(raw, callbacks=[samples], attach=attach)
    return samples, summary(samples)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the model, the run and the figures")
    parser.add_argument("--weights", choices=("anchored", "conductor"), default="anchored")
    parser.add_argument("--every", type=int, default=20, help="steps between two counts of objects")
    options = parser.parse_args()
    if options.steps < 2 * BLOCKS:
        parser.error(f"--steps: {options.steps}, expected at least {2 * BLOCKS}")
    torch.set_num_threads(1)
    samples, found = soak(options.out, options.steps, options.weights, options.every)
    values = {
        "machine": machine(),
        "weights": options.weights,
        "summary": found,
        "checkpoints": {
            step: {"bytes": sum(files.values()), **files} for step, files in sorted(samples.checkpoints.items())
        },
        "objects": samples.objects,
        "steps": samples.steps[:: max(1, options.steps // 200)],
    }
    (options.out / "soak.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    plot(samples, found, options.out / "soak.png")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
