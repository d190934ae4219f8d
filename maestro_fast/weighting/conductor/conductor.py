"""The Conductor as a weight policy: a small network reads a hidden state and sets the weight of each reward.

It keeps what became of its weights, and every ``period`` batches it updates its network from what it kept. The page
``meta_rewards`` says what it learns from, ``network`` holds what it learns.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from maestro_fast.functions import load_function
from maestro_fast.ops.conductor_update import conductor_update, meta_gradient
from maestro_fast.ops.conductor_weights import ConductorSample, action_probs, conductor_weights
from maestro_fast.specs import AdvantageProfile, ConductorParams, ConductorUpdateConfig
from maestro_fast.weighting.conductor.experience import Buffer, RunningStatistics, group_mean, policy_contexts
from maestro_fast.weighting.conductor.meta_rewards import Estimator, Objective, experience, update_batch
from maestro_fast.weighting.conductor.network import Network
from maestro_fast.weighting.diagnostics import self_flattery
from maestro_fast.weighting.policy import ContextKind, Outcome, WeightContext, Weights, check_shapes

logger = logging.getLogger(__name__)

WEAKNESS = (
    "The Conductor's meta-objective 'advantage' is the published one. The group-normalised advantage carries no "
    "information on which reward a task needs: in our simulations the true utility stayed at or below that of equal "
    "weights. Watch conductor/self_flattery (healthy within +-0.05) and compare with `weights: equal`."
)


@dataclass(frozen=True)
class ConductorConfig:
    """MAESTRO's network reads the policy's hidden state and draws one reward to emphasise, per response or prompt.

    The defaults limit the harm that a Conductor can do; the README says what it can learn.

    Attributes:
        alpha: how far a drawn action moves the weights from equal to one-hot, in (0, 1].
        tau: the temperature of the softmax.
        min_prob: the least probability of every action, below 1 / K.
        mode: "sample" draws one action per response (training, as in the paper). "group" draws one per group, from the
            group's mean context. "soft" uses the probabilities as weights, which leaves nothing to reinforce: it needs
            the estimator "pathwise", or learning_rate 0.
        context: "response" is the terminal hidden state of each response (the paper). "response_mean" is the mean over
            the tokens of the response, and "response_first_layer" the terminal state after the first layer instead of
            the last. "prompt_last" and "prompt_mean" are states of the prompt, the same for its whole group.
            "reference_prompt_mean" is the prompt's mean under the frozen reference model.
        shuffle: whether every response gets the state of another one (with a state of the prompt: every group that of
            another group), anew in each batch. This control shows what the states contribute.
        standardise: "running" uses the mean and variance of all contexts so far, which change at updates only;
            "layer_norm" normalises each context by itself.
        hidden: the width of the hidden layer if the network is an MLP, d -> hidden -> GELU -> K; usually 256. 0 makes
            the network linear, d -> K.
        objective: "advantage" is the paper's meta-reward. "first_order" is the advantage times the standardised
            utility, on responses whose utility is known. "custom" is what ``meta_reward`` returns.
        meta_reward: for "custom", a function of the ``Outcome`` that returns [B], or [B, K] for every action. A config
            gives its name, as "package.module:function" or "file.py:function".
        estimator: "reinforce" is the paper's; "baseline" also subtracts the response's expected meta-reward from that
            of its action; "all_actions" sums over all actions, which has the least variance; "pathwise" differentiates
            the advantages themselves.
        learning_rate: the learning rate of AdamW. 0 freezes the Conductor.
        weight_decay: the weight decay of AdamW.
        half_life: the number of batches in which the learning rate halves. None keeps it constant.
        freeze_at: the batch from which on nothing is learnt. None never freezes.
        entropy_coef: the factor of the entropy of p in the objective.
        period: the number of batches from one update to the next (M in the paper).
        capacity: how many batches are kept for later updates as well; their drawn actions count with importance ratios
            of at most 2. None lets every batch serve one update.
        staleness: an update leaves out batches that are older than this many batches. None leaves out none.
        seed: the seed of the draws of actions.
        device: where the network lives and learns. "auto" is the current CUDA device if there is one and this is the
            only process: there Triton fuses weights and advantages, and contexts do not travel. Otherwise "auto" is
            the CPU, where all processes compute the same bits. Any device can be named, but processes on GPUs of
            different kinds may drift apart.
    """

    alpha: float = 0.3
    tau: float = 1.0
    min_prob: float = 0.05
    mode: Literal["sample", "soft", "group"] = "sample"
    context: ContextKind = "response"
    shuffle: bool = False
    standardise: Literal["running", "layer_norm"] = "running"
    hidden: int = 0
    objective: Objective = "advantage"
    meta_reward: Any = None
    estimator: Estimator = "reinforce"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    half_life: float | None = None
    freeze_at: int | None = None
    entropy_coef: float = 0.3
    period: int = 5
    capacity: int | None = None
    staleness: int | None = None
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha: {self.alpha}, expected 0 < alpha <= 1")
        if not self.tau > 0:
            raise ValueError(f"tau: {self.tau}, expected a positive number")
        if not 0 <= self.min_prob < 1:
            raise ValueError(f"min_prob: {self.min_prob}, expected 0 <= min_prob < 1 / K")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: {self.seed}, expected 0 <= seed < 2**64")
        for name, least in (("period", 1), ("hidden", 0), ("capacity", 1), ("staleness", 0), ("freeze_at", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: {value}, expected at least {least}")
        for name in ("learning_rate", "weight_decay", "entropy_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected a number >= 0")
        if self.half_life is not None and not self.half_life > 0:
            raise ValueError(f"half_life: {self.half_life}, expected a positive number of batches")
        if (self.objective == "custom") != (self.meta_reward is not None):
            raise ValueError(
                f"meta_reward: {self.meta_reward!r} with objective {self.objective!r}, expected a function with "
                "'custom' and only then"
            )
        if self.learning_rate > 0:
            self._check_estimator()

    def _check_estimator(self) -> None:
        pathwise = self.estimator == "pathwise"
        if self.mode == "soft" and not pathwise:
            raise ValueError(
                f"learning_rate: {self.learning_rate} with mode 'soft', expected 0: soft weights draw no action, so "
                "REINFORCE has nothing to learn from"
            )
        if pathwise and self.mode != "soft":
            raise ValueError(f"estimator: 'pathwise' with mode {self.mode!r}, expected mode 'soft'")
        if pathwise and self.objective == "advantage":
            raise ValueError(
                "estimator: 'pathwise' with objective 'advantage', whose mean is 0 for all weights: there is nothing "
                "to climb; expected objective 'first_order' or 'custom'"
            )
        if self.mode == "group" and self.estimator != "reinforce":
            raise ValueError(
                f"estimator: {self.estimator!r} with mode 'group', expected 'reinforce': other actions are tried one "
                "response at a time"
            )

    @property
    def needs_group_scores(self) -> bool:
        """Whether an update forms advantages anew, group by group."""
        return self.learning_rate > 0 and self.estimator != "reinforce"

    @property
    def chosen_device(self) -> str:
        """``device``, or what "auto" stands for in this process."""
        if self.device != "auto":
            return self.device
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        processes = torch.distributed.get_world_size() if several else int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1 or not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{torch.cuda.current_device()}"

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Conductor:
        """A Conductor that has not learnt yet.

        Raises:
            ValueError: the device is not here, or ``min_prob`` is too large for so many rewards.
        """
        try:
            torch.empty(0, device=self.chosen_device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: {self.device!r}, expected one that is here: {error}") from error
        if not self.min_prob < 1 / len(reward_names):
            raise ValueError(f"min_prob: {self.min_prob}, expected below 1 / K = {1 / len(reward_names):.4g}")
        return Conductor(self, reward_names, context_size)


class Conductor:
    """A weight policy whose network learns from a buffer of past batches, every ``period`` batches."""

    name = "conductor"
    needs_context = True
    needs_columns: tuple[str, ...] = ()
    should_stop = False

    def __init__(self, config: ConductorConfig, reward_names: tuple[str, ...], context_size: int) -> None:
        self.config = config
        self.reward_names = reward_names
        self.context_kind: ContextKind = config.context
        self.needs_group_scores = config.needs_group_scores
        self.device = torch.device(config.chosen_device)
        self.network = Network(context_size, len(reward_names), config.hidden, config.seed, self.device)
        self.statistics = RunningStatistics(context_size, self.device)
        self.buffer = Buffer(config.period, config.capacity, config.staleness)
        hook = config.meta_reward
        self._meta_reward = load_function(hook, field="meta_reward") if isinstance(hook, str) else hook
        self._metrics: dict[str, float] = {}
        self._warned = False

    # --- weights ---

    @property
    def weight(self) -> Tensor:
        """The last layer's weights."""
        return self.network.weight

    @property
    def bias(self) -> Tensor:
        """The last layer's biases."""
        return self.network.bias

    @property
    def params(self) -> ConductorParams:
        """The network as the ops take it."""
        return self.network.params(*self._standardisation())

    def _standardisation(self) -> tuple[Tensor, Tensor]:
        if self.config.standardise == "running":
            return self.statistics.standardisation()
        size = self.statistics.mean.numel()  # ``contexts`` has applied LayerNorm already
        return torch.zeros(size, device=self.device), torch.ones(size, device=self.device)

    def contexts(self, context: WeightContext) -> Tensor:
        """What the network reads for each response, [B, d]."""
        config, size = self.config, self.statistics.mean.numel()
        h_Bd = policy_contexts(context, config.context, size, config.seed, self.device, shuffle=config.shuffle)
        return functional.layer_norm(h_Bd, h_Bd.shape[-1:]) if config.standardise == "layer_norm" else h_Bd

    def weights(self, context: WeightContext) -> Weights:
        """The weights that the present network gives the responses of a batch."""
        h_Bd = self.contexts(context)
        if self.config.mode == "group":
            h_Bd = group_mean(h_Bd, context.group_size)
        return self.as_weights(context, conductor_weights(h_Bd, self.params, **self.choice(context)))

    def choice(self, context: WeightContext) -> dict[str, Any]:
        """How actions are chosen, as keyword arguments of ``conductor_weights`` and ``maestro_advantages``."""
        config = self.config
        return {
            "tau": config.tau,
            "min_prob": config.min_prob,
            "alpha": config.alpha,
            "mode": "soft" if config.mode == "soft" else "sample",
            "seed": config.seed,
            "step": context.step,
        }

    def as_weights(self, context: WeightContext, sample: ConductorSample) -> Weights:
        """The weights of every response, on the device of the rewards. Mode "group" repeats one row for a group."""
        self._metrics = {"conductor/entropy": sample.entropy.mean().item()}
        used, expected, actions = sample.weights, self.expected(sample.probs), sample.actions
        if self.config.mode == "group":
            used, expected, actions = (x.repeat_interleave(context.group_size, 0) for x in (used, expected, actions))
        device = context.rewards_BK.device
        return Weights(used.to(device), expected.to(device), actions.to(device))

    def expected(self, probs_BK: Tensor) -> Tensor:
        """The expected weights [B, K] under the probabilities [B, K]."""
        if self.config.mode == "soft":
            return probs_BK
        return (1.0 - self.config.alpha) / len(self.reward_names) + self.config.alpha * probs_BK

    def probs(self, h_Bd: Tensor) -> Tensor:
        """The probabilities p [B, K] of contexts [B, d] that have not been standardised."""
        return action_probs(self.params.logits(h_Bd), self.config.tau, self.config.min_prob)

    # --- learning ---

    def observe(self, outcome: Outcome) -> None:
        """Adds the batch to the buffer, and updates the network if it is time for that."""
        self._metrics["conductor/self_flattery"] = self_flattery(outcome)
        config, step = self.config, outcome.context.step
        if config.learning_rate == 0 or (config.freeze_at is not None and step >= config.freeze_at):
            return
        h_Bd = self.contexts(outcome.context)
        if config.mode == "group":
            h_Bd = group_mean(h_Bd, outcome.context.group_size).repeat_interleave(outcome.context.group_size, 0)
        batch = experience(
            outcome,
            h_Bd,
            self.probs(h_Bd),
            objective=config.objective,
            estimator=config.estimator,
            alpha=config.alpha,
            meta_reward=self._meta_reward,
            keep_drawn_probs=config.capacity is not None,
        )
        self.buffer.add(step, batch)
        if self.buffer.due:
            self._update(step, outcome.profile)

    def _update(self, step: int, profile: str | AdvantageProfile) -> None:
        """One step of AdamW on the batches of the buffer."""
        batches = [batch for batch in self.buffer.take(step) if batch["h"].shape[0]]
        if not batches:
            return
        if self.config.objective == "advantage" and not self._warned:
            logger.warning(WEAKNESS)
            self._warned = True
        new = [batch["h"] for batch in batches if "used" not in batch]
        self.statistics.update(torch.cat(new or [batches[0]["h"][:0]]))
        self._metrics |= self._signal_to_noise(batches, profile)
        joined, rest = update_batch(batches, self.config.estimator, self.probs, profile)
        before = self.network.state(*self._standardisation())
        after, found = conductor_update(before, joined, self._options(step))
        self.network.updates = after.step
        for batch in batches:
            batch["used"] = torch.tensor(True)
        objective = found["objective"].item() + rest
        self._metrics |= {"conductor/objective": objective, "conductor/grad_norm": found["grad_norm"].item()}

    def _signal_to_noise(
        self, batches: Sequence[dict[str, Tensor]], profile: str | AdvantageProfile
    ) -> dict[str, float]:
        """Measures signal to noise of the meta-gradient as |mean|^2 / (variance of the mean) - 1, over the batches.

        Each batch gives one gradient. The expectation of |mean|^2 is |signal|^2 plus that variance, so pure noise gives
        about 0.
        """
        if len(batches) < 2:
            return {}
        options, params = self._options(0), self.params
        gradients = []
        for batch in batches:
            joined, _ = update_batch([batch], self.config.estimator, self.probs, profile)
            _, by_name = meta_gradient(params, joined, options)
            gradients.append(torch.cat([gradient.flatten() for gradient in by_name.values()]))
        stacked = torch.stack(gradients)
        noise = stacked.var(0).sum() / len(batches)
        ratio = stacked.mean(0).square().sum() / noise - 1 if noise > 0 else noise.new_zeros(())
        return {"conductor/gradient_snr": max(0.0, ratio.item())}

    def _options(self, step: int) -> ConductorUpdateConfig:
        config = self.config
        rate = config.learning_rate * (1.0 if config.half_life is None else 2.0 ** (-step / config.half_life))
        return ConductorUpdateConfig(config.tau, config.min_prob, config.entropy_coef, rate, config.weight_decay)

    def metrics(self) -> dict[str, float]:
        """Figures of the last batch, and of the update after it if there was one."""
        return dict(self._metrics)

    # --- saved state ---

    def state_dict(self) -> dict[str, Tensor]:
        """All state as tensors on the CPU, whatever the device."""
        state = self.network.state_dict() | self.statistics.state_dict("statistics.") | self.buffer.state_dict()
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over a ``state_dict``.

        Raises:
            ValueError: a tensor is missing or has another shape. The Conductor is then as it was.
        """
        size, num_rewards = self.statistics.mean.numel(), len(self.reward_names)
        check_shapes(
            state,
            self.network.saved_shapes(state)
            | self.statistics.saved_shapes("statistics.")
            | self.buffer.saved_shapes(state, size, num_rewards),
        )
        self.network.load_state_dict(state)
        self.statistics.load_state_dict(state, "statistics.")
        self.buffer.load_state_dict(state, self.device)
