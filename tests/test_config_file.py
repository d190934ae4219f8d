"""A config file from any directory: relative paths start in its folder, those of the command line where one works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from maestro_fast.config_file import absolute_paths, check_paths, read_config
from maestro_fast.config_reference import sections
from maestro_fast.settings import SettingsError

CONFIG = """
run_dir: runs/a
model: {path: ckpt}
data: {path: data/p.jsonl}
evaluation: {data: {path: org/prompts}}
rewards:
  - format
  - own.py:score
  - {type: preference, model: reward, gate: {on: "../shared.py:gate", threshold: 1}}
  - {function: "own.py:other", model: ckpt, file: data/p.jsonl}
  - {type: function, function: "package.module:name"}
anchor: {type: preference, model: org/judge, where: {family: data/p.jsonl}}
weights: {type: conductor, meta_reward: "own.py:meta"}
loss: own.py:loss
generation: {type: vllm_server, url: "http://h:1", folder: weights}
trainer: {run_name: ckpt, deepspeed: ds.json}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a config, some of whose paths exist, beside the working directory, which is empty."""
    folder = tmp_path / "project" / "configs"
    for name in ("ckpt", "reward", "data"):
        (folder / name).mkdir(parents=True)
    (folder / "c.yaml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_relative_paths_start_in_the_folder_of_the_file(folder: Path) -> None:
    assert read_config(Path("../project/configs/c.yaml")) == {
        "run_dir": f"{folder}/runs/a",
        "model": {"path": f"{folder}/ckpt"},
        "data": {"path": f"{folder}/data/p.jsonl"},
        "evaluation": {"data": {"path": "org/prompts"}},  # There is no such folder: a name of the hub.
        "rewards": [
            "format",
            f"{folder}/own.py:score",
            {
                "type": "preference",
                "model": f"{folder}/reward",
                "gate": {True: f"{folder.parent}/shared.py:gate", "threshold": 1},  # YAML's `on`
            },
            # Arguments of the user's own function are none of our business.
            {"function": f"{folder}/own.py:other", "model": "ckpt", "file": "data/p.jsonl"},
            {"type": "function", "function": "package.module:name"},
        ],
        "anchor": {"type": "preference", "model": "org/judge", "where": {"family": "data/p.jsonl"}},
        "weights": {"type": "conductor", "meta_reward": f"{folder}/own.py:meta"},
        "loss": f"{folder}/own.py:loss",
        "generation": {"type": "vllm_server", "url": "http://h:1", "folder": f"{folder}/weights"},
        "trainer": {"run_name": "ckpt", "deepspeed": f"{folder}/ds.json"},
    }


def test_a_folder_that_is_a_link_is_followed_before_one_goes_up(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(folder)
    (folder / "c.yaml").write_text("model: {path: ../base}\ndata: {path: ../p.jsonl}\n")
    (folder.parent / "base").mkdir()

    read = read_config(tmp_path / "elsewhere" / "link" / "c.yaml")
    assert read == {"model": {"path": f"{folder.parent}/base"}, "data": {"path": f"{folder.parent}/p.jsonl"}}


def test_what_is_read_reads_the_same_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    """As config.yaml in a run directory, which is trained on with, and whose Conductor is shown."""
    values = read_config(folder / "c.yaml")

    assert absolute_paths(values, tmp_path) == values


def test_paths_on_the_command_line_start_where_one_works(folder: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    (here / "org" / "model").mkdir(parents=True)
    words = ["--model.path", "org/model", "--data.path=p.jsonl", "--rewards", "[mine.py:f, 'm:f']", "--run_dir", "~/r"]
    values = read_config(folder / "c.yaml", [*words, "--weights", "mine.py:f", "--anchor.model", "./judge"])

    assert values["model"]["path"] == f"{here}/org/model"
    assert values["data"]["path"] == f"{here}/p.jsonl"
    assert values["rewards"] == [f"{here}/mine.py:f", "m:f"]
    assert values["run_dir"] == str(Path.home() / "r")
    assert values["weights"] == f"{here}/mine.py:f"
    assert values["anchor"]["model"] == f"{here}/judge"
    assert values["loss"] == f"{folder}/own.py:loss"  # This one the command line left alone.


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [("model.path", "org/model", "folder"), ("data.path", "q.jsonl", "file"), ("loss", "l.py:f", "file")],
)
def test_a_path_that_starts_where_one_works_is_refused_in_a_file(
    folder: Path, tmp_path: Path, name: str, text: str, where: str
) -> None:
    """transformers would load the folder, and a name of the hub could mean two things. The way out is named."""
    found = tmp_path / "here" / text.partition(":")[0]
    found.mkdir(parents=True) if where == "folder" else found.write_text("")
    section, _, key = name.partition(".")
    (folder / "d.yaml").write_text(f"{section}: {f'{{{key}: {text}}}' if key else text}\n")

    words = rf"^{name}: .* is not in {folder}, .*, expected \.\./\.\./here/{found.relative_to(tmp_path / 'here')}$"
    with pytest.raises(SettingsError, match=words):
        read_config(folder / "d.yaml")
    assert read_config(folder / "d.yaml", [f"--{name}", "/else"])[section]


def test_every_setting_that_is_a_path_is_known() -> None:
    """A setting whose sentence speaks of files has to be made absolute, also one that is added tomorrow."""
    no_path = {"final", "weights.columns", "generation.weights", "trainer.report_to"}
    known: set[str] = set()
    for row in (row for section in sections() for row in section.rows):
        name = row.name.replace("[]", "[0]").replace(".*", "")
        if not re.search(r"\b(file|directory|folder)\b|\.py:", row.sentence) or row.name in no_path:
            continue
        if row.kind.partition(" ")[0] not in ("text", "anything"):
            continue
        values: Any = "own.py:f" if ".py:" in row.sentence else "./own"
        for part in reversed(name.split(".")):
            values = {part: values} if not part.endswith("[0]") else {part[:-3]: [values]}
        assert "/base/own" in str(absolute_paths(values, Path("/base"))), f"{row.name} is not among the paths"
        known.add(row.name)
    assert {"run_dir", "model.path", "data.path", "rewards[].model", "rewards[].function", "loss.function"} <= known
    assert {"weights.function", "weights.meta_reward", "generation.folder"} <= known


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("data.path", "no.jsonl", r"data\.path: there is no file /.*/no\.jsonl"),
        ("evaluation.data.path", "no.jsonl", r"evaluation\.data\.path: there is no file /.*/no\.jsonl"),
        ("rewards", "[format, 'no.py:f']", r"rewards\[1\]: there is no file /.*/no\.py"),
        ("rewards", "[{type: preference, model: ./no}]", r"rewards\[0\]\.model: there is no folder /.*/no"),
        ("loss.function", "no.py:f", r"loss\.function: there is no file /.*/no\.py"),
        ("model.path", "./no", r"model\.path: there is no folder /.*/no"),
    ],
)
def test_what_is_missing_is_named_before_it_is_read(tmp_path: Path, name: str, value: str, complaint: str) -> None:
    (tmp_path / "c.yaml").write_text("model: {path: org/model}\ndata: {path: org/data}\nrewards: [m:f, format]\n")
    check_paths(read_config(tmp_path / "c.yaml"))

    with pytest.raises(SettingsError, match=f"^{complaint}"):
        check_paths(read_config(tmp_path / "c.yaml", [f"--{name}", value]))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("run_dir: a\nmodel: {path: [\n", "c.yaml, line 3, column 1: is not valid YAML: expected the node content"),
        ("a: 1\nb:\n\tc: 2\n", r"c.yaml, line 3, column 1: is not valid YAML: found character '\\t'"),
        ("[" * 3000, r"c.yaml: nests too deep, expected at most 64 levels"),
        ("a: " + "[" * 70 + "]" * 70, r"c.yaml: nests too deep, expected at most 64 levels"),
        ("a: &x {b: [*x]}", r"c.yaml: holds an anchor that stands within itself, expected none"),
        ("a: 1\nb: {c: 1, c: 2}\n", "c.yaml, line 2, column 11: is not valid YAML: the key 'c' stands there twice"),
        ("a: 2026-13-45\n", "c.yaml: is not valid YAML: month must be in 1..12"),
        ("- a\n", "c.yaml holds a list, expected a mapping"),
        ("", "c.yaml holds nothing, expected a mapping"),
        (b"a: caf\xe9\n", "c.yaml is not a text in UTF-8, see byte 6"),
        (None, "cannot read .*c.yaml: Is a directory"),
    ],
)
def test_a_broken_file_is_one_sentence(text: str | bytes | None, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    if text is None:
        path.mkdir()
    else:
        path.write_bytes(text.encode() if isinstance(text, str) else text)

    with pytest.raises(SettingsError, match=f"^config: .*{complaint}") as caught:
        read_config(path)
    assert "\n" not in str(caught.value)


def test_anchors_and_merges_of_yaml_stay_legal(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "base: &b {low: 1, high: 2}\n"
        "parts: {mine: &m {<<: *b, high: 3}}\n"  # It is merged before it is read itself.
        "next: &n {<<: *m, wide: 4, high: 5}\n"
        "last: {<<: [*n, *b], low: 6}\n"
    )

    read = read_config(path)
    assert read["parts"] == {"mine": {"low": 1, "high": 3}} and read["next"] == {"low": 1, "high": 5, "wide": 4}
    assert read["last"]["low"] == 6 and read["last"]["wide"] == 4


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("a" * 256, r"^data\.path: 'a{255}'\.\.\. is no path that a file can have"),
        ("a\0b", r"^data\.path: .* is no path that a file can have"),
        (
            "~nobody-of-this-name/x",
            r"^data\.path: '~nobody-of-this-name/x' begins with the folder of a user whom there",
        ),
    ],
)
def test_a_path_that_no_file_can_have(folder: Path, path: str, complaint: str) -> None:
    text = yaml.safe_dump({"data": {"path": path}})
    (folder / "c.yaml").write_text(text)
    with pytest.raises(SettingsError, match=complaint):
        read_config(folder / "c.yaml")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--trainer.x", "{a: ["], r"^trainer\.x: '{a: \[', line 1, column 6: is not valid YAML: "),
        (
            ["rollout.n=8"],
            r"^rollout\.n=8: expected --section\.setting VALUE; here verl's rollout\.n is sampling\.group",
        ),
        (["--seed", "--x", "1"], "^seed: missing its value"),
    ],
)
def test_a_broken_word_of_the_command_line_is_one_sentence(folder: Path, words: list[str], complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        read_config(folder / "c.yaml", words)
