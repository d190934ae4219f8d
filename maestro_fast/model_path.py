"""Says in one sentence why a path or name of a model leads to none, before and while transformers loads it."""

from __future__ import annotations

import contextlib
import json
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maestro_fast.settings import SettingsError

_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json")
_TOO_BROKEN = ("SafetensorError", "UnpicklingError", "RuntimeError", "KeyError", "AttributeError")


def check_model_path(path: str, field: str = "model.path") -> None:
    """Looks at the files of a local folder, and refuses one that holds no checkpoint. It imports no model library.

    A folder with an adapter of peft is not looked at closely: it names another checkpoint. A name of the hub passes.

    Args:
        path: a folder, or a name of the hub.
        field: the name of the setting that holds it, with which every error begins.

    Raises:
        SettingsError: there is no such folder, or it lacks its config, its weights or its tokenizer.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        if not _HUB_NAME.fullmatch(path):
            raise SettingsError(f"{field}: there is no folder {path}, expected a checkpoint of transformers")
        return
    if not folder.is_dir():
        raise SettingsError(f"{field}: {path} is a file, expected the folder of a checkpoint")
    if (folder / "adapter_config.json").is_file():
        return
    if not (folder / "config.json").is_file():
        inside = sorted(p.parent.name for p in folder.glob("*/config.json"))
        hint = f"; the folders {', '.join(inside)} in it have one" if inside else ""
        raise SettingsError(f"{field}: {path} has no config.json, expected a checkpoint of transformers{hint}")
    about = _read(folder / "config.json", field)
    if not about.keys() & {"model_type", "architectures"}:
        raise SettingsError(f"{field}: {path}/config.json names no model_type, expected that of transformers")
    _check_weights(folder, field)
    if not _any(folder, _TOKENIZERS):
        raise SettingsError(f"{field}: {path} holds no tokenizer (tokenizer.json), expected one beside the weights")


def _check_weights(folder: Path, field: str) -> None:
    if not _any(folder, _WEIGHTS):
        raise SettingsError(f"{field}: {folder} holds no weights, expected model.safetensors beside config.json")
    for index in (folder / name for name in _INDICES if (folder / name).is_file()):
        parts = set(_read(index, field).get("weight_map", {}).values())
        missing = sorted(part for part in parts if not (folder / part).is_file())
        if missing:
            raise SettingsError(
                f"{field}: {folder} lacks {missing[0]}, one of the {len(parts)} files of weights in {index.name}"
            )


def _any(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


def _read(path: Path, field: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{field}: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"{field}: {path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise SettingsError(f"{field}: {path} holds a {type(found).__name__}, expected a JSON object")
    return found


@contextlib.contextmanager
def loading_model(path: str, field: str = "model.path") -> Iterator[None]:
    """Turns what goes wrong while a checkpoint is loaded into one sentence about the setting that names it.

    Raises:
        SettingsError: the checkpoint cannot be loaded. Errors that name their own setting pass as they are.
    """
    try:
        yield
    except SettingsError:
        raise
    except ImportError:
        raise  # It says what to install.
    except Exception as error:
        if not isinstance(error, (OSError, ValueError)) and type(error).__name__ not in _TOO_BROKEN:
            raise
        if any("peft" in Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)):
            raise SettingsError(f"model.lora: {' '.join(str(error).split())}") from error
        raise SettingsError(f"{field}: {_why(error, path)}") from error


def _why(error: Exception, path: str) -> str:
    message = str(error)
    if "connect to" in message or "offline mode" in message.lower():
        return (
            f"there is no folder {path}, and the hub cannot be reached for a model of that name: "
            "expected a local folder, or a network"
        )
    if "not a valid model identifier" in message or "valid repository name" in message:
        return f"{path} is neither a folder nor a model of the hub that can be read without a login"
    first = re.split(r"(?<=[^.][.:])\s", " ".join(message.split()))[0].rstrip(".:")
    return f"{path} cannot be loaded: {first or type(error).__name__}"
