"""The trainer: transformers.Trainer with generation batches in place of a labelled data set."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import SaveStrategy

from maestro_fast.generation import Generator, SamplingConfig, TransformersGenerator
from maestro_fast.ops import AdvantageProfile, PolicyLossConfig, policy_loss
from maestro_fast.ops.profiles import resolve_profile
from maestro_fast.records import StepRecord
from maestro_fast.rewards import RewardSet
from maestro_fast.training.batches import BatchConfig, BatchPlan, MicroBatch
from maestro_fast.training.checkpoint import load_weight_policy, save_weight_policy
from maestro_fast.training.data import PromptDataset
from maestro_fast.training.forward import choose_layout, completion_logprobs, last_hidden
from maestro_fast.training.head import causal_lm, check_head, head_of
from maestro_fast.training.metrics import MetricMeans
from maestro_fast.training.pipeline import Pipeline
from maestro_fast.training.progress import StageProgress
from maestro_fast.training.reference import frozen_copy, reference_policy
from maestro_fast.training.sampler import GroupSampler
from maestro_fast.training.timing import StageClock
from maestro_fast.weighting import WeightPolicy

_METRIC_NAMES = {
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "ratio": "ratio/mean",
    "kl": "kl",
    "sampler_ratio": "sampling/importance_sampling_ratio/mean",
}


@dataclass(frozen=True)
class Method:
    """What is done in a step, apart from the optimiser: sampling, batch sizes, advantages and loss."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    profile: str | AdvantageProfile = "maestro"
    seed: int = 0


