"""What a checkpoint is and how it is loaded: whole models, trained adapters, dtypes, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from maestro_fast.model.load import LoraSettings, ModelConfig, load_policy, trains_adapter
from maestro_fast.model.trained import trained_parameters
from maestro_fast.settings import SettingsError
from tests.tiny import tiny_model, tiny_tokenizer

peft = pytest.importorskip("peft")
IDS = torch.arange(12)[None]
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 model in ``base/``, and an adapter that was trained on it in ``adapter/``."""
    folder = tmp_path_factory.mktemp("checkpoints")
    base: Any = tiny_model().bfloat16()
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    return make_adapter(folder, "adapter", AutoModelForCausalLM.from_pretrained(folder / "base"))


def make_adapter(folder: Path, name: str, base: Any, **changes: Any) -> Path:
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 64, "target_modules": TARGETS, "init_lora_weights": False, **changes}
    peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options)).save_pretrained(folder / name)
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found.float()


def expected(folders: Path, dtype: torch.dtype) -> Tensor:
    """The logits of base + adapter, as peft loads them."""
    base = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=dtype)
    return logits(peft.PeftModel.from_pretrained(base, folders / "adapter"))


def dtypes(model: Any, *, trained: bool) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad == trained}


# --- a trained adapter ---


@pytest.mark.parametrize("lora", [None, LoraSettings(4, 64, 0.0, TARGETS)], ids=["no section", "the same section"])
def test_a_trained_adapter_goes_on(folders: Path, lora: LoraSettings | None) -> None:
    model, tokenizer = load_policy(ModelConfig(str(folders / "adapter"), lora=lora))
    before = AutoModelForCausalLM.from_pretrained(folders / "base")

    assert torch.equal(logits(model), expected(folders, torch.bfloat16))
    assert (logits(model) - logits(before)).abs().max() > 0.1
    names = [name for name, _ in trained_parameters(model)]
    assert len(names) == 2 * 2 * 2 and all("lora_" in name for name in names)
    assert dtypes(model, trained=False) == {torch.bfloat16} and dtypes(model, trained=True) == {torch.float32}
    assert tokenizer.chat_template == tiny_tokenizer().chat_template, "the adapter has no tokenizer, its base has one"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"r": 16}, r"r: 16, but the adapter \S+/adapter has 4"),
        ({"alpha": 8}, r"alpha: 8, but the adapter \S+/adapter has 64"),
        ({"dropout": 0.1}, r"dropout: 0\.1, but the adapter \S+/adapter has 0\.0"),
        (
            {"target_modules": "all-linear"},
            r"target_modules: all-linear, but the adapter \S+/adapter has down_proj, q_proj in 4 modules and not 14",
        ),
    ],
    ids=str,
)
def test_a_section_lora_that_contradicts_the_adapter_is_refused(
    folders: Path, change: dict[str, Any], complaint: str
) -> None:
    lora = LoraSettings(**{"r": 4, "alpha": 64, "target_modules": TARGETS, **change})

    with pytest.raises(SettingsError, match=rf"^model\.lora\.{complaint}, expected the same or no section lora"):
        load_policy(ModelConfig(str(folders / "adapter"), lora=lora))


def test_a_merged_adapter_trains_all_weights(folders: Path) -> None:
    model, _ = load_policy(ModelConfig(str(folders / "adapter"), adapter="merge"))

    torch.testing.assert_close(logits(model), expected(folders, torch.float32), rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert dtypes(model, trained=True) == {torch.float32}


def test_a_new_adapter_on_a_merged_one_names_the_merged_model_as_its_base(folders: Path, tmp_path: Path) -> None:
    config = ModelConfig(str(folders / "adapter"), adapter="merge", lora=LoraSettings(r=2))
    model, _ = load_policy(config, merged=tmp_path / "merged")
    parameters = dict(trained_parameters(model))
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(0.01)
    model.save_pretrained(tmp_path / "final")
    again, tokenizer = load_policy(ModelConfig(str(tmp_path / "final")))

    assert all("lora_" in name for name in parameters)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    assert (logits(again) - expected(folders, torch.float32)).abs().max() > 1e-3
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def test_merging_into_half_precision_is_said(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = load_policy(ModelConfig(str(folders / "adapter"), "bfloat16", adapter="merge"))

    assert dtypes(model, trained=True) == {torch.bfloat16}
    assert "model.adapter: merge into bfloat16 weights, which rounds small changes" in caplog.text


# --- bases that are not there, and other checkpoints that cannot be loaded ---


def with_base(folders: Path, to: Path, base: str | None) -> Path:
    shutil.copytree(folders / "adapter", to)
    file = to / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))
    return to


