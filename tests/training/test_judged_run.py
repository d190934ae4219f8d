"""A run with a judge as a reward and as the anchor: killed and resumed it judges as before, and pays only once."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors.torch import load_file

from maestro_fast.reporting import read_jsonl
from maestro_fast.reporting.recorded_run import recorded_train
from tests.rewards.judge_server import Body, JudgeServer, asked, serving
from tests.training.test_checkpoint import killed_and_resumed


@contextmanager
def fickle() -> Iterator[JudgeServer]:
    """A judge that says something else when it is asked the same again. Some of its scores are out of the scale."""
    times: Counter[str] = Counter()

    def answer(body: Body) -> str:
        question = asked(body)
        times[question] += 1
        mood = crc32(f"{question}{times[question]}".encode())
        return ["[[A]]", "[[B]]", "tie"][mood % 3] if "[Response A]" in question else f"Score: {mood % 12}"

    with serving(answer) as server:
        yield server


def judged(raw: dict[str, Any], server: JudgeServer, name: str) -> dict[str, Any]:
    """A run of its own. All runs of the test have the same config but for their directory, cache and server."""
    raw = copy.deepcopy(raw)
    judge = {"type": "judge", "url": server.url, "model": "m", "cache": f"{raw['run_dir']}-{name}.sqlite"}
    raw["rewards"] = [{**judge, "name": "quality"}, {"type": "length", "name": "brevity", "target": 2}]
    raw["anchor"] = {**judge, "name": "preferred", "against": "reference", "labels": {"share": 0.5, "early": 1}}
    raw["weights"] = {"type": "anchored", "steps": 3}
    raw["trainer"] |= {"max_steps": 3, "save_steps": 1, "logging_steps": 1}
    return raw | {"run_dir": f"{raw['run_dir']}-{name}"}


def test_a_killed_run_judges_as_the_uninterrupted_one(raw_config: dict[str, Any]) -> None:
    with fickle() as one, fickle() as other:
        whole, killed = judged(raw_config, one, "whole"), judged(raw_config, other, "killed")
        recorded_train(whole)
        killed_and_resumed(killed, step=2)

    ours, theirs = Path(whole["run_dir"]), Path(killed["run_dir"])
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    for name in ("final/model.safetensors", "final/weight_policy.safetensors"):  # Abstentions that it keeps are NaN.
        torch.testing.assert_close(load_file(ours / name), load_file(theirs / name), rtol=0, atol=0, equal_nan=True)
    assert len(one.bodies) == len(other.bodies) > 0, "no question was asked twice"
    log = [line for line in read_jsonl(Path(whole["run_dir"]) / "metrics.jsonl") if "rewards/quality/mean" in line]
    assert len(log) == 3 and any(line["rewards/quality/malformed"] > 0 for line in log)
    assert any("anchor/position_bias" in line for line in log) and not any("/cost/" in key for key in log[0])
    kept = [*read_jsonl(Path(whole["run_dir"]) / "rollouts.jsonl")]
    assert {row["rewards"]["quality"] for row in kept} > {None}

    paid = [[*read_jsonl(Path(run["run_dir"]) / "costs.jsonl")] for run in (whole, killed)]
    costs = [
        Counter({key: sum(line.get(key, 0) for line in lines) for line in lines for key in line}) for lines in paid
    ]
    requests = [cost["rewards/quality/cost/requests"] + cost["anchor/cost/requests"] for cost in costs]
    assert requests[0] == len(one.bodies) and requests[1] < requests[0], "the resumed run found answers of the first"
    assert costs[0]["rewards/quality/cost/completion_tokens"] == 3 * costs[0]["rewards/quality/cost/requests"]
