"""What dtype the weights train in, what mixed precision computes in, and at which rate, unless the config says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from maestro_fast.generation import GenerationConfig, Served
from maestro_fast.settings import SettingsError
from maestro_fast.training import parse_config
from maestro_fast.training.arguments import training_arguments
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.copy_engine import CopyEngine
from tests.training.test_trainer import run


@pytest.fixture
def half(raw_config: dict[str, Any], tmp_path: Path) -> Path:
    """A checkpoint in bfloat16, as models are published, and a run on it without a learning rate."""
    model: Any = tiny_model().bfloat16()
    model.save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    raw_config["model"] = {"path": str(tmp_path / "half")}
    raw_config["weights"] = "equal"
    del raw_config["trainer"]["learning_rate"]
    return tmp_path / "half"


@pytest.mark.parametrize(("dtype", "low", "high"), [("auto", 0.9, 1.0), ("bfloat16", 0.0, 0.05)])
def test_the_share_of_the_weights_that_ever_move(
    raw_config: dict[str, Any], half: Path, caplog: pytest.LogCaptureFixture, dtype: str, low: float, high: float
) -> None:
    trainer, _ = run(raw_config, model__dtype=dtype)
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model.layers.state_dict()
        for path in (half, Path(raw_config["run_dir"]) / "final")
    )
    moved = sum(int((after[name] != before[name]).sum()) for name in before) / sum(x.numel() for x in before.values())
    said = "are trained in bfloat16, which rounds away a step of the learning rate 1e-06 for every weight beyond 0.0005"

    assert trainer.args.learning_rate == 1e-6
    assert low <= moved <= high
    assert (said in caplog.text) == (dtype == "bfloat16")


def test_adapters_are_float32_on_a_base_that_stays_as_it_is(
    raw_config: dict[str, Any], half: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("peft")
    trainer, _ = run(raw_config, model__lora={"r": 2})

    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert trainer.args.learning_rate == 1e-5
    assert "rounds away" not in caplog.text


@pytest.mark.parametrize(
    "batch",
    [{"batch__updates_per_batch": 2}, {"batch__micro_batch": 16, "advantages__profile": "maestro"}],
    ids=["scored before", "judged in the training forward"],
)
def test_the_head_follows_mixed_precision_in_every_forward(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, batch: dict[str, Any]
) -> None:
    """Scoring, reference and training multiply by the head in the dtype in which F.linear would."""
    seen: dict[str, set[torch.dtype]] = {}

    def watch(module: str, name: str) -> None:
        original = getattr(__import__(module, fromlist=[name]), name)

        def spy(hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.setdefault(name, set()).update({hidden.dtype, weight.dtype})
            return original(hidden, weight, *args, **kwargs)

        monkeypatch.setattr(f"{module}.{name}", spy)

    watch("maestro_fast.model.forward", "token_logprobs")
    watch("maestro_fast.training.loss", "linear_policy_loss")
    trainer, _ = run({**raw_config, "weights": "equal"}, trainer__bf16=True, loss__kl_coef=0.1, **batch)

    assert seen["token_logprobs"] == {torch.bfloat16}
    assert seen.get("linear_policy_loss", {torch.bfloat16}) == {torch.bfloat16}
    assert ("linear_policy_loss" in seen) == ("batch__updates_per_batch" in batch)
    assert trainer.state.log_history[0]["ratio/mean"] == pytest.approx(1, abs=1e-3)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("mixed", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_an_engine_computes_in_mixed_precision(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, mixed: bool, wanted: torch.dtype
) -> None:
    dtypes: list[torch.dtype] = []

    def build_engine(_config: GenerationConfig, served: Served) -> CopyEngine:
        dtypes.append(served.dtype)
        raise SettingsError("seen")

    monkeypatch.setattr("maestro_fast.training.run.check_generation", lambda *args: None)
    monkeypatch.setattr("maestro_fast.training.run.build_engine", build_engine)
    with pytest.raises(SettingsError, match="seen"):
        run({**raw_config, "generation": "vllm"}, trainer__bf16=mixed)
    assert dtypes == [wanted]


# --- defaults ---


@pytest.mark.parametrize(
    ("model", "trainer", "mixed"),
    [
        ({}, {}, True),
        ({"lora": {"r": 4}}, {}, True),
        ({"dtype": "float32"}, {}, True),
        ({"dtype": "bfloat16"}, {}, False),
        ({}, {"bf16": False}, False),
        ({}, {"use_cpu": True}, False),
    ],
)
def test_a_gpu_that_can_computes_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], trainer: dict[str, Any], mixed: bool
) -> None:
    for module in ("maestro_fast.training.arguments", "transformers.training_args"):
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: True)
    raw = {"run_dir": "out", "data": {"path": "p"}, "rewards": ["format"], "model": {"path": "m", **model}}

    assert training_arguments(parse_config({**raw, "trainer": trainer})).bf16 == mixed
    monkeypatch.setattr("maestro_fast.training.arguments.is_torch_bf16_gpu_available", lambda: False)
    assert not training_arguments(parse_config({**raw, "trainer": trainer})).bf16


def test_the_learning_rate_follows_what_trains(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "m", "peft_type": "LORA"}))
    raw: dict[str, Any] = {"run_dir": "out", "data": {"path": "p"}, "rewards": ["format"]}

    def rate(model: dict[str, Any], **trainer: Any) -> float:
        return training_arguments(parse_config({**raw, "model": model, "trainer": trainer})).learning_rate

    assert rate({"path": "m"}) == 1e-6
    assert rate({"path": "m", "lora": {}}) == rate({"path": str(tmp_path)}) == 1e-5
    assert rate({"path": str(tmp_path), "adapter": "merge"}) == 1e-6
    assert rate({"path": "m", "lora": {}}, learning_rate="3e-4") == 3e-4


# --- nothing to train ---


def test_a_model_of_which_nothing_trains_is_refused(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[..., Path]
) -> None:
    frozen: Any = AutoModelForCausalLM.from_pretrained(checkpoint()).requires_grad_(False)
    monkeypatch.setattr("maestro_fast.training.run.load_policy", lambda *_, **__: (frozen, tiny_tokenizer()))

    with pytest.raises(ValueError, match=r"^model: none of the parameters of Qwen3ForCausalLM .* requires a gradient"):
        run(raw_config)
    assert not (Path(raw_config["run_dir"]) / "config.yaml").exists()


def test_adapters_that_add_to_the_prompt_are_refused(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[..., Path]
) -> None:
    peft = pytest.importorskip("peft")
    base: Any = AutoModelForCausalLM.from_pretrained(checkpoint())
    tuned = peft.get_peft_model(base, peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    monkeypatch.setattr("maestro_fast.training.run.load_policy", lambda *_, **__: (tuned, tiny_tokenizer()))

    with pytest.raises(ValueError, match=r"^model: adapters of type PROMPT_TUNING add tokens to the prompt"):
        run(raw_config)
