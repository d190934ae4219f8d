"""Tries data files that are almost right: prompts come of them, or an error names the section and the place.

    python -m tests.fuzz data_files --inputs 10000 --json tests/fuzz/data_files.json

Every input is a file of prompts with one to three values, lines or bytes changed, of each kind that is read as text. It
is loaded as a run loads it, and every prompt is rendered with a chat template and tokenised. The answer has to be
prompts in the file's order or an error that begins with "data", in time.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from maestro_fast.data import DataConfig, load_prompts
from maestro_fast.model.chat import ChatConfig
from tests.fuzz.trial import Input, add_options, as_tally, try_inputs
from tests.tiny import tiny_tokenizer

__all__ = ["add_options", "main", "run"]

_DEEP: Any = "end"
for _ in range(200):
    _DEEP = [_DEEP]
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, "", " ", "\n", "\0", "a" * 20_000, "ü€\u202e🙂", "\ud800", "[", '[{"role": "user"}]', "nan"),
    *(0, -1, 1.5, 10**30, 1e308, float("nan"), float("inf"), [], {}, [[]], [None], [1, 2], _DEEP, {"a": {"b": [1]}}),
    *([{}], [{"role": "user"}], [{"content": "x"}], [{"role": 3, "content": "x"}], [{"role": "user", "content": 3}]),
    [{"role": "user", "content": [{"type": "text", "text": None}]}],
    [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
    [{"role": "wizard", "content": "x"}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
    [{"role": "user", "content": "\ud800"}],
    "{% for x in y %}",
    "<|end|><|user|>",
)
_TEXT = [
    b"\xff\xfe",
    b"\0",
    b"\r",
    b"\n\n",
    b'"',
    b"{",
    b"}",
    b",",
    b"\t",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"NaN",
    b"'",
]


def rows(rng: random.Random) -> list[dict[str, Any]]:
    """Rows of prompts as text or as messages, with columns for rewards."""
    talks = rng.random() < 0.4
    found = []
    for i in range(rng.randint(1, 6)):
        text = f"Name colour {i}."
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": text}] if talks else text}
        row |= {"family": f"family {i % 2}", "reference": "red", "number": i, "tags": ["a", "b"]}
        found.append(row)
    return found


def draw(rng: random.Random, folder: Path) -> tuple[DataConfig, ChatConfig, str]:
    """Writes a file, and gives the sections that read it, and what was changed."""
    found, done = rows(rng), []
    for _ in range(rng.randint(0, 2)):
        row = rng.choice(found)
        key = rng.choice([*row, "tools", "chat_template_kwargs", "messages", "", "new"])
        if rng.random() < 0.2:
            row.pop(key, None)
            done.append(f"{key} deleted")
        else:
            row[key] = rng.choice(HOSTILE)
            done.append(f"{key} = {str(row[key])[:50]!r}")
    kind = rng.choice([".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".csv.gz"])
    content = _written(found, kind.removesuffix(".gz"))
    if rng.random() < 0.4 and content:
        at, what = rng.randrange(len(content)), rng.choice(_TEXT)
        content = content[:at] + what + content[at + rng.randrange(4) :]
        done.append(f"bytes at {at}: {what!r}")
    if rng.random() < 0.05:
        content = content[: rng.randrange(len(content) + 1)]
        done.append("cut")
    if kind.endswith(".gz"):
        content = gzip.compress(content)
        if rng.random() < 0.2:
            content = content[: rng.randrange(len(content))]
            done.append("gzip cut")
    path = folder / f"prompts{kind}"
    path.write_bytes(content)
    options = rng.choice(
        [{}, {}, {"limit": 3}, {"prompt_column": "prompt"}, {"family_column": "family"}, {"family": "x"}]
    )
    chat = ChatConfig(system_prompt="Be kind.") if rng.random() < 0.5 else ChatConfig()
    return DataConfig(path=str(path), **options), chat, f"{kind}, {options}: {'; '.join(done) or 'as it is'}"


def _written(found: list[dict[str, Any]], kind: str) -> bytes:
    if kind == ".jsonl":
        return "\n".join(json.dumps(row) for row in found).encode()
    if kind == ".json":
        return json.dumps(found).encode()
    names = list(dict.fromkeys(name for row in found for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, delimiter="," if kind == ".csv" else "\t", lineterminator="\n")
    writer.writeheader()
    for row in found:
        plain = {name: json.dumps(x) if isinstance(x, list | dict) else x for name, x in row.items()}
        writer.writerow(plain)
    return out.getvalue().encode("utf-8", errors="surrogatepass")


def run(folder: Path, inputs: int, seed: int, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Tries files, see ``trial.try_inputs``; they are written to ``folder``."""
    tokenizer = tiny_tokenizer()

    def make(rng: random.Random) -> Input:
        data, chat, changes = draw(rng, folder)
        return Input(changes, lambda: _outcome(data, chat, tokenizer))

    return try_inputs(make, ("read", "refused by name"), inputs=inputs, seed=seed, first=first)


def _outcome(data: DataConfig, chat: ChatConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    try:
        dataset = load_prompts(data, chat)
        dataset.check_prompts(tokenizer, len(tokenizer))
    except (ValueError, FileNotFoundError) as error:
        named = str(error).startswith(("data", "chat"))
        return ("refused by name" if named else "refused without a name"), str(error)[:300]
    return ("read", "") if len(dataset) else ("empty", "no prompt is left")


def main(given: argparse.Namespace) -> dict[str, Any]:
    """Runs the command, and returns its tally."""
    with tempfile.TemporaryDirectory() as folder:
        return as_tally(given, *run(Path(folder), given.inputs, given.seed, given.first))
