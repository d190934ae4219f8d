"""What an update of the Conductor starts from: its state, a batch of experience, and options."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maestro_fast.ops.conductor_params import ConductorParams, check_params
from maestro_fast.ops.tensors import is_integer, readable


@dataclass(frozen=True)
class ConductorState:
    """A head and AdamW's moments of it.

    Attributes:
        params: contiguous, of one dtype, float32 (float64 for a reference).
        first, second: moments by the names of the parameters: "weight", "bias", and of an MLP "hidden_weight" and
            "hidden_bias"; like the parameters, contiguous.
        step: updates made so far.
    """

    params: ConductorParams
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    step: int = 0

    @staticmethod
    def start(params: ConductorParams) -> ConductorState:
        """Of a head that has not learnt yet."""
        first, second = ({name: torch.zeros_like(x) for name, x in params.learned.items()} for _ in range(2))
        return ConductorState(params, first, second)


@dataclass(frozen=True)
class ConductorBatch:
    """N responses to learn from.

    Attributes:
        h: [N, d] contexts, any floating dtype.
        meta: [N] meta-rewards of the actions drawn (the paper's: their advantages; or those minus a baseline), or
            without ``actions`` [N, K] of all actions.
        actions: int [N], or None.
        drawn_probs: [N] probabilities that the actions were drawn with, where that was not by these parameters: their
            meta-rewards then count p / drawn_probs fold, at most ``max_ratio``.
        live: bool [N], rows that count; all if None. The others may hold anything, NaN included.
    """

    h: Tensor
    meta: Tensor
    actions: Tensor | None = None
    drawn_probs: Tensor | None = None
    live: Tensor | None = None


@dataclass(frozen=True)
class ConductorUpdateConfig:
    """Options of an update.

    Attributes:
        tau, min_prob: as in ``conductor_weights``.
        entropy_coef: weight of the entropy of p in the objective.
        learning_rate, weight_decay, beta1, beta2, eps: of AdamW. Biases do not decay.
        max_ratio: importance ratios beyond it would let one old response rule an update.
    """

    tau: float = 1.0
    min_prob: float = 0.05
    entropy_coef: float = 0.3
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_ratio: float = 2.0

    def __post_init__(self) -> None:
        for name in ("tau", "eps", "max_ratio"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected a positive number")
        for name in ("entropy_coef", "learning_rate", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected a number >= 0")
        for name in ("min_prob", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected 0 <= {name} < 1")


def check_update(state: ConductorState, batch: ConductorBatch, config: ConductorUpdateConfig) -> None:
    """Raises ValueError or TypeError that names the argument."""
    check_experience(state.params, batch, config)
    learned = state.params.learned
    if state.step < 0:
        raise ValueError(f"state.step: {state.step}, expected the number of updates so far")
    for kind in ("first", "second"):
        moments = getattr(state, kind)
        if moments.keys() != learned.keys():
            raise ValueError(f"state.{kind}: of {', '.join(moments) or 'nothing'}, expected {', '.join(learned)}")
        for name, x in learned.items():
            moment = moments[name]
            if (moment.shape, moment.dtype, moment.device) != (x.shape, x.dtype, x.device):
                came = f"{moment.dtype} {tuple(moment.shape)} on {moment.device}"
                raise ValueError(
                    f"state.{kind}.{name}: {came}, expected {x.dtype} {tuple(x.shape)} on {x.device} as the parameter"
                )
            if not moment.is_contiguous():
                raise ValueError(f"state.{kind}.{name}: strides {moment.stride()}, expected a contiguous tensor")
    for name, x in learned.items():
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"state.params.{name}: dtype {x.dtype}, expected float32 or float64")
        if not x.is_contiguous():
            raise ValueError(f"state.params.{name}: strides {x.stride()}, expected a contiguous tensor")


def check_experience(params: ConductorParams, batch: ConductorBatch, config: ConductorUpdateConfig) -> None:
    if not batch.h.is_floating_point():
        raise TypeError(f"h: dtype {batch.h.dtype}, expected a floating dtype")
    check_params(batch.h, params)
    rows, K = batch.h.shape[0], params.num_rewards
    if rows == 0:
        raise ValueError(f"h: shape {tuple(batch.h.shape)}, expected at least one row")
    if not config.min_prob < 1 / K:
        raise ValueError(f"min_prob: {config.min_prob}, expected 0 <= min_prob < 1 / K = {1 / K:.4g}")
    if batch.actions is None and batch.drawn_probs is not None:
        raise ValueError("drawn_probs: given without actions, expected the actions that they belong to")
    wanted = {"meta": (rows, K) if batch.actions is None else (rows,)}
    for name in ("meta", "actions", "drawn_probs", "live"):
        x, shape = getattr(batch, name), wanted.get(name, (rows,))
        if x is None:
            continue
        if x.shape != shape:
            beside = "" if name != "meta" else f" with{'out' if batch.actions is None else ''} actions"
            raise ValueError(f"{name}: shape {tuple(x.shape)}, expected {shape}{beside}")
        if x.device != batch.h.device:
            raise ValueError(f"{name}: on {x.device}, expected {batch.h.device} as h")
        _check_dtype(name, x)
    actions = batch.actions
    if actions is not None and readable(actions) and not bool(((actions >= 0) & (actions < K)).all()):
        raise ValueError(f"actions: from {int(actions.min())} to {int(actions.max())}, expected 0 <= action < {K}")


def _check_dtype(name: str, x: Tensor) -> None:
    if name == "actions" and not is_integer(x):
        raise TypeError(f"actions: dtype {x.dtype}, expected an integer dtype")
    if name == "live" and x.dtype != torch.bool:
        raise TypeError(f"live: dtype {x.dtype}, expected bool")
    if name in ("meta", "drawn_probs") and not x.is_floating_point():
        raise TypeError(f"{name}: dtype {x.dtype}, expected a floating dtype")
