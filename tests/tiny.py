"""Tiny models and tokenizers, made here: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TEXT = [
    "Name a colour. red",
    "Tell a story about the sea. The sea was wide and the night was long.",
    "<think> short words </think> <answer> red </answer>",
    "the quick brown fox jumps over the lazy dog",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 320 tokens and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE
    )


def tiny_model(family: str = "qwen3", *, tied: bool = False, seed: int = 0, head_dim: int = 8) -> PreTrainedModel:
    """Two layers, width 32, random weights. vLLM's attention on the CPU needs a ``head_dim`` of 32 at least."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": 1,
    }
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(head_dim=head_dim, **sizes))
    return LlamaForCausalLM(LlamaConfig(**sizes))


def tiny_checkpoint(folder: Path, family: str = "qwen3", *, tied: bool = False, head_dim: int = 8) -> Path:
    """A local checkpoint: model and tokenizer."""
    tiny_model(family, tied=tied, head_dim=head_dim).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
