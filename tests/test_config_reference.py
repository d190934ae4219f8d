"""The reference of the config: it names every setting, and the committed file is up to date."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import maestro_fast.training
from maestro_fast.cli import main
from maestro_fast.config_reference import Section, as_markdown, sections
from maestro_fast.generation.config import GENERATION
from maestro_fast.rewards import REWARD_TYPES
from maestro_fast.settings import settings_of
from maestro_fast.training.config import LOSS, TrainConfig
from maestro_fast.weighting import POLICIES

FILE = Path(maestro_fast.training.__file__).parent / "CONFIG.md"


def test_the_committed_file_is_what_is_generated() -> None:
    command = "python -m maestro_fast.config_reference > maestro_fast/training/CONFIG.md"
    assert FILE.read_text(encoding="utf-8") == as_markdown(), f"run {command}"


def test_the_module_writes_the_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "maestro_fast.config_reference")
    runpy.run_module("maestro_fast.config_reference", run_name="__main__")
    assert capsys.readouterr().out == as_markdown()


def find(name: str, variant: str = "") -> Section:
    (found,) = [section for section in sections() if (section.name, section.variant) == (name, variant)]
    return found


def test_every_setting_of_every_type_is_there_once() -> None:
    assert [row.name for row in find("").rows] == list(settings_of(TrainConfig))
    for name, types in (
        ("rewards[]", REWARD_TYPES),
        ("weights", POLICIES),
        ("generation", GENERATION.types),
        ("loss", LOSS.types),
    ):
        for variant, config in types.items():
            listed = [row.name for row in find(name, variant).rows]
            assert listed == [f"{name}.{'*' if s.takes_rest else key}" for key, s in settings_of(config).items()]
    for name in (
        "model.lora",
        "rewards[].gate",
        "weights.guard",
        "anchor.labels",
        "generation.probe",
        "data",
        "trainer",
    ):
        assert find(name).rows


def test_every_setting_has_a_type_and_a_sentence() -> None:
    rows = [row for section in sections() for row in section.rows]
    assert len(rows) > 150
    assert not [row.name for row in rows if not row.kind or not row.sentence.endswith(".")]
    assert not [section.title for section in sections() if not section.about]


@pytest.mark.parametrize(
    ("section", "variant", "name", "kind", "default"),
    [
        ("", "", "run_dir", "text", ""),
        ("", "", "weights", "section", "equal"),
        ("", "", "generation", "section of type transformers or vllm or vllm_server", "transformers"),
        ("", "", "trainer", "mapping of names to values", "{}"),
        ("", "", "evaluation", "section or null", "null"),
        ("model.lora", "", "model.lora.target_modules", "text or list of text", "all-linear"),
        ("rewards[]", "", "rewards[].type", ", ".join(REWARD_TYPES), ""),
        ("rewards[]", "", "rewards[].where", "text or mapping of names to values or null", "null"),
        ("rewards[]", "length", "rewards[].target", "number", ""),
        ("rewards[]", "format", "rewards[].tags", "list of text", "[think, answer]"),
        ("rewards[]", "preference", "rewards[].separator", "text", '"\\n"'),
        ("rewards[]", "function", "rewards[].*", "anything", "{}"),
        ("rewards[].gate", "", "rewards[].gate.on", "section, as `rewards[]`", ""),
        ("weights", "", "weights.type", ", ".join(POLICIES), "equal"),
        ("weights", "router", "weights.routes", "mapping of names to mapping of names to numbers", ""),
        ("weights.points[]", "", "weights.points[].step", "integer", ""),
        ("generation", "vllm", "generation.sleep", "0 or 1 or 2", "0"),
        ("generation", "vllm_server", "generation.probe", "section, as `generation.probe`", "{}"),
        ("loss", "function", "loss.function", "text or function", ""),
        ("evaluation", "", "evaluation.data", "section or list of sections, as `data`", ""),
        ("trainer", "", "trainer.report_to", "text", "none"),
    ],
)
def test_types_and_defaults(section: str, variant: str, name: str, kind: str, default: str) -> None:
    (row,) = [row for row in find(section, variant).rows if row.name == name]
    assert (row.kind, row.default) == (kind, default)


def test_the_help_of_train_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0

    printed = capsys.readouterr().out
    assert "--resume" in printed and "rewards[], type: length:" in printed
    for section in sections():
        for row in section.rows:
            assert f"    {row.name}: {row.kind}{f' = {row.default}' if row.default else ', required'}\n" in printed
    assert max(map(len, printed.splitlines())) <= 160