def test_a_base_beside_the_adapter_is_found_from_any_working_directory(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").symlink_to(folders / "base")
    path = with_base(folders, tmp_path / "adapter", "../base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere" / "..")
    monkeypatch.chdir(tmp_path / "elsewhere")
    model, _ = load_policy(ModelConfig("../adapter"))
    model.save_pretrained(tmp_path / "final")
    monkeypatch.chdir("/")

    assert torch.equal(logits(load_policy(ModelConfig(str(path)))[0]), logits(model))
    assert torch.equal(logits(load_policy(ModelConfig(str(tmp_path / "final")))[0]), logits(model))


@pytest.mark.parametrize(
    ("base", "complaint"),
    [
        ("/moved/away", r"'/moved/away': there is no such folder; if that model was moved, write its new path"),
        ("./models/base", r"'\./models/base': there is no such folder"),
        (None, r"None, expected the model that it was trained on"),
        ("ADAPTER", r"'\S+', which is an adapter itself, expected a whole model"),
    ],
)
def test_a_base_that_is_not_there_is_named(folders: Path, tmp_path: Path, base: str | None, complaint: str) -> None:
    base = str(folders / "adapter") if base == "ADAPTER" else base
    path = with_base(folders, tmp_path / "adapter", base)

    with pytest.raises(
        SettingsError, match=rf"^model\.path: {path} is an adapter, .* base_model_name_or_path {complaint}"
    ):
        load_policy(ModelConfig(str(path)))


def test_a_whole_model_has_nothing_to_merge(folders: Path) -> None:
    with pytest.raises(SettingsError, match=r"^model\.adapter: merge, but \S+/base holds a whole model"):
        load_policy(ModelConfig(str(folders / "base"), adapter="merge"))


def test_a_folder_that_holds_both_is_refused(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "adapter", tmp_path / "both")
    shutil.copytree(folders / "base", tmp_path / "both", dirs_exist_ok=True)

    with pytest.raises(SettingsError, match=r"^model\.path: \S+/both holds a whole model and an adapter"):
        load_policy(ModelConfig(str(tmp_path / "both")))


def test_an_adapter_that_adds_to_the_prompt_is_refused(folders: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    tuning = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(base, tuning).save_pretrained(tmp_path / "prompt")

    with pytest.raises(SettingsError, match=r"^model\.path: \S+/prompt is an adapter of type PROMPT_TUNING"):
        load_policy(ModelConfig(str(tmp_path / "prompt")))


def test_an_adapter_that_peft_does_not_know_is_refused(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "adapter", tmp_path / "later")
    settings = json.loads((tmp_path / "later" / "adapter_config.json").read_text())
    (tmp_path / "later" / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "LATER"}))

    with pytest.raises(SettingsError, match=r"^model\.path: \S+/later is an adapter of type 'LATER', which this peft"):
        load_policy(ModelConfig(str(tmp_path / "later")))


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=rf"^model\.path: {tmp_path} cannot be loaded: "):
        load_policy(ModelConfig(str(tmp_path)))


@pytest.mark.parametrize("path", ["/no/such/folder", "runs/one/final", "../no_such_model", "my model"])
def test_a_path_that_is_not_there_is_named(path: str) -> None:
    for use in (load_policy, trains_adapter):
        with pytest.raises(
            SettingsError, match=r"^model\.path: '.*' is no folder here, and no name of a model on the hub"
        ):
            use(ModelConfig(path))


# --- dtypes ---


@pytest.mark.parametrize(
    ("options", "frozen", "trained"),
    [
        ({}, set(), {torch.float32}),
        ({"dtype": "bfloat16"}, set(), {torch.bfloat16}),
        ({"lora": LoraSettings(r=2)}, {torch.bfloat16}, {torch.float32}),
        ({"lora": LoraSettings(r=2), "dtype": "float32"}, {torch.float32}, {torch.float32}),
    ],
    ids=["full", "full bfloat16", "lora", "lora float32"],
)
def test_weights_that_train_are_float32(
    folders: Path, options: dict[str, Any], frozen: set[torch.dtype], trained: set[torch.dtype]
) -> None:
    model, _ = load_policy(ModelConfig(str(folders / "base"), **options))

    assert dtypes(model, trained=False) == frozen and dtypes(model, trained=True) == trained
