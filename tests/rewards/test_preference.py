"""PreferenceReward with small reward models of our own: what is scored, in which form, and what is refused."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from maestro_fast.records import RewardBatch, Text
from maestro_fast.rewards import PreferenceReward, RewardSet, build_rewards
from maestro_fast.rewards.preference import conversation_ids, truncate
from tests.chat_templates import CHATML, STRICT, chat_tokenizer
from tests.tiny import CHAT_TEMPLATE, TEXT, tiny_checkpoint, tiny_tokenizer

MakeBatch = Callable[..., RewardBatch]
MakeModel = Callable[..., Path]

COMPLETIONS = ["red", "the sea was wide and the night was long", "<think> short words </think>", "", "the lazy dog red"]
SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def save(folder: Path, template: str | None = CHAT_TEMPLATE, **config: Any) -> Path:
    """A Qwen3 reward model with random weights and a head large enough that scores differ."""
    torch.manual_seed(0)
    settings = {"num_labels": 1, "pad_token_id": 1, "max_position_embeddings": 256} | config
    model = Qwen3ForSequenceClassification(
        Qwen3Config(head_dim=8, num_attention_heads=4, num_key_value_heads=2, **SIZES, **settings)
    )
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("plain"), template=None)


def reward(model: Path, **options: Any) -> PreferenceReward:
    return PreferenceReward(str(model), **{"max_length": 256, **options})


def score_alone(folder: Path, ids: list[int], column: int = 0) -> float:
    """By the model's own forward in float64, one conversation without padding."""
    model = Qwen3ForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, column])


def test_scores_are_those_of_the_model_on_the_templated_conversation(chat_model: Path, make_batch: MakeBatch) -> None:
    """The conversation is written out by hand: the template's marks, no generation prompt, no second opening token."""
    texts = [f"<|user|>Why?<|end|><|assistant|>{completion}<|end|>" for completion in COMPLETIONS]
    tokenizer = tiny_tokenizer()
    expected = [score_alone(chat_model, tokenizer(text)["input_ids"]) for text in texts]

    scores = reward(chat_model)(make_batch(COMPLETIONS))

    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert scores.std() > 0.1, "the scores of different completions hardly differ: nothing is tested"


def test_without_a_template_prompt_and_completion_are_joined(plain_model: Path, make_batch: MakeBatch) -> None:
    tokenizer = tiny_tokenizer()
    for separator in ("\n", " "):
        expected = [score_alone(plain_model, tokenizer(f"Why?{separator}{text}")["input_ids"]) for text in COMPLETIONS]
        scores = reward(plain_model, separator=separator)(make_batch(COMPLETIONS))
        assert scores.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_neither_the_batch_nor_the_padding_side_changes_a_score(
    side: str, batch_size: int, chat_model: Path, make_batch: MakeBatch, tmp_path: Path
) -> None:
    folder = save(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    tokenizer.save_pretrained(folder)
    judge = reward(chat_model)
    one_by_one = [judge(make_batch([text])).item() for text in COMPLETIONS]

    scores = reward(folder, batch_size=batch_size)(make_batch(COMPLETIONS))

    assert scores.tolist() == pytest.approx(one_by_one, rel=1e-5, abs=1e-5)


def test_messages_and_strings_are_the_same_conversation(chat_model: Path, make_batch: MakeBatch) -> None:
    judge = reward(chat_model)
    assert torch.equal(judge(make_batch(COMPLETIONS, chat=True)), judge(make_batch(COMPLETIONS)))


def test_every_message_of_a_prompt_is_read(chat_model: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Why?"), ("assistant", "red"), ("user", "Again?")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    ids = conversation_ids(tiny_tokenizer(), prompt, [{"role": "assistant", "content": "dog"}])
    spelled = "".join(f"<|{role}|>{text}<|end|>" for role, text in [*turns, ("assistant", "dog")])

    assert tiny_tokenizer().decode(ids) == spelled
    scores = reward(chat_model)(RewardBatch([prompt], ["dog"], [[1]]))
    assert scores.item() == pytest.approx(score_alone(chat_model, ids), rel=1e-5)
    assert prompt[-1]["content"] == "Again?" and len(prompt) == 4, "the prompt of the batch was changed"


def test_the_tokenizer_is_its_own(tmp_path: Path, make_batch: MakeBatch) -> None:
    """An encoder with whole words as tokens and [CLS] in front; the policy's ids of the batch are not read."""
    words = sorted({word for text in TEXT for word in text.split()} | {"Why?"})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[UNK]", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]").save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(vocabulary), "initializer_range": 0.5}
    model = BertForSequenceClassification(BertConfig(num_attention_heads=4, num_labels=1, pad_token_id=0, **sizes))
    model.eval().save_pretrained(tmp_path)
    expected = []
    for text in ["red", "the sea was wide"]:
        ids = [1, *(vocabulary[word] for word in f"Why? {text}".split())]
        with torch.no_grad():
            expected.append(model(input_ids=torch.tensor([ids])).logits.item())

    scores = reward(tmp_path)(make_batch(["red", "the sea was wide"], completion_ids=[[319], [9999, 3]]))

    assert scores.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert abs(expected[0] - expected[1]) > 0.1


