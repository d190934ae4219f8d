"""Repeats the quickstart's training with other seeds: ``python -m maestro_fast.quickstart.seeds --seeds 101 ... 110``.

The quickstart shows one run of each arm. What it shows holds only if other seeds say the same, so here everything that
is random follows from the seed: both tiny models, the order of the prompts, the labels and the sampling. The prompts
that are held out stay the same. A run that was killed goes on with the arms that are missing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maestro_fast.evals.jobs import Job, run_jobs
from maestro_fast.evals.results import Result, by_arm
from maestro_fast.evals.statistics import paired_difference
from maestro_fast.quickstart.arms import ANCHORED, ARMS, EXAMPLE, example_config, run_config
from maestro_fast.quickstart.held_out import Utilities, split, utilities
from maestro_fast.quickstart.model import make_checkpoint
from maestro_fast.quickstart.reward_model import make_reward_model
from maestro_fast.reporting import read_jsonl
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.training import DataConfig, load_prompts, parse_config

WARM_START, MODULE = "warm_start", "maestro_fast.quickstart.seeds"
MINUTES = {WARM_START: 1.5, ANCHORED: 2.0}  # roughly, on a core of its own; other arms take 1.8


def made(payload: Mapping[str, Any]) -> list[Result]:
    """Makes both tiny models of a seed, and measures the policy before training.

    Args:
        payload: "folder", where the seeds have their folders, and "seed".
    """
    seed, out = int(payload["seed"]), _folder(payload)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    make_checkpoint(EXAMPLE / "prompts.jsonl", out / "model", seed=seed)
    make_reward_model(EXAMPLE, out / "reward_model", seed=seed)
    split(EXAMPLE / "prompts.jsonl", out, None)
    return [_result(WARM_START, seed, _measured(out, out / "model"))]


def trained(payload: Mapping[str, Any]) -> list[Result]:
    """Trains an arm of a seed from the models that ``made`` left, and measures its policy.

    Args:
        payload: as for ``made``, and "arm", a key of ``ARMS``.
    """
    seed, out, arm = int(payload["seed"]), _folder(payload), payload["arm"]
    raw = run_config(out, arm, _settings(seed))
    shutil.rmtree(out / arm, ignore_errors=True)
    recorded_train(raw)
    lengths = [row["length"] for row in read_jsonl(out / arm / "rollouts.jsonl")]
    return [_result(arm, seed, _measured(out, out / arm / "final"), sum(lengths))]


def _settings(seed: int) -> dict[str, Any]:
    """What a run of this seed changes in the bundled config."""
    return {"seed": seed, "anchor.labels.seed": seed, "trainer.disable_tqdm": True}


def _folder(payload: Mapping[str, Any]) -> Path:
    return Path(payload["folder"]) / f"seed{payload['seed']}"


def _measured(out: Path, model: Path) -> Utilities:
    """The utility of the policy in the folder ``model`` on the held-out prompts."""
    raw = example_config(out)
    return utilities(raw, model, load_prompts(DataConfig(str(out / "held_out.jsonl")), parse_config(raw).chat))


def _result(arm: str, seed: int, found: Utilities, tokens: int = 0) -> Result:
    return Result(arm, seed, {}, found.mean_N.mean().item(), found.by_family(), tokens=tokens)


def run(seeds: Sequence[int], folder: Path, workers: int) -> list[Result]:
    """Trains all arms with each of the seeds, and returns the results of those that were there already, too.

    Args:
        seeds: the seeds.
        folder: where models, runs and results.jsonl are.
        workers: the number of processes, each on one thread.

    Raises:
        RuntimeError: trainings failed, see ``run_jobs``.
    """
    common = [{"folder": str(folder.absolute()), "seed": seed} for seed in seeds]
    warm = [Job(f"{WARM_START}-{own['seed']}", own, MINUTES[WARM_START]) for own in common]
    arms = [Job(f"{arm}-{own['seed']}", {**own, "arm": arm}, MINUTES.get(arm, 1.8)) for own in common for arm in ARMS]
    folder.mkdir(parents=True, exist_ok=True)
    found = run_jobs(warm, f"{MODULE}:made", folder, workers=workers, title="warm starts")
    found |= run_jobs(arms, f"{MODULE}:trained", folder, workers=workers, title="trainings")
    return [result for results in found.values() for result in results]


def table(results: Sequence[Result]) -> str:
    """A Markdown table with a row for each arm: means over the seeds with 95 % intervals, paired by seed."""
    arms = by_arm(results, {})
    seeds = sorted(arms[WARM_START])
    values = {arm: torch.tensor([own[seed].utility for seed in seeds]) for arm, own in arms.items()}
    families = list(arms[WARM_START][seeds[0]].families)
    names = {WARM_START: "warm start"} | {arm: own.label for arm, own in ARMS.items()}
    head = ["policy", "utility", "above the warm start", "seeds that rose", "anchored minus it", *families]
    rows = [head, ["---"] * len(head)]
    for arm, name in names.items():
        rise = values[arm] - values[WARM_START]
        means = [sum(own.families[family] for own in arms[arm].values()) / len(seeds) for family in families]
        own, zero = values[arm], torch.zeros(len(seeds))
        rows.append(
            [
                name,
                _interval(own, zero, "{:.3f}"),
                "" if arm == WARM_START else _interval(own, values[WARM_START]),
                "" if arm == WARM_START else f"{int((rise > 0).sum())} of {len(seeds)}",
                "" if arm == ANCHORED else _interval(values[ANCHORED], own),
                *(f"{mean:.2f}" for mean in means),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _interval(ours: Tensor, theirs: Tensor, form: str = "{:+.3f}") -> str:
    """The mean of the differences with its 95 % interval."""
    gap = paired_difference(ours, theirs)
    return f"{form.format(gap.mean)} ± {gap.half_width:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the seeds, prints the table, and writes the results."""
    parser = argparse.ArgumentParser(prog="python -m maestro_fast.quickstart.seeds", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(101, 111)), help="default: 101 to 110")
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart-seeds"), help="models, runs and results")
    parser.add_argument("--workers", type=int, default=2, help="processes with a thread each (default: 2)")
    parser.add_argument("--json", type=Path, help="the file that the results are written to")
    options = parser.parse_args(arguments)
    results = run(options.seeds, options.folder, options.workers)
    print(table(results))
    if options.json:
        rows = [result.as_json() for result in results]
        text = json.dumps({"seeds": options.seeds, "results": rows}, indent=1, allow_nan=False)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
