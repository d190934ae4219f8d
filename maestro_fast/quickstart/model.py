"""Makes a tiny Qwen3 and its tokenizer from the bundled text in under a minute."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
END, PAD = "<|end|>", "<|pad|>"


def read_pairs(prompts: Path) -> list[tuple[str, str]]:
    """Reads (prompt, draft) for every draft of the bundled prompts. A draft is what an untrained model might answer."""
    rows = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    return [(row["prompt"], draft) for row in rows for draft in row["drafts"]]


def build_tokenizer(texts: list[str], vocabulary: int = 2000) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE. Each tag is one token but not a special one, so that it stays in the decoded text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(TAGS)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Builds a model of about 0.8 million parameters with tied embeddings."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )


def warm_start(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[tuple[str, str]],
    *,
    epochs: int,
    seed: int,
    batch: int = 16,
    learning_rate: float = 4e-3,
) -> float:
    """Trains on the drafts, with the loss on the draft's tokens alone. Returns the mean loss of the last epoch."""
    rows = [_encode(tokenizer, prompt, draft) for prompt, draft in pairs]
    steps = epochs * -(-len(rows) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    order = random.Random(seed)
    model.train()
    losses: list[float] = []
    with tqdm(total=steps, desc="      warm start", unit="batch") as bar:
        for _ in range(epochs):
            losses.clear()
            for input_ids, labels in _batches(rows, batch, order, tokenizer.pad_token_id):
                loss = model(
                    input_ids=input_ids, attention_mask=(input_ids != tokenizer.pad_token_id).long(), labels=labels
                ).loss
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
                bar.update()
    return sum(losses) / len(losses)


def _encode(tokenizer: PreTrainedTokenizerFast, prompt: str, draft: str) -> tuple[list[int], list[int]]:
    """Token ids and labels of a prompt and a draft; the labels ignore the prompt."""
    before = tokenizer(prompt)["input_ids"]
    after = [*tokenizer(" " + draft)["input_ids"], tokenizer.eos_token_id]
    return before + after, [-100] * len(before) + after


def _batches(
    rows: list[tuple[list[int], list[int]]], size: int, order: random.Random, pad: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields shuffled batches of rows of similar length, padded on the right."""
    shuffled = sorted(order.sample(rows, len(rows)), key=lambda row: len(row[0]) // 8)
    starts = list(range(0, len(rows), size))
    order.shuffle(starts)
    for start in starts:
        part = shuffled[start : start + size]
        width = max(len(ids) for ids, _ in part)
        yield (
            torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in part]),
            torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in part]),
        )


def make_checkpoint(prompts: Path, folder: Path, *, epochs: int = 8, seed: int = 0) -> float:
    """Writes the warm-started model and its tokenizer to ``folder``. Returns its loss in nats per token."""
    torch.manual_seed(seed)
    pairs = read_pairs(prompts)
    tokenizer = build_tokenizer([text for pair in pairs for text in pair])
    model = build_model(tokenizer)
    loss = warm_start(model, tokenizer, pairs, epochs=epochs, seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss
