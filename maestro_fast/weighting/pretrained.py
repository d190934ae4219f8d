"""A Conductor in a directory of its own: ``conductor.safetensors`` beside ``conductor.json``.

The JSON says which policy it is, the rewards that its outputs stand for, in order, the width of the states it reads
and its options; the tensors are its whole state. So it can be looked at, handed on, or trained further.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from maestro_fast.settings import SettingsError, build
from maestro_fast.weighting.anchored import Anchored, AnchoredConfig
from maestro_fast.weighting.conductor import Conductor, ConductorConfig
from maestro_fast.weighting.guard import Guarded
from maestro_fast.weighting.policy import WeightPolicy

FORMAT = 1
CONFIG_FILE, TENSORS_FILE = "conductor.json", "conductor.safetensors"
_CONFIGS: dict[str, type[ConductorConfig] | type[AnchoredConfig]] = {
    "conductor": ConductorConfig,
    "anchored": AnchoredConfig,
}


def save_pretrained(policy: WeightPolicy, folder: str | Path) -> None:
    """Writes a ``Conductor`` or an ``Anchored`` one; of a guarded one what is under guard.

    Raises:
        ValueError: another policy, or a meta-reward that was given as a function and has no name to be found by.
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
    """Reads what ``save_pretrained`` wrote: the same weights for the same contexts, and the same future.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: not of this format, or a file that does not fit the other.
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
        policy = build(_CONFIGS[about["policy"]], about["config"], "config").build(names, size)
    except (KeyError, TypeError, SettingsError) as error:
        raise ValueError(f"{path / CONFIG_FILE}: {error}") from error
    policy.load_state_dict(load_file(path / TENSORS_FILE))
    return policy
