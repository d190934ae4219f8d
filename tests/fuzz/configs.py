"""Tries configs that are almost right: whatever a file says, a run begins, or an error names the setting.

    python -m tests.fuzz configs --inputs 20000 --json tests/fuzz/configs.json

Every input is a config in which each section has one of its kinds, with one or two values, keys or bytes changed. It is
written as YAML, read as ``maestro-fast train`` reads it, and prepared up to the point at which a model would be loaded.
The answer has to be a prepared run or an error that begins with a setting's name, in time. A failing input is found
again by its number and the seed.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import yaml

from maestro_fast.config_file import read_config
from maestro_fast.settings import SettingsError, settings_of
from maestro_fast.training import parse_config
from maestro_fast.training.config import TrainConfig
from maestro_fast.training.run import prepare
from tests.fuzz.trial import Input, add_options, as_tally, try_inputs
from tests.tiny import tiny_checkpoint

__all__ = ["add_options", "main", "run"]

_DEEP: Any = []
for _ in range(60):
    _DEEP = [_DEEP]
# Values that nobody means, but that typing errors, tools and templates put into files.
HOSTILE: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        "",
        " ",
        "abc",
        "-1",
        "1e3",
        "nan",
        "null",
        "../..",
        "a" * 5000,
        "ü€\u202e",
        "x:y",
        "~",
        "%s{}",
    ),
    *(0, 1, -1, 2, 3, 7, -5, 2**31, 2**63, 2**70, -(2**70), 10**400),
    *(0.0, -0.0, 0.5, 1.5, -0.5, 1e-300, 1e308, float("inf"), float("-inf"), float("nan")),
    *(
        [],
        {},
        [1],
        [None],
        [[]],
        {"a": 1},
        {1: 2},
        {None: None},
        {"type": "abc"},
        {"type": 3},
        ["format", "format"],
        _DEEP,
    ),
    *(datetime.date(2026, 1, 1), datetime.datetime(2026, 1, 1, 1), b"bytes", {"a", "b"}),
)
_OWN = """
def reward(completions, **columns):
    return [0.0 for _ in completions]


def loss(inputs):
    return inputs.logprobs.sum(), {}


def weights(context):
    return None
