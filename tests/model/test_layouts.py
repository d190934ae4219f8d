"""Which layout serves a batch, by what it costs; and in which order responses are scored."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM

from maestro_fast.model.forward import _micro_batches, last_hidden
from maestro_fast.model.layout_trial import choose_layout
from maestro_fast.model.layouts import Layouts, cost_of_a_pair
from maestro_fast.model.rows import Sequences
from maestro_fast.settings import SettingsError
from tests.model.plain_kernels import PlainKernels
from tests.model.test_attention import with_attention
from tests.tiny import tiny_model


def group(prompt: int, completion: int, size: int, first: int = 5) -> Sequences:
    return Sequences([[first] * prompt] * size, [[7] * completion] * size)


def layout_of(layouts: Layouts, sequences: Sequences) -> str:
    return "plain" if layouts.rows_of(sequences).trees is None else "shared"


@pytest.mark.parametrize(
    ("prompt", "completion", "size", "chosen"),
    [(256, 32, 8, "shared"), (16, 512, 8, "plain"), (256, 32, 1, "plain"), (64, 64, 2, "shared")],
)
def test_prompts_are_shared_where_that_costs_less(prompt: int, completion: int, size: int, chosen: str) -> None:
    """The costs are those of a hidden size of 576, in SDPA with a mask."""
    layouts = Layouts("packed", "auto", 1.5 / 3072)
    assert layout_of(layouts, group(prompt, completion, size)) == chosen
    assert layout_of(Layouts("packed", "always", 1.5 / 3072), group(prompt, completion, size)) == "shared"
    assert layout_of(Layouts("packed"), group(prompt, completion, size)) == "plain"


def test_the_cost_counts_padding_and_pairs() -> None:
    layouts, ragged = Layouts("packed", "auto", 0.01), Sequences([[5] * 4, [6] * 6], [[7] * 4, [8] * 2])
    one_each = layouts.cost(Layouts("packed").rows_of(ragged))
    assert one_each == pytest.approx(16 + 0.01 * 2 * 8**2 / 2)  # SDPA needs no mask there, and skips half of the pairs.
    shorter = Sequences([[5] * 4, [6] * 2, [9]], [[7] * 4, [8] * 2, [3] * 3])
    for plain in ("packed", "padded"):
        rows = Layouts(plain).rows_of(shorter)  # type: ignore[arg-type]
        assert layouts.cost(rows) == pytest.approx(rows.input_ids.numel() + 0.01 * len(rows.input_ids) * 8**2)
    shared = Layouts("packed", "always").rows_of(group(6, 2, 3))
    assert layouts.cost(shared) == pytest.approx(12 + 0.01 * 12**2)
    seen = 6 * 7 / 2 + 3 * (2 * 6 + 3)
    kernel = Layouts("varlen", "always", 0.01, kernel=True)
    assert kernel.cost(kernel.rows_of(group(6, 2, 3))) == pytest.approx(12 + 0.01 * seen)


@pytest.mark.parametrize(
    ("config", "operations", "weights"),
    [
        ({"hidden_size": 64, "num_attention_heads": 8}, 4 * 64, 4 * 64**2 + 3 * 64 * 256),
        (
            {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
            | {"intermediate_size": 100},
            4 * 128,
            2 * 64 * 16 * 10 + 3 * 64 * 100,
        ),
        (
            {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 999}
            | {"moe_intermediate_size": 32, "num_experts_per_tok": 4},
            4 * 64,
            4 * 64**2 + 3 * 64 * 4 * 32,
        ),
    ],
    ids=["plain", "few key heads", "experts"],
)
def test_a_pair_costs_what_the_models_sizes_say(config: dict[str, Any], operations: int, weights: int) -> None:
    ratio = cost_of_a_pair(SimpleNamespace(**config)) / (operations / (2 * weights))
    assert ratio == pytest.approx(cost_of_a_pair(SimpleNamespace(hidden_size=64)) / (4 * 64 / (2 * 16 * 64**2)))
    assert 1 <= ratio <= 4


# --- models that cannot share ---


@pytest.mark.parametrize("sharing", ["auto", "always"])
def test_an_attention_that_reads_masks_in_its_own_way_is_not_tried(
    kernels: PlainKernels, sharing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """flash-attn would read past the end of a mask with four axes."""
    model = with_attention(tiny_model(), "flash")
    if sharing == "always":
        with pytest.raises(SettingsError, match="its attention is flash_attention_2, and only sdpa, eager"):
            choose_layout(model, sharing)
        return
    with caplog.at_level(logging.INFO, "maestro_fast"):
        assert choose_layout(model, sharing) == Layouts("flash")
    assert "layout: prompts are not shared, Qwen3ForCausalLM with flash_attention_2 cannot" in caplog.text


@pytest.mark.parametrize("error", [AssertionError, KeyError, IndexError, AttributeError])
def test_whatever_a_models_own_code_raises_at_a_mask_it_trains_without_sharing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    model = tiny_model("llama")
    original = type(model).forward

    def forward(self: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None and attention_mask.ndim == 4:
            raise error("four axes")
        return original(self, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    with caplog.at_level(logging.INFO, "maestro_fast"):
        assert choose_layout(model, "auto") == Layouts("packed")
    assert f"cannot: {error.__name__}" in caplog.text


def test_a_backbone_that_gives_no_states_is_named() -> None:
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 40}
    model = OPTForCausalLM(OPTConfig(word_embed_proj_dim=16, max_position_embeddings=32, pad_token_id=1, **sizes))
    with pytest.raises(ValueError, match=r"^model: OPTForCausalLM gave last hidden states of no tokens for rows of"):
        last_hidden(model, group(3, 2, 2), "padded")


def test_a_mixture_of_experts_that_returns_its_router_shares_prompts() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, output_router_logits=True, sliding_window=None))
    assert choose_layout(model, "auto").sharing == "auto"


# --- the order in which responses are scored ---


def order_of(sequences: Sequences, layouts: Layouts, size: int = 4) -> list[list[int]]:
    return [members for members, _ in _micro_batches(sequences, size, layouts)]


def test_responses_to_one_prompt_are_scored_together() -> None:
    prompts = [[5] * 20, [6] * 20, [5] * 20, [6] * 20, [5] * 20, [6] * 20]
    sequences = Sequences(prompts, [[7] * n for n in (1, 2, 3, 9, 5, 6)])
    assert order_of(sequences, Layouts("packed", "auto", 0.001), 3) == [[3, 5, 1], [4, 2, 0]]
    assert order_of(sequences, Layouts("packed"), 3) == [[3, 5, 4], [2, 1, 0]]
    long = [[5] * 20 + [8] * n for n in (9, 4, 1)]  # Such prompts have rewards that score texts behind a response.
    beginnings = Sequences([long[0], [6] * 30, long[1], [6] * 30, long[2]], [[7], [7], [7] * 9, [7], [7]])
    assert order_of(beginnings, Layouts("packed", "auto", 0.001), 3) == [[4, 2, 0], [1, 3]]


def test_the_longest_are_scored_first_where_little_is_shared() -> None:
    prompts = [[5, i] for i in range(6)]
    sequences = Sequences(prompts, [[7] * n for n in (1, 20, 3, 40, 5, 60)])
    for layouts in (Layouts("packed", "auto", 0.001), Layouts("packed")):
        assert order_of(sequences, layouts) == [[5, 3, 1, 4], [2, 0]]
    same = Sequences([[5, 6]] * 6, sequences.completion_ids)  # Their prompts are short.
    assert order_of(same, Layouts("packed", "auto", 0.001)) == [[5, 3, 1, 4], [2, 0]]
    assert torch.equal(torch.tensor([5, 3, 1, 4, 2, 0]), torch.tensor(order_of(same, Layouts("packed"), 6)[0]))
