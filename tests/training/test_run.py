"""What is refused before anything is trained."""

from __future__ import annotations

import logging

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from maestro_fast.generation import SamplingConfig
from maestro_fast.training.run import check_positions
from tests.tiny import tiny_model


def test_a_model_with_learned_positions_needs_one_for_each_token() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=16, n_embd=32, n_layer=1, n_head=2))

    check_positions(model, 10, SamplingConfig(max_new_tokens=6))
    with pytest.raises(
        ValueError,
        match=r"^sampling\.max_new_tokens: 7 after the longest prompt of 10 tokens, expected at most 16 together, "
        "the positions of GPT2LMHeadModel",
    ):
        check_positions(model, 10, SamplingConfig(max_new_tokens=7))


def test_rotary_positions_only_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_positions(tiny_model(), 200, SamplingConfig(max_new_tokens=56))
        assert not caplog.records
        check_positions(tiny_model(), 201, SamplingConfig(max_new_tokens=56))
    assert "expected at most 256 together, the positions of Qwen3ForCausalLM" in caplog.text
