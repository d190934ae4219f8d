"""The config of a training run: one YAML file, whose sections are the config dataclasses of the parts of a run.

``CONFIG.md`` beside this file lists every setting. It is made from these dataclasses by ``config_reference``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from maestro_fast.functions import load_function
from maestro_fast.generation import GenerationConfig, SamplingConfig, TransformersConfig
from maestro_fast.generation.config import GENERATION
from maestro_fast.model.chat import ChatConfig
from maestro_fast.model.load import ModelConfig
from maestro_fast.rewards import AnchorConfig, RewardConfig
from maestro_fast.settings import Choice, SettingsError, build, override
from maestro_fast.specs import FunctionLoss, PolicyLossConfig
from maestro_fast.training.batches import BatchConfig
from maestro_fast.training.data import DataConfig
from maestro_fast.training.plan import Method, check_correction
from maestro_fast.weighting import WeightsConfig

LOSS = Choice({"policy_loss": PolicyLossConfig, "function": FunctionLoss}, default="policy_loss", what="loss")


@dataclass(frozen=True)
class AdvantagesConfig:
    """How rewards become advantages.

    Attributes:
        profile: the name of an advantage profile, a key of ``ops.PROFILES``.
    """

    profile: str = "maestro"


@dataclass(frozen=True)
class EvaluationConfig:
    """Rewards on held-out prompts.

    ``trainer.eval_strategy`` and ``trainer.eval_steps`` say when they are computed, by default at every checkpoint.

    Attributes:
        data: the held-out prompts.
        samples: the number of responses to each prompt.
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
        run_dir: the directory for everything that the run produces, which must not hold another run.
        model: the policy.
        data: the prompts.
        chat: how conversations become what the policy reads, in training and in evaluations.
        rewards: the rewards of the run, a list of entries.
        weights: the weight policy, which says how much each reward counts.
        anchor: the utility that some weight policies learn from, an entry as in ``rewards``, but no reward of the run.
        advantages: how rewards become advantages.
        sampling: how responses are sampled.
        generation: what samples the responses.
        batch: the sizes of a step.
        loss: the policy loss, whose ``kl_coef`` is the coefficient of the KL wherever the profile has it enter, or a
            function of your own.
        trainer: fields of ``transformers.TrainingArguments``.
        final: the policy that ``final/`` holds: "last", "best" by the utility of its labelled responses, or "auto",
            which is "best" if the weight policy is ``anchored`` and "last" otherwise; the weight policy saved beside it
            is always the last one.
        evaluation: the rewards on held-out prompts during training; null means none.
        seed: the seed of the data order, the sampling and the trainer.
    """

    run_dir: str
    model: ModelConfig
    data: DataConfig
    rewards: list[RewardConfig]
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    anchor: AnchorConfig | None = None
    chat: ChatConfig = field(default_factory=ChatConfig)
    advantages: AdvantagesConfig = field(default_factory=AdvantagesConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    generation: Annotated[GenerationConfig, GENERATION] = field(default_factory=TransformersConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loss: Annotated[PolicyLossConfig | FunctionLoss, LOSS] = field(default_factory=PolicyLossConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    final: Literal["auto", "best", "last"] = "auto"
    evaluation: EvaluationConfig | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_correction(self.sampling, self.loss)

    @property
    def method(self) -> Method:
        """Says what is done in a step. A loss of the user's own is loaded here.

        Raises:
            ValueError, TypeError: ``loss.function`` cannot be loaded, see ``load_function``.
        """
        loss: Any = self.loss
        if isinstance(loss, FunctionLoss) and isinstance(loss.function, str):
            function = load_function(loss.function, field="loss.function")
            _check_loss_function(function, loss.function)
            loaded = replace(loss, function=function)
            loss = replace(loaded, needs_entropy=loaded.entropies)
        samples = 1 if self.evaluation is None else self.evaluation.samples
        return Method(self.sampling, self.batch, loss, self.advantages.profile, self.seed, samples)


def _check_loss_function(function: Callable[..., Any], name: str) -> None:
    """Refuses a function that cannot be called with ``LossInputs`` alone, before a model is loaded for it.

    Raises:
        TypeError: the function takes other arguments.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # Some functions that are written in C do not say what they take.
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise TypeError(
            f"loss.function: {name} takes {signature}, expected a function of one argument, ops.LossInputs"
        ) from error


def read_config(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads the mapping of a YAML file, and sets the ``--a.b value`` pairs of the command line in it.

    Raises:
        SettingsError: there is no such file, it holds no mapping, or an override lacks its value.
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
    """Builds a ``TrainConfig`` from a mapping. Errors are ``SettingsError`` and name the setting."""
    return build(TrainConfig, values)
