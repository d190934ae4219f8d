"""``maestro-fast init``: a config for a user's own model and data that runs as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from maestro_fast.cli import main
from maestro_fast.config_file import read_config
from maestro_fast.starting import init
from maestro_fast.starting.columns import family_column, prompt_column
from maestro_fast.training.config import parse_config
from tests.tiny import tiny_checkpoint, tiny_tokenizer

OWN = "def score(completions, answer, **columns):\n    return [float(len(c) % 3) for c in completions]\n"
TOPICS = ("sums", "words")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def here(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a model, data whose columns have names of their own, and a reward."""
    (tmp_path / "model").symlink_to(model)
    rows = [{"question": f"How much is {i}?", "answer": str(i), "topic": TOPICS[i % 2]} for i in range(8)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(init._LONGEST, "cpu", 24)
    monkeypatch.setattr(init, "_GROUP", 2)
    return tmp_path


WORDS = ["init", "--model", "model", "--data", "tasks.jsonl", "--prompts", "1", "--tokens", "4"]


def test_a_config_is_written_checked_and_trained(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = here / "configs" / "mine.yaml"
    asked = ["--prompt-column", "question", "--rewards", "format,length,own.py:score", "--out", "configs/mine.yaml"]
    assert main([*WORDS, *asked]) == 0

    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("ready") and "other columns       answer, topic" in printed
    text = out.read_text(encoding="utf-8")
    config = parse_config(read_config(out))
    written = yaml.safe_load(text)
    assert written["data"] == {"path": "../tasks.jsonl", "prompt_column": "question", "family_column": "topic"}
    assert written["rewards"][2] == "../own.py:score", "relative paths start in the folder of the file"
    assert written["rewards"][1] == {"type": "length", "target": config.sampling.max_new_tokens // 2}
    assert written["weights"] == "conductor" and "<think>" in written["chat"]["system_prompt"]
    assert (config.batch.prompts_per_batch, config.batch.micro_batch, config.model.lora) == (2, 4, None)
    settings = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    explained = [line for line in settings if "  # " in line or line.rstrip().endswith(":") or '"' in line]
    assert len(explained) >= len(settings) - 1, "every line but the seed has its reason"
    assert not (here / "configs" / "runs").exists()

    before = out.read_bytes()
    assert main([*WORDS, *asked]) == 2
    assert "is there already, and init overwrites nothing" in capsys.readouterr().err and out.read_bytes() == before

    assert main(["train", str(out), "--trainer.max_steps", "1", "--trainer.use_cpu", "true"]) == 0
    assert (here / "configs" / "runs" / "mine" / "final").is_dir()


def test_every_alternative_that_is_commented_out_can_be_taken(here: Path) -> None:
    """A line such as ``# weights: equal`` is a setting once its ``# `` is gone."""
    chosen: list[Any] = []
    keep = init.written

    def see(choices: Any) -> str:
        chosen.append(choices)
        return keep(choices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init, "written", see)
        patch.setattr(init, "_micro_batch", lambda choices: 1)
        init.write_config(init.InitOptions("model", "tasks.jsonl", here / "c.yaml", prompt_column="question"))
        see(chosen[-1])
    lines = (here / "c.yaml").read_text(encoding="utf-8").splitlines()
    top = [line.removeprefix("# ") for line in lines if line.startswith(("# weights:", "# loss:", "# advantages:"))]
    top += [line.removeprefix("# ") for line in lines if line.startswith(("# batch:", "# alarms:", "# console:"))]
    assert len(top) >= 4
    base = read_config(here / "c.yaml")
    for line in top:
        parse_config({**base, **yaml.safe_load(line)})
    nested = [line for line in lines if line.startswith("  # ")]
    assert len(nested) >= 4
    for line in nested:
        section = next(x for x in reversed(lines[: lines.index(line)]) if x and x[0].isalpha()).partition(":")[0]
        parse_config({**base, section: {**base[section], **yaml.safe_load(line.replace("# ", "", 1))}})


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "columns are question, answer, topic: name the one with the prompts, perhaps --prompt-column question"),
        (
            ["--prompt-column", "qestion"],
            "no column 'qestion' in tasks.jsonl, columns are question, answer, topic; did",
        ),
        (["--rewards", "formt"], "--rewards: 'formt', expected one of"),
        (["--rewards", "other.py:score"], "--rewards: there is no file other.py"),
        (["--rewards", "preference"], "--rewards: preference needs settings of its own"),
        (["--rewards", ","], "--rewards: names none"),
        (["--weights", "conducter"], "did you mean 'conductor'"),
        (["--model", "nowhere/at/all"], "model.path: there is no folder"),
        (["--data", "nowhere.jsonl"], "data.path: there is no file"),
        (["--out", "no/such/folder.yaml"], "--out: there is no directory"),
        (["--tokens", "0"], "--tokens: 0, expected at least 1"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    assert main([*WORDS, *words]) == 2
    assert complaint in capsys.readouterr().err
    assert not (here / "config.yaml").exists()


def test_responses_fit_into_the_positions(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(init._LONGEST, "cpu", 512)
    monkeypatch.setattr(init, "_micro_batch", lambda choices: 1)
    options = init.InitOptions("model", "tasks.jsonl", here / "c.yaml", prompt_column="question", rewards="format")
    init.write_config(options)

    config = parse_config(read_config(here / "c.yaml"))
    assert 16 <= config.sampling.max_new_tokens < 256 - 30, "the model has 256 positions"
    (here / "c.yaml").unlink()
    (here / "tasks.jsonl").write_text(json.dumps({"question": "word " * 300}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"the longest prompt has .* expected room for 16 more"):
        init.write_config(options)


def test_text_for_a_model_without_a_template_stays_text_and_conversations_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    system: Callable[..., str | None] = init._system_prompt
    conversation = [{"role": "user", "content": "Hello"}]
    assert system("Hello", tokenizer, ["entropy"]) == "You are a helpful assistant."
    assert system(conversation, tokenizer, ["entropy"]) is None
    tokenizer.chat_template = None
    assert system("Hello", tokenizer, ["format"]) is None
    with pytest.raises(ValueError, match="prompts are conversations, and the model's tokenizer has no chat template"):
        system(conversation, tokenizer, ["format"])


def test_columns_are_found_by_the_names_that_people_use() -> None:
    assert prompt_column([{"id": 1, "messages": []}], None, "x") == "messages"
    assert prompt_column([{"messages": [], "prompt": ""}], None, "x") == "prompt"
    with pytest.raises(ValueError, match=r"perhaps --prompt-column Instruction$"):
        prompt_column([{"Output": "", "Instruction": ""}], None, "x")
    with pytest.raises(ValueError, match=r"name the one with the prompts --prompt-column NAME$"):
        prompt_column([{"a": "", "b": ""}], None, "x")
    rows = [{"p": str(i), "source": str(i), "subject": "xy"[i % 2]} for i in range(8)]
    assert family_column(rows, "p") == "subject", "a source that differs in every row is no family"
    assert family_column(rows, "subject") is None
