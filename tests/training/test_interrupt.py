"""Ctrl-C and SIGTERM: the run is saved first, a resumed one leaves the same bytes, and a second signal ends it."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from maestro_fast.cli import main
from maestro_fast.generation import TransformersGenerator
from maestro_fast.records import StepRecord
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.rewards import RewardSet
from maestro_fast.training import MaestroTrainer, checkpoint, interrupt, trainer
from maestro_fast.training.interrupt import Interrupted, Interrupts
from tests.training.test_checkpoint import assert_same_run
from tests.training.test_failures import drawing_reward
from tests.training.test_trainer import run

PLACES: dict[str, tuple[Any, str]] = {  # where a signal comes: the owner and the name of a function
    "generation": (TransformersGenerator, "generate"),
    "rewards": (RewardSet, "__call__"),
    "training forward": (MaestroTrainer, "compute_loss"),
    "saving": (checkpoint, "save_step_state"),
    "evaluation": (trainer, "evaluate_rewards"),
}


def signal_after(patch: pytest.MonkeyPatch, place: str, call: int, number: int = signal.SIGINT) -> None:
    """Sends a signal at the end of the ``call``-th call of a function, from 1."""
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), [0]

    def signalling(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return result

    patch.setattr(owner, name, signalling)


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """A shell without job control starts a background command with SIGINT ignored, and a run leaves it so."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


