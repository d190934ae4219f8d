"""The command line as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from maestro_fast import __version__
from maestro_fast.cli import main
from maestro_fast.ops import cpp
from tests.tiny import tiny_checkpoint


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"Name {i}."}) for i in range(4)))
    raw = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "model")},
        "data": {"path": str(tmp_path / "prompts.jsonl")},
        "rewards": ["format", {"name": "brevity", "kind": "length", "target": 2}],
        "sampling": {"group_size": 2, "max_new_tokens": 4},
        "batch": {"prompts_per_batch": 2, "micro_batch": 4},
        "trainer": {"disable_tqdm": True, "use_cpu": True},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_train_leaves_a_run_directory_with_a_report(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--weights", "random", "--trainer.learning_rate", "1e-4"]) == 0

    run = tmp_path / "run"
    for name in ("config.yaml", "metrics.jsonl", "timings.jsonl", "rollouts.jsonl", "report/report.html", "final"):
        assert (run / name).exists(), name
    assert yaml.safe_load((run / "config.yaml").read_text())["weights"] == "random"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert {"rewards/format/mean", "weights/brevity", "completions/mean_length"} <= lines[0].keys()
    timings = [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timings] == [1, 2]
    assert all(0 < line["generate"] + line["train"] < line["total"] for line in timings)
    assert "report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--sampling.group_size", "1"], "sampling.group_size: 1, expected at least 2"),
        (["--weights", "{policy: static, values: {tone: 1}}"], "weights.values.tone: there is no such reward"),
        (["--data.prompt_column", "question"], "data.prompt_column: no column 'question'"),
        (["--run_dir", "config.yaml/run"], "run_dir: cannot write to"),
        (["--weights.policy"], "weights.policy: missing its value"),
    ],
)
def test_bad_input_ends_with_a_sentence_that_names_it(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    monkeypatch.chdir(config.parent)

    assert main(["train", str(config), *words]) == 2
    assert complaint in capsys.readouterr().err


def test_info_says_what_serves_and_why_not_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0

    printed = capsys.readouterr().out
    words = ("maestro-fast", __version__, "group_advantages", "pack_sequences", "sdpa", "varlen", "never run", "vllm")
    for word in words:
        assert word in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_info_says_whether_cpp_serves_here_and_why_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cpp_row() -> str:
        assert main(["info"]) == 0
        reasons = capsys.readouterr().out.partition("Why not others")[2].partition("Attention")[0]
        return " ".join(reasons[reasons.index("\ncpp ") :].split())

    assert cpp_row().endswith("here: it can")
    monkeypatch.setattr(cpp, "why_not_built", lambda: "maestro_fast._C is not built; here is how")
    assert cpp_row().endswith("here: maestro_fast._C is not built; here is how")


def test_the_module_is_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "maestro_fast", "--version"], capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stdout.strip()) == (0, __version__)


def test_report_of_a_run_that_was_left_without_one(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config)]) == 0
    page = tmp_path / "run" / "report" / "report.html"
    page.unlink()
    assert main(["report", str(tmp_path / "run"), "--title", "A title", "--compare", f"the same={tmp_path}/run"]) == 0

    assert "<h1>A title</h1>" in page.read_text() and "the same" in page.read_text()
    assert str(page) in capsys.readouterr().out


def test_a_conductor_is_shown(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--weights", "{policy: conductor, context: prompt_mean}"]
    assert main(["train", str(config), *options]) == 0
    capsys.readouterr()
    picture, on = tmp_path / "weights.png", str(tmp_path / "prompts.jsonl")
    show = ["conductor", "show", str(tmp_path / "run" / "final"), "--on", on, "--out", str(picture), "--rows", "3"]
    assert main(show) == 0

    printed = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Weights of 3 of 4 prompts" in printed and "Name 0." in printed and str(picture) in printed
    assert main([*show, "--family-column", "kind"]) == 2
    assert "--on: family_column: no column 'kind'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["conductor", "show", "nowhere", "--on", "x.jsonl"], "DIR: nowhere holds neither"),
        (["conductor", "show", "nowhere", "--on", "x.jsonl", "--rows", "0"], "--rows: 0, expected at least 1"),
        (["conductor", "show", ".", "--on", "x", "--out", "no/where.png"], "--out: there is no directory"),
        (["report", "nowhere"], "nowhere/metrics.jsonl: there is no such run directory"),
        (["report", "nowhere", "--compare", "other"], "--compare: 'other', expected LABEL=RUN_DIR"),
        (["quickstart", "--resume"], "--resume: needs --out, the directory of an earlier quickstart, got None"),
    ],
)
def test_what_cannot_be_reported_or_resumed_is_named(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert complaint in capsys.readouterr().err
