"""A training run as one YAML file: sections that belong to the packages they configure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from maestro_fast.generation import SamplingConfig
from maestro_fast.model.attention import Attention
from maestro_fast.ops import PolicyLossConfig
from maestro_fast.settings import SettingsError, build, override
from maestro_fast.training.batches import BatchConfig
from maestro_fast.training.data import DataConfig
from maestro_fast.training.plan import Method


@dataclass(frozen=True)
class LoraSettings:
    """LoRA adapters (needs the extra ``peft``); ``target_modules`` as in ``peft.LoraConfig``."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass(frozen=True)
class ModelConfig:
    """The policy.

    Attributes:
        path: a local directory or a hub name, for ``AutoModelForCausalLM`` and ``AutoTokenizer``.
        dtype: of the weights; "auto" keeps the checkpoint's.
        attention: "auto" takes flash-attn if it can be imported, else torch's varlen kernel, both on CUDA devices and
            for half-precision weights only; else sdpa. Any other is used or refused. ``maestro-fast info`` shows which
            can serve.
        lora: adapters; without them all weights are trained.
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Attention = "auto"
    lora: LoraSettings | None = None


@dataclass(frozen=True)
class AdvantagesConfig:
    """How rewards become advantages: a profile's name, see ``ops.PROFILES``."""

    profile: str = "maestro"


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out prompts; ``trainer.eval_strategy`` and ``trainer.eval_steps`` say when (default: at every checkpoint).

    Attributes:
        data: the prompts.
        samples: responses to each prompt.
    """

    data: DataConfig
    samples: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples: {self.samples}, expected at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """One run.

    Attributes:
        run_dir: where everything goes that the run produces; must not hold another run.
        rewards: entries for ``rewards.build_rewards``.
        weights: entry for ``weighting.build_weight_policy``.
        anchor: entry for ``rewards.build_anchor``, the utility that some weight policies learn from; it is no reward.
        generation: entry for ``generation.generation_config``, what samples the responses.
        loss: its ``kl_coef`` is the coefficient of the KL, wherever the profile has it enter.
        trainer: fields of ``transformers.TrainingArguments``.
        final: the policy that ``final/`` holds: "last", or "best" by the utility of its labelled responses (see
            ``training/best_policy.py``; the last one is in the last checkpoint); "auto": the best where the weight
            policy is ``anchored``, else the last. The weight policy beside it is that of the end: it learns to the last
            label.
        evaluation: rewards on held-out prompts, during training.
        seed: of the data order, the sampling and the trainer.
    """

    run_dir: str
    model: ModelConfig
    data: DataConfig
    rewards: list[Any]
    weights: Any = "equal"
    anchor: Any = None
    advantages: AdvantagesConfig = field(default_factory=AdvantagesConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    generation: Any = "transformers"
    batch: BatchConfig = field(default_factory=BatchConfig)
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    final: Literal["auto", "best", "last"] = "auto"
    evaluation: EvaluationConfig | None = None
    seed: int = 0

    @property
    def method(self) -> Method:
        samples = 1 if self.evaluation is None else self.evaluation.samples
        return Method(self.sampling, self.batch, self.loss, self.advantages.profile, self.seed, samples)


def read_config(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping of a YAML file with ``--a.b value`` pairs set in it.

    Raises:
        SettingsError: no such file, no mapping, or an override without a value.
    """
    if not path.is_file():
        raise SettingsError(f"config: no file {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SettingsError(f"config: {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"config: {path} holds {type(values).__name__}, expected a mapping")
    rest = list(overrides)
    while rest:
        name = rest.pop(0)
        if not name.startswith("--") or len(name) == 2:
            raise SettingsError(f"{name}: expected --section.setting VALUE")
        name, equals, text = name[2:].partition("=")
        if not equals:
            if not rest:
                raise SettingsError(f"{name}: missing its value")
            text = rest.pop(0)
        override(values, name, yaml.safe_load(text))
    return values


def parse_config(values: dict[str, Any]) -> TrainConfig:
    """A ``TrainConfig`` from a mapping; errors name the setting."""
    return build(TrainConfig, values)