def test_what_is_too_long_loses_the_beginning_of_its_prompt(
    plain_model: Path, make_batch: MakeBatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "the quick brown fox jumps over the lazy dog " * 3
    ids = tiny_tokenizer()(f"{prompt}\nred")["input_ids"]
    judge = reward(plain_model, max_length=12)
    assert len(ids) > 12

    with caplog.at_level(logging.WARNING):
        scores = judge(make_batch(["red", "red"], prompts=[prompt, prompt]))

    assert scores.tolist() == pytest.approx([score_alone(plain_model, ids[-12:])] * 2, rel=1e-5)
    assert [f"has {len(ids)} tokens, more than max_length 12" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize(
    ("ids", "limit", "kept"),
    [
        ([1, 5, 6, 7, 8], 5, [1, 5, 6, 7, 8]),
        ([1, 5, 6, 7, 8], 3, [1, 7, 8]),
        ([1, 2, 5, 6, 7, 8], 4, [1, 2, 7, 8]),
        ([5, 6, 7, 1], 2, [7, 1]),
        ([1, 2, 1, 5, 6], 2, [1, 6]),
        ([1, 2, 1, 2], 3, [2, 1, 2]),
    ],
)
def test_truncation_keeps_opening_special_tokens_and_the_end(ids: list[int], limit: int, kept: list[int]) -> None:
    assert truncate(ids, limit, frozenset({1, 2})) == kept


def test_one_of_several_outputs_by_index_or_name(tmp_path: Path, make_batch: MakeBatch) -> None:
    folder = save(tmp_path, num_labels=3, id2label={0: "rude", 1: "helpful", 2: "long"})
    ids = conversation_ids(tiny_tokenizer(), "Why?", "red")
    with pytest.raises(ValueError, match=r"label: missing, the model has 3 outputs: .* 0 \(rude\), 1 \(helpful\), 2"):
        reward(folder)
    for label, column in ((1, 1), ("helpful", 1), ("long", 2)):
        score = reward(folder, label=label)(make_batch(["red"])).item()
        assert score == pytest.approx(score_alone(folder, ids, column), rel=1e-5)
    for label, error in ((3, ValueError), ("kind", ValueError), (True, TypeError)):
        with pytest.raises(error, match=r"label: .*, expected one of 0 \(rude\)"):
            reward(folder, label=label)


def test_half_precision_gives_float32_scores(chat_model: Path, make_batch: MakeBatch) -> None:
    scores = reward(chat_model, dtype="bfloat16")(make_batch(COMPLETIONS))
    exact = reward(chat_model)(make_batch(COMPLETIONS))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, exact)
    torch.testing.assert_close(scores, exact, rtol=0.1, atol=0.1)


def test_it_is_frozen_and_in_evaluation_mode(tmp_path: Path, make_batch: MakeBatch) -> None:
    judge = reward(save(tmp_path, attention_dropout=0.9))
    scores = [judge(make_batch(COMPLETIONS)) for _ in range(2)]
    assert torch.equal(*scores)
    assert not any(parameter.requires_grad for parameter in judge._model.parameters())


def test_the_device_of_the_batch_is_used_unless_another_is_given(chat_model: Path, make_batch: MakeBatch) -> None:
    """The meta device stands for another one: a model that went there cannot give numbers."""
    for options in ({"device": "cpu"}, {}):
        judge = reward(chat_model, **options)
        batch = make_batch(["red"], device=torch.device("meta"))
        if options:
            assert judge(batch).isfinite().all()
        else:
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                judge(batch)


def test_a_score_that_is_not_finite_names_its_row(chat_model: Path, make_batch: MakeBatch) -> None:
    judge = reward(chat_model)
    forward = judge._model.forward

    def overflow(input_ids: Any, **given: Any) -> Any:
        out = forward(input_ids=input_ids, **given)
        out.logits[-1] = float("inf")  # rows come longest first, so this is the shortest one
        return out

    judge._model.forward = overflow
    with pytest.raises(ValueError, match="reward 'preference': row 3 was scored inf"):
        judge(make_batch(COMPLETIONS))


def test_in_a_set_from_a_config(chat_model: Path, make_batch: MakeBatch) -> None:
    entry = {"type": "preference", "name": "liked", "model": str(chat_model), "max_length": 64, "batch_size": 2}
    rewards = build_rewards(["format", entry])
    batch = make_batch(COMPLETIONS)
    assert isinstance(rewards, RewardSet) and rewards.names == ("format", "liked")
    assert (rewards.needs_entropy, rewards.needs_policy) == (False, False)
    torch.testing.assert_close(rewards(batch)[:, 1], reward(chat_model)(batch), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"^rewards\[0\]\.model: missing, it has no default"):
        build_rewards(["preference"])
    with pytest.raises(ValueError, match=r"^rewards\[0\]\.model: there is no directory /nowhere"):
        build_rewards([{"type": "preference", "model": "/nowhere/model"}])


def test_an_empty_batch(chat_model: Path, make_batch: MakeBatch) -> None:
    assert reward(chat_model)(make_batch([])).shape == (0,)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: 0, expected at least 1"),
        ({"batch_size": 2.0}, TypeError, r"batch_size: 2.0, expected an integer"),
        ({"max_length": 1}, ValueError, "max_length: 1, expected at least 2"),
        ({"dtype": "int8"}, ValueError, r"dtype: 'int8', expected one of \('auto'"),
        ({"device": "gpu"}, ValueError, "device: 'gpu', expected a name such as"),
        ({"separator": None}, TypeError, "separator: None, expected a string"),
        ({"label": 1}, ValueError, r"label: 1, expected one of 0 \(LABEL_0\)"),
        ({"model": 3}, TypeError, "model: 3, expected a directory or a hub name"),
        ({"model": "./nowhere"}, ValueError, r"model: there is no directory ./nowhere"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], words: str, chat_model: Path) -> None:
    with pytest.raises(error, match=words):
        PreferenceReward(**{"model": str(chat_model), "max_length": 256, **options})


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: '.*' gives no sequence-classification model: "):
        reward(tmp_path)


