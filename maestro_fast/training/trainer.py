"""The trainer: transformers.Trainer with generation batches in place of a labelled data set.

What happens in a generation batch stands in ``training/step.py``. The trainer makes a batch at the first micro-batch
that is trained on, in one of two ways (``plan.choose_scoring`` decides):

scored before             Rewards, weights and advantages are known before the training forward. A scoring forward comes
                          before them if anything reads it. Each training forward then gives its loss at once.
judged in the training    One micro-batch holds the whole batch. Its training forward gives log-probs, entropies and
forward                   hidden states; then the responses are judged, weighed and compared; then the loss follows.

Saving and resuming stand in ``training/checkpoint.py``, what stops a run in ``training/interrupt.py`` and
``training/health.py``, and how it is saved then in ``training/rescue.py``. The methods below are the places where
transformers calls them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from maestro_fast.data.conditions import check_conditions
from maestro_fast.data.dataset import PromptDataset
from maestro_fast.generation import Engine, Generator, ProbeConfig
from maestro_fast.model.forward import last_hidden, policy_outputs
from maestro_fast.model.hidden_states import HiddenStates
from maestro_fast.model.reference import reference_policy
from maestro_fast.model.sharding import check_sharding, saves_shards
from maestro_fast.model.trained import warn_of_half_precision
from maestro_fast.ops import policy_loss
from maestro_fast.records import PolicyOutputs, Prompts, StepRecord
from maestro_fast.rewards import RewardSet
from maestro_fast.specs import resolve_profile
from maestro_fast.training.arguments import check_arguments
from maestro_fast.training.batches import GroupSampler, MicroBatch
from maestro_fast.training.best_policy import BestPolicy, check_best
from maestro_fast.training.build import Given, build_step
from maestro_fast.training.checkpoint import Checkpoints, StepState, batch_sizes, check_resumed, use_learning_rate
from maestro_fast.training.dynamic_sampling import dynamic_sampling
from maestro_fast.training.evaluation import check_best_metric, evaluate_rewards
from maestro_fast.training.health import Health, Origins
from maestro_fast.training.interrupt import Interrupts
from maestro_fast.training.loss import loss_of_logprobs, loss_of_states
from maestro_fast.training.metrics import LOSS_METRICS, MetricMeans, SamplerGaps, StageClock, divergence
from maestro_fast.training.overlap import Ahead, Lessons, check_parts
from maestro_fast.training.plan import LossTerms, Method, checked_plan, context_mode, reads_reference
from maestro_fast.training.progress import StageProgress, StepEvents
from maestro_fast.training.rescue import Rescue
from maestro_fast.training.run_directory import rotate, staged
from maestro_fast.training.step import Sampled
from maestro_fast.training.weight_sync import check_engine
from maestro_fast.weighting import WeightPolicy
from maestro_fast.weighting.diagnostics import Watch, healthy_ranges

logger = logging.getLogger(__name__)


class MaestroTrainer(Trainer):
    """GRPO with reward weights from a weight policy.

    Accumulation, mixed precision, PEFT, DDP, loggers and callbacks are transformers.Trainer's own.

    Args:
        model: a causal language model of transformers, with or without PEFT adapters. With a KL, the model as it is
            here becomes the reference, see ``model/reference.py``.
        tokenizer: the model's own; it needs a chat template if prompts are messages.
        dataset: the prompts.
        rewards: the rewards, for example from ``rewards.build_rewards``.
        weights: the weight policy, for example from ``weighting.build_weight_policy``. One that reads hidden states has
            to be built for this model's hidden size.
        args: the options of ``transformers.Trainer``; batch size and accumulation follow from ``method.batch`` and are
            set here.
        method: what is done in a step; None takes the defaults of ``Method``.
        anchor: the utility that a weight policy learns from, for example from ``rewards.build_anchor``.
        evaluation: the held-out prompts, which ``args.eval_strategy`` needs.
        keep_best: whether to keep a copy of the best policy by labelled utility, see ``training/best_policy.py``.
        generator: samples the responses; None takes ``generate`` of transformers, unless there is an ``engine``.
        engine: samples in place of the model, and gets the model's weights whenever they have changed.
        probe: how the engine is compared with the model after each sync, see ``ProbeConfig``.
        observers: functions that get the record of every generation batch, on the main process.
        timing_observers: functions that get the seconds by stage after every generation batch, on the main process.
        callbacks: the callbacks of ``transformers.Trainer``.

    Raises:
        ValueError: sizes do not divide, or the arguments or the model cannot be served. Nothing has trained by then.

    Attributes:
        method: what is done in a step.
        step: the order and the parts of every generation batch, see ``training/step.py``.
        checkpoints: our part of every checkpoint.
        best: the best policy so far; None where the run does not keep it.
        clock: adds up the seconds of each stage.
        interrupts: catches the signals that stop a run, see ``training/interrupt.py``.
        health: stops a run that is not finite any more, see ``training/health.py``.
    """

    loss_is_scaled_for_ga = True  # Gradient accumulation is in the normalizer of the loss already.
    _restored: StepState | None = None  # what a checkpoint held, until transformers has set its own counters
    _sampler: GroupSampler  # made with the data loader
    _staging: Path | None = None  # the folder in which a checkpoint is being written
    saved_at: int | None = None  # the step of the last checkpoint
    _record: StepRecord | None = None  # of the current generation batch; None behind a resume
    _save_due = True  # whether a checkpoint was due behind the evaluation that goes on, or has failed
    _judges = True  # whether a checkpoint that is written now is a regular one
    _evaluating = False  # whether an evaluation of the training loop goes on, or has failed

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
        check_arguments(args)
        if engine is not None:
            check_engine(engine, generator, model)
        self._best_checkpoint = check_best_metric(args, rewards.names, evaluation, anchor is not None)
        check_conditions(rewards, anchor, weights, dataset, evaluation)
        self.method = method or Method()
        terms = LossTerms.of(self.method.loss, resolve_profile(self.method.profile))
        self._plan = plan = checked_plan(self.method, model, dataset, args.world_size)
        plan.set_sizes(args)
        needs_reference = terms.reads_reference or reads_reference(weights)
        self._dataset, self._tokenizer, self._means = dataset, tokenizer, MetricMeans()
        self._micro_batches: list[MicroBatch | Sampled] = []  # those of the generation batch that are left
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            eval_dataset=evaluation,
            data_collator=list,  # type: ignore[arg-type]
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        check_sharding(self.accelerator)
        # A transformers that does not know loss_is_scaled_for_ga looks at this attribute instead, and never calls it.
        self.compute_loss_func = policy_loss
        self.clock = StageClock(self.args.device)
        self.interrupts = Interrupts(alone=self.args.world_size == 1, speaks=self.is_world_process_zero())
        if keep_best:
            check_best(anchor, sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self.best = BestPolicy(holds=self.is_world_process_zero()) if keep_best else None
        self._observers = tuple(observers)
        self._progress = StageProgress.replace_bar(self, self.clock)
        self.add_callback(StepEvents(self, timing_observers))
        if self._best_checkpoint is not None:
            self.add_callback(self._best_checkpoint)
        warn_of_half_precision(model, args.learning_rate, self.accelerator)
        reference = reference_policy(model, self.accelerator) if needs_reference else None
        given = Given(model, tokenizer, dataset, rewards, anchor, weights, self.method, generator, engine, probe)
        self.step = build_step(given, plan, reference, self.accelerator, self.clock)
        check_parts(self.step.sampler.generator.concurrent_parts, plan.prompts, rewards, anchor)
        sizes = batch_sizes(plan, self.method.sampling.group_size, self.args.world_size)
        self.checkpoints = Checkpoints(weights, rewards.names, self.best, sizes, self.args)
        self._dynamic = dynamic_sampling(self.method.batch, self.step, self._spare_rows, self._prompts_of)
        self._watch = Watch(healthy_ranges(rewards.names) if self.is_world_process_zero() else {})
        self._ahead = Ahead(self.step, lambda number: self._sampler.rows(number), self._prompts_of, self.method)
        self._lessons, self._gaps = Lessons(weights), SamplerGaps(self.step.processes.gather)
        self._rescue = Rescue(self, model, weights, self._lessons)
        self.health = Health(self.step.processes, model, self.args.learning_rate)
        self._origins = Origins([], self.method.sampling.group_size, 0)  # where the current responses come from

    # ---- a generation batch -------------------------------------------------------------------------------------

    def _get_train_sampler(self, _dataset: Any = None) -> GroupSampler:
        block, batches = self.method.batch.prompts_per_batch, -(-self.args.max_steps // self.step.plan.updates)
        order = self._dataset.order(block, self.method.seed, batches)
        self._sampler = GroupSampler(order, self.step.plan.micro_steps)
        return self._sampler

    def _spare_rows(self, number: int, refill: int, count: int, used: set[int]) -> list[int]:
        return self._sampler.spare_rows(number, refill, count, used)

    def _prompts_of(self, rows: Sequence[int]) -> Prompts:
        return self._dataset.prompts([self._dataset[row] for row in rows], self._tokenizer)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as ``transformers.Trainer.train`` does, and saves the run before a signal stops it.

        Raises:
            Interrupted: SIGINT or SIGTERM has come.
            NonFiniteError: a loss, a gradient or a parameter is not finite.
            ValueError: the checkpoint to resume from is not whole.
        """
        check_resumed(resume_from_checkpoint, self.args, self.step.processes)
        with self.interrupts.caught("Training had ended."), contextlib.closing(self._progress), self._ahead:
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Trains on one micro-batch; for the first one of a generation batch, it samples the batch."""
        if not self._micro_batches:
            self._micro_batches = self._next_batch(model, inputs)
        elif len(self._micro_batches) % self.step.plan.accumulation == 0:
            self._rescue.remember()  # The next optimiser step of this generation batch begins.
        with self._rescue.saved_if_it_fails(), self.clock.stage("train"):
            micro_batch = self._micro_batches.pop(0)
            loss: Tensor = super().training_step(model, micro_batch, num_items_in_batch)  # type: ignore[arg-type]
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Checks the losses and the norm of the gradient, just before the optimiser applies the gradient."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        with self._rescue.saved_if_it_fails():
            self.health.check(norm, self.state.global_step + 1, self._origins, self._record)
        return norm

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs if isinstance(inputs, (MicroBatch, Sampled)) else super()._prepare_inputs(inputs)

    def _next_batch(self, model: nn.Module, rows: Any) -> list[MicroBatch | Sampled]:
        """Samples a generation batch. Unless the training forward is to be read, it is judged here, too."""
        step, updates = self.state.global_step, self.step.plan.updates
        prompts = self._dataset.prompts(rows, self._tokenizer)
        with self._rescue.saved_if_it_fails():
            self.health.check_parameters(step)
            started = self._ahead.batch(model, prompts, step // updates)
        try:
            self.learn()
            self._rescue.remember()
            with self._rescue.saved_if_it_fails():
                with self.interrupts.may_stop():
                    sampled = self.step.collect(model, started)
                next_number, stops = sampled.number + 1, self.step.weights.should_stop
                self._ahead.begin(model, next_number, self.state.max_steps, stops=stops)
                with self.interrupts.may_stop():
                    if self.step.scoring.source == "training":
                        return [sampled]
                    outputs, rows_N = self.step.score(model, sampled), self._sampler.rows(sampled.number)
                    if self._dynamic is not None:
                        sampled, outputs, rows_N, cost = self._dynamic.fill(model, sampled, outputs, rows_N)
                        self._means.add(cost)
                return [*self._prepared(model, sampled, outputs, rows_N)]
        finally:
            started.wait()  # If one part failed, no other may still use the engine when it is closed.

    def _prepared(
        self, model: nn.Module, sampled: Sampled, outputs: PolicyOutputs | None, rows_N: list[int]
    ) -> list[MicroBatch]:
        """Judges, weighs and compares a batch, and tells the log and the observers about it."""
        postpone = self.step.sampler.generator.concurrent_parts > 0
        with self.interrupts.may_stop():
            micro_batches, record, metrics = self.step.prepare(
                model, sampled, outputs, lambda outcome: self._lessons.add(outcome, postpone=postpone)
            )
        self._watch.see(metrics)
        self._means.add(metrics)
        self._origins, self._record = self._origins_of(rows_N), record
        for observer in self._observers if self.is_world_process_zero() else ():
            observer(record)
        if self.best is not None:  # This comes last: if something above fails, the batch does not count.
            assert isinstance(self.model, nn.Module)
            self._means.add(self.best.see(sampled.number, record, self.model))
        return micro_batches

    def _origins_of(self, rows_N: list[int]) -> Origins:
        own = self.step.processes.rank * self.step.plan.responses
        return Origins(rows_N, self.method.sampling.group_size, own, self._dataset.name_of)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the policy loss of a micro-batch; an optimiser step has the sum over its micro-batches."""
        mode = context_mode(self.step.weights) if self.step.scoring.source == "training" else None
        hidden = last_hidden(model, inputs.sequences, self.step.scorer.layouts, mode)
        if isinstance(inputs, MicroBatch):
            batch, (loss, metrics, logprobs) = inputs, self._loss_scored_before(hidden, inputs)
        else:
            batch, (loss, metrics, logprobs) = self._loss_judged_in_forward(model, hidden, inputs)
        self.health.see(loss, batch, logprobs)
        if batch.logprobs.ref_C is not None and "kl" not in metrics:  # A loss of the user's own need not tell it.
            tokens, total = divergence(batch.live(logprobs), batch.live(batch.logprobs.ref_C))
            metrics = {**metrics, "kl": total / tokens.clamp(min=1)}
        named = {LOSS_METRICS.get(name, f"loss/{name}"): value.item() for name, value in metrics.items()}
        self._means.add(named, batch.live_tokens)  # They are means over these tokens, and the log's over those of all.
        return (loss, None) if return_outputs else loss

    def _loss_scored_before(self, hidden: HiddenStates, batch: MicroBatch) -> _Found:
        """Computes the loss from hidden states and advantages that are known, in one sweep."""
        scorer = self.step.scorer
        with scorer.autocast():
            found = loss_of_states(hidden, batch, scorer.head, scorer.temperature, self.step.terms.function)
        if self.step.scoring.source == "none":
            last = not self._micro_batches
            sampling_C = batch.logprobs.sampling_C
            theirs_C = None if sampling_C is None else batch.live(sampling_C)
            self._means.add(self._gaps.add(batch.live(found.logprobs), theirs_C, last=last))
        return found.loss, found.metrics, found.logprobs

    def _loss_judged_in_forward(self, model: Any, hidden: HiddenStates, sampled: Sampled) -> tuple[MicroBatch, _Found]:
        """Judges responses by what their training forward gives, and computes the loss from its states."""
        logprobs, entropies = self.step.scorer.logprobs(hidden, self.step.terms.entropy)
        mode = context_mode(self.step.weights) or "last"
        outputs = policy_outputs(hidden, logprobs, entropies, mode)
        (batch,) = self._prepared(model, sampled, outputs, self._sampler.rows(sampled.number))
        found = loss_of_logprobs(logprobs, entropies, batch, self.step.terms.function)
        return batch, (found.loss, found.metrics, logprobs.detach())

    def learn(self) -> None:
        """Lets the weight policy catch up with the last batch. Its figures go to the next line of the log."""
        if not self._lessons.waiting:
            return
        self._rescue.remember(lessons=())  # If learning fails, the run is saved as it was before.
        with self._rescue.saved_if_it_fails(), self.clock.stage("conductor_update"):
            learnt = self._lessons.learn()
        self._watch.see(learnt)
        self._means.add(learnt)

    # ---- the log and evaluations --------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs a line. A line about training also gets the means of our figures since the last, over all processes."""
        means = MetricMeans()
        if "loss" in logs or "train_loss" in logs:
            means.join(self.step.processes.gather_objects([self._means.state()]))
            self._means = MetricMeans()
        super().log({**logs, **means.pop()}, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Returns 0: the rows that come from the data loader are prompts, not the sequences that are trained on."""
        return 0

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Computes mean rewards and utility on held-out prompts, see ``evaluation.evaluate_rewards``.

        Raises:
            ValueError: there are no held-out prompts.
        """
        del ignore_keys
        dataset = eval_dataset or self.eval_dataset
        if not isinstance(dataset, PromptDataset):
            raise ValueError(f"evaluation: got {type(dataset).__name__}, expected a PromptDataset")
        self.learn()
        if not self._evaluating:
            self._save_due = self.control.should_save
        self._evaluating = self.is_in_train
        self._rescue.remember()
        with self._rescue.saved_if_it_fails(), self.interrupts.may_stop(), self.clock.stage("evaluate"):
            metrics = evaluate_rewards(
                self.step.sampler,
                self.step.judges,
                self.model_wrapped,
                dataset,
                self.method.evaluation_samples,
                prompts_at_once=self.step.plan.prompts,
                prefix=metric_key_prefix,
                progress=not self.args.disable_tqdm and self.is_world_process_zero(),
            )
        self._evaluating = False
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the policy for ``from_pretrained``, on all processes together.

        A checkpoint that holds the shards of each process (SHARDED_STATE_DICT) needs no such copy, a final policy does.
        """
        if not saves_shards(self.accelerator):
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:
            state = self.accelerator.get_state_dict(self.model)
            if self.args.should_save:  # Not every transformers asks this itself.
                self._save(output_dir, state_dict=state)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self.learn()
        self.health.check_parameters(self.state.global_step)
        if self._best_checkpoint is not None and self.control.should_save and self._judges and not self._evaluating:
            self._best_checkpoint.judge(self.state)  # A checkpoint that a signal or an error makes is not judged.
        with self.clock.stage("save"), staged(run_dir, self.accelerator) as self._staging:
            try:
                super()._save_checkpoint(model, trial)
                self.checkpoints.save(self._staging / name, run_dir / name, self.step_state(), self.state)
            finally:
                self._staging = None
        self.saved_at = self.state.global_step
        if self.args.should_save:
            rotate(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            use_learning_rate(self.optimizer, self.lr_scheduler, self.args.learning_rate)
            self._restored = self.checkpoints.load(Path(checkpoint), self.state.global_step)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Judges by an evaluation; checkpoints that a figure of training judges are judged where they are saved."""
        return self._best_checkpoint is None and super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        """Loads the weight policy of the best checkpoint, too, because the two were trained together."""
        self.learn()  # The weight policy that made the last outcome has to learn from it before it is replaced.
        assert self.state.best_model_checkpoint is not None
        check_resumed(self.state.best_model_checkpoint, self.args, self.step.processes)
        super()._load_best_model()
        self.checkpoints.load_weights(Path(self.state.best_model_checkpoint))

    def restore_step(self) -> None:
        """Takes over what a checkpoint held of the step in progress, once transformers has set its own counters.

        Nothing of an earlier ``train``, which may have failed, reaches this one.
        """
        state, self._restored = self._restored, None
        self._lessons.restore()
        self.health.forget()
        self._micro_batches, self._means, self._evaluating = [], MetricMeans(), False
        self.saved_at = self._record = None
        if state is not None:
            self.saved_at = self.state.global_step
            number = (self.state.global_step - 1) // self.step.plan.updates
            self._origins = self._origins_of(state.rows or self._sampler.rows(number))
            self.take_over(state)

    def step_state(self) -> StepState:
        """The step in progress, for a checkpoint."""
        unused = [batch for batch in self._micro_batches if isinstance(batch, MicroBatch)]
        loss, logged = self._tr_loss.item(), self._globalstep_last_logged
        rows, ahead = self._origins.rows_N, self._ahead.started
        return StepState(
            unused, self._means, loss, logged, self._evaluating, rows=rows, ahead=ahead, save_due=self._save_due
        )

    def save_checkpoint(self) -> None:
        """Writes a checkpoint of the run as it is."""
        self._save_checkpoint(self.model_wrapped, None)

    def take_over(self, state: StepState) -> None:
        """Goes on from the step in progress that ``state`` holds."""
        self._micro_batches, self._means = [*state.micro_batches], state.means
        self._tr_loss = torch.full_like(self._tr_loss, state.loss)
        self._globalstep_last_logged, self._evaluating = state.logged_step, state.evaluation_due
        self._save_due = state.save_due
        self._ahead.restore(state.ahead)

    def begin_epoch(self) -> None:
        """Tells the sampler its epoch, because transformers does not do so when several processes resume."""
        steps = self._sampler.blocks * self.step.plan.updates
        self._sampler.set_epoch(self.state.global_step // steps)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Runs no epoch after ``max_steps``. transformers itself checks only after a step, so it would run one more.

        An evaluation that was broken off when the run was saved is made before the first step.
        """
        if self._evaluating and self.eval_dataset is not None:
            self._load_rng_state(kwargs["resume_from_checkpoint"])
            self.control.should_evaluate = self.control.should_save = True  # The new checkpoint replaces the old one.
            after = {name: kwargs[name] for name in ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")}
            self._judges = self._save_due
            try:
                self._maybe_log_save_evaluate(self._tr_loss, None, **after)
            finally:
                self._judges = True
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:  # An alarm may have ended the run that is resumed.
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Stops the run behind an optimiser step if a signal has come to any process, and saves it before."""
        with self._rescue.saved_if_it_fails():
            super()._maybe_log_save_evaluate(*args, **kwargs)
            if self.interrupts.agreed(self.step.processes):
                if self.args.save_strategy != SaveStrategy.NO and self.saved_at != self.state.global_step:
                    self.save_checkpoint()
                self.interrupts.check()


_Found = tuple[Tensor, dict[str, Tensor], Tensor]  # a loss, its metrics, and the policy's log-probs [C]
