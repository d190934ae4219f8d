"""A Conductor that lies in a folder, and the model whose states it reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from maestro_fast.training.checkpoint import WEIGHTS_FILE, load_weight_policy
from maestro_fast.training.config import ModelConfig, TrainConfig, parse_config, read_config
from maestro_fast.weighting import (
    Anchored,
    Conductor,
    Guarded,
    WeightPolicy,
    WeightsConfig,
    build_weight_policy,
    from_pretrained,
)
from maestro_fast.weighting.pretrained import CONFIG_FILE


@dataclass(frozen=True)
class SavedConductor:
    """
    Attributes:
        folder: where its files are.
        policy: as it was saved, its guard included.
        run: the config of the run that left it; None for a folder of ``save_pretrained``.
    """

    folder: Path
    policy: WeightPolicy
    run: TrainConfig | None

    @property
    def inner(self) -> Conductor | Anchored:
        inner = self.policy.policy if isinstance(self.policy, Guarded) else self.policy
        assert isinstance(inner, Conductor | Anchored)
        return inner

    def model(self, given: str | None) -> tuple[ModelConfig, str]:
        """The model whose states it was trained on, and in words which one that is.

        Args:
            given: path or name of that model, where it is not the folder's or the run's own.

        Raises:
            ValueError: it is not known where that model is.
        """
        reference = self.inner.context_kind == "reference_prompt_mean"
        dtype = "auto" if self.run is None else self.run.model.dtype
        role = "the frozen reference, which training started from" if reference else "the policy"
        if given is not None:
            return ModelConfig(given, dtype), f"{given}, given as {role}"
        if reference and self.run is not None:
            path = Path(self.run.model.path)
            if path.is_dir():
                return ModelConfig(str(path), dtype), f"{path}, {role}"
            raise ValueError(f"--model: missing; it reads {role}, which was {path}: there is no such directory here")
        if not reference and any((self.folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            return ModelConfig(str(self.folder), dtype), f"{self.folder}, {role} that it was saved with"
        raise ValueError(f"--model: missing; {self.folder} does not tell where {role}, is, which it reads")


def load_conductor(folder: Path) -> SavedConductor:
    """From a folder of ``save_pretrained``, the ``final/`` or a checkpoint of a run, or a run directory.

    Raises:
        ValueError: none of these, or the run had another weight policy.
    """
    for candidate in (folder, folder / "final"):
        if (candidate / CONFIG_FILE).is_file():
            return SavedConductor(candidate, from_pretrained(candidate), None)
        if (candidate / WEIGHTS_FILE).is_file():
            return _of_run(candidate)
    raise ValueError(f"DIR: {folder} holds neither {CONFIG_FILE} nor {WEIGHTS_FILE}, expected a saved Conductor")


def _of_run(folder: Path) -> SavedConductor:
    config = folder.absolute().parent / "config.yaml"
    if not config.is_file():
        raise ValueError(
            f"DIR: {folder} is of a run, but beside it there is no config.yaml, which has the Conductor's options; "
            "expected it in its run directory"
        )
    run = parse_config(read_config(config))
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as saved:
        about = saved.metadata()
        names = saved.keys()
        sizes = [saved.get_slice(name).get_shape()[0] for name in names if _is_context_mean(name)]
    if about.get("policy") not in ("conductor", "anchored") or not sizes:
        raise ValueError(f"DIR: {folder} holds weight policy {about.get('policy')!r}, expected conductor or anchored")
    rewards = tuple(json.loads(about["rewards"]))
    policy = build_weight_policy(_entry(run), rewards, int(sizes[0]))
    load_weight_policy(folder, policy, rewards)
    return SavedConductor(folder, policy, run)


def _is_context_mean(name: str) -> bool:
    return name.removeprefix("policy.") == "statistics.mean"


def _entry(run: TrainConfig) -> WeightsConfig:
    return run.weights
