"""Options of the Conductor."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from maestro_fast.weighting.conductor.conductor import Conductor
    from maestro_fast.weighting.policy import Outcome

Context = Literal["response", "prompt_last", "prompt_mean", "reference_prompt_mean", "shuffled"]
Estimator = Literal["reinforce", "baseline", "all_actions", "pathwise"]
Objective = Literal["advantage", "first_order", "custom"]
MetaReward = Callable[["Outcome"], "Tensor"]


@dataclass(frozen=True)
class ConductorConfig:
    """Defaults limit the harm that a Conductor can do; see the README on what it can be expected to learn.

    Attributes:
        alpha: how far a sampled action moves the weights from equal to one-hot, in (0, 1].
        tau: temperature of the softmax.
        min_prob: floor of every action's probability, below 1 / K.
        mode: "sample" draws one action per response (training, as in the paper), "group" one per group, from the
            group's mean context; "soft" uses the probabilities as weights, which leaves nothing to reinforce: it needs
            the estimator "pathwise", or learning_rate 0.
        context: "response" is the terminal hidden state of each response (the paper); "prompt_last" and
            "prompt_mean" are states of the prompt, the same for its whole group; "reference_prompt_mean" is the mean
            of the frozen reference model; "shuffled" hands every response the state of another one, the control that
            shows what the states contribute.
        standardise: "running" mean and variance of the contexts, frozen between updates, or "layer_norm" of each.
        hidden: width of an MLP head d -> hidden -> GELU -> K; 0 is the linear head d -> K. 256 is the usual width.
        objective: "advantage" is the paper's meta-reward, "first_order" the advantage times the standardised utility
            on responses whose utility is known, "custom" what ``meta_reward`` returns.
        meta_reward: of "custom": a function of the ``Outcome`` that returns [B], or [B, K] for every action; from a
            config its name, as "package.module:function" or "file.py:function".
        estimator: "reinforce"; "baseline" subtracts the expected meta-reward over one's own action; "all_actions" sums
            over them instead of drawing (least variance); "pathwise" differentiates the advantages themselves.
        learning_rate, weight_decay: of AdamW; a rate of 0 freezes the Conductor.
        half_life: batches in which the learning rate halves; None: it stays.
        freeze_at: from this batch on nothing is learnt; None: never.
        entropy_coef: weight of the entropy of p in the objective.
        period: batches between two updates (M).
        capacity: batches that are kept for later updates as well, with importance ratios of at most 2 for the drawn
            actions; None: every batch serves one update.
        staleness: an update leaves out batches that are older than so many batches; None: none.
        seed: key of the action draws.
        device: where the head lives and learns. "auto": the current CUDA device if there is one and this is the only
            process, where Triton fuses weights and advantages and contexts do not travel; else "cpu", where all
            processes hold the same bits. Or any device by name: processes on GPUs of different kinds may drift apart.
    """

    alpha: float = 0.3
    tau: float = 1.0
    min_prob: float = 0.05
    mode: Literal["sample", "soft", "group"] = "sample"
    context: Context = "response"
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
    def needs_counterfactuals(self) -> bool:
        return self.learning_rate > 0 and self.estimator in ("baseline", "all_actions")

    @property
    def needs_group_scores(self) -> bool:
        """Whether an update forms advantages anew, group by group."""
        return self.learning_rate > 0 and self.estimator != "reinforce"

    @property
    def chosen_device(self) -> str:
        """``device``, or what "auto" stands for in this process."""
        import torch

        if self.device != "auto":
            return self.device
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        processes = torch.distributed.get_world_size() if several else int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1 or not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{torch.cuda.current_device()}"

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Conductor:
        import torch

        from maestro_fast.weighting.conductor.conductor import Conductor

        try:
            torch.empty(0, device=self.chosen_device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: {self.device!r}, expected one that is here: {error}") from error
        if not self.min_prob < 1 / len(reward_names):
            raise ValueError(f"min_prob: {self.min_prob}, expected below 1 / K = {1 / len(reward_names):.4g}")
        return Conductor(self, reward_names, context_size)
