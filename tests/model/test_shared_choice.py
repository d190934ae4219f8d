"""Prompts are shared where the model's attention keeps responses apart, and only there; the log says why not."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from maestro_fast.model import shared_attention
from maestro_fast.model.forward import last_hidden
from maestro_fast.model.layout_trial import choose_layout
from maestro_fast.model.layouts import Layouts
from maestro_fast.settings import SettingsError
from tests.model.shared_cases import MODELS, SHARED, SMALL, WINDOW, batch, lively, model_of
from tests.tiny import tiny_model

TWO = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}
MORE: dict[str, Callable[[], Any]] = {
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **TWO, head_dim=8)),
    "cohere2": lambda: Cohere2ForCausalLM(Cohere2Config(**SMALL, **TWO)),
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 16, **EXPERTS}
SIZES = {"vocab_size": 96, "hidden_size": 32}
UNSERVED: dict[str, tuple[Callable[[], Any], str]] = {
    "mamba": (
        lambda: MambaForCausalLM(MambaConfig(**SIZES, num_hidden_layers=2, state_size=8)),
        "layers of the types linear_attention have no mask for shared prompts",
    ),
    "qwen3-next": (
        lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SMALL, **LINEAR, head_dim=8)),
        "layers of the types linear_attention have no mask for shared prompts",
    ),
    "bloom": (lambda: BloomForCausalLM(BloomConfig(**SIZES, n_layer=2, n_head=4)), "ValueError: too many values"),
    "mpt": (
        lambda: MptForCausalLM(MptConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=4, max_seq_len=128)),
        "it mixes packed sequences",  # Its bias goes by the place in the row.
    ),
    "gpt-neo": (
        lambda: GPTNeoForCausalLM(
            GPTNeoConfig(
                vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48,
                attention_types=[[["global", "local"], 1]], window_size=100, max_position_embeddings=128,
                bos_token_id=1, eos_token_id=2, resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
            )
        ),
        "its window_size of 100 counts places in the row",
    ),
}  # fmt: skip


def chosen(model: nn.Module, caplog: pytest.LogCaptureFixture, sharing: Any = "auto") -> tuple[Layouts, str]:
    """The layouts that serve a model, and the last line of the log about them."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="maestro_fast"):
        layouts = choose_layout(model, sharing)
    return layouts, caplog.messages[-1]


@pytest.mark.parametrize("name", [*MODELS, *MORE])
def test_models_whose_attention_takes_a_mask_share_prompts(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, sequences = lively({**MODELS, **MORE}[name]()), batch()
    before = model.config.get_text_config().to_dict()
    layouts, line = chosen(model, caplog)
    with torch.no_grad():
        states, expected = (last_hidden(model, sequences, x).packed() for x in (SHARED, "padded"))  # type: ignore[arg-type]

    assert layouts.sharing == "auto" and line.startswith("layout: prompts that responses have in common are computed")
    assert model.config.get_text_config().to_dict() == before, "the trial has left a short window behind"
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", UNSERVED)
def test_other_models_are_served_without_sharing(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, reason = UNSERVED[name]
    model, sequences = lively(make()), batch()
    layouts, line = chosen(model, caplog)

    assert layouts.sharing == "never"
    assert line.startswith(f"layout: prompts are not shared, {type(model).__name__} with ") and reason in line
    with pytest.raises(SettingsError, match=rf"^model\.attention: shared does not serve {type(model).__name__}"):
        choose_layout(model, "always")
    with torch.no_grad():
        states, expected = (last_hidden(model, sequences, x).packed() for x in (layouts, "padded"))  # type: ignore[arg-type]
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


# --- attention that does something else than the masks say ---


@contextlib.contextmanager
def without_mask(model: Any) -> Iterator[None]:
    """Makes every layer ignore its mask and look at all that comes before in the row."""
    layers = [layer.self_attn for layer in model.model.layers]
    for layer in layers:
        layer.forward = lambda *args, forward=layer.forward, **options: forward(
            *args, **{**options, "attention_mask": None}
        )
    yield
    for layer in layers:
        del layer.forward


@contextlib.contextmanager
def by_place(model: Any) -> Iterator[None]:
    """Makes rotary positions those in the row."""
    rotary = model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda x, position_ids: forward(x, torch.arange(x.shape[1])[None].expand_as(position_ids))
    yield
    del rotary.forward


@contextlib.contextmanager
def longer_window(model: Any) -> Iterator[None]:
    """Makes the masks of windows show a token too many."""
    original = shared_attention.tree_mask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            shared_attention,
            "tree_mask",
            lambda trees, device, window=None: original(trees, device, window and window + 1),
        )
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", [without_mask, by_place, longer_window])
def test_attention_that_mixes_responses_is_found(
    broken: Callable[[Any], Any], dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of("qwen3, mixed").to(dtype)
    model.config.sliding_window = 64  # It is longer than the trial, which makes it shorter for a moment.
    assert chosen(model, caplog)[0].sharing == "auto" and model.config.sliding_window == 64
    with broken(model):
        layouts, line = chosen(model, caplog)
    assert layouts.sharing == "never" and "it mixes packed sequences (states differ by" in line


def test_a_model_that_is_hardly_trained_is_no_exception(caplog: pytest.LogCaptureFixture) -> None:
    """With small random weights attention does little, and yet it shows."""
    for family in ("qwen3", "llama"):
        model = tiny_model(family)
        for broken in (without_mask, by_place):
            with broken(model):
                assert chosen(model, caplog)[0].sharing == "never"
        assert chosen(model, caplog)[0].sharing == "auto"


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 3.0), (torch.bfloat16, 2.0)])
def test_rounding_that_grows_in_a_deep_model_is_told_from_mixing(
    dtype: torch.dtype, factor: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Padded rows themselves are exact to no more than 1e-3 here, or a tenth in bf16."""
    model: Any = lively(LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 12})))
    for parameter in model.parameters():
        parameter.data *= factor if parameter.ndim > 1 else 1.0
    model = model.to(dtype)

    layouts, line = chosen(model, caplog)
    assert layouts.sharing == "auto" and float(line.split()[-1]) > (1e-4 if dtype == torch.float32 else 1e-1)
    with without_mask(model):
        assert chosen(model, caplog)[0].sharing == "never"


def test_the_trial_runs_in_the_precision_of_training(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("llama, tied")
    with torch.autocast("cpu", torch.bfloat16):
        layouts, line = chosen(model, caplog)
        with by_place(model):
            assert chosen(model, caplog)[0].sharing == "never"
    assert layouts.sharing == "auto" and float(line.split()[-1]) > 1e-3
    assert choose_layout(model).sharing == "never" and choose_layout(model, "always").sharing == "always"