class MaestroTrainer(Trainer):
    """GRPO with reward weights from a weight policy.

    Resume, accumulation, mixed precision, PEFT, DDP, loggers and callbacks are transformers.Trainer's own.
    """

    loss_is_scaled_for_ga = True  # the normalizer of the loss already spans the accumulated micro-batches

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        dataset: PromptDataset,
        rewards: RewardSet,
        weights: WeightPolicy,
        args: TrainingArguments,
        method: Method | None = None,
        *,
        generator: Generator | None = None,
        observers: Sequence[Callable[[StepRecord], None]] = (),
        timing_observers: Sequence[Callable[[dict[str, float]], None]] = (),
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        """
        Args:
            model: a causal language model of transformers, with PEFT adapters or without. With a KL and without
                adapters, a frozen copy of it becomes the reference.
            tokenizer: of the model; with a chat template if prompts are messages.
            dataset: the prompts.
            rewards, weights: see their packages; a policy that reads hidden states was built for this model's width.
            args: of the Trainer; batch size and accumulation follow from ``method.batch`` and are set here.
            method: sampling, batch, loss, profile.
            generator: None: transformers' own.
            observers: called with the record of every generation batch, on the main process.
            timing_observers: called with seconds by stage after every generation batch, on the main process.

        Raises:
            ValueError: numbers that do not divide, or a model that cannot be served; before training starts.
        """
        self.method = method or Method()
        self._plan = _checked_plan(self.method, model, dataset, args.world_size)
        args.per_device_train_batch_size = self._plan.prompts
        args.gradient_accumulation_steps = self._plan.accumulation
        args.remove_unused_columns = False
        args.dataloader_pin_memory = False
        frozen = frozen_copy(model) if self.method.loss.kl_coef > 0 else None
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=list,  # type: ignore[arg-type]
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        # transformers without loss_is_scaled_for_ga reads this; compute_loss below never calls it
        self.compute_loss_func = policy_loss
        self.clock = StageClock(self.args.device)
        self._observers, self._timing_observers = tuple(observers), tuple(timing_observers)
        self._means = MetricMeans()
        self._micro_batches: list[MicroBatch] = []
        self._install_progress()
        self.add_callback(_EndOfBatch(self))
        self.pipeline = self._build_pipeline(model, tokenizer, dataset, rewards, weights, generator, frozen)

    def _build_pipeline(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        dataset: PromptDataset,
        rewards: RewardSet,
        weights: WeightPolicy,
        generator: Generator | None,
        frozen: nn.Module | None,
    ) -> Pipeline:
        head = head_of(model)
        check_head(model, head)
        method = self.method
        return Pipeline(
            tokenizer=tokenizer,
            dataset=dataset,
            rewards=rewards,
            weights=weights,
            generator=generator or TransformersGenerator(tokenizer, method.sampling, synced_gpus=self.is_fsdp_enabled),
            sampling=method.sampling,
            plan=self._plan,
            loss=method.loss,
            profile=resolve_profile(method.profile),
            head=head,
            layout=choose_layout(model),
            reference=reference_policy(model, frozen, self.accelerator) if method.loss.kl_coef > 0 else None,
            accelerator=self.accelerator,
            clock=self.clock,
            seed=method.seed,
        )

    def _install_progress(self) -> None:
        if self.args.disable_tqdm:
            return
        self.remove_callback(ProgressCallback)
        progress = StageProgress()
        self.clock.on_stage = progress.show
        self.add_callback(progress)

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupSampler:
        del train_dataset
        return GroupSampler(
            len(self.pipeline.dataset), self.method.batch.prompts_per_batch, self._plan.micro_steps, self.method.seed
        )

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch; the first of a generation batch samples it."""
        if not self._micro_batches:
            try:
                self._micro_batches = self._next_batch(model, inputs)
            except Exception as error:
                self._save_before_failing(model, error)
                raise
        micro_batch = self._micro_batches.pop(0)
        with self.clock.stage("train"):
            loss: Tensor = super().training_step(model, micro_batch, num_items_in_batch)  # type: ignore[arg-type]
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs if isinstance(inputs, MicroBatch) else super()._prepare_inputs(inputs)

    def _next_batch(self, model: nn.Module, rows: Any) -> list[MicroBatch]:
        step = self.state.global_step
        number = step // self._plan.updates
        micro_batches, record, metrics = self.pipeline.run(model, rows, number, step)
        self._means.add(metrics)
        if self.is_world_process_zero():
            for observer in self._observers:
                observer(record)
        done = step % self._plan.updates * self._plan.accumulation  # resumed inside a batch: its first part is done
        return micro_batches[done:]

    def _save_before_failing(self, model: nn.Module, error: Exception) -> None:
        """A faulty reward late in a run must not cost the steps since the last checkpoint.

        One process only: with several, the others are not here to take part in saving.
        """
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{step}"
        if step == 0 or self.args.world_size > 1 or self.args.save_strategy == SaveStrategy.NO:
            return
        if not folder.exists():
            self._save_checkpoint(model, None)
        error.add_note(f"The run as it was after step {step} is in {folder}; mend the cause and go on with --resume.")

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The policy loss of a ``MicroBatch``, to be summed over the micro-batches of an optimiser step."""
        pipeline, logprobs = self.pipeline, inputs.logprobs
        config = pipeline.token_loss
        hidden = last_hidden(model, inputs.sequences, pipeline.layout)
        current, entropies = completion_logprobs(
            hidden,
            inputs.sequences,
            pipeline.head,
            pipeline.sampling.temperature,
            "grad" if config.entropy_coef > 0 else "none",
        )
        loss, metrics = policy_loss(
            current,
            inputs.advantages_B,
            inputs.cu_seqlens,
            old_logprobs=logprobs.old_C,
            ref_logprobs=logprobs.ref_C,
            sampling_logprobs=logprobs.sampling_C,
            entropies=entropies,
            normalizer=inputs.normalizer,
            entropy_normalizer=inputs.entropy_normalizer,
            config=config,
        )
        self._means.add({_METRIC_NAMES[name]: value.item() for name, value in metrics.items()})
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of our figures since the last log line."""
        super().log({**logs, **self._means.pop()}, start_time)

    def emit_timings(self) -> None:
        """Hands the seconds by stage of the generation batch that just ended to the observers."""
        timings = {"step": float(self.state.global_step), **self.clock.lap()}
        if self.is_world_process_zero():
            for observer in self._timing_observers:
                observer(timings)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the rows that come from the data loader are prompts, not what is trained on."""
        return 0

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            self.save_weight_policy(folder)

    def save_weight_policy(self, folder: Path) -> None:
        """Writes the state of the weight policy to ``folder``."""
        save_weight_policy(folder, self.pipeline.weights, self.pipeline.rewards.names)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_weight_policy(Path(checkpoint), self.pipeline.weights, self.pipeline.rewards.names)


def _checked_plan(method: Method, model: nn.Module, dataset: PromptDataset, processes: int) -> BatchPlan:
    """What can be refused before anything is copied or moved."""
    plan = BatchPlan.of(method.batch, method.sampling.group_size, processes)
    block = method.batch.prompts_per_batch
    if len(dataset) < block:
        raise ValueError(f"batch.prompts_per_batch: {block}, but the data holds {len(dataset)} prompts")
    language_model = causal_lm(model)
    if "logits_to_keep" not in inspect.signature(language_model.forward).parameters:
        raise ValueError(
            f"model: {type(language_model).__name__}.forward takes no logits_to_keep, so it would form all logits"
        )
    head_of(model)
    return plan


class _EndOfBatch(TrainerCallback):
    """Ends a timing lap with the last optimiser step of a generation batch."""

    def __init__(self, trainer: MaestroTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.clock.lap()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._trainer.method.batch.updates_per_batch == 0:
            self._trainer.emit_timings()
