"""Four attention paths give one result, and a trial on the model finds a path that does not.

No CPU runs flash-attn's kernel or torch's varlen kernel: a plain attention stands in for both (``kernels``), so that
all around them is run. The tests marked ``gpu`` run the kernels themselves.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from maestro_fast.model.attention import (
    VARLEN,
    Layout,
    attention_choice,
    bounds_mask,
    register_varlen,
    use_attention,
    varlen_attention,
)
from maestro_fast.model.forward import completion_logprobs, last_hidden, score
from maestro_fast.model.head import head_of
from maestro_fast.model.layout_trial import choose_layout
from maestro_fast.model.rows import Sequences, rows_of
from maestro_fast.settings import SettingsError, override
from maestro_fast.training import parse_config, train
from tests.model.plain_kernels import PlainKernels
from tests.tiny import tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PATHS: list[Layout] = ["flash", "varlen", "packed", "padded"]
IMPLEMENTATION = {"flash": "flash_attention_2", "varlen": VARLEN, "packed": "sdpa", "padded": "sdpa"}


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(2, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# The lengths of these sequences are 2, 150, 7, 40, 2 and 23.
SEQUENCES = Sequences(
    [ids(n, n) for n in (1, 30, 3, 36, 1, 11)],
    [ids(n, 100 + n) for n in (1, 120, 4, 4, 1, 12)],
)
BOUNDS = [0, 2, 152, 159, 199, 201, 224]


def with_attention(model: PreTrainedModel, path: Layout) -> PreTrainedModel:
    """Sets the name of the implementation, as ``set_attn_implementation`` refuses flash attention without a GPU."""
    register_varlen()
    model.config._attn_implementation_internal = IMPLEMENTATION[path]
    return model


def logprobs_and_gradients(model: PreTrainedModel, path: Layout) -> tuple[Tensor, dict[str, Tensor]]:
    hidden = last_hidden(model, SEQUENCES, path)
    logprobs, _ = completion_logprobs(hidden, head_of(model), 1.0, "none")
    (logprobs * torch.linspace(-1, 1, logprobs.numel(), device=logprobs.device)).sum().backward()
    return logprobs.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def one_by_one(model: PreTrainedModel) -> Tensor:
    """Log-probs from the model's own logits, in float64."""
    logprobs = []
    for prompt, completion in zip(SEQUENCES.prompt_ids, SEQUENCES.completion_ids, strict=True):
        logits = model.double()(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logprobs.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(logprobs).detach()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_gives_the_same_logprobs_and_gradients(kernels: PlainKernels, family: str, path: Layout) -> None:
    logprobs, gradients = logprobs_and_gradients(with_attention(tiny_model(family), path), path)
    calls = kernels.calls.copy()
    _, expected = logprobs_and_gradients(tiny_model(family).double(), "padded")

    torch.testing.assert_close(logprobs.double(), one_by_one(tiny_model(family)), rtol=0, atol=1e-5)
    assert gradients.keys() == expected.keys() and gradients
    for name, gradient in gradients.items():
        worst = (gradient - expected[name]).abs().max() / expected[name].abs().max()
        assert expected[name].abs().max() > 0 and worst < 1e-5, name
    # There are two layers with four query heads and two key heads, and each sequence has its own bounds.
    assert calls == ([(path, 4, 2, BOUNDS)] * 2 if path in ("flash", "varlen") else [])


@pytest.mark.parametrize("path", ["flash", "varlen"])
def test_one_row_is_what_transformers_calls_flattened(path: Layout) -> None:
    flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    expected = flatten([{"input_ids": sequence} for sequence in SEQUENCES.tokens])
    expected.pop("labels")
    ours = rows_of(SEQUENCES, path).model_input(CPU)

    mask = ours.pop("attention_mask")
    assert mask is None if path == "flash" else mask.shape == (1, 1, 0, 0)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("path", PATHS)
def test_scoring_in_micro_batches_gives_the_same_on_every_path(kernels: PlainKernels, path: Layout) -> None:
    model = with_attention(tiny_model(), path)
    out = score(model, SEQUENCES, head_of(model), layout=path, micro_batch=4, temperature=1.0, context="last")
    expected = score(
        tiny_model(), SEQUENCES, head_of(tiny_model()), layout="padded", micro_batch=1, temperature=1.0, context="last"
    )

    torch.testing.assert_close(out.logprobs_C, expected.logprobs_C, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.context_Bd, expected.context_Bd, rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", ["flash", "varlen"])
def test_recomputed_activations_see_the_same_bounds(kernels: PlainKernels, path: Layout) -> None:
    model = with_attention(tiny_model(), path).train()
    model.activation_checkpointing_enable()
    _, gradients = logprobs_and_gradients(model, path)
    _, expected = logprobs_and_gradients(tiny_model(), "padded")

    assert kernels.calls == [(path, 4, 2, BOUNDS)] * 4  # Two layers run in the forward, and again in the backward.
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() < 1e-5 * expected[name].abs().max(), name


@pytest.mark.parametrize("path", ["flash", "varlen"])
def test_a_layout_needs_its_implementation(path: Layout) -> None:
    with pytest.raises(ValueError, match=f"layout: {path}, but the model's attention implementation is sdpa"):
        last_hidden(tiny_model(), SEQUENCES, path)


@pytest.mark.parametrize("path", ["flash", "varlen", "packed"])
def test_the_trial_takes_the_path_that_the_implementation_offers(
    kernels: PlainKernels, path: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "maestro_fast"):
        assert choose_layout(with_attention(tiny_model(), path)).plain == path
    assert f"layout: {path} with {IMPLEMENTATION[path]}, states and gradients equal the padded ones" in caplog.text


def mixing(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: Any, **options: Any) -> Tensor:
    whole = torch.tensor([0, query.shape[0]], dtype=torch.int32)
    return PlainKernels().varlen_attn(
        query, key, value, whole, whole, query.shape[0], query.shape[0], **options
    )  # The whole row counts as one long sequence.


def without_key_gradient(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
    return PlainKernels().varlen_attn(query, key.detach(), *rest, **options)


def out_of_order(*arguments: Any, **options: Any) -> Tensor:
    raise NotImplementedError("no kernel image is available")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (mixing, r"it mixes packed sequences \(states differ by \d"),
        (without_key_gradient, r"states differ by \d.\de-0[5-9], gradients by \d.\de(\+00|-0[1-3])"),
        (out_of_order, "NotImplementedError: no kernel image is available"),
    ],
)
def test_a_kernel_that_is_wrong_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kernel: Callable[..., Tensor], reason: str
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    with caplog.at_level(logging.INFO, "maestro_fast"):
        assert choose_layout(with_attention(tiny_model(), "varlen")).plain == "padded"
    (message,) = [record.message for record in caplog.records]
    assert message.startswith(f"layout: padded with {VARLEN}, Qwen3ForCausalLM cannot take varlen: ")
    assert re.search(reason, message), message


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def dropping_the_bounds() -> PreTrainedModel:
    """A model with its own attention, which drops the keyword arguments that it does not know."""
    model = tiny_model()
    for layer in model.model.layers:
        forward = layer.self_attn.forward

        def own(
            hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, *, forward: Any = forward, **_: Any
        ) -> Any:
            return forward(hidden_states, position_embeddings, attention_mask)

        layer.self_attn.forward = own
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (dropping_the_bounds, "Qwen3Attention got sequence bounds without bounds_mask()"),
        (lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)), "asks for sliding_window, which"),
    ],
    ids=["own attention", "windows"],
)
def test_models_that_varlen_cannot_serve_are_padded_and_stay_right(
    kernels: PlainKernels, caplog: pytest.LogCaptureFixture, make: Callable[[], PreTrainedModel], reason: str
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    use_attention(model, VARLEN)
    with caplog.at_level(logging.INFO, "maestro_fast"):
        assert choose_layout(model).plain == "padded"
    assert reason in caplog.text
    padded = last_hidden(model, Sequences([[5, 6, 7, 8]], [[9, 10, 11, 12]]), "padded").packed()
    model.config._attn_implementation_internal = "sdpa"
    own = model.base_model(input_ids=torch.arange(5, 13)[None]).last_hidden_state[0]
    torch.testing.assert_close(padded, own, rtol=1e-5, atol=1e-5)


def test_a_model_without_sdpa_is_not_given_varlen() -> None:
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL))  # This model caps its scores.

    with pytest.raises(ValueError, match="model: Gemma2ForCausalLM has eager attention, expected sdpa beside"):
        use_attention(model, VARLEN)
    assert choose_layout(model).plain == "packed"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"dropout": 0.1}, "Linear asks for dropout, which maestro_varlen does not do"),
        ({"softcap": 30.0}, "asks for softcap,"),
        ({"s_aux": torch.zeros(4)}, "asks for s_aux,"),
        ({"is_causal": False}, "asks for is_causal=False,"),
        ({"query": torch.zeros(2, 4, 6, 8)}, "asks for rows side by side,"),
        ({"value": torch.zeros(1, 2, 6, 4)}, "asks for values of another head size,"),
        ({"attention_mask": None}, r"cu_seq_lens_q: Linear got sequence bounds without bounds_mask\(\), or that mask"),
        ({"cu_seq_lens_q": None}, r"cu_seq_lens_q: Linear got sequence bounds without bounds_mask\(\), or that mask"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused(kernels: PlainKernels, change: dict[str, Any], complaint: str) -> None:
    given = {
        "query": torch.zeros(1, 4, 6, 8),
        "key": torch.zeros(1, 2, 6, 8),
        "value": torch.zeros(1, 2, 6, 8),
        "attention_mask": bounds_mask(),
        "scaling": 1.0,
        "cu_seq_lens_q": torch.tensor([0, 2, 6], dtype=torch.int32),
        "max_length_q": 4,
    }
    assert varlen_attention(nn.Linear(1, 1), **given)[0].shape == (1, 6, 4, 8)
    with pytest.raises(ValueError, match=complaint):
        varlen_attention(nn.Linear(1, 1), **{**given, **change})


def test_everything_else_that_is_done_with_a_model_uses_sdpa(kernels: PlainKernels, tmp_path: Path) -> None:
    model, plain = tiny_model(), tiny_model()
    use_attention(model, VARLEN)
    left_padded = torch.tensor([[1, 1, 5, 6], [7, 8, 9, 10]])
    arguments: Any = {
        "attention_mask": (left_padded != 1).long(),
        "max_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    ours, theirs = model.generate(left_padded, **arguments), plain.generate(left_padded, **arguments)

    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(torch.stack(ours.logits), torch.stack(theirs.logits))
    assert not kernels.calls
    model.save_pretrained(tmp_path)
    assert VARLEN not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_autocast_gives_the_kernel_one_half_precision_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append({query.dtype, key.dtype, value.dtype})
        return PlainKernels().varlen_attn(query, key, value, *rest, **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    model = with_attention(tiny_model("qwen3"), "varlen")  # Its norms leave queries and keys in float32.
    with torch.autocast("cpu", torch.bfloat16):
        last_hidden(model, SEQUENCES, "varlen")
    assert seen == [{torch.bfloat16}] * 2


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
def test_a_run_with_varlen_equals_one_with_sdpa(
    monkeypatch: pytest.MonkeyPatch, kernels: PlainKernels, raw_config: dict[str, Any], tmp_path: Path, lora: Any
) -> None:
    monkeypatch.setattr("maestro_fast.model.attention.varlen_obstacle", lambda device, dtype=None: None)
    # The reward reads the text alone. Entropies differ by 1e-4 here, so their advantages would be mostly noise.
    own = tmp_path / "own.py"
    own.write_text("def letters(completions):\n    return [float(len(set(text))) for text in completions]\n")
    raw_config["rewards"] = [{"name": "letters", "function": f"{own}:letters"}]
    raw_config["weights"] = "equal"
    override(raw_config, "trainer.optim", "sgd")  # SGD steps by the gradient, Adam by its sign.
    override(raw_config, "trainer.learning_rate", 1.0)
    override(raw_config, "trainer.max_steps", 1)
    override(raw_config, "model.lora", lora)
    override(raw_config, "loss.kl_coef", 0.01)
    after: dict[str, dict[str, Tensor]] = {}
    for attention in ("sdpa", "varlen"):
        override(raw_config, "model.attention", attention)
        override(raw_config, "run_dir", str(tmp_path / attention))
        trainer = train(parse_config(raw_config), raw_config)
        assert trainer.step.scorer.layouts.plain == ("varlen" if attention == "varlen" else "packed")
        after[attention] = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}

    before = {} if lora else dict(AutoModelForCausalLM.from_pretrained(raw_config["model"]["path"]).named_parameters())
    moved = 0.0
    for name, value in after["sdpa"].items():
        torch.testing.assert_close(after["varlen"][name], value, rtol=0, atol=1e-6, msg=name)
        moved = max(moved, (value - before[name]).abs().max().item() if before else value.abs().max().item())
    assert kernels.calls and moved > 2e-2


def test_varlen_serves_float32_weights_in_mixed_precision(
    monkeypatch: pytest.MonkeyPatch, raw_config: dict[str, Any]
) -> None:
    """The kernel here refuses float32 as the real one does. So every forward of the run, trials included, is cast."""
    seen: set[torch.dtype] = set()

    def kernel(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        if query.dtype not in (torch.bfloat16, torch.float16):
            raise RuntimeError(f"varlen_attn takes half precision, not {query.dtype}")
        seen.add(query.dtype)
        return PlainKernels().varlen_attn(query, *rest, **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr(
        "maestro_fast.model.attention.varlen_obstacle",
        lambda device, dtype=None: "it needs half precision" if dtype is torch.float32 else None,
    )
    for name, value in {"model.attention": "varlen", "trainer.bf16": True, "loss.kl_coef": 0.01}.items():
        override(raw_config, name, value)
    trainer = train(parse_config(raw_config), raw_config)

    assert trainer.step.scorer.layouts.plain == "varlen" and seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_a_run_that_asks_for_varlen_does_not_start_without_it(
    monkeypatch: pytest.MonkeyPatch, raw_config: dict[str, Any]
) -> None:
    monkeypatch.setattr("maestro_fast.model.attention.varlen_obstacle", lambda device, dtype=None: None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", mixing)
    override(raw_config, "model.attention", "varlen")

    with pytest.raises(SettingsError, match=r"^model\.attention: varlen does not serve this model"):
        train(parse_config(raw_config), raw_config)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", VARLEN])
def test_the_real_kernels_agree_with_float64(family: str, implementation: str) -> None:
    wanted = "varlen" if implementation == VARLEN else implementation
    try:
        attention_choice(wanted, CUDA, torch.bfloat16)
    except SettingsError as error:
        pytest.skip(str(error))
    path: Layout = "varlen" if implementation == VARLEN else "flash"
    model = tiny_model(family).to(CUDA, torch.bfloat16)
    use_attention(model, implementation)
    assert choose_layout(model).plain == path
    logprobs, gradients = logprobs_and_gradients(model, path)
    rounded: nn.Module = tiny_model(family).to(torch.bfloat16)  # These are the weights that the kernel saw.
    expected, truth = logprobs_and_gradients(rounded.double(), "padded")  # type: ignore[arg-type]
    theirs, padded = logprobs_and_gradients(tiny_model(family).to(CUDA, torch.bfloat16), "padded")

    # bfloat16 costs every path accuracy. This path may lose twice what padded SDPA loses, plus one rounding.
    def error(ours: Tensor, true: Tensor) -> float:
        return ((ours.double().cpu() - true).abs().max() / true.abs().max()).item()

    assert error(logprobs, expected) <= 2 * error(theirs, expected) + 2**-8
    for name, gradient in gradients.items():
        assert error(gradient, truth[name]) <= 2 * error(padded[name], truth[name]) + 2**-7, name