@pytest.fixture
def raw(raw_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Two batches of two optimiser steps of two micro-batches, an evaluation after each batch, all kinds of state.

    A reward draws random numbers, also in the evaluation, and no line of the log is written at the moments below.
    """
    raw_config["rewards"] = ["entropy", "format", drawing_reward(tmp_path / "own.py")]
    raw_config["evaluation"] = {"data": {**raw_config["data"], "limit": 4}}
    raw_config["batch"] = {"prompts_per_batch": 4, "micro_batch": 4, "updates_per_batch": 2}
    raw_config["trainer"] |= {"max_steps": 4, "logging_steps": 4, "eval_steps": 2, "save_steps": 3}
    random.seed(0)
    return raw_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], str]:
    """The run directory of the uninterrupted run, which is made once."""
    made: list[str] = []

    def get(raw: dict[str, Any]) -> str:
        if not made:
            made.append(str(tmp_path_factory.mktemp("whole") / "run"))
            recorded_train(copy.deepcopy(raw) | {"run_dir": made[0]})
            random.seed(0)
        return made[0]

    return get


@pytest.mark.parametrize(
    ("place", "call", "saved"),
    [
        ("generation", 3, 2),  # the evaluation was the second
        ("rewards", 3, 2),
        ("training forward", 5, 3),  # the step in progress comes to its end
        ("saving", 1, 3),
        ("evaluation", 1, 2),  # it is made again
    ],
)
def test_an_interrupted_run_goes_on_bit_by_bit(
    raw: dict[str, Any], whole: Callable[[dict[str, Any]], str], place: str, call: int, saved: int
) -> None:
    expected = whole(raw)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, place, call)
        with pytest.raises(Interrupted) as caught:
            recorded_train(raw)
    recorded_train(raw, resume=True)

    folder = Path(raw["run_dir"]) / f"checkpoint-{saved}"
    assert str(caught.value) == "stopped by SIGINT (Ctrl-C)"
    assert caught.value.__notes__ == [f"The run as it was after step {saved} is in {folder}; go on with --resume."]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert_same_run(expected, raw["run_dir"])


def test_a_judge_on_the_background_thread_is_not_waited_for(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """The judge would answer after ten minutes."""
    (tmp_path / "own.py").write_text(
        "import asyncio, os, signal\n"
        "calls = 0\n"
        "async def mine(completions, **columns):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 2:\n"
        "        await asyncio.sleep(0.1)\n"  # Until then the main thread waits for the answers.
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        await asyncio.sleep(600)\n"
        "    return [float(len(c)) for c in completions]\n",
        encoding="utf-8",
    )
    raw_config |= {"rewards": [f"{tmp_path}/own.py:mine"], "weights": "equal"}
    with pytest.raises(Interrupted) as caught:
        run(raw_config)

    assert (str(caught.value), caught.value.signal) == ("stopped by SIGTERM", signal.SIGTERM)
    assert "checkpoint-1; go on with --resume" in caught.value.__notes__[0]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_how_to_go_on_and_shows_no_traceback(
    raw_config: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], number: int, status: int
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw_config), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, "rewards", 2, number)
        assert main(["train", str(config)]) == status
    written = capfd.readouterr().err

    assert "Traceback" not in written and "a second one ends it at once" in written
    assert written.splitlines()[-1].endswith("checkpoint-1; go on with --resume.")


def test_a_run_that_is_stopped_in_its_first_step_starts_anew(raw_config: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, "generation", 1)
        with pytest.raises(Interrupted) as caught:
            recorded_train(raw_config)
    assert caught.value.__notes__ == ["The run has no checkpoint to go on from; start it again."]
    assert recorded_train(raw_config).state.global_step == 2


def test_a_signal_that_comes_too_late_leaves_the_final_policy(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[StepRecord] = []
    monkeypatch.setattr(MaestroTrainer, "save_model", saving_with_a_signal(MaestroTrainer.save_model))
    with pytest.raises(Interrupted) as caught:
        run(raw_config, trainer__save_strategy="no")

    final = Path(raw_config["run_dir"]) / "final"
    assert caught.value.__notes__ == [f"Training had ended; its policy is in {final}."]
    assert (final / "weight_policy.safetensors").is_file() and not records


def saving_with_a_signal(save_model: Callable[..., None]) -> Callable[..., None]:
    def save(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save_model(*args, **kwargs)

    return save


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[int]]:
    """A list whose last entry is the time, and one of the signals by which the process would have ended itself."""
    now, killed = [0.0], list[int]()
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[-1])
    monkeypatch.setattr(interrupt.os, "kill", lambda _, number: killed.append(number))
    return now, killed


def test_a_second_signal_ends_the_process_at_once(ended: tuple[list[float], list[int]]) -> None:
    """A launcher that sends one signal twice does not count as a person who presses Ctrl-C twice."""
    now, killed = ended
    interrupts = Interrupts(alone=True, speaks=False)
    with pytest.raises(Interrupted), interrupts.caught("too late"):
        signal.raise_signal(signal.SIGTERM)
        now.append(0.5)
        signal.raise_signal(signal.SIGTERM)
        assert killed == []
        now.append(1.5)
        signal.raise_signal(signal.SIGINT)
        assert killed == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_a_signal_stops_at_once_only_where_that_is_safe() -> None:
    interrupts, reached = Interrupts(alone=True, speaks=False), []
    with pytest.raises(Interrupted) as caught, interrupts.caught("too late"):
        with pytest.raises(Interrupted), interrupts.may_stop():
            signal.raise_signal(signal.SIGINT)
            reached.append("behind a signal where it is safe")
        interrupts.received = None
        signal.raise_signal(signal.SIGINT)
        reached.append("behind a signal where it is not")
        with pytest.raises(Interrupted), interrupts.may_stop():
            reached.append("where it is safe again")

    assert reached == ["behind a signal where it is not"]
    assert caught.value.__notes__ == ["too late"]


def test_an_error_that_a_reward_swallows_comes_again() -> None:
    interrupts = Interrupts(alone=True, speaks=False)
    careless = contextlib.suppress(BaseException)  # as a bare ``except`` in a reward
    with pytest.raises(Interrupted), interrupts.caught("too late"), interrupts.may_stop(), careless:
        signal.raise_signal(signal.SIGINT)


def test_handlers_of_others_and_other_threads_are_left_alone() -> None:
    mine = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with Interrupts(alone=True, speaks=False).caught(""):
            assert signal.getsignal(signal.SIGTERM) is not mine
            assert "_receive" not in repr(signal.getsignal(signal.SIGTERM))
            assert "_receive" in repr(signal.getsignal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, mine)

    def elsewhere() -> None:
        with Interrupts(alone=True, speaks=False).caught(""):
            entered.append(True)

    entered: list[bool] = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert entered == [True] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


class TwoProcesses:
    """Stands for the processes of a run, to the other of which no signal has come."""

    count, device = 2, torch.device("cpu")

    @staticmethod
    def gather(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, torch.tensor([0])])


def test_several_processes_stop_together_between_two_steps() -> None:
    interrupts, processes = Interrupts(alone=False, speaks=False), TwoProcesses()
    with pytest.raises(Interrupted), interrupts.caught(""):
        with interrupts.may_stop():
            signal.raise_signal(signal.SIGINT)  # It does not stop one process while the other goes on.
        assert interrupts.agreed(processes)  # type: ignore[arg-type]
        interrupts.check()

    other = Interrupts(alone=False, speaks=False)
    processes.gather = lambda _: torch.tensor([0, 15])  # type: ignore[method-assign]
    assert other.agreed(processes) and other.received == signal.SIGTERM  # type: ignore[arg-type]
