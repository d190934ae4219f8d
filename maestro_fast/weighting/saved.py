"""A weight policy on disk: its state, its name, and the rewards that its columns stand for.

The file is part of a checkpoint, of a run's ``final/`` folder, and of the checkpoints of the TRL class.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from maestro_fast.weighting.policy import WeightPolicy

WEIGHTS_FILE = "weight_policy.safetensors"


def save_weight_policy(folder: Path, policy: WeightPolicy, reward_names: tuple[str, ...]) -> None:
    """Writes ``weight_policy.safetensors`` into ``folder``."""
    state = {name: tensor.contiguous() for name, tensor in policy.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE, metadata=_metadata(policy, reward_names))


def load_weight_policy(folder: Path, policy: WeightPolicy, reward_names: tuple[str, ...]) -> None:
    """Gives ``policy`` the state that ``save_weight_policy`` wrote into ``folder``.

    Raises:
        ValueError: the file is missing, or it was written for another policy or for other rewards.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(f"resume_from_checkpoint: {folder} holds no {WEIGHTS_FILE}, it is incomplete")
    with safe_open(file, framework="pt") as saved:
        found = saved.metadata()
    for name, value in _metadata(policy, reward_names).items():
        if found.get(name) != value:
            raise ValueError(f"resume_from_checkpoint: {file} is of {name} {found.get(name)}, this run has {value}")
    policy.load_state_dict(load_file(file))


def _metadata(policy: WeightPolicy, reward_names: tuple[str, ...]) -> dict[str, str]:
    return {"policy": policy.name, "rewards": json.dumps(reward_names)}
