"""The answers of judges on disk: all that decides an answer is in its key, and processes share a file."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from maestro_fast.config_file import absolute_paths, check_paths
from maestro_fast.records import RewardBatch
from maestro_fast.rewards import build_rewards, judge_cache
from maestro_fast.rewards.judge import JudgeConfig, JudgeReward
from maestro_fast.rewards.judge_cache import Answer, JudgeCache
from maestro_fast.settings import SettingsError
from tests.rewards.judge_server import RESET, JudgeServer, asked, serving, values

MakeBatch = Callable[..., RewardBatch]


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with serving(lambda body: "5.5") as server:
        yield server


def made(server: JudgeServer, folder: Path, **options: Any) -> JudgeReward:
    given = {"url": server.url, "model": "m", "prompt": "{completion}", "cache": "answers/judge.sqlite", "retries": 0}
    return JudgeConfig(**(given | options)).build("judge", folder)


def test_a_known_answer_costs_nothing(server: JudgeServer, make_batch: MakeBatch, tmp_path: Path) -> None:
    batch = make_batch(["a", "b"])
    assert values(made(server, tmp_path), batch) == [0.5, 0.5]

    server.answer = lambda body: "10"
    again = made(server, tmp_path)
    assert values(again, make_batch(["b", "a", "c"])) == [0.5, 0.5, 1.0]
    assert [*map(asked, server.bodies)].count("c") == 1 and len(server.bodies) == 3
    expected = {"cost/requests": 1, "cost/cached": 2, "cost/prompt_tokens": 7, "cost/completion_tokens": 3}
    assert again.metrics().items() >= expected.items()
    assert [*(tmp_path / "answers").iterdir()] == [tmp_path / "answers" / "judge.sqlite"]

    assert values(made(server, tmp_path, scale=(0, 11)), batch) == [0.5, 0.5], "how an answer is read decides nothing"
    assert len(server.bodies) == 3
    assert values(made(server, tmp_path, cache=None), batch) == [1.0, 1.0]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"prompt": "{completion}!"},
        {"system": "You judge."},
        {"temperature": 0.5},
        {"temperature": None},
        {"max_tokens": 10},
        {"seed": 1},
        {"seed": None},
        {"extra_body": {"top_p": 0.9}},
    ],
    ids=str,
)
def test_all_that_decides_an_answer_is_in_its_key(
    server: JudgeServer, make_batch: MakeBatch, tmp_path: Path, changes: dict[str, Any]
) -> None:
    ours, other = made(server, tmp_path), made(server, tmp_path, **changes)
    keys = [reward._key(reward._questions(make_batch(["a"]), 0, "a")[0][0]) for reward in (ours, other)]
    assert keys[0] != keys[1]


def test_the_server_and_the_vote_are_in_the_key(server: JudgeServer, make_batch: MakeBatch, tmp_path: Path) -> None:
    votes = made(server, tmp_path, votes=2, temperature=1.0)._questions(make_batch(["a"]), 0, "a")
    ours, elsewhere = made(server, tmp_path), made(server, tmp_path, url="http://elsewhere/v1")
    assert len({ours._key(votes[0][0]), ours._key(votes[1][0]), elsewhere._key(votes[0][0])}) == 3
    assert made(server, tmp_path, url=server.url + "/")._key(votes[0][0]) == ours._key(votes[0][0])


def test_malformed_answers_are_kept_and_failures_are_not(
    server: JudgeServer, make_batch: MakeBatch, tmp_path: Path
) -> None:
    server.answer = lambda body: {"bad": "no idea", "dead": RESET}.get(asked(body), "10")
    assert values(made(server, tmp_path), make_batch(["bad", "dead", "good"])) == [None, None, 1.0]

    server.answer = lambda body: "1"
    again = made(server, tmp_path)
    assert values(again, make_batch(["bad", "dead", "good"])) == [None, 0.0, 1.0]
    assert again.metrics()["malformed"] == 1 and again.metrics()["cost/requests"] == 0


PROCESS = """
import runpy, sys, types
cache = types.SimpleNamespace(**runpy.run_path(sys.argv[1]))
path, name, number = __import__("pathlib").Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
with cache.JudgeCache(path).opened() as answers:
    for i in range(number):
        kept = answers.put(f"key {i}", cache.Answer(f"{name} {i}", 1, 2))
        print(f"key {i}", kept.text, sep="\\t", flush=True)
