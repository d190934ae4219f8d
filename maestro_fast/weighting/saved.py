"""Weight policies on disk: the state of any policy in a checkpoint, and a Conductor in a folder of its own.

``save_weight_policy`` writes one file, ``weight_policy.safetensors``. It is part of a checkpoint, of a run's ``final/``
folder and of the checkpoints of the TRL class, and it is read into a policy that the config has built already.

``save_pretrained`` writes ``conductor.safetensors``, the whole state, beside ``conductor.json``, which holds the
policy's name and options, the names of the rewards in the order of its outputs, and the width of the states that it
reads. ``from_pretrained`` needs nothing else to build the policy again, so a Conductor can be looked at, handed on, or
trained further.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from maestro_fast.manifest import tensors_of
from maestro_fast.settings import SettingsError, build
from maestro_fast.weighting.anchored import Anchored, AnchoredConfig
from maestro_fast.weighting.conductor import Conductor, ConductorConfig
from maestro_fast.weighting.guard import Guarded
from maestro_fast.weighting.policy import WeightPolicy

WEIGHTS_FILE = "weight_policy.safetensors"

FORMAT = 1
CONFIG_FILE, TENSORS_FILE = "conductor.json", "conductor.safetensors"
_CONFIGS: dict[str, type[ConductorConfig] | type[AnchoredConfig]] = {
    "conductor": ConductorConfig,
    "anchored": AnchoredConfig,
}


def save_weight_policy(folder: Path, policy: WeightPolicy, reward_names: tuple[str, ...]) -> None:
    """Writes ``weight_policy.safetensors`` into ``folder``."""
    state = {name: tensor.contiguous() for name, tensor in policy.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE, metadata=_metadata(policy, reward_names))


def load_weight_policy(folder: Path, policy: WeightPolicy, reward_names: tuple[str, ...]) -> None:
    """Gives ``policy`` the state that ``save_weight_policy`` wrote into ``folder``.

    Raises:
        ValueError: The file is missing, or it was written for another policy or for other rewards.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(f"resume_from_checkpoint: {folder} holds no {WEIGHTS_FILE}, it is incomplete")
    with tensors_of(file) as saved:
        found, state = saved.metadata() or {}, {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
    for name, value in _metadata(policy, reward_names).items():
        if found.get(name) != value:
            raise ValueError(f"resume_from_checkpoint: {file} is of {name} {found.get(name)}, this run has {value}")
    try:
        policy.load_state_dict(state)
    except (ValueError, TypeError) as error:
        raise ValueError(f"resume_from_checkpoint: {file}: {error}") from error


def _metadata(policy: WeightPolicy, reward_names: tuple[str, ...]) -> dict[str, str]:
    """What the file says about itself, so that it is never loaded into another policy or for other rewards."""
    return {"policy": policy.name, "rewards": json.dumps(reward_names)}


def save_pretrained(policy: WeightPolicy, folder: str | Path) -> None:
    """Writes a ``Conductor`` or an ``Anchored`` into ``folder``. Of a guarded policy, it writes the one inside.

    Raises:
        ValueError: It is another policy, or its meta-reward is a function without a name to load it by.
    """
    inner = policy.policy if isinstance(policy, Guarded) else policy
    if not isinstance(inner, Conductor | Anchored):
        raise ValueError(f"policy: {inner.name!r}, expected one of {', '.join(_CONFIGS)}")
    config: dict[str, Any] = asdict(inner.config)
    if callable(config.get("meta_reward")):
        raise ValueError("policy: its meta_reward is a function, expected a name such as 'package.module:function'")
    about = {
        "format": FORMAT,
        "policy": inner.name,
        "rewards": list(inner.reward_names),
        "context_size": inner.statistics.mean.numel(),
        "config": config,
    }
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in inner.state_dict().items()}, path / TENSORS_FILE)
    (path / CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def from_pretrained(folder: str | Path) -> Conductor | Anchored:
    """Reads what ``save_pretrained`` wrote: a policy that gives the same weights and learns on as the saved one would.

    Raises:
        FileNotFoundError: One of the two files is missing.
        ValueError: A file is not of this format, or the two do not belong together.
    """
    path = Path(folder)
    for name in (CONFIG_FILE, TENSORS_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(f"folder: {path} holds no {name}")
    try:
        about = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path / CONFIG_FILE}: is not JSON: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("policy") not in _CONFIGS:
        found = {key: about.get(key) for key in ("format", "policy")} if isinstance(about, dict) else about
        raise ValueError(f"{path / CONFIG_FILE}: {found}, expected format {FORMAT} of {' or '.join(_CONFIGS)}")
    try:
        names, size = tuple(map(str, about["rewards"])), int(about["context_size"])
        options = dict(about["config"])
        if about["policy"] == "anchored":
            options.setdefault("residual", False)  # A file without the option is older than it, and has no residual.
        policy = build(_CONFIGS[about["policy"]], options, "config").build(names, size)
    except (KeyError, TypeError, SettingsError) as error:
        raise ValueError(f"{path / CONFIG_FILE}: {error}") from error
    with tensors_of(path / TENSORS_FILE) as saved:
        state = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
    try:
        policy.load_state_dict(state)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / TENSORS_FILE}: {error}") from error
    return policy
