"""Each reward has the batch for itself: what one does to its arguments, no other and no data set sees."""

from __future__ import annotations

import copy
import threading
from asyncio import ensure_future, sleep
from typing import Any

import pytest
import torch

from maestro_fast.records import Prompts, RewardBatch, own_copy
from maestro_fast.rewards import FunctionReward, Labelled, LabelsConfig, RewardSet, Where, gate
from maestro_fast.training.batches import Processes
from maestro_fast.training.step import policy_columns
from maestro_fast.weighting.fixed import FunctionPolicy

B = 4


def shared_batch() -> RewardBatch:
    """Four responses to one prompt, which share its messages and its columns, as the rows of a data set do."""
    prompt, tools = [{"role": "user", "content": "Why?"}], {"names": ["search"]}
    return RewardBatch(
        prompts=[prompt] * B,
        completions=[[{"role": "assistant", "content": f"reply {i}"}] for i in range(B)],
        completion_ids=[[1, 2, i] for i in range(B)],
        columns={"history": [["a", "b"]] * B, "tools": [tools] * B, "answer": ["42"] * B, "level": [3] * B},
        mean_entropies_B=torch.arange(B).float(),
        step=0,
    )


def spoil(row: dict[str, Any]) -> None:
    """Does to the arguments of one response what a careless judge does."""
    row["prompts"].append({"role": "assistant", "content": "judged"})
    row["completions"][0]["content"] = "changed"
    row["completion_ids"].clear()
    row["history"].pop()
    row["tools"]["names"].append("calculator")
    row["answer"] = "43"


def rows_of(given: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: values[i] for name, values in given.items()} for i in range(len(given["prompts"]))]


def spoils(**given: Any) -> list[float]:
    """Counts the messages of each prompt that it finds, and spoils one response after the other."""
    found = []
    for row in rows_of(given):
        found.append(float(len(row["prompts"])))
        spoil(row)
    given["answer"][0] = None
    given["prompts"].reverse()
    return found


async def spoils_later(**given: Any) -> list[float]:
    await sleep(0)
    return spoils(**given)


def names_what_it_takes(prompts: Any, completions: Any, completion_ids: Any, history: Any, tools: Any, answer: Any):  # type: ignore[no-untyped-def]
    return spoils(
        prompts=prompts,
        completions=completions,
        completion_ids=completion_ids,
        history=history,
        tools=tools,
        answer=answer,
    )


class OwnReward:
    """A reward of the user's own class, which gets the batch itself."""

    name, needs_entropy, needs_policy = "own", True, False

    def __call__(self, batch: RewardBatch) -> list[float]:
        assert batch.mean_entropies_B is not None
        batch.mean_entropies_B.zero_()
        columns = {name: batch.columns[name] for name in ("history", "tools", "answer")}
        return spoils(
            prompts=batch.prompts, completions=batch.completions, completion_ids=batch.completion_ids, **columns
        )


class Witness:
    """Keeps the batch as it finds it."""

    name, needs_entropy, needs_policy, reads_only = "witness", False, False, True

    def __init__(self) -> None:
        self.seen: RewardBatch | None = None

    def __call__(self, batch: RewardBatch) -> list[float]:
        self.seen = batch
        return [0.0] * len(batch)


SPOILERS = {
    "function": FunctionReward(spoils),
    "async": FunctionReward(spoils_later),
    "named": FunctionReward(names_what_it_takes),
    "class": OwnReward(),
    "the gate": gate(FunctionReward(lambda completions: [0.0] * len(completions), "x"), on=OwnReward(), threshold=9),
    "behind a gate": gate(OwnReward(), on=FunctionReward(spoils), threshold=0),
    "where": Where(OwnReward(), "answer"),
    "labelled": Labelled(FunctionReward(spoils), LabelsConfig()),
}


@pytest.mark.parametrize("kind", SPOILERS)
def test_no_one_sees_what_a_reward_does_to_its_arguments(kind: str) -> None:
    batch, witness = shared_batch(), Witness()
    before = copy.deepcopy(batch)

    found_BK = RewardSet([SPOILERS[kind], witness])(batch)

    assert witness.seen is not None
    for after in (batch, witness.seen):
        assert vars(after) | {"mean_entropies_B": None} == vars(before) | {"mean_entropies_B": None}
        assert torch.equal(after.mean_entropies_B, before.mean_entropies_B)  # type: ignore[arg-type]
    if kind != "the gate":  # each response has its own conversation, as in TRL: 1, 1, 1, 1 messages and not 1, 2, 3, 4
        assert found_BK[:, 0].tolist() == [1.0] * B


class Inherits(FunctionReward):
    """A judge of the user's, made of a reward of ours that says of itself that it only reads."""

    def __call__(self, batch: RewardBatch) -> list[float]:
        batch.columns["answer"][0] = None
        batch.prompts[0].append({"role": "assistant", "content": "judged"})
        return [0.0] * len(batch)


class Says(Inherits):
    reads_only = True


@pytest.mark.parametrize(("judge", "changes"), [(Inherits, False), (Says, True)])
def test_only_a_class_that_says_so_itself_gets_the_batch_uncopied(judge: Any, changes: bool) -> None:
    batch, untouched = shared_batch(), shared_batch()
    RewardSet([judge(spoils, "mine")])(batch)
    assert (batch.prompts != untouched.prompts) == (batch.columns != untouched.columns) == changes


def test_a_reward_that_goes_on_after_its_return_changes_nothing() -> None:
    batch, returned, done = shared_batch(), threading.Event(), threading.Event()
    before = copy.deepcopy(batch.prompts)

    async def goes_on(**given: Any) -> list[float]:
        async def rest() -> None:
            while not returned.is_set():
                await sleep(0)
            spoils(**given)
            done.set()

        goes_on.task = ensure_future(rest())  # type: ignore[attr-defined]
        return [1.0] * B

    RewardSet([FunctionReward(goes_on)])(batch)
    returned.set()
    assert done.wait(20)
    assert batch.prompts == before and batch.columns["history"] == [["a", "b"]] * B


def test_a_weight_policy_may_change_its_columns() -> None:
    column = [["a"], ["b"]]
    prompts = Prompts(["x", "y"], [[1], [2]], {"kinds": column})
    processes = Processes(type("A", (), {"process_index": 0, "num_processes": 1}))  # type: ignore[arg-type]
    found = policy_columns(FunctionPolicy(lambda context: torch.ones(1), ("kinds",)), prompts, processes)
    assert found == {"kinds": [["a"], ["b"]]}
    found["kinds"][0].append("z")
    found["kinds"].pop()
    assert column == [["a"], ["b"]]


def test_a_copy_is_equal_and_shares_nothing_that_can_change() -> None:
    class Handle:
        pass

    inner, handle = [1, [2, {"k": {3}}]], Handle()
    value = {"a": inner, "b": inner, "t": (inner, "s"), "x": torch.ones(2), "h": handle, "n": None}
    found = own_copy(value)
    assert found["a"] == found["b"] == inner and found["t"] == (inner, "s") and torch.equal(found["x"], value["x"])
    parts = [found["a"], found["b"], found["t"][0]]
    assert len({id(part) for part in [*parts, inner]}) == 4
    assert len({id(part[1][1]["k"]) for part in [*parts, inner]}) == 4
    assert found["x"] is not value["x"] and found["h"] is handle
