"""TRL's GRPOTrainer with a weight policy and any advantage profile.

TRL multiplies rewards [B, K] by ``self.reward_weights.to(device).unsqueeze(0)`` and sums. That attribute holds [B, K]
weights while a batch is aggregated, so TRL's own code computes and logs everything that follows from them. They are set
right after the rewards are known, which is after TRL's forwards over the batch: what those saw is there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from maestro_fast.integrations.trl import refuse
from maestro_fast.integrations.trl.context import (
    GenerationBatch,
    is_reference_pass,
    reading_terminal_states,
    scores_old_logprobs,
)
from maestro_fast.integrations.trl.head import takes_hidden_states
from maestro_fast.integrations.trl.loss import head_policy_loss, loss_config, packed_policy_loss
from maestro_fast.integrations.trl.metrics import replace_logged_advantages, weight_metrics
from maestro_fast.integrations.trl.profile import apply_profile
from maestro_fast.integrations.trl.scale import scales, weigh_scaled
from maestro_fast.integrations.trl.versions import check_version
from maestro_fast.model.forward import terminal_states
from maestro_fast.model.head import causal_lm
from maestro_fast.ops import AdvantageProfile, GroupAdvantages, group_advantages
from maestro_fast.weighting import Outcome, Static, WeightContext, WeightPolicy, Weights, build_weight_policy
from maestro_fast.weighting.saved import WEIGHTS_FILE, load_weight_policy, save_weight_policy

logger = logging.getLogger(__name__)
BATCHES_FILE = "maestro_fast.json"
_Base: Any = GRPOTrainer if TYPE_CHECKING else object


class RowWeights:
    """[B, K] weights behind the two calls by which TRL reads K."""

    def __init__(self, weights_BK: Tensor) -> None:
        self.weights_BK = weights_BK

    def to(self, device: torch.device) -> RowWeights:
        return RowWeights(self.weights_BK.to(device))

    def unsqueeze(self, dim: int) -> Tensor:
        assert dim == 0
        return self.weights_BK


class MaestroGRPOMixin(_Base):  # type: ignore[misc]
    """Adaptive weights for a ``GRPOTrainer`` or a subclass of it; comes first among the bases.

    Takes every argument of ``GRPOTrainer``, and:

    Args:
        weights: name of a weight policy, a mapping with it under ``policy`` and its options, or a ``WeightPolicy``.
            TRL's weights are 1 per reward where a policy's sum to 1: they are multiplied by K, and by TRL's
            ``reward_weights`` if there are any. So "equal", the default, is TRL as it was. The values of ``static`` are
            what TRL's ``reward_weights`` are, unscaled.
        profile: name of an advantage profile, or an ``AdvantageProfile``; None is TRL's own, by the config's
            ``scale_rewards`` and ``multi_objective_aggregation``. One of TRL's is computed by TRL, and groups of
            identical scores get exactly 0. A KL (``beta``) stays in TRL's loss, whatever the profile has it in.
        loss: "trl", or "maestro_fast" for ``ops.policy_loss``; by ``ops.linear_policy_loss``, head and loss in one
            sweep, where TRL scores neither old nor reference log-probs and the head can be read. The log says which.

    Attributes:
        weight_policy: the policy; every process holds the same one.
        profile: the profile in use.

    Raises:
        ValueError: what ``refusals`` lists, an unknown name or option.
        ImportError: a TRL that is too old.
    """

    _row_weights: RowWeights | None = None
    _generation_batch: GenerationBatch | None = None

    def __init__(
        self,
        *args: Any,
        weights: str | Mapping[str, Any] | WeightPolicy = "equal",
        profile: str | AdvantageProfile | None = None,
        loss: Literal["trl", "maestro_fast"] = "trl",
        **kwargs: Any,
    ) -> None:
        if not isinstance(self, GRPOTrainer):
            raise TypeError(f"{type(self).__name__}: no trl.GRPOTrainer, expected it among the bases after the mixin")
        check_version()
        super().__init__(*args, **kwargs)
        self._reward_names = _unique(self.reward_func_names)
        if isinstance(weights, str | Mapping):
            width = causal_lm(self.model).config.get_text_config().hidden_size
            weights = build_weight_policy(weights, self._reward_names, width)
        self.weight_policy: WeightPolicy = weights
        refuse.check(self, weights, loss)
        self.profile, self._trl_aggregates = apply_profile(self, profile)
        self._loss_config = loss_config(self) if loss == "maestro_fast" else None
        self._head_in_loss = self._loss_config is not None and takes_hidden_states(self)
        self._batches = 0  # generation batches trained on so far; keys the policy's random draws
        self._same_everywhere()
        self._say_what_context_costs()

    @property
    def reward_weights(self) -> Any:
        return self._fixed_weights if self._row_weights is None else self._row_weights

    @reward_weights.setter
    def reward_weights(self, weights_K: Tensor) -> None:
        self._fixed_weights = weights_K

    def _same_everywhere(self) -> None:
        """TRL seeds every process differently; a policy that drew its start from that must not differ."""
        if self.accelerator.num_processes > 1:
            state = [{name: tensor.cpu() for name, tensor in self.weight_policy.state_dict().items()}]
            broadcast_object_list(state)
            self.weight_policy.load_state_dict(state[0])

    def _say_what_context_costs(self) -> None:
        if not self.weight_policy.needs_context or not self.accelerator.is_main_process:
            return
        if scores_old_logprobs(self):
            logger.info("hidden states for the weights: read off TRL's forward for the old log-probs, none is added")
        else:
            logger.warning(
                "hidden states for the weights: one forward without log-probs is added to each generation batch, "
                "because TRL scores no old log-probs with this gradient_accumulation_steps and steps_per_generation"
            )

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
        if self.mask_truncated_completions:  # no loss reads the log-probs that this changes
            attention_mask = batch.attention_mask(input_ids, logits_to_keep)
        batch.states = []
        with reading_terminal_states(model, attention_mask, batch.states):
            return forward(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards_BK: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._generation_batch is not None:
            self._weigh(self._generation_batch, rewards_BK)
        return rewards_BK

    def _weigh(self, batch: GenerationBatch, rewards_BK: Tensor) -> None:
        """Asks the policy, and hands TRL what it answers."""
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
            weights, advantages = weigh_scaled(self.weight_policy, context, self.profile, scale)
        else:
            weights = self.weight_policy.weights(context)
        if not training:  # an evaluation draws nothing
            weights = Weights(weights.expected_BK, weights.expected_BK)
        self._check_agreement(weights)
        batch.weighed = (context, weights, advantages)
        self._row_weights = RowWeights(weights.weights_BK * (scale * self._fixed_weights.to(rewards_BK.device)))

    def _compares_at_once(self) -> bool:
        """Whether advantages can be made when the rewards are known, from the policy's weights times one number.

        TRL computes its own profiles later, from the row weights.
        """
        plain = bool((self._fixed_weights == 1).all())
        return plain and not self._trl_aggregates and scales(self.profile)

    def _context(self, batch: GenerationBatch) -> Tensor:
        """Terminal states [b, d] of this process's responses."""
        if batch.states:
            return torch.cat(batch.states)
        args = self.args
        size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        with self.accelerator.autocast():
            return terminal_states(self.model, batch.sequences, "padded", size)

    def _check_agreement(self, weights: Weights) -> None:
        if self.accelerator.num_processes == 1:
            return
        flat = weights.weights_BK.double().flatten()
        sums = self.accelerator.gather((flat * torch.arange(1, len(flat) + 1, device=flat.device)).sum()[None])
        if not bool((sums == sums[0]).all()):
            raise RuntimeError(
                f"weights: policy {self.weight_policy.name} gave different weights on different processes; it must "
                "depend on its state and its context alone"
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._generation_batch = batch = GenerationBatch()
        try:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
            base_K = self._row_weights
        finally:
            self._row_weights = self._generation_batch = None
        assert batch.weighed is not None and base_K is not None
        self._finish(inputs, output, *batch.weighed, base_K.weights_BK)
        return output

    def _finish(
        self,
        inputs: list[dict[str, Any]],
        output: dict[str, Any],
        context: WeightContext,
        weights: Weights,
        advantages: GroupAdvantages | None,
        row_weights_BK: Tensor,
    ) -> None:
        """Sets the advantages, made here unless they are known, and tells the policy and the log about them."""
        mode = "train" if self.model.training else "eval"
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        lengths_B = self.accelerator.gather(mask.sum(1))
        if advantages is None:
            advantages = group_advantages(
                context.rewards_BK,
                row_weights_BK,
                context.group_size,
                lengths=lengths_B if self.profile.needs_lengths else None,
                profile=self.profile,
            )
        self._set_advantages(output, advantages, mode)
        outcome = Outcome(context, weights, advantages)
        if mode == "train":
            self.weight_policy.observe(outcome)
            self._batches += 1
        families = gather_object([str(row.get("family") or "") for row in inputs])
        for name, value in {**weight_metrics(outcome, families, lengths_B), **self.weight_policy.metrics()}.items():
            self._metrics[mode][name].append(value)

    def _set_advantages(self, output: dict[str, Any], advantages: GroupAdvantages, mode: str) -> None:
        own = len(output["advantages"])
        rows = slice(self.accelerator.process_index * own, (self.accelerator.process_index + 1) * own)
        ours, degenerate = advantages.advantages[rows], advantages.degenerate[rows]
        if self._trl_aggregates:  # but for what TRL makes of the rounding noise in a group without spread
            output["advantages"] = torch.where(degenerate, ours, output["advantages"])
        else:
            output["advantages"] = ours
        replace_logged_advantages(self, mode, advantages, own_profile=not self._trl_aggregates)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self._loss_config is not None:
            if self._head_in_loss and "old_per_token_logps" not in inputs:
                return head_policy_loss(self, self._loss_config, model, inputs)
            return packed_policy_loss(self, self._loss_config, model, inputs)
        loss: Tensor = super()._compute_loss(model, inputs)
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:  # before the trainer's state, whose presence says that a checkpoint is complete
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
            return  # a checkpoint of TRL's own, and nothing that it could lack
        load_weight_policy(folder, self.weight_policy, self._reward_names)
        self._batches = json.loads((folder / BATCHES_FILE).read_text(encoding="utf-8"))["generation_batches"]


class MaestroGRPOTrainer(MaestroGRPOMixin, GRPOTrainer):
    """``trl.GRPOTrainer`` with the arguments of ``MaestroGRPOMixin`` besides its own."""


def _unique(names: list[str]) -> tuple[str, ...]:
    """The names, with a number after those that came before: two lambdas are two rewards."""
    unique: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in unique:
            number += 1
            candidate = f"{name}_{number}"
        unique.append(candidate)
    return tuple(unique)
