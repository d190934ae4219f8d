"""TRL's GRPOTrainer with a weight policy, any advantage profile, and our loss.

TRL multiplies rewards [B, K] by ``self.reward_weights.to(device).unsqueeze(0)`` and sums. While a batch is aggregated,
that attribute holds weights [B, K], so TRL's own code computes and logs everything that follows from them. They are set
as soon as the rewards are known. That is after TRL's forwards over the batch, so hidden states that these forwards
computed are at hand.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from maestro_fast.integrations.trl import refuse
from maestro_fast.integrations.trl.advantages import (
    apply_profile,
    set_advantages,
)
from maestro_fast.integrations.trl.context import (
    MODES,
    GenerationBatch,
    Weighed,
    is_reference_pass,
    reading_contexts,
    scores_old_logprobs,
)
from maestro_fast.integrations.trl.loss import (
    check_sharded_head,
    head_policy_loss,
    layouts_for_loss,
    loss_config,
    packed_policy_loss,
)
from maestro_fast.integrations.trl.overrides import hides_ours, other_advantages
from maestro_fast.integrations.trl.sharing import layouts_of, regrouped, regroups, shards_unseen
from maestro_fast.model import Layouts, causal_lm, check_trainable, response_contexts, warn_of_half_precision
from maestro_fast.ops import AdvantageProfile, GroupAdvantages, LossFunction, PolicyLossConfig, group_advantages
from maestro_fast.records import TOKEN_COUNTS
from maestro_fast.rewards.reward import figures
from maestro_fast.weighting import (
    Comparison,
    Outcome,
    Static,
    WeightContext,
    WeightPolicy,
    Weights,
    build_weight_policy,
    scales,
    weigh_scaled,
)
from maestro_fast.weighting.diagnostics import abstained_weight
from maestro_fast.weighting.families import family_metrics
from maestro_fast.weighting.saved import WEIGHTS_FILE, load_weight_policy, save_weight_policy

logger = logging.getLogger(__name__)
BATCHES_FILE = "maestro_fast.json"
_Base: Any = GRPOTrainer if TYPE_CHECKING else object


class RowWeights:
    """Weights [B, K] that answer the two calls by which TRL reads its weights [K]."""

    def __init__(self, weights_BK: Tensor) -> None:
        self.weights_BK = weights_BK

    def to(self, device: torch.device) -> RowWeights:
        return RowWeights(self.weights_BK.to(device))

    def unsqueeze(self, dim: int) -> Tensor:
        assert dim == 0
        return self.weights_BK


class MaestroGRPOMixin(_Base):  # type: ignore[misc]
    """Gives a ``GRPOTrainer`` or a subclass of it adaptive weights; the mixin comes first among the bases.

    It takes every argument of ``GRPOTrainer``, and these:

    Args:
        weights: the name of a weight policy, a mapping with the name and the options of one, or a ``WeightPolicy``.
            TRL's weights are 1 for each reward, where a policy's weights sum to 1. So a policy's weights are multiplied
            by K, and by TRL's ``reward_weights`` if there are any; and "equal", the default, is TRL as it was. The
            values of a "static" policy count as TRL's ``reward_weights`` do and are not multiplied by K.
        profile: the name of an advantage profile, or an ``AdvantageProfile``; None is TRL's own, by the config's
            ``scale_rewards`` and ``multi_objective_aggregation``. TRL itself computes a profile that is one of its own,
            but groups of identical scores get exactly 0. A KL (``beta``) stays in TRL's loss under every profile.
        loss: "trl" keeps TRL's loss. "maestro_fast" replaces it by ``ops.policy_loss``, or by
            ``ops.linear_policy_loss``, head and loss in one sweep, where TRL scores neither old nor reference log-probs
            and the head can be read. The log says which, with FSDP2 in the first batch. A function is a loss of your
            own: it gets ``ops.LossInputs`` and returns the scalar loss and a dict of metrics. It gets entropies if
            ``ops.loss_function`` marks it so, and the other log-probs where TRL has them (those of the reference if
            ``beta`` is not 0); ``normalizer`` is the number of tokens of the update. Its metrics are logged under their
            own names, as means over the tokens.
            TRL's options for the loss (``loss_type``, ``epsilon``, ``beta``, ...) do not act on it.

    Attributes:
        weight_policy: the policy; every process holds the same one.
        profile: the profile in use.

    Raises:
        ValueError: a name or an option is unknown, a setting is one that ``refusals`` lists, or nothing in the model
            would be trained.
        TypeError: ``loss`` is neither a name nor a function.
        ImportError: this version of TRL is too old.
    """

    _row_weights: RowWeights | None = None
    _generation_batch: GenerationBatch | None = None

    def __init__(
        self,
        *args: Any,
        weights: str | Mapping[str, Any] | WeightPolicy = "equal",
        profile: str | AdvantageProfile | None = None,
        loss: Literal["trl", "maestro_fast"] | LossFunction = "trl",
        **kwargs: Any,
    ) -> None:
        if not isinstance(self, GRPOTrainer):
            raise TypeError(f"{type(self).__name__}: no trl.GRPOTrainer, expected it among the bases after the mixin")
        refuse.check_version()
        super().__init__(*args, **kwargs)
        check_trainable(self.model)
        warn_of_half_precision(self.model, self.args.learning_rate, self.accelerator)
        self._reward_names = _unique(self.reward_func_names)
        if isinstance(weights, str | Mapping):
            width = causal_lm(self.model).config.get_text_config().hidden_size
            weights = build_weight_policy(weights, self._reward_names, width)
        self.weight_policy: WeightPolicy = weights
        self.profile, self._trl_aggregates = apply_profile(self, profile)
        refuse.check(self, weights, loss)
        self._loss_config: PolicyLossConfig | LossFunction | None = None
        if loss != "trl":
            self._loss_config = loss_config(self) if loss == "maestro_fast" else loss
        self._layouts, self._head_in_loss, self._regroups = Layouts("padded"), False, False
        self._laid_out = False
        if not self.accelerator.is_fsdp2:
            self._lay_out()
        self._batches = 0  # the generation batches trained on so far; this number keys the policy's random draws
        self._make_policies_equal()
        self._say_what_context_costs()

    @property
    def reward_weights(self) -> Any:
        return self._fixed_weights if self._row_weights is None else self._row_weights

    @reward_weights.setter
    def reward_weights(self, weights_K: Tensor) -> None:
        self._fixed_weights = weights_K

    def _make_policies_equal(self) -> None:
        """Gives every process the policy of the first, as TRL seeds each process differently before policies draw."""
        if self.accelerator.num_processes > 1:
            state = [{name: tensor.cpu() for name, tensor in self.weight_policy.state_dict().items()}]
            broadcast_object_list(state)
            self.weight_policy.load_state_dict(state[0])

    def _lay_out(self) -> None:
        """Tries, once, how sequences are laid out, and whether the loss can be computed from the hidden states.

        With FSDP2 this waits for the first batch. Until then the model is whole, but it need not be on its device, and
        accelerate may have loaded its weights in the main process alone.
        """
        if self._laid_out:
            return
        self._laid_out = True
        if self.accelerator.is_fsdp2:
            check_sharded_head(self)
        layouts = None if self._loss_config is None else layouts_for_loss(self)
        self._head_in_loss = layouts is not None
        self._layouts = layouts or self._layouts_for_context()
        self._regroups = self._head_in_loss and regroups(self, self._loss_config, self._layouts)

    def _layouts_for_context(self) -> Layouts:
        """How the sequences of a forward for hidden states are laid out, if one is added and the loss has none."""
        hides = hides_ours(self, "_get_per_token_logps_and_entropies") is not None
        adds_forward = self.weight_policy.needs_context and (hides or not scores_old_logprobs(self))
        if adds_forward and not shards_unseen(self) and not self.args.torch_compile:
            try:
                return layouts_of(self)
            except ValueError as error:  # The trial has a backward, which this forward does not need.
                logger.info("layout: padded for the hidden states, %s", error)
        return Layouts("padded")

    def _say_what_context_costs(self) -> None:
        if not self.weight_policy.needs_context or not self.accelerator.is_main_process:
            return
        hidden_by = hides_ours(self, "_get_per_token_logps_and_entropies")
        if not scores_old_logprobs(self):
            logger.warning(
                "hidden states for the weights: one forward without log-probs is added to each generation batch, "
                "because TRL scores no old log-probs with this gradient_accumulation_steps and steps_per_generation"
            )
        elif hidden_by is not None:
            logger.warning(
                "hidden states for the weights: one forward without log-probs is added to each generation batch, "
                "because %s does not call super(), by which they would be read off TRL's forward",
                hidden_by,
            )
        else:
            logger.info("hidden states for the weights: read off TRL's forward for the old log-probs, none is added")

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        self._lay_out()
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self._regroups or self._buffered_inputs is before:
            return inputs
        # TRL has made a new batch. An update has all of its micro-batches, or TRL would have scored old log-probs.
        buffer = self._buffered_inputs
        number = next(i for i, micro_batch in enumerate(buffer) if micro_batch is inputs)
        buffer[:] = regrouped(buffer)
        return buffer[number]

    # TRL makes a generation batch in this order: generation, old and reference log-probs, rewards, advantages.

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._generation_batch = batch = GenerationBatch()
        try:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        finally:
            self._row_weights = self._generation_batch = None
        assert batch.weighed is not None
        self._finish(inputs, output, batch.weighed)
        return output

    def _generate(self, prompts: list[Any]) -> Any:
        generated = super()._generate(prompts)
        if self._generation_batch is not None:
            self._generation_batch.prompt_ids, self._generation_batch.completion_ids = generated[:2]
        return generated

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        forward = super()._get_per_token_logps_and_entropies
        batch = self._generation_batch
        if batch is None or not self.weight_policy.needs_context or model is not self.model or is_reference_pass(model):
            return forward(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        if self.mask_truncated_completions:  # This changes log-probs of truncated completions only: no loss reads them.
            attention_mask = batch.attention_mask(input_ids, logits_to_keep)
        batch.states = []
        with reading_contexts(model, attention_mask, logits_to_keep, self.weight_policy.context_kind, batch.states):
            return forward(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards_BK: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._generation_batch is not None:
            self._weigh(self._generation_batch, rewards_BK)
        return rewards_BK

    def _weigh(self, batch: GenerationBatch, rewards_BK: Tensor) -> None:
        """Asks the policy for weights, and hands them to TRL."""
        training = self.model.training
        context = WeightContext(
            self._reward_names,
            self.num_generations if training else self.num_generations_eval,
            self._batches,
            rewards_BK,
            self.accelerator.gather(self._context(batch)) if self.weight_policy.needs_context else None,
        )
        scale = 1.0 if isinstance(self.weight_policy, Static) else float(len(self._reward_names))
        advantages: GroupAdvantages | None = None
        if training and self._compares_at_once():
            weights, advantages = weigh_scaled(self.weight_policy, context, Comparison(self.profile), scale)
        else:
            weights = self.weight_policy.weights(context)
        if weights.direct_B is not None or weights.residual_B is not None:
            raise ValueError(
                f"weights: policy {self.weight_policy.name} returned direct_B or residual_B, expected None: TRL scores "
                "responses by weighted rewards alone"
            )
        if not training:  # An evaluation draws nothing: it uses the expected weights.
            weights = Weights(weights.expected_BK, weights.expected_BK)
        self._check_agreement(weights)
        factor_K = scale * self._fixed_weights.to(rewards_BK.device)
        self._row_weights = RowWeights(weights.weights_BK * factor_K)
        batch.weighed = Weighed(context, weights, self._row_weights.weights_BK, factor_K, advantages)

    def _compares_at_once(self) -> bool:
        """Whether one op can give weights and advantages as soon as the rewards are known.

        For that, all row weights must be the policy's times one number, and TRL must not aggregate the rewards itself.
        """
        plain = bool((self._fixed_weights == 1).all())
        return plain and not self._trl_aggregates and scales(self.profile)

    def _context(self, batch: GenerationBatch) -> Tensor:
        """The contexts [b, d] of this process's responses."""
        if batch.states:
            return torch.cat(batch.states)
        args = self.args
        size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        mode = MODES[self.weight_policy.context_kind]
        with self.accelerator.autocast():
            return response_contexts(self.model, batch.sequences, self._layouts, size, mode)

    def _check_agreement(self, weights: Weights) -> None:
        """Raises if the processes have different weights, by comparing a sum of them that depends on their order."""
        if self.accelerator.num_processes == 1:
            return
        flat = weights.weights_BK.double().flatten()
        sums = self.accelerator.gather((flat * torch.arange(1, len(flat) + 1, device=flat.device)).sum()[None])
        if not bool((sums == sums[0]).all()):
            raise RuntimeError(
                f"weights: policy {self.weight_policy.name} gave different weights on different processes; it must "
                "depend on its state and its context alone"
            )

    def _finish(self, inputs: list[dict[str, Any]], output: dict[str, Any], weighed: Weighed) -> None:
        """Puts the advantages into TRL's output, and tells the policy and the log about the batch."""
        mode = "train" if self.model.training else "eval"
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        lengths_B = self.accelerator.gather(mask.sum(1))
        context, advantages = weighed.context, weighed.advantages
        if advantages is None:
            advantages = group_advantages(
                context.rewards_BK,
                weighed.row_weights_BK,
                context.group_size,
                lengths=lengths_B if self.profile.needs_lengths else None,
                profile=self.profile,
            )
        if other_advantages(self) is None:
            set_advantages(self, output, advantages, mode, trl_aggregates=self._trl_aggregates)
        outcome = Outcome(context, weighed.weights, advantages, self.profile, factors_K=weighed.factor_K)
        if mode == "train":
            self.weight_policy.observe(outcome)
            self._batches += 1
        families = gather_object([str(row.get("family") or "") for row in inputs])
        found = {**weight_metrics(outcome, families, lengths_B), **self.weight_policy.metrics(), **self._own_figures()}
        for name, value in found.items():
            self._metrics[mode][name].append(value)

    def _own_figures(self) -> dict[str, float]:
        """What reward functions with a method ``metrics`` have of figures of their own, as means over the processes."""
        named = zip(self._reward_names, self.reward_funcs, strict=True)
        own = {
            f"rewards/{name}/{figure}": value
            for name, function in named
            for figure, value in figures(function, name).items()
        }
        values = defaultdict(list)
        for name, value in [item for process in gather_object([own]) for item in process.items()]:
            values[name].append(value)
        return {name: sum(several) / len(several) for name, several in values.items()}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._lay_out()  # A class of the user's may override _prepare_inputs.
        if self._loss_config is not None:
            if self._head_in_loss and "old_per_token_logps" not in inputs:
                self._layouts.count.pop()  # A forward for hidden states is not counted.
                out = head_policy_loss(self, self._loss_config, model, inputs)
                self._log_tokens()
                return out
            return packed_policy_loss(self, self._loss_config, model, inputs)
        loss: Tensor = super()._compute_loss(model, inputs)
        return loss

    def _log_tokens(self) -> None:
        """Logs the tokens of a micro-batch's forward, in this process, if it may have shared prompts."""
        if self._layouts.sharing == "never":
            return
        count = self._layouts.count.pop()
        log = self._metrics["train" if self.model.training else "eval"]
        for name, tokens in zip(TOKEN_COUNTS, (count.computed, count.of_sequences), strict=True):
            log[name].append(float(tokens))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # The policy is written before the trainer's state, whose presence says that a checkpoint is complete.
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            save_weight_policy(folder, self.weight_policy, self._reward_names)
            (folder / BATCHES_FILE).write_text(json.dumps({"generation_batches": self._batches}), encoding="utf-8")
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if not (folder / WEIGHTS_FILE).exists() and not self.weight_policy.state_dict():
            return  # The checkpoint is one of TRL's own, and this policy has no state that could be missing in it.
        load_weight_policy(folder, self.weight_policy, self._reward_names)
        self._batches = json.loads((folder / BATCHES_FILE).read_text(encoding="utf-8"))["generation_batches"]


class MaestroGRPOTrainer(MaestroGRPOMixin, GRPOTrainer):
    """``trl.GRPOTrainer`` with the arguments of ``MaestroGRPOMixin`` besides its own."""


def weight_metrics(outcome: Outcome, families: Sequence[str], lengths_B: Tensor) -> dict[str, float]:
    """The figures over all processes that are added to TRL's log of a generation batch; TRL has none of these names.

    Args:
        families: the task family of each of the B responses, "" where the data names none.
        lengths_B: the number of completion tokens of each response.
    """
    context, expected_BK = outcome.context, outcome.weights.expected_BK
    advantages = outcome.advantages.advantages
    metrics = {
        "advantages/std": advantages.std(correction=0).item(),
        "advantages/abs_mean": advantages.abs().mean().item(),
    }
    for k, name in enumerate(context.reward_names):
        metrics[f"rewards/{name}/abstained"] = context.rewards_BK[:, k].isnan().float().mean().item()
        metrics[f"weights/{name}"] = expected_BK[:, k].mean().item()
    absent_BK = context.rewards_BK.isnan()
    for name, value in abstained_weight(absent_BK, expected_BK, context.group_size).items():
        metrics[name] = value.item()
    return metrics | family_metrics(families, context.reward_names, context.rewards_BK, expected_BK, lengths_B)


def _unique(names: list[str]) -> tuple[str, ...]:
    """Numbers the names that occur several times, because two lambdas are two rewards."""
    unique: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in unique:
            number += 1
            candidate = f"{name}_{number}"
        unique.append(candidate)
    return tuple(unique)
