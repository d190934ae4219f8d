"""The command line as a user meets it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from maestro_fast import __version__
from maestro_fast.cli import main
from maestro_fast.ops import cpp
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"Name {i}."}) for i in range(4)))
    raw = {
        "run_dir": "run",  # Relative paths start in the folder of the file, wherever the command is run.
        "model": {"path": "model"},
        "data": {"path": "prompts.jsonl"},
        "rewards": ["format", {"type": "length", "name": "brevity", "target": 2}],
        "sampling": {"group_size": 2, "max_new_tokens": 4},
        "batch": {"prompts_per_batch": 2, "micro_batch": 4},
        "trainer": {"disable_tqdm": True, "use_cpu": True},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_run_is_trained_reported_and_resumed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--weights", "random", "--trainer.learning_rate", "1e-4"]) == 0

    run = tmp_path / "run"
    for name in ("config.yaml", "metrics.jsonl", "timings.jsonl", "rollouts.jsonl", "report/report.html", "final"):
        assert (run / name).exists(), name
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert (written["weights"], written["model"]["path"]) == ("random", str(tmp_path / "model"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert {"rewards/format/mean", "weights/brevity", "completions/mean_length"} <= lines[0].keys()
    timings = [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timings] == [1, 2]
    assert all(0 < line["generate"] + line["train"] < line["total"] for line in timings)
    printed = capsys.readouterr().out
    assert "2 logged steps are too few to tell a change from noise" in printed and "report.html" in printed

    page = run / "report" / "report.html"
    page.unlink()
    assert main(["report", str(run), "--title", "A title", "--compare", f"the same={run}"]) == 0
    assert "<h1>A title</h1>" in page.read_text() and "the same" in page.read_text()
    assert str(page) in capsys.readouterr().out

    (run / "metrics.jsonl").unlink()
    assert main(["train", str(run / "config.yaml"), "--resume", "--trainer.num_train_epochs", "2"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4], "the config of a run directory serves to go on"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--sampling.group_size", "1"], "sampling.group_size: 1, expected at least 2"),
        (["--weights", "{type: static, values: {tone: 1}}"], "weights.values.tone: there is no such reward"),
        (["--data.prompt_column", "question"], "data.prompt_column: no column 'question'"),
        (["--run_dir", "config.yaml/run"], "run_dir: cannot write to"),
        (["--weights.policy"], "weights.policy: missing its value"),
        (["--model.path", "nowhere/at/all"], "model.path: there is no folder"),
        (["--data.path", "nowhere.jsonl"], "data.path: there is no file"),
        (["--trainer.report_to", "comet_ml"], "trainer.report_to: comet_ml cannot serve: CometCallback requires"),
        (["--trainer.max_grad_norm", "high"], "trainer.max_grad_norm: got str 'high', expected float"),
        (["--trainer.x", "{a: ["], "trainer.x: '{a: [', line 1, column 6: is not valid YAML: expected the node"),
        (["--weights", "anchored"], "anchor: missing, weights: anchored needs a known utility"),
        (["--model.lora", "{target_modules: [zork]}"], "model.lora: Target modules {'zork'} not found"),
        (["algorithm.adv_estimator=grpo"], "here verl's algorithm.adv_estimator is advantages.profile"),
    ],
)
def test_bad_input_ends_with_a_sentence_that_names_it(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    monkeypatch.chdir(config.parent)

    assert main(["train", str(config), *words]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert [line for line in printed if complaint in line], printed
    assert len([line for line in printed if line.startswith("maestro-fast: ")]) == 1
    assert not (config.parent / "run" / "config.yaml").exists()


OWN = """
def score(completions, **columns):
    return [helper(text) for text in completions]

def helper(text):
    return {}["answer"]

async def later(completions, **columns):
    return [helper(text) for text in completions]

