"""build_rewards: from YAML to a RewardSet, and errors that name the entry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from maestro_fast.records import RewardBatch
from maestro_fast.rewards import (
    EntropyReward,
    FormatReward,
    FunctionReward,
    LengthReward,
    PerplexityReward,
    RewardSpec,
    build_rewards,
)

MakeBatch = Callable[..., RewardBatch]

YAML = """
- format
- {name: brevity, kind: length, target: 12, unit: words, floor: -.inf}
- {name: rich, function: "my_rewards.py:richness", scale: 2}
- entropy
- {kind: perplexity, tags: [plan, final], transform: rank}
- {name: perplexity_2, kind: perplexity}
- my_rewards.py:plain
- {function: "my_rewards.py:other"}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_rewards.py").write_text(
        "def richness(completions, scale):\n    return [scale * len(c) for c in completions]\n"
        "def plain(**kwargs):\n    return [1.0]\n"
        "def other(**kwargs):\n    return [2.0]\n"
    )
    return tmp_path


def test_from_yaml(folder: Path, make_batch: MakeBatch) -> None:
    rewards = build_rewards(yaml.safe_load(YAML), base_dir=folder)
    assert rewards.names == (
        "format",
        "brevity",
        "rich",
        "entropy",
        "perplexity",
        "perplexity_2",
        "plain",
        "other",
    )
    built = rewards.rewards
    assert built[0] == FormatReward()
    assert built[1] == LengthReward(12, unit="words", floor=float("-inf"), name="brevity")
    assert built[2](make_batch(["abc"])) == [6]
    assert built[3] == EntropyReward()
    assert built[4] == PerplexityReward(tags=["plan", "final"], transform="rank")
    assert built[5] == PerplexityReward(name="perplexity_2")
    assert [reward(make_batch(["abc"])) for reward in built[6:]] == [[1.0], [2.0]]


def test_objects_pass_through(make_batch: MakeBatch) -> None:
    def richness(completions: Any) -> list[float]:
        return [3.0 for _ in completions]

    mine = LengthReward(3, name="mine")
    spec = RewardSpec("short", kind="length", options={"target": 2})
    rewards = build_rewards([mine, richness, FunctionReward(richness, "again"), spec])
    assert rewards.names == ("mine", "richness", "again", "short")
    assert rewards.rewards[0] is mine
    assert rewards.rewards[3] == LengthReward(2, name="short")
    assert rewards(make_batch(["a b c"])).tolist() == [[0.0, 3.0, 3.0, -0.5]]


@pytest.mark.parametrize(
    ("entry", "error", "words"),
    [
        (
            "formt",
            ValueError,
            r"rewards\[1\] 'formt': kind 'formt', expected one of entropy, .*, preference; a function",
        ),
        ({"name": "rich"}, ValueError, r"rewards\[1\] 'rich': kind 'rich', expected one of entropy, "),
        ({"name": "a", "kind": "len"}, ValueError, r"rewards\[1\] 'a': kind 'len', expected one of"),
        ({"name": "a", "kind": ["length"]}, ValueError, r"rewards\[1\] 'a': kind \['length'\], expected one"),
        ({"kind": "format", "function": "a:b"}, ValueError, r"rewards\[1\] 'b': both kind and function are set"),
        ({"target": 3}, ValueError, r"rewards\[1\]: name is None"),
        ({"name": 3, "kind": "length"}, ValueError, r"rewards\[1\]: name is 3, expected a non-empty string"),
        ("", ValueError, r"rewards\[1\]: name is ''"),
        (
            {"name": "brevity", "kind": "length", "target": 3, "unit": "tokens", "taget": 3},
            ValueError,
            r"rewards\[1\] 'brevity': kind 'length' has no option 'taget', its options are target, unit, scale, floor$",
        ),
        ("length", ValueError, r"rewards\[1\] 'length': the option 'target' of kind 'length' is missing"),
        ({"kind": "length", "target": -2}, ValueError, r"rewards\[1\] 'length': target: -2, expected"),
        ({"kind": "format", "tags": 5}, ValueError, r"rewards\[1\] 'format': tags: 5"),
        ("absent.py:f", ValueError, r"rewards\[1\] 'f'.function: there is no file .*absent.py"),
        ({"name": "x", "function": 3}, TypeError, r"rewards\[1\] 'x'.function: got 3, expected 'package"),
        (
            {"name": "rich", "function": "my_rewards.py:richness", "scael": 2},
            ValueError,
            r"rewards\[1\] 'rich': reward 'rich': richness takes no 'scael', it takes completions, scale",
        ),
        ({"name": "x", "function": "builtins:abs"}, TypeError, r"rewards\[1\] 'x': .* positional-only"),
        (3, TypeError, r"rewards\[1\]: got int, expected a name, a mapping, a function or a Reward"),
        (LengthReward, TypeError, r"rewards\[1\]: got the class LengthReward, expected an instance"),
        (FormatReward(), ValueError, "rewards: the name 'format' stands for more than one"),
    ],
)
def test_errors_name_the_entry(entry: Any, error: type[Exception], words: str, folder: Path) -> None:
    with pytest.raises(error, match=words):
        build_rewards(["format", entry], base_dir=folder)


@pytest.mark.parametrize("entries", ["format", {"name": "format"}, None])
def test_entries_must_be_a_list(entries: Any) -> None:
    with pytest.raises(TypeError, match=r"rewards: got \w+, expected a list"):
        build_rewards(entries)


def test_no_entry() -> None:
    with pytest.raises(ValueError, match="rewards: none given"):
        build_rewards([])
