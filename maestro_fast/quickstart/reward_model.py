"""Makes a tiny reward model for the ``preference`` reward from the bundled pairs in a few seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForSequenceClassification

from maestro_fast.quickstart.model import build_tokenizer
from maestro_fast.rewards.preference import conversation_ids


class Pair(NamedTuple):
    """Two responses to one prompt, one of which is preferred."""

    prompt: str
    chosen: str
    rejected: str


class HeldOut(NamedTuple):
    """How good the reward model is on prompts that were held out from its training.

    Attributes:
        right: The number of pairs whose chosen response has the higher score.
        pairs: The number of pairs.
        own: The number of prompts whose own reference answer has a higher score than the reference answer of another
            prompt of the family, which looks alike but is wrong here.
        references: The number of prompts that were compared in this way.
    """

    right: int
    pairs: int
    own: int
    references: int

    def __str__(self) -> str:
        return (
            f"prefers the chosen response in {self.right} of {self.pairs} held-out pairs "
            f"({self.right / self.pairs:.0%}), and a prompt's own reference answer to another prompt's in "
            f"{self.own} of {self.references} ({self.own / self.references:.0%}, by chance 50%)"
        )


def read_preferences(path: Path) -> tuple[list[Pair], list[Pair]]:
    """Reads the pairs to train on, and the pairs of every fifth prompt, which are held out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [Pair(row["prompt"], row["chosen"], row["rejected"]) for row in map(json.loads, lines)]
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    kept = set(prompts[4::5])
    return [pair for pair in pairs if pair.prompt not in kept], [pair for pair in pairs if pair.prompt in kept]


def build_reward_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForSequenceClassification:
    """Builds a model of about 0.2 million parameters with one output, the score."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    config.num_labels = 1
    return Qwen3ForSequenceClassification(config)


def train_preferences(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[Pair],
    *,
    epochs: int,
    seed: int,
    batch: int = 32,
    learning_rate: float = 3e-3,
) -> None:
    """Minimises the Bradley-Terry loss, the mean of -log sigmoid(score(chosen) - score(rejected))."""
    steps = epochs * -(-len(pairs) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    order = random.Random(seed)
    model.train()
    with tqdm(total=steps, desc="      reward model", unit="batch") as bar:
        for _ in range(epochs):
            shuffled = order.sample(pairs, len(pairs))
            for start in range(0, len(pairs), batch):
                loss = -logsigmoid(margins(model, tokenizer, shuffled[start : start + batch])).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
                bar.update()


def margins(model: Any, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> Tensor:
    """The score of the chosen response minus the score of the rejected one, float32 [pairs].

    A response begins with a space, as the policy writes it, and follows its prompt without a separator.
    """
    responses = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    rows = [conversation_ids(tokenizer, prompt, f" {response}", separator="") for prompt, response in responses]
    width, pad = max(len(row) for row in rows), tokenizer.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    scores: Tensor = model(input_ids=ids, attention_mask=(ids != pad).long()).logits[:, 0]
    return scores[: len(pairs)] - scores[len(pairs) :]


def make_reward_model(example: Path, folder: Path, *, epochs: int = 4, seed: int = 0) -> HeldOut:
    """Trains on ``pairs.jsonl`` in the folder ``example``, and writes the model and its tokenizer to ``folder``.

    Returns:
        The result on held-out pairs, and on the reference answers of the same prompts in ``prompts.jsonl``.
    """
    torch.manual_seed(seed)
    training, held_out = read_preferences(example / "pairs.jsonl")
    tokenizer = build_tokenizer([text for pair in training for text in pair], vocabulary=1500)
    model = build_reward_model(tokenizer)
    train_preferences(model, tokenizer, training, epochs=epochs, seed=seed)
    model.eval()
    swapped = _swapped_references(example / "prompts.jsonl", {pair.prompt for pair in held_out})
    with torch.no_grad():
        right, own = (int((margins(model, tokenizer, pairs) > 0).sum()) for pairs in (held_out, swapped))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return HeldOut(right, len(held_out), own, len(swapped))


def _swapped_references(prompts: Path, held_out: set[str]) -> list[Pair]:
    """Pairs each held-out prompt's reference with that of the family's next prompt, and the last with the first."""
    rows = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    families: dict[str, list[Any]] = {}
    for row in rows:
        if row["prompt"] in held_out:
            families.setdefault(row["family"], []).append(row)
    return [
        Pair(row["prompt"], row["reference"], other["reference"])
        for members in families.values()
        for row, other in zip(members, [*members[1:], members[0]], strict=True)
    ]