def loss(inputs):
    return inputs.no_such_field, {}
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--rewards", "[own.py:score]"],
            ["line 3, in score", "line 6, in helper", "KeyError: 'answer'", "raised by reward 'score'"],
        ),
        (["--rewards", "[own.py:later]"], ["line 9, in later", "KeyError: 'answer'", "raised by reward 'later'"]),
        (["--loss", "own.py:loss"], ["line 12, in loss", "no_such_field", "AttributeError"]),
        (["--rewards", "[broken.py:f]"], ["def f(:", "SyntaxError", "while loading rewards[0].function"]),
        (["--rewards", "[lacking.py:f]"], ["line 1, in <module>", "No module named 'absent_dependency'"]),
    ],
)
def test_an_error_in_the_users_code_keeps_its_file_and_line(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: list[str],
) -> None:
    monkeypatch.chdir(config.parent)
    (config.parent / "own.py").write_text(OWN)
    (config.parent / "broken.py").write_text("def f(:\n    pass\n")
    (config.parent / "lacking.py").write_text("import absent_dependency\n")

    assert main(["train", str(config), *words]) == 2
    _, begin, shown = capsys.readouterr().err.partition("maestro-fast: your own code failed")
    assert begin
    for words_of_it in expected:
        assert words_of_it in shown
    assert "site-packages" not in shown and "maestro_fast/" not in shown, "only the user's files are shown"
    assert len(shown.splitlines()) < 16


@pytest.mark.parametrize("words", [["-v", "train", "c.yaml"], ["train", "c.yaml", "--verbose"], ["report", "c", "-v"]])
def test_the_whole_traceback_is_a_word_away_anywhere(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ValueError, match=r"no file c\.yaml|no directory c"):
        main(words)
    assert logging.getLogger("maestro_fast").level == logging.INFO


@pytest.mark.parametrize(
    "words",
    [
        ["train", "nowhere.yaml"],
        ["train", "examples/quickstart/config.yaml", "--model.path", "no/such/model"],
        ["train", "README.md", "--a", "[", "-v"],
        ["check", "nowhere.yaml"],
        ["check", "examples/quickstart/config.yaml", "--model.path", "no/such/model"],
        ["init", "--model", "no/such/model", "--data", "README.md"],
        ["init", "--model", "a", "--data", "nowhere.jsonl"],
        ["init", "--model", "a", "--data", "README.md", "--out", "README.md"],
        ["init", "--help"],
        ["report", "nowhere"],
        ["conductor", "show", "nowhere", "--on", "x"],
        ["--help"],
        ["no_such_command"],
    ],
)
def test_what_is_wrong_with_a_path_is_said_before_the_slow_imports(words: list[str]) -> None:
    code = f"""
import sys
from maestro_fast.cli import main
try:
    main({words})
except (Exception, SystemExit):
    pass
print("slow:", *sorted({{"torch", "transformers", "numpy", "matplotlib"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)

    assert done.stdout.splitlines()[-1] == "slow:"


def test_check_takes_the_settings_that_train_takes(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--prompts", "1", "--tokens", "3"]
    assert main(["check", str(config), *few, "--sampling.group_size", "4", "--weights", "random"]) == 0
    printed = capsys.readouterr().out
    assert "Rewards of 4 responses (1 prompts x 4)" in printed and printed.rstrip().endswith("ready")
    assert not (tmp_path / "run").exists()

    assert main(["check", str(config), *few, "--sampling.groupsize", "4"]) == 2
    assert "sampling.groupsize: unknown setting" in capsys.readouterr().err
    assert main(["check", str(config), "--prompts", "0"]) == 2
    assert "--prompts: 0, expected at least 1" in capsys.readouterr().err


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


def test_a_conductor_is_shown(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--weights", "{type: conductor, context: prompt_mean}"]
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
        (["conductor", "show", "nowhere", "--on", "x.jsonl"], "DIR: there is no folder nowhere, expected a saved"),
        (["conductor", "show", ".", "--on", "x.jsonl"], "DIR: . holds neither"),
        (["conductor", "show", "nowhere", "--on", "x.jsonl", "--rows", "0"], "--rows: 0, expected at least 1"),
        (["conductor", "show", ".", "--on", "x", "--out", "no/where.png"], "--out: there is no directory"),
        (["report", "nowhere"], "run_dir: there is no directory nowhere, expected that of a run"),
        (["report", "tests"], "tests/metrics.jsonl: there is no metrics.jsonl"),
        (["report", "tests", "--compare", "a=nowhere"], "--compare a: there is no directory nowhere"),
        (["report", "nowhere", "--compare", "other"], "--compare: 'other', expected LABEL=RUN_DIR"),
        (["quickstart", "--resume"], "--resume: needs --out, the directory of an earlier quickstart, got None"),
    ],
)
def test_what_cannot_be_reported_or_resumed_is_named(
    words: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)

    assert main(words) == 2
    assert complaint in capsys.readouterr().err
