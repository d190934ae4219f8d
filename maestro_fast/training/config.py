"""The config of a training run: one YAML file, whose sections are the config dataclasses of the parts of a run.

``CONFIG.md`` beside this file lists every setting. It is made from these dataclasses by ``config_reference``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, Literal, get_args

from transformers import TrainingArguments

from maestro_fast.data.config import DataConfig, check_held_out_data, check_training_data
from maestro_fast.functions import load_function
from maestro_fast.generation import GenerationConfig, SamplingConfig, TransformersConfig
from maestro_fast.generation.config import GENERATION
from maestro_fast.model.chat import ChatConfig
from maestro_fast.model.load import ModelConfig
from maestro_fast.peer_names import our_name
from maestro_fast.rewards import AnchorConfig, OverlongReward, RewardConfig
from maestro_fast.settings import Choice, Setting, SettingsError, UnknownSetting, build, near, settings_of
from maestro_fast.specs import PROFILES, FunctionLoss, PolicyLossConfig
from maestro_fast.training.batches import BatchConfig
from maestro_fast.training.overlap import check_ahead
from maestro_fast.training.plan import Method, check_correction
from maestro_fast.watching import AlarmConfig, ConsoleConfig, TrackersConfig
from maestro_fast.weighting import WeightsConfig

LOSS = Choice({"policy_loss": PolicyLossConfig, "function": FunctionLoss}, default="policy_loss", what="loss")


@dataclass(frozen=True)
class AdvantagesConfig:
    """How rewards become advantages.

    Attributes:
        profile: the name of an advantage profile, a key of ``ops.PROFILES``.
    """

    profile: str = "maestro"

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            known = ", ".join(PROFILES)
            raise ValueError(f"profile: {self.profile!r}, expected one of {known}{near(self.profile, PROFILES)}")


@dataclass(frozen=True)
class EvaluationConfig:
    """Rewards on held-out prompts.

    ``trainer.eval_strategy`` and ``trainer.eval_steps`` say when they are computed, by default at every checkpoint.

    Attributes:
        data: the held-out prompts; a list of data sets is read one after the other.
        samples: the number of responses to each prompt.
        prompts: how many of the prompts are taken, at random by the seed of the run, from each task family in
            proportion and at least one; they are the same at every evaluation. Null takes all.
    """

    data: DataConfig | list[DataConfig]
    samples: int = 1
    prompts: int | None = None

    def __post_init__(self) -> None:
        check_held_out_data(self.data)
        if self.samples < 1:
            raise ValueError(f"samples: {self.samples}, expected at least 1")
        if self.prompts is not None and self.prompts < 1:
            raise ValueError(f"prompts: {self.prompts}, expected at least 1 or null")


@dataclass(frozen=True)
class TrainConfig:
    """One run.

    Attributes:
        run_dir: the directory for everything that the run produces, which must not hold another run.
        model: the policy.
        data: the prompts; a list of data sets is a mixture.
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
            which is "best" if the weight policy learns from utilities or trains on them (``anchored``,
            ``reward_model``, ``utility``) and "last" otherwise; the weight policy saved beside it is always the last
            one.
        evaluation: the rewards on held-out prompts during training; null means none.
        alarms: bounds on figures of the log, beyond which the run warns or ends.
        console: samples on the console while the run goes on; null means none.
        trackers: histograms and samples for TensorBoard and Weights & Biases, where ``trainer.report_to`` names them;
            null leaves them with the figures of the log.
        seed: the seed of the data order, the sampling and the trainer.
    """

    run_dir: str
    model: ModelConfig
    data: DataConfig | list[DataConfig]
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
    alarms: list[AlarmConfig] = field(default_factory=list)
    console: ConsoleConfig | None = None
    trackers: TrackersConfig | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.run_dir:
            raise SettingsError("run_dir: is empty, expected a directory")
        if not 0 <= self.seed < 2**32:
            raise SettingsError(f"seed: {self.seed}, expected 0 <= seed < 2**32")
        if self.anchor is None and (needing := self.weights.needs_utility):
            raise SettingsError(f"anchor: missing, {needing} needs a known utility, expected a section anchor")
        check_correction(self.sampling, self.loss)
        check_training_data(self.data, self.trainer)
        check_ahead(getattr(self.generation, "ahead", 0), self.sampling, self.loss)
        for i, entry in enumerate(self.rewards):
            if isinstance(entry.reward, OverlongReward) and entry.reward.limit > self.sampling.max_new_tokens:
                raise SettingsError(
                    f"rewards[{i}].limit: {entry.reward.limit}, but no response gets longer than "
                    f"sampling.max_new_tokens {self.sampling.max_new_tokens}, expected at most that"
                )

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
        model = self.model
        return Method(
            self.sampling, self.batch, loss, self.advantages.profile, self.seed, samples, model.sharing, model.layout
        )


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


def parse_config(values: dict[str, Any]) -> TrainConfig:
    """Builds a ``TrainConfig`` from a mapping.

    Raises:
        SettingsError: a setting is wrong. The message begins with its name; for one that there is not, it says what
            was probably meant, also where the name is one of TRL or verl, or stands in another section here.
    """
    try:
        return build(TrainConfig, values)
    except UnknownSetting as error:
        hint = known_elsewhere(error.name, error.value)
        if not hint:
            raise
        raise SettingsError(f"{error.name}: unknown setting; {hint}") from error


def known_elsewhere(name: str, value: Any = None) -> str:
    """Says where a setting belongs that stands in the wrong section, or that has this name in TRL or verl only.

    Args:
        name: its dotted name.
        value: its value.

    Returns:
        Words such as "here TRL's beta is loss.kl_coef"; "" if no section and neither library has such a setting.
    """
    own, sections = name.rpartition(".")[2], settings_of(TrainConfig)
    hint = our_name(name, value)
    if hint and not hint.endswith("has no equal here"):
        return hint
    places = [f"{section}.{own}" for section, setting in sections.items() if own in _names(setting)]
    places += [own] if own in sections else []
    places += [f"trainer.{own}"] if own in {item.name for item in fields(TrainingArguments)} and not places else []
    return f"it is {' or '.join(places)}" if places and name not in places else hint


def _names(setting: Setting) -> set[str]:
    """The names of the settings in a section."""
    kinds = setting.choice.types.values() if setting.choice is not None else [setting.hint, *get_args(setting.hint)]
    return {
        name for kind in kinds if is_dataclass(kind) for name, own in settings_of(kind).items() if not own.takes_rest
    }
