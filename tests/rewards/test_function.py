"""Functions with TRL's signature as rewards, TRL's own among them, and loading functions by name."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maestro_fast.records import RewardBatch
from maestro_fast.rewards import FunctionReward, RewardSet, load_function

MakeBatch = Callable[..., RewardBatch]


@pytest.fixture
def batch(make_batch: MakeBatch) -> RewardBatch:
    return make_batch(["a b", "a b c"], prompts=["P", "Q"], columns={"topic": ["tea", "salt"], "level": [1, 2]})


def test_passes_everything_to_a_function_with_kwargs(batch: RewardBatch) -> None:
    seen: dict[str, Any] = {}

    def greedy(prompts: Any, **kwargs: Any) -> list[float | None]:
        seen.update(kwargs, prompts=prompts)
        return [1.0, None]

    reward = FunctionReward(greedy)
    assert reward(batch) == [1.0, None]
    assert reward.name == "greedy"
    assert (reward.needs_entropy, reward.needs_policy) == (False, False)
    assert seen == {
        "prompts": ["P", "Q"],
        "completions": ["a b", "a b c"],
        "completion_ids": [[0, 1], [0, 1, 2]],
        "topic": ["tea", "salt"],
        "level": [1, 2],
    }


def test_passes_only_what_a_function_names(batch: RewardBatch) -> None:
    def modest(completion_ids: Any, level: Any, *, absent: float = 10.0) -> list[float]:
        return [len(ids) * depth + absent for ids, depth in zip(completion_ids, level, strict=True)]

    assert FunctionReward(modest)(batch) == [12.0, 16.0]


def test_standard_arguments_go_before_columns(make_batch: MakeBatch) -> None:
    def echo(completions: Any) -> Any:
        return completions

    assert FunctionReward(echo)(make_batch(["a"], columns={"completions": ["column"]})) == ["a"]


def test_options_are_constant_arguments_before_columns(batch: RewardBatch) -> None:
    def scaled(completion_ids: Any, level: Any) -> list[float]:
        return [float(level * len(ids)) for ids in completion_ids]

    assert FunctionReward(scaled, "x", {"level": 5})(batch) == [10.0, 15.0]


def test_a_missing_argument_is_an_error_when_called(batch: RewardBatch, make_batch: MakeBatch) -> None:
    def needy(completions: Any, solution: Any, **kwargs: Any) -> list[float]:
        return [0.0]

    reward = FunctionReward(needy, name="truth")
    words = "reward 'truth': the argument 'solution' .* prompts, completions, completion_ids .* are level, topic"
    with pytest.raises(ValueError, match=words):
        reward(batch)
    with pytest.raises(ValueError, match="the columns are none"):
        reward(make_batch(["a"]))


def test_names_as_trl_does() -> None:
    def plain(**kwargs: Any) -> None: ...

    class Judge:
        def __call__(self, **kwargs: Any) -> None: ...

    inner = functools.partial(plain)
    inner.note = "keeps the outer one from absorbing it"  # type: ignore[attr-defined]
    assert FunctionReward(functools.partial(inner, a=1)).name == "plain"
    assert FunctionReward(Judge()).name == "Judge"
    assert FunctionReward(plain, name="other").name == "other"


def test_a_partial_keeps_what_it_binds(batch: RewardBatch) -> None:
    def scaled(completion_ids: Any, scale: float) -> list[float]:
        return [scale * len(ids) for ids in completion_ids]

    assert FunctionReward(functools.partial(scaled, scale=2.0))(batch) == [4.0, 6.0]


def test_a_callable_without_signature_gets_everything(batch: RewardBatch) -> None:
    assert FunctionReward(dict)(batch) == {
        **batch.columns,
        "prompts": batch.prompts,
        "completions": batch.completions,
        "completion_ids": batch.completion_ids,
    }


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: FunctionReward(3), TypeError, "function: got int, expected a callable"),  # type: ignore[arg-type]
        (lambda: FunctionReward(abs, "x"), TypeError, "reward 'x': positional-only arguments"),
        (
            lambda: FunctionReward(lambda completions, a: 0, "x", {"b": 1}),
            ValueError,
            "reward 'x': <lambda> takes no 'b', it takes completions, a",
        ),
        (
            lambda: FunctionReward(lambda **kwargs: 0, "x", {"prompts": 1}),
            ValueError,
            "reward 'x': the option 'prompts' has the name of a standard argument",
        ),
    ],
)
def test_bad_functions_are_refused(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_async_functions_and_objects_are_awaited(batch: RewardBatch) -> None:
    async def lengths(completion_ids: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    class Judge:
        async def __call__(self, level: Any, **kwargs: Any) -> list[float | None]:
            return [None, *level[1:]]

    rewards = RewardSet(
        [FunctionReward(lengths), FunctionReward(Judge()), FunctionReward(functools.partial(lengths), "p")]
    )
    assert str(rewards(batch).tolist()) == "[[2.0, nan, 2.0], [3.0, 2.0, 3.0]]"


THOUGHT = "<think>\nTea is hot.\n</think>\nTea."


class TestTrlFunctions:
    """Unchanged, with and without chat format as each one wants it."""

    def test_think_format_reward(self, make_batch: MakeBatch) -> None:
        pytest.importorskip("trl")
        reward = FunctionReward(load_function("trl.rewards:think_format_reward"))
        assert reward.name == "think_format_reward"
        batch = make_batch([THOUGHT, "Tea."], chat=True, columns={"topic": ["tea", "tea"]})
        assert RewardSet([reward])(batch).tolist() == [[1.0], [0.0]]

    @pytest.mark.parametrize("chat", [False, True])
    def test_soft_overlong_punishment(self, chat: bool, make_batch: MakeBatch) -> None:
        make = pytest.importorskip("trl.rewards").get_soft_overlong_punishment
        reward = FunctionReward(make(max_completion_len=10, soft_punish_cache=4))
        assert reward.name == "soft_overlong_punishment_reward"
        batch = make_batch(["a"] * 4, chat=chat, completion_ids=[[1] * n for n in (6, 9, 10, 11)])
        assert RewardSet([reward])(batch).tolist() == [[0.0], [-0.75], [-1.0], [-1.0]]

    def test_repetition_penalty(self, make_batch: MakeBatch) -> None:
        make = pytest.importorskip("trl.rewards").get_repetition_penalty_reward
        batch = make_batch(["a"] * 2, completion_ids=[[1, 2, 3, 4], [5] * 5])
        assert RewardSet([FunctionReward(make(ngram_size=2))])(batch).tolist() == [[0.0], [-0.75]]

    def test_accuracy_reward(self, make_batch: MakeBatch) -> None:
        reward = FunctionReward(pytest.importorskip("trl.rewards").accuracy_reward)
        batch = make_batch([r"\boxed{3}", r"\boxed{4}"], chat=True, columns={"solution": [r"\boxed{3}", r"\boxed{3}"]})
        if importlib.util.find_spec("math_verify"):
            assert RewardSet([reward])(batch).tolist() == [[1.0], [0.0]]
        else:
            with pytest.raises(ImportError, match="math_verify") as caught:
                RewardSet([reward])(batch)
            assert caught.value.__notes__ == ["raised by reward 'accuracy_reward'"]

    def test_accuracy_reward_without_its_column(self, make_batch: MakeBatch) -> None:
        reward = FunctionReward(pytest.importorskip("trl.rewards").accuracy_reward)
        with pytest.raises(ValueError, match=r"'accuracy_reward': .* 'solution' .* the columns are answer"):
            reward(make_batch(["3"], chat=True, columns={"answer": ["3"]}))


class TestLoadFunction:
    def test_from_a_module(self) -> None:
        assert load_function("os.path:join") is __import__("os").path.join

    def test_from_a_file_run_once(self, tmp_path: Path) -> None:
        (tmp_path / "my_rewards.py").write_text(
            "import dataclasses\nruns = []\n"
            "@dataclasses.dataclass\nclass Point:\n    x: int\n"  # looks its module up in sys.modules
            "def richness(completions):\n    return [1.0] * len(completions)\n"
            "def other(**kwargs):\n    return runs\n"
        )
        richness = load_function("my_rewards.py:richness", base_dir=tmp_path)
        assert richness(["a"]) == [1.0]
        other = load_function(f"{tmp_path}/my_rewards.py:other")
        assert other() is richness.__globals__["runs"]

    def test_the_working_folder_is_the_base(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "here.py").write_text("def f(): return 5\n")
        monkeypatch.chdir(tmp_path)
        assert load_function("here.py:f")() == 5

    @pytest.mark.parametrize(
        ("target", "error", "words"),
        [
            ("richness", ValueError, "rewards.1: 'richness', expected 'package.module:attribute' or 'path/to/file"),
            (":f", ValueError, "rewards.1: ':f', expected"),
            ("os:", ValueError, "rewards.1: 'os:', expected"),
            (7, TypeError, "rewards.1: got 7, expected 'package.module:attribute'"),
            ("absent.py:f", ValueError, "rewards.1: there is no file .*/absent.py"),
            ("absent_package.module:f", ValueError, "rewards.1: there is no module 'absent_package'"),
            ("os.absent:f", ValueError, "rewards.1: there is no module 'os.absent'"),
            ("mod.py:absent", ValueError, "rewards.1: mod.py has no 'absent'; its callables are richness$"),
            ("mod.py:number", TypeError, "rewards.1: 'mod.py:number' is a int, expected a callable"),
        ],
    )
    def test_errors_begin_with_the_field(self, target: Any, error: type[Exception], words: str, tmp_path: Path) -> None:
        (tmp_path / "mod.py").write_text("number = 3\ndef richness(): ...\ndef _hidden(): ...\n")
        with pytest.raises(error, match=f"^{words}"):
            load_function(target, field="rewards.1", base_dir=tmp_path)

    def test_a_fault_in_the_file_comes_through_and_leaves_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "bad.py").write_text("import absent_dependency\n")
        before = set(sys.modules)
        for _ in range(2):  # the second time it runs again, instead of finding half a module
            with pytest.raises(ModuleNotFoundError, match="absent_dependency") as caught:
                load_function("bad.py:f", field="rewards[0].function", base_dir=tmp_path)
            assert caught.value.__notes__ == ["while loading rewards[0].function: 'bad.py:f'"]
        assert set(sys.modules) == before

    def test_a_missing_dependency_of_a_module_is_not_taken_for_a_missing_module(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "module_with_a_dependency.py").write_text("import absent_dependency\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ModuleNotFoundError, match="absent_dependency"):
            load_function("module_with_a_dependency:f")


def test_a_function_that_names_prefills_gets_the_part_of_the_reply_in_the_prompt(make_batch: MakeBatch) -> None:
    def whole(completions: list[str], prefills: list[str], **rest: Any) -> list[float]:
        return [float(len(a + b)) for a, b in zip(prefills, completions, strict=True)]

    reward = FunctionReward(whole)
    assert reward(make_batch(["a", "b"], prefills=["<think>", ""])) == [8.0, 1.0]
    assert reward(make_batch(["a", "b"])) == [1.0, 1.0]
    assert reward(make_batch(["a"], prefills=["<think>"], columns={"prefills": ["own"]})) == [4.0]
