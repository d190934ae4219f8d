"""What can be said of a run's data and model before anything is sampled: rows, columns, lengths, a prompt as read."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from maestro_fast.data import PromptDataset
from maestro_fast.generation import SamplingConfig
from maestro_fast.model.load import Checkpoint
from maestro_fast.model_path import loading_model
from maestro_fast.records import Prompts
from maestro_fast.reporting.tables import Cell, Table

MOST_ROWS = 20_000  # rows whose prompts are measured; more tell nothing new
_SHOWN = 900  # characters of the prompt
_AT_ONCE = 64


def skeleton(path: str) -> nn.Module:
    """A model without memory for its weights, by which its parameters are counted before it is loaded."""
    with loading_model(path), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(Checkpoint.at(path).base))
    return model


def positions_of(config: Any) -> int | None:
    """The positions that a model knows, from its config; None if it names none."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(found) if isinstance(found, int) and found > 0 else None


def prompt_lengths(dataset: PromptDataset, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of every prompt, of at most the first ``MOST_ROWS``.

    Raises:
        ValueError: the tokenizer or its template refuses a prompt.
    """
    count, found = min(len(dataset.rows), MOST_ROWS), []
    for start in tqdm(range(0, count, _AT_ONCE), desc="reading prompts", leave=False, disable=None):
        rows = dataset.rows[start : min(count, start + _AT_ONCE)]
        found += [len(ids) for ids in dataset.prompts(rows, tokenizer).token_ids]
    return found


def quantile(lengths: Sequence[int], share: float) -> int:
    """The least length that so large a share of the prompts does not exceed."""
    return sorted(lengths)[max(0, math.ceil(share * len(lengths)) - 1)]


def data_table(
    dataset: PromptDataset, lengths: Sequence[int], sampling: SamplingConfig, positions: int | None
) -> Table:
    """Rows, columns, families and lengths of the prompts."""
    families = Counter(family for family in dataset.families if family)
    room = None if positions is None else positions - sampling.max_new_tokens
    rows: list[tuple[str, Cell]] = [
        ("prompts", f"{'the first ' if dataset.streaming else ''}{len(dataset.rows):,}"),
        ("other columns", ", ".join(dataset.columns) or "none"),
        ("families", _families(families) or "none"),
        ("tokens of a prompt", f"least {min(lengths)}, median {quantile(lengths, 0.5)}, 95 % up to "
         f"{quantile(lengths, 0.95)}, most {max(lengths)}"),
    ]  # fmt: skip
    for name in ("replies", "dropped", "cut"):
        if count := getattr(dataset.changes, name):
            rows.append((_CHANGES[name], f"{count:,}"))
    if room is not None:
        over = sum(length > room for length in lengths)
        rows.append(("too long", f"{over:,} with {sampling.max_new_tokens} more tokens beyond {positions:,} positions"))
    return Table("Data", ("what", "found"), tuple(rows))


_CHANGES = {
    "replies": "without their last reply",
    "dropped": "dropped, because they are too long",
    "cut": "cut, because they are too long",
}


def _families(families: Counter[str]) -> str:
    shown = ", ".join(f"{name} {count}" for name, count in families.most_common(6))
    return f"{shown}, and {len(families) - 6} more" if len(families) > 6 else shown


def shown_prompt(prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first prompt as the policy reads it, with its special tokens, and its first and last token ids."""
    ids = prompts.token_ids[0]
    text = str(tokenizer.decode(ids, skip_special_tokens=False))
    if len(text) > _SHOWN:
        text = f"{text[: _SHOWN // 2]}\n[... {len(text) - _SHOWN} characters ...]\n{text[-_SHOWN // 2 :]}"
    few = ids if len(ids) <= 12 else [*ids[:6], "...", *ids[-6:]]
    prefill = prompts.prefills[0] if prompts.prefills else ""
    kind = "text" if isinstance(prompts.texts[0], str) else "messages through the chat template"
    lines = [
        f"The first prompt as the policy reads it ({kind}), {len(ids)} tokens:",
        *(f"  | {line}" for line in text.splitlines() or [""]),
        f"  ids {' '.join(map(str, few))}",
    ]
    return "\n".join([*lines, f"  the template begins the reply: {prefill!r}"] if prefill else lines)


def can_write(path: Path) -> bool:
    """Whether the directory can be made, or written to, without trying it."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
