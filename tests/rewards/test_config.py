"""Rewards from a config: types, names, entries of release 0.1, and errors that name the entry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from maestro_fast.records import RewardBatch
from maestro_fast.rewards import (
    REWARD_TYPES,
    EntropyReward,
    FormatReward,
    FunctionReward,
    FunctionRewardConfig,
    LengthReward,
    PerplexityReward,
    PreferenceConfig,
    RewardConfig,
    RewardSpec,
    build_rewards,
)
from maestro_fast.settings import build, sentences, settings_of

MakeBatch = Callable[..., RewardBatch]

YAML = """
- format
- {type: length, name: brevity, target: 12, unit: words, floor: -.inf}
- {type: function, name: rich, function: "my_rewards.py:richness", scale: 2}
- entropy
- {type: perplexity, tags: [plan, final], transform: rank}
- {type: perplexity, name: perplexity_2}
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
            r"rewards\[1\]\.type: 'formt', expected one of entropy, .*, function; a function of your own",
        ),
        ({"name": "rich"}, ValueError, r"rewards\[1\]\.type: missing, expected one of entropy, "),
        ({"name": "a", "type": "len"}, ValueError, r"rewards\[1\]\.type: 'len', expected one of"),
        ({"name": "a", "type": ["length"]}, ValueError, r"rewards\[1\]\.type: \['length'\], expected one"),
        (
            {"type": "format", "function": "a:b"},
            ValueError,
            r"rewards\[1\]\.function: unknown setting, expected one of",
        ),
        ({"target": 3}, ValueError, r"rewards\[1\]\.type: missing"),
        ({"name": 3, "type": "length", "target": 1}, ValueError, r"rewards\[1\]\.name: got int 3, expected str"),
        ({"name": "", "type": "format"}, ValueError, r"rewards\[1\]: the name is '', expected a non-empty string"),
        ("", ValueError, r"rewards\[1\]\.type: '', expected one of"),
        (
            {"type": "length", "name": "brevity", "target": 3, "unit": "tokens", "taget": 3},
            ValueError,
            r"rewards\[1\]\.taget: unknown setting, expected one of floor, name, scale, target, unit; did you",
        ),
        ("length", ValueError, r"rewards\[1\]\.target: missing, it has no default"),
        ({"type": "length", "target": -2}, ValueError, r"rewards\[1\]\.target: -2.0, expected"),
        ({"type": "format", "tags": 5}, ValueError, r"rewards\[1\]\.tags: got int 5, expected a list"),
        ("absent.py:f", ValueError, r"rewards\[1\]\.function: there is no file .*absent.py"),
        ({"name": "x", "function": 3}, ValueError, r"rewards\[1\]\.function: got int 3, expected str"),
        (
            {"name": "rich", "function": "my_rewards.py:richness", "scael": 2},
            ValueError,
            r"rewards\[1\]: reward 'rich': richness takes no 'scael', it takes completions, scale",
        ),
        ({"name": "x", "function": "builtins:abs"}, TypeError, r"rewards\[1\]: .* positional-only"),
        (
            {"type": "preference", "model": "/no/such"},
            ValueError,
            r"rewards\[1\]\.model: there is no directory /no/such",
        ),
        (3, TypeError, r"rewards\[1\]: got int, expected a name, a mapping, a function or a Reward"),
        (LengthReward, TypeError, r"rewards\[1\]: got the class LengthReward, expected an instance"),
        (FormatReward(), ValueError, "rewards: the name 'format' stands for more than one"),
    ],
)
def test_errors_name_the_entry(entry: Any, error: type[Exception], words: str, folder: Path) -> None:
    with pytest.raises(error, match=f"^{words}"):
        build_rewards(["format", entry], base_dir=folder)


OLD_YAML = """
- {name: brevity, kind: length, target: 12}
- {kind: perplexity}
- {name: entropy, direction: maximise}
- {name: format, partial: true}
"""


def test_entries_of_release_0_1_are_read_with_one_warning_for_each_old_key(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maestro_fast.settings._said", set())
    expected = (
        LengthReward(12, name="brevity"),
        PerplexityReward(),
        EntropyReward("maximise"),
        FormatReward(partial=True),
    )
    for _ in range(2):
        assert build_rewards(yaml.safe_load(OLD_YAML)).rewards == expected
    assert caplog.messages == [
        "rewards: the key `kind` is now called `type`: write `type: length` in rewards[0]. "
        "The old one is read in this release and refused in the next.",
        "rewards[2]: a reward's type is no longer read off its name: write `type: entropy`. "
        "Entries with a name alone are read in this release and refused in the next.",
    ]


def test_the_old_and_the_new_key_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^rewards\[0\]\.kind: is the old name of type, which is set too"):
        build_rewards([{"kind": "format", "type": "format"}])


def test_a_config_is_the_reward_itself_where_that_is_cheap() -> None:
    """Reading a config loads neither models nor files."""
    assert build(RewardConfig, {"type": "length", "target": 3}).reward == LengthReward(3)
    assert isinstance(build(RewardConfig, {"type": "preference", "model": "nowhere"}).reward, PreferenceConfig)
    function = build(RewardConfig, {"function": "nowhere.py:f", "scale": 2}).reward
    assert function == FunctionRewardConfig("nowhere.py:f", options={"scale": 2})
    assert build(RewardConfig, "nowhere.py:f").reward == FunctionRewardConfig("nowhere.py:f")


@pytest.mark.parametrize("name", REWARD_TYPES)
def test_every_option_has_a_sentence(name: str) -> None:
    documented = sentences(REWARD_TYPES[name])
    assert set(settings_of(REWARD_TYPES[name])) <= documented.keys()


@pytest.mark.parametrize("entries", ["format", {"name": "format"}, None])
def test_entries_must_be_a_list(entries: Any) -> None:
    with pytest.raises(TypeError, match=r"rewards: got \w+, expected a list"):
        build_rewards(entries)


def test_no_entry() -> None:
    with pytest.raises(ValueError, match="rewards: none given"):
        build_rewards([])