def test_a_language_model_has_no_score_head(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    for label in (None, 0):  # without a head there is nothing to choose from
        with pytest.raises(
            ValueError, match=r"lacks the weights score\.weight of a Qwen3.*: its scores would be random"
        ):
            reward(folder, label=label)


@pytest.mark.parametrize(("kind", "table"), [("Bert", 16), ("Roberta", 18)])
def test_an_encoder_with_few_positions_scores_the_end_of_what_is_too_long(
    kind: str, table: int, tmp_path: Path, make_batch: MakeBatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both have 16 positions: RoBERTa's table also holds those up to the padding token's."""
    tokenizer = tiny_tokenizer()
    sizes = SIZES | {"max_position_embeddings": table, "num_attention_heads": 4, "pad_token_id": 1}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(num_labels=1, initializer_range=0.5, **sizes)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)

    with caplog.at_level(logging.INFO, logger="maestro_fast"):
        judge = PreferenceReward(str(tmp_path))
        texts = ["red", "the sea was wide and the night was long " * 4]
        scores = judge(make_batch(texts))

    ids = [tokenizer(f"Why?\n{text}")["input_ids"] for text in texts]
    assert len(ids[0]) < 16 < len(ids[1])
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([row[-16:]])).logits.item() for row in ids]
    assert scores.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    found = {record.levelname: record.message for record in caplog.records if record.name.endswith("preference")}
    assert "max_length is 2048, but the model has 16 positions" in found["INFO"]
    assert "more than the model's positions, 16" in found["WARNING"]  # only once a conversation is longer


def test_padding_token(tmp_path: Path, make_batch: MakeBatch) -> None:
    """The tokenizer's where the model's config names none; without either there is no telling where a row ends."""
    folder = save(tmp_path, pad_token_id=None)
    padded = reward(folder)(make_batch(COMPLETIONS))
    assert torch.equal(padded, reward(save(tmp_path / "named"))(make_batch(COMPLETIONS)))
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="has the padding token None, expected one of its 320 tokens"):
        reward(folder)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = save(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=f"has 320 tokens but its tokenizer {len(tokenizer)}"):
        reward(folder)


def test_every_process_loads_the_weights_under_fsdp(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks this variable while it loads; elsewhere it keeps its value."""
    import os

    from transformers import AutoModelForSequenceClassification as Auto

    seen: list[str | None] = []
    load = Auto.from_pretrained
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    monkeypatch.setattr(Auto, "from_pretrained", lambda *a, **k: (seen.append(os.environ.get(name)), load(*a, **k))[1])
    monkeypatch.setenv(name, "True")
    reward(chat_model)
    assert (seen, os.environ[name]) == (["False"], "True")
    monkeypatch.delenv(name)
    reward(chat_model)
    assert name not in os.environ


def test_importing_the_rewards_imports_no_transformers() -> None:
    code = "import sys, maestro_fast.rewards; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_conversations_as_data_sets_have_them() -> None:
    """Messages without content, and with parts of text; and a template that refuses a role."""
    calling = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]}
    plain: Text = [{"role": "user", "content": "Bern?"}, calling | {"content": ""}]
    odd: Text = [{"role": "user", "content": [{"type": "text", "text": "Bern?"}]}, calling]
    for template in (CHATML, CHAT_TEMPLATE, None):
        tokenizer = chat_tokenizer(template)
        assert conversation_ids(tokenizer, odd, "Wet.") == conversation_ids(tokenizer, plain, "Wet.")
    refused: Text = [{"role": "system", "content": "Be brief."}, *plain]
    with pytest.raises(ValueError, match=r"reward model refuses a conversation: System role not supported$"):
        conversation_ids(chat_tokenizer(STRICT), refused, "Wet.")
