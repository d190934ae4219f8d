"""``maestro-fast init``: writes a commented config for a model, a file of prompts and rewards.

Every line stands there with the reason for its value, which is read off the model, the data and the device; what else
one may want is commented out. The largest micro-batch that fits is found by the measurement of ``maestro-fast check``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from maestro_fast.config_file import absolute_paths
from maestro_fast.data.files import Row, read_rows
from maestro_fast.generation.vllm import vllm_obstacle
from maestro_fast.model.attention import default_device
from maestro_fast.model.load import Checkpoint
from maestro_fast.model_path import loading_model
from maestro_fast.rewards.builtin import REWARD_TYPES
from maestro_fast.settings import SettingsError, near
from maestro_fast.starting.check import fitting_micro_batch
from maestro_fast.starting.columns import family_column, prompt_column, shown_columns
from maestro_fast.starting.facts import positions_of, prompt_lengths, quantile, skeleton
from maestro_fast.starting.memory import Room, millions
from maestro_fast.starting.template import Choices, written
from maestro_fast.training.config import parse_config
from maestro_fast.weighting.build import POLICIES

_FULL_BYTES = 16  # of a parameter that trains: weight, gradient and two moments, in float32
_ROOM_FOR_FULL = 0.6  # of the memory; the rest is for activations and the cache
_LONGEST = {"cpu": 128, "cuda": 512}  # tokens of a response, where the positions allow it
_PROMPTS = {"cpu": 2, "cuda": 16}
_MOST = {"cpu": 8, "cuda": 64}  # responses of a micro-batch
_GROUP = 8
TAGS = "Think between <think> and </think>. Then give your answer between <answer> and </answer>."


@dataclass(frozen=True)
class InitOptions:
    """What the user asked for.

    Attributes:
        model, data, out: the checkpoint, the prompts, and the file to write.
        rewards: types and functions, with commas between them; None takes a starter set.
        weights: the type of the weight policy; None takes the Conductor where there are several rewards.
        prompt_column: the column of the prompts; None looks for it.
    """

    model: str
    data: str
    out: Path
    rewards: str | None = None
    weights: str | None = None
    prompt_column: str | None = None


def write_config(options: InitOptions) -> None:
    """Writes the config.

    Raises:
        SettingsError, ValueError, FileNotFoundError: there is a file already, or the model, the data or the rewards
            cannot serve; the message says what was expected.
    """
    located = absolute_paths({"model": {"path": options.model}, "data": {"path": options.data}}, Path.cwd())
    model, data = located["model"]["path"], located["data"]["path"]
    rewards = reward_entries(options.rewards, options.out)
    weights = _weights(options.weights, len(rewards))
    rows = read_rows(data, "train")
    if not rows:
        raise SettingsError(f"--data: {options.data} holds no rows, expected at least two")
    column = prompt_column(rows, options.prompt_column, options.data)
    with loading_model(model, "--model"):
        checkpoint = Checkpoint.at(model)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
        positions = positions_of(AutoConfig.from_pretrained(checkpoint.base))
        parameters = sum(parameter.numel() for parameter in skeleton(model).parameters())
    device = default_device()
    system = _system_prompt(rows[0][column], tokenizer, rewards)
    chosen = _with_lengths(
        Choices(
            out=options.out,
            model=_from_config(options.model, model, options.out),
            data=_from_config(options.data, data, options.out),
            rewards=rewards,
            weights=weights,
            prompt_column=column,
            family_column=family_column(rows, column),
            columns=shown_columns(rows, column),
            system_prompt=system,
            lora=_wants_lora(checkpoint, parameters, device),
            parameters=millions(parameters),
            device=device.type,
            vllm=device.type == "cuda" and vllm_obstacle() is None,
        ),
        rows,
        tokenizer,
        positions,
    )
    final = replace(chosen, micro_batch=_micro_batch(chosen))
    with options.out.open("x", encoding="utf-8") as file:
        file.write(written(final))


def reward_entries(listed: str | None, out: Path) -> list[dict[str, Any] | str]:
    """The entries of ``rewards`` for a list of types and functions.

    Raises:
        SettingsError: a name is neither a built-in reward that needs no further setting, nor a function.
    """
    names = ["format", "length"] if listed is None else [name.strip() for name in listed.split(",") if name.strip()]
    if not names:
        raise SettingsError("--rewards: names none, expected types or functions with commas between them")
    return [_reward_entry(name, out) for name in names]


def _reward_entry(name: str, out: Path) -> dict[str, Any] | str:
    if ":" in name:
        source, _, attribute = name.rpartition(":")
        if not source.endswith(".py"):
            return name
        if not Path(source).is_file():
            raise SettingsError(f"--rewards: there is no file {source}")
        return f"{_from_config(source, str(Path(source).absolute()), out)}:{attribute}"
    if name == "length":
        return {"type": "length"}  # Its target follows from the lengths.
    if name not in REWARD_TYPES:
        own = "; a function of your own is named path/to/file.py:function"
        raise SettingsError(
            f"--rewards: {name!r}, expected one of {', '.join(REWARD_TYPES)}{own}{near(name, REWARD_TYPES)}"
        )
    try:
        parse_reward(name)
    except SettingsError as error:
        raise SettingsError(
            f"--rewards: {name} needs settings of its own ({str(error).removeprefix('rewards[0].')}): leave it out "
            "here and add it to the file, see maestro-fast train --help"
        ) from error
    return name


def parse_reward(name: str) -> None:
    """Raises SettingsError if the reward type ``name`` does not do without settings."""
    parse_config({"run_dir": ".", "model": {"path": "."}, "data": {"path": "."}, "rewards": [{"type": name}]})


def _weights(asked: str | None, rewards: int) -> str:
    if asked is None:
        return "conductor" if rewards > 1 else "equal"
    if asked not in POLICIES:
        raise SettingsError(f"--weights: {asked!r}, expected one of {', '.join(POLICIES)}{near(asked, POLICIES)}")
    return asked


def _from_config(given: str, absolute: str, out: Path) -> str:
    """A path as it has to stand in the file, where relative paths start in the folder of the file."""
    if absolute == given or not os.path.exists(absolute):  # It is absolute already, or a name of the hub.
        return given
    return os.path.relpath(absolute, out.absolute().parent)


def _system_prompt(prompt: Any, tokenizer: PreTrainedTokenizerBase, rewards: list[dict[str, Any] | str]) -> str | None:
    """The system prompt of a model with a chat template; None for a model that reads text as it is.

    Raises:
        SettingsError: the prompts are conversations, and the tokenizer has no template for them.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if not isinstance(prompt, str) and not has_template:
        raise SettingsError("--data: its prompts are conversations, and the model's tokenizer has no chat template")
    if not has_template:
        return None
    if "format" in rewards:
        return TAGS
    return "You are a helpful assistant." if isinstance(prompt, str) else None


