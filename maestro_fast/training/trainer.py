"""The trainer: transformers.Trainer with generation batches in place of a labelled data set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from maestro_fast.generation import Engine, Generator, ProbeConfig, TransformersGenerator
from maestro_fast.model.forward import choose_layout, completion_logprobs, last_hidden, policy_outputs
from maestro_fast.model.head import check_head, head_of
from maestro_fast.model.reference import frozen_copy, reference_policy
from maestro_fast.ops import policy_loss
from maestro_fast.records import PolicyOutputs, StepRecord
from maestro_fast.rewards import RewardSet
from maestro_fast.specs import EntropyMode, resolve_profile
from maestro_fast.training.arguments import check_arguments
from maestro_fast.training.batches import MicroBatch
from maestro_fast.training.beside import Lessons, check_parts
from maestro_fast.training.best import BestPolicy, check_best
from maestro_fast.training.bounds import Bounds
from maestro_fast.training.data import PromptDataset
from maestro_fast.training.evaluation import check_best_metric, evaluate_rewards
from maestro_fast.training.exact_checkpoints import ExactCheckpoints
from maestro_fast.training.loss import loss_of_logprobs, loss_of_states
from maestro_fast.training.method import Method, checked_plan
from maestro_fast.training.metrics import LOSS_METRICS, MetricMeans, SamplerGaps
from maestro_fast.training.pipeline import Pipeline, Sampled
from maestro_fast.training.progress import show_stages
from maestro_fast.training.sampler import GroupSampler
from maestro_fast.training.scoring import choose_scoring, context_mode, reads_reference
from maestro_fast.training.synced import check_engine, synced
from maestro_fast.training.timing import StageClock
from maestro_fast.weighting import WeightPolicy, check_profile
from maestro_fast.weighting.diagnostics import Watch, healthy_ranges

logger = logging.getLogger(__name__)


class MaestroTrainer(ExactCheckpoints):
    """GRPO with reward weights from a weight policy.

    Accumulation, mixed precision, PEFT, DDP, loggers and callbacks are transformers.Trainer's own.
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
        anchor: RewardSet | None = None,
        evaluation: PromptDataset | None = None,
        keep_best: bool = False,
        generator: Generator | None = None,
        engine: Engine | None = None,
        probe: ProbeConfig | None = None,
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
            anchor: the utility that a weight policy learns from, of ``build_anchor``.
            evaluation: held-out prompts, for ``args.eval_strategy``.
            keep_best: keep the best policy by labelled utility beside the one in training, see ``training/best.py``.
            generator: None: transformers' own, unless there is an ``engine``.
            engine: samples in place of the model, and gets its weights whenever they have changed; ``probe``: how it is
                compared with the model after that, see ``ProbeConfig``.
            observers: called with the record of every generation batch, on the main process.
            timing_observers: called with seconds by stage after every generation batch, on the main process.

        Raises:
            ValueError: numbers that do not divide, arguments or a model that cannot be served; before training starts.
        """
        check_arguments(args)
        if engine is not None:
            check_engine(engine, generator, model)
        check_best_metric(args.metric_for_best_model, rewards.names, evaluation, anchor is not None)
        self.method = method or Method()
        self._plan = checked_plan(self.method, model, dataset, args.world_size)
        args.per_device_train_batch_size = self._plan.prompts
        args.gradient_accumulation_steps = self._plan.accumulation
        args.remove_unused_columns = False
        args.dataloader_pin_memory = False
        self._needs_reference = self.method.loss.kl_coef > 0 or reads_reference(weights)
        frozen = frozen_copy(model) if self._needs_reference else None
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            eval_dataset=evaluation,
            data_collator=list,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        # transformers without loss_is_scaled_for_ga reads this; compute_loss below never calls it
        self.compute_loss_func = policy_loss
        self.clock = StageClock(self.args.device)
        if keep_best:
            check_best(anchor, sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self.best = BestPolicy(holds=self.is_world_process_zero()) if keep_best else None
        self._observers, self._timing_observers = tuple(observers), tuple(timing_observers)
        if not self.args.disable_tqdm:
            show_stages(self, self.clock)
        self.add_callback(Bounds(self))
        self.pipeline = self._build_pipeline(model, tokenizer, dataset, rewards, weights, anchor, generator, frozen)
        self._gaps = SamplerGaps(self.pipeline.gather)
        if engine is not None:
            self.pipeline = replace(self.pipeline, generator=synced(self.pipeline, engine, probe or ProbeConfig()))
        check_parts(self.pipeline.generator.concurrent_parts, self._plan.prompts, rewards, anchor)

    def _build_pipeline(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        dataset: PromptDataset,
        rewards: RewardSet,
        weights: WeightPolicy,
        anchor: RewardSet | None,
        generator: Generator | None,
        frozen: nn.Module | None,
    ) -> Pipeline:
        head = head_of(model)
        check_head(model, head)
        method, profile = self.method, resolve_profile(self.method.profile)
        check_profile(weights, profile)
        scoring = choose_scoring(model, self._plan, rewards, weights, method.loss, profile)
        logger.info("log-probs and hidden states: %s, %s", scoring.source, scoring.reason)
        return Pipeline(
            tokenizer=tokenizer,
            dataset=dataset,
            rewards=rewards,
            weights=weights,
            anchor=anchor,
            generator=generator or TransformersGenerator(tokenizer, method.sampling, synced_gpus=self.is_fsdp_enabled),
            sampling=method.sampling,
            plan=self._plan,
            loss=method.loss,
            profile=profile,
            head=head,
            layout=choose_layout(model),
            scoring=scoring,
            reference=reference_policy(model, frozen, self.accelerator) if self._needs_reference else None,
            accelerator=self.accelerator,
            clock=self.clock,
            seed=method.seed,
            lessons=Lessons(weights),
            watch=Watch(healthy_ranges(rewards.names) if self.is_world_process_zero() else {}),
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupSampler:
        del train_dataset
        self._sampler = GroupSampler(
            len(self.pipeline.dataset), self.method.batch.prompts_per_batch, self._plan.micro_steps, self.method.seed
        )
        return self._sampler

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch; the first of a generation batch samples it."""
        if not self._micro_batches:
            self._micro_batches = self._next_batch(model, inputs)
        micro_batch = self._micro_batches.pop(0)
        with self.clock.stage("train"):
            loss: Tensor = super().training_step(model, micro_batch, num_items_in_batch)  # type: ignore[arg-type]
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs if isinstance(inputs, (MicroBatch, Sampled)) else super()._prepare_inputs(inputs)

    def _next_batch(self, model: nn.Module, rows: Any) -> list[MicroBatch | Sampled]:
        step = self.state.global_step
        started = self.pipeline.start(model, rows, step // self._plan.updates, step)
        try:
            self._remember()
            with self._saved_if_it_fails(model):
                sampled = self.pipeline.finish(model, started)
                if self.pipeline.scoring.source == "training":
                    return [sampled]
                return [*self._judge(model, sampled, self.pipeline.score(model, sampled))]
        finally:
            started.wait()  # where a part failed: no other may use the engine when it is closed

    def _judge(self, model: nn.Module, sampled: Sampled, outputs: PolicyOutputs | None) -> list[MicroBatch]:
        judged = self.pipeline.judge(model, sampled, outputs)
        self._means.add(judged.metrics)
        if self.is_world_process_zero():
            for observer in self._observers:
                observer(judged.record)
        if self.best is not None:  # last: where something above fails, this batch has not been
            assert isinstance(self.model, nn.Module)
            self._means.add(self.best.see(sampled.number, judged.record, self.model))
        return judged.micro_batches

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The policy loss of a ``MicroBatch``, to be summed over the micro-batches of an optimiser step.

        Responses that nothing has judged yet (``Sampled``) are judged by what this forward gives.
        """
        pipeline = self.pipeline
        config, temperature = pipeline.token_loss, pipeline.sampling.temperature
        hidden = last_hidden(model, inputs.sequences, pipeline.layout)
        if isinstance(inputs, MicroBatch):
            loss, metrics, current = loss_of_states(hidden, inputs, pipeline.head, temperature, config)
            if pipeline.scoring.source == "none":
                self._means.add(self._gaps.add(current, inputs.logprobs.sampling_C, last=not self._micro_batches))
        else:
            entropy: EntropyMode = "grad" if config.entropy_coef > 0 else "value"
            current, entropies = completion_logprobs(hidden, inputs.sequences, pipeline.head, temperature, entropy)
            mode = context_mode(pipeline.weights) or "last"
            outputs = policy_outputs(hidden, inputs.sequences, current, entropies, mode)
            with self._saved_if_it_fails(model):
                (inputs,) = self._judge(model, inputs, outputs)
            loss, metrics = loss_of_logprobs(current, entropies, inputs, config)
        self._means.add({LOSS_METRICS[name]: value.item() for name, value in metrics.items()})
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to a line of training the means of our figures since the last one, over all processes."""
        means = MetricMeans()
        if "loss" in logs or "train_loss" in logs:
            means.join(self.pipeline.gather_objects([self._means.state()]))
            self._means = MetricMeans()
        super().log({**logs, **means.pop()}, start_time)

    def emit_timings(self) -> None:
        """Hands the seconds by stage of the generation batch that just ended to the observers."""
        timings = {"step": float(self.state.global_step), **self.clock.lap()}
        if self.is_world_process_zero():
            for observer in self._timing_observers:
                observer(timings)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the rows that come from the data loader are prompts, not what is trained on."""
        return 0

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean rewards and utility on held-out prompts, see ``evaluation.evaluate_rewards``.

        Raises:
            ValueError: there are none.
        """
        del ignore_keys
        dataset = eval_dataset or self.eval_dataset
        if not isinstance(dataset, PromptDataset):
            raise ValueError(f"evaluation: got {type(dataset).__name__}, expected a PromptDataset")
        self._remember()
        with self._saved_if_it_fails(self.model_wrapped), self.clock.stage("evaluate"):
            metrics = evaluate_rewards(
                self.pipeline,
                self.model_wrapped,
                dataset,
                self.method.evaluation_samples,
                prefix=metric_key_prefix,
                progress=not self.args.disable_tqdm and self.is_world_process_zero(),
            )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
