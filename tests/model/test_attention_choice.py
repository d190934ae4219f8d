"""Which attention a model is loaded with, on which device and in which dtype, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_fast.model.attention import VARLEN, attention_choice, attention_paths
from maestro_fast.model.load import ModelConfig, load_policy
from maestro_fast.settings import SettingsError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that there is a CUDA device of the wanted capability, with flash-attn or without."""

    def pretend(flash: bool, capability: tuple[int, int] = (9, 0), accepted: bool = True) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if flash else None)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(
            "maestro_fast.model.attention._FLASH",
            {"flash_attention_2": ("flash_attn", lambda: accepted)},
        )

    return pretend


@pytest.mark.parametrize(
    ("machine", "dtype", "chosen", "because"),
    [
        ({"flash": True}, torch.bfloat16, VARLEN, "the first choice that can serve on cuda"),
        ({"flash": True}, None, VARLEN, "the first choice"),
        ({"flash": False}, torch.float16, VARLEN, "the first choice that can serve on cuda"),
        ({"flash": True, "accepted": False}, torch.bfloat16, VARLEN, "the first choice"),
        (
            {"flash": True},
            torch.float32,
            "sdpa",
            "torch.nn.attention.varlen needs bfloat16 or float16 weights, not float32; flash_attn needs bfloat16",
        ),
        ({"flash": False, "capability": (7, 5)}, torch.float16, "sdpa", "varlen needs sm_80, the device is sm_75"),
    ],
)
def test_the_choice_goes_by_kernel_device_and_dtype(
    on_a_gpu: Callable[..., None], machine: dict[str, Any], dtype: torch.dtype | None, chosen: str, because: str
) -> None:
    on_a_gpu(**machine)

    implementation, reason = attention_choice("auto", CUDA, dtype)
    assert implementation == chosen and because in reason


def test_flash_attention_serves_where_the_varlen_kernel_does_not(on_a_gpu: Callable[..., None]) -> None:
    """The varlen kernel takes no windows but with shared prompts, and some models do not take it at all."""
    on_a_gpu(flash=True)

    assert attention_choice("auto", CUDA, torch.bfloat16, windows=True)[0] == "flash_attention_2"
    assert attention_choice("shared", CUDA, torch.bfloat16, windows=True)[0] == VARLEN
    assert attention_choice("auto", CUDA, torch.bfloat16, refused={VARLEN: "no"})[0] == "flash_attention_2"
    implementation, reason = attention_choice("shared", CUDA, torch.bfloat16, refused={VARLEN: "it caps its scores"})
    assert (implementation, reason) == ("sdpa", "it caps its scores")


def test_flash_attention_is_never_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    implementation, reason = attention_choice("auto", CPU)
    assert implementation == "sdpa"
    assert "flash_attn cannot be imported" in reason
    assert "torch.nn.attention.varlen runs on CUDA devices, not on cpu" in reason
    assert attention_choice("eager", CPU) == ("eager", "as configured")


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        ("flash_attention_2", r"flash_attn cannot be imported, pip install \"maestro-fast\[flash-attn\]\"$"),
        ("flash_attention_3", "flash_attn_interface cannot be imported"),
        ("varlen", "torch.nn.attention.varlen runs on CUDA devices, not on cpu"),
    ],
)
def test_what_is_asked_for_is_given_or_refused(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[..., Path], wanted: Any, complaint: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(SettingsError, match=rf"^model\.attention: {wanted} cannot serve: {complaint}"):
        load_policy(ModelConfig(str(checkpoint()), attention=wanted), CPU)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"^model\.attention: flash, expected one of auto, shared, flash_attention_2"
    ):
        attention_choice("flash", CPU)


def test_a_refused_dtype_is_found_once_the_weights_are_read(
    on_a_gpu: Callable[..., None], checkpoint: Callable[..., Path]
) -> None:
    on_a_gpu(flash=False)

    with pytest.raises(SettingsError, match=r"varlen needs bfloat16 or float16 weights, not float32"):
        load_policy(ModelConfig(str(checkpoint()), attention="varlen", dtype="float32"), CUDA)
    model, _ = load_policy(ModelConfig(str(checkpoint()), attention="auto", dtype="bfloat16"), CUDA)
    assert model.config._attn_implementation == VARLEN
    model, _ = load_policy(ModelConfig(str(checkpoint()), attention="auto", dtype="float32"), CUDA)
    assert model.config._attn_implementation == "sdpa"
    for wanted in ("auto", "varlen"):  # Autocast gives the kernel half precision, whatever the weights are.
        config = ModelConfig(str(checkpoint()), attention=wanted, dtype="float32")
        model, _ = load_policy(config, CUDA, mixed=torch.bfloat16)
        assert model.config._attn_implementation == VARLEN


def test_auto_keeps_the_attention_of_a_model_that_cannot_change_it(
    monkeypatch: pytest.MonkeyPatch,
    on_a_gpu: Callable[..., None],
    checkpoint: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    on_a_gpu(flash=False)
    monkeypatch.setattr("transformers.Qwen3ForCausalLM.set_attn_implementation", lambda self, name: None)

    with caplog.at_level(logging.INFO, "maestro_fast"):
        model, _ = load_policy(ModelConfig(str(checkpoint()), dtype="bfloat16"), CUDA)
    assert model.config._attn_implementation == "sdpa"
    assert "attention: sdpa, maestro_varlen was the choice, but model: Qwen3ForCausalLM keeps its own" in caplog.text
    with pytest.raises(SettingsError, match=r"^model\.attention: varlen cannot serve: model: Qwen3ForCausalLM keeps"):
        load_policy(ModelConfig(str(checkpoint()), attention="varlen", dtype="bfloat16"), CUDA)


def test_the_paths_say_what_they_need_and_what_was_never_run() -> None:
    paths = {path.name: path for path in attention_paths(CPU)}

    assert list(paths) == ["flash", "varlen", "packed", "padded", "shared"]
    assert "CUDA" in str(paths["varlen"].obstacle) and paths["flash"].obstacle is not None
    assert paths["packed"].obstacle is None and paths["padded"].obstacle is None
    assert all(("never run" in paths[name].tried) == (name == "flash") for name in paths)