def _wants_lora(checkpoint: Checkpoint, parameters: int, device: torch.device) -> bool:
    """Whether all weights, with gradients and optimiser, would take too much of the memory. An adapter goes on."""
    return checkpoint.adapter is None and _FULL_BYTES * parameters > _ROOM_FOR_FULL * Room.now(device).free


def _with_lengths(
    chosen: Choices, rows: list[Row], tokenizer: PreTrainedTokenizerBase, positions: int | None
) -> Choices:
    """The choices with the lengths of prompts and responses, and as many prompts in a batch as there are.

    Raises:
        SettingsError: the positions leave no room for a response, or there is no prompt but one.
    """
    dataset = chosen.dataset(rows)
    lengths = prompt_lengths(dataset, tokenizer)
    most = _LONGEST.get(chosen.device, _LONGEST["cuda"])
    if positions is not None:
        most = min(most, positions - max(lengths))
        if most < 16:
            raise SettingsError(
                f"--data: the longest prompt has {max(lengths)} tokens and the model {positions} positions, expected "
                "room for 16 more"
            )
    tokens = most if most < 32 else most // 16 * 16
    prompts = min(_PROMPTS.get(chosen.device, _PROMPTS["cuda"]), len(rows))
    rewards = [
        {**own, "target": tokens // 2} if isinstance(own, dict) and own.get("type") == "length" else own
        for own in chosen.rewards
    ]
    return replace(
        chosen,
        rewards=rewards,
        rows=len(rows),
        lengths=(quantile(lengths, 0.5), quantile(lengths, 0.95), max(lengths)),
        positions=positions,
        max_new_tokens=tokens,
        prompts_per_batch=prompts,
        group_size=_GROUP,
    )


def _micro_batch(chosen: Choices) -> int:
    """The largest micro-batch that fits, up to a size beyond which nothing is gained."""
    raw = absolute_paths(yaml.safe_load(written(chosen)), chosen.out.absolute().parent)
    most = _MOST.get(chosen.device, _MOST["cuda"])
    return fitting_micro_batch(raw, most)