"""


def start(path: Path, name: str, number: int) -> subprocess.Popen[str]:
    """A process of its own that fills the cache. It loads that module alone."""
    command = [sys.executable, "-c", PROCESS, judge_cache.__file__, str(path), name, str(number)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_a_file_and_agree_on_its_answers(tmp_path: Path) -> None:
    """They make the file at the same time. Of two answers to a question the first one counts, for both."""
    path = tmp_path / "judge.sqlite"
    processes = [start(path, name, 60) for name in ("one", "two", "three")]
    printed = [process.communicate(timeout=60) for process in processes]

    assert [process.returncode for process in processes] == [0, 0, 0], printed
    assert len({out for out, _ in printed}) == 1
    with JudgeCache(path).opened() as answers:
        found = answers.find([f"key {i}" for i in range(700)])
    assert {key: answer.text for key, answer in found.items()} == dict(
        line.split("\t") for line in printed[0][0].splitlines()
    )


def test_kill_9_leaves_whole_answers(tmp_path: Path) -> None:
    path = tmp_path / "judge.sqlite"
    process = start(path, "killed", 10**6)
    assert process.stdout is not None and process.stderr is not None
    seen = [process.stdout.readline().rstrip("\n").split("\t") for _ in range(50)]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)

    with JudgeCache(path).opened() as answers:
        found = answers.find([key for key, _ in seen])
        assert {key: answer.text for key, answer in found.items()} == dict(map(tuple, seen))
        assert answers.put("key 7", Answer("other")).text == "killed 7"


def test_a_broken_file_is_named(server: JudgeServer, make_batch: MakeBatch, tmp_path: Path) -> None:
    broken, other, full = (tmp_path / name for name in ("broken.sqlite", "other.sqlite", "full.sqlite"))
    broken.write_bytes(b"no database" * 100)
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE diary (day TEXT)")
    connection.close()
    before = other.read_bytes()
    entry = {"type": "judge", "url": server.url, "model": "m", "prompt": "{completion}"}

    for path, words in ((broken, "file is not a database"), (other, "is the database of another program")):
        with pytest.raises(SettingsError, match=rf"^rewards\[0\]\.cache: {path}: {words}; expected a file of judges'"):
            build_rewards([{**entry, "cache": path.name}], base_dir=tmp_path)
    assert other.read_bytes() == before
    with pytest.raises(SettingsError, match=rf"^rewards\[0\]\.cache: cannot make the folder {broken}"):
        build_rewards([{**entry, "cache": f"{broken}/judge.sqlite"}])

    reward = made(server, tmp_path, cache=str(full))
    values(reward, make_batch(["a"]))
    full.write_bytes(full.read_bytes()[:4096] + b"\xff" * 8192)
    with pytest.raises(ValueError, match=rf"cache: {full}: database disk image is malformed"):
        values(reward, make_batch(["b"]))


def test_its_path_is_located_and_the_model_is_a_name(tmp_path: Path) -> None:
    """The name of a model may look like a path: vLLM calls a model by the folder that it was started with."""
    judge = {"type": "judge", "model": "/no/such/folder", "cache": "judge.sqlite"}
    gate = {"type": "format", "gate": {"on": judge, "threshold": 0.5}}
    function = {"function": "pkg.mod:f", "cache": "mine", "model": "./x"}

    located = absolute_paths({"rewards": [judge, gate, function], "anchor": judge}, tmp_path)

    there = judge | {"cache": str(tmp_path / "judge.sqlite")}
    assert located["rewards"] == [there, {"type": "format", "gate": {"on": there, "threshold": 0.5}}, function]
    assert located["anchor"] == there
    check_paths(located)