"""


def kinds(folder: Path) -> dict[str, list[Any]]:
    """Entries of each section that a run can have; the first of each is what most runs have."""
    own, prompts = f"{folder}/own.py", str(folder / "prompts.jsonl")
    judge = {"type": "judge", "url": "http://127.0.0.1:9/v1", "model": "m", "cache": None}
    labels = {"type": "function", "function": f"{own}:reward", "labels": {"share": 0.5, "early": 1, "over": 4}}
    values = {"format": 0.5, "brevity": 0.5}
    return {
        "run_dir": [str(folder / "run")],
        "model": [{"path": str(folder / "model")}, {"path": str(folder / "model"), "lora": {"r": 2, "alpha": 4}}],
        "data": [
            {"path": prompts},
            {
                "path": prompts,
                "limit": 8,
                "prompt_column": "prompt",
                "family_column": "family",
                "max_prompt_tokens": 20,
            },
            [{"path": prompts, "share": 2, "family": "a"}, {"path": prompts, "share": 1, "family": "b"}],
        ],
        "rewards": [
            ["format", {"type": "length", "name": "brevity", "target": 2}],
            ["format", {"type": "overlong", "name": "brevity", "limit": 8, "buffer": 2}],
            ["format", {"type": "function", "name": "brevity", "function": f"{own}:reward", "timeout": 3}],
            ["format", {**judge, "name": "brevity", "gate": {"on": "format", "threshold": 1}}],
            ["format", {"type": "entropy", "name": "brevity"}],
        ],
        "weights": [
            "equal",
            {"type": "conductor", "period": 2, "alpha": 0.3, "min_prob": 0.05},
            {"type": "static", "values": values},
            {"type": "schedule", "points": [{"step": 0, "values": values}, {"step": 9, "values": values}]},
            *({"type": name} for name in ("random", "saw", "dvao", "weakest_first", "exp3", "utility")),
            {"type": "anchored", "residual": True, "guard": {"window": 4}},
        ],
        "anchor": [labels, None, {**judge, "labels": {"share": 0.1}}],
        "chat": [None, {"system_prompt": "Be kind.", "template_kwargs": {"enable_thinking": False}}],
        "advantages": [{"profile": "maestro"}, {"profile": "grpo"}, {"profile": "verl_gdpo"}],
        "sampling": [{"group_size": 4, "max_new_tokens": 8, "temperature": 0.7, "top_p": 1.0, "stop": ["x"]}],
        "generation": [
            "transformers",
            {"type": "vllm_server", "url": "http://127.0.0.1:9", "weights": "folder", "folder": str(folder)},
        ],
        "batch": [
            {"prompts_per_batch": 4, "micro_batch": 8},
            {"prompts_per_batch": 4, "micro_batch": 8, "no_signal": "refill", "max_refills": 2, "updates_per_batch": 2},
        ],
        "loss": [
            {"normalization": "dapo", "clip_high": 0.28},
            {"normalization": "dr_grpo", "max_completion_length": 8, "kl_coef": 0.1, "entropy_coef": 0.01},
            {"type": "function", "function": f"{own}:loss"},
        ],
        "evaluation": [None, {"data": {"path": prompts}, "samples": 2, "prompts": 2}],
        "alarms": [None, [{"metric": "kl", "above": 1.0, "lines": 2, "then": "stop"}]],
        "console": [None, {"samples": 2}],
        "trainer": [{"max_steps": 3, "use_cpu": True, "learning_rate": 1e-4, "save_steps": 2}],
        "seed": [0],
    }


def prepare_folder(folder: Path) -> None:
    """Writes the files that the configs name."""
    tiny_checkpoint(folder / "model")
    (folder / "own.py").write_text(_OWN, encoding="utf-8")
    rows = [json.dumps({"prompt": f"Name colour {i}.", "family": f"family {i % 2}"}) for i in range(16)]
    (folder / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")


def draw(rng: random.Random, of: dict[str, list[Any]]) -> tuple[str, str]:
    """A config as YAML, and what was changed in it."""
    raw = {}
    for name, entries in of.items():
        entry = entries[0] if rng.random() < 0.6 else rng.choice(entries)
        if entry is not None:
            raw[name] = copy.deepcopy(entry)
    done = [change(rng, raw) for _ in range(1 if rng.random() < 0.7 else 2)]
    text = yaml.dump(raw, sort_keys=False, allow_unicode=True)
    if rng.random() < 0.1:
        at = rng.randrange(len(text))
        byte = rng.choice(":{}[]&*!|>'\"%@`#-?,\t\n \0é")
        text, done = text[:at] + byte + text[at + rng.randrange(3) :], [*done, f"text at {at}: {byte!r}"]
    return text, "; ".join(done)


def change(rng: random.Random, raw: dict[str, Any]) -> str:
    """Changes a value or a key somewhere in ``raw``, and says what."""
    places = [*_places(raw, "")]
    path, parent, key = rng.choice(places)
    how = rng.random()
    if how < 0.75:
        parent[key] = copy.deepcopy(rng.choice(HOSTILE))
        return f"{path} = {str(parent[key])[:60]!r}"
    if how < 0.85 and isinstance(parent, dict):
        name = rng.choice(["", "type", "x" + str(key), str(key)[:-1], 3, None, "beta", "num_generations"])
        parent[name] = parent.pop(key)
        return f"{path} renamed {name!r}"
    if how < 0.92:
        del parent[key]
        return f"{path} deleted"
    section = rng.choice([*settings_of(TrainConfig)])
    raw[section] = copy.deepcopy(rng.choice(HOSTILE))
    return f"{section} = {str(raw[section])[:60]!r}"


def _places(value: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in [*items]:
        below = f"{path}.{key}" if isinstance(value, dict) else f"{path}[{key}]"
        yield below.removeprefix("."), value, key
        yield from _places(inside, below)


def answer(path: Path) -> str:
    """What becomes of the config in ``path``: "prepared", or the message of an error that is meant for the user.

    Any other exception passes, which is what this trial looks for.
    """
    try:
        prepare(parse_config(read_config(path)))
    except (SettingsError, ValueError, FileNotFoundError, ImportError) as error:
        return str(error)
    return "prepared"


def is_named(message: str, path: Path) -> bool:
    """Whether the message begins with the file or with the name of a setting."""
    if str(path) in message:
        return True
    try:
        keys = {key if isinstance(key, str) and key else repr(key) for key in yaml.safe_load(path.read_text("utf-8"))}
    except (ValueError, TypeError, yaml.YAMLError):
        keys = set()
    return any(message.startswith((f"{key}:", f"{key}.", f"{key}[")) for key in {*settings_of(TrainConfig), *keys})


def run(folder: Path, inputs: int, seed: int, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Tries configs, see ``trial.try_inputs``; their files are written to ``folder``."""
    prepare_folder(folder)
    of, path = kinds(folder), folder / "config.yaml"
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True  # Names of the hub end at once.

    def make(rng: random.Random) -> Input:
        text, changes = draw(rng, of)
        path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
        return Input(changes, lambda: _outcome(path))

    return try_inputs(make, ("prepared", "refused by name"), inputs=inputs, seed=seed, first=first)


def _outcome(path: Path) -> tuple[str, str]:
    found = answer(path)
    if found == "prepared":
        return "prepared", ""
    return ("refused by name" if is_named(found, path) else "refused without a name"), found[:300]


def main(given: argparse.Namespace) -> dict[str, Any]:
    """Runs the command, and returns its tally."""
    with tempfile.TemporaryDirectory() as folder:
        return as_tally(given, *run(Path(folder), given.inputs, given.seed, given.first))
