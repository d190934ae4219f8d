"""A user's own loss: a function of ``LossInputs`` that returns the scalar loss and a dict of scalar metrics.

    @loss_function(row_wise=True)
    def loss(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = (inputs.logprobs - inputs.old_logprobs).exp()
        ...
        return loss, {"ratio": ratio.mean().detach()}

``policy_loss`` and ``linear_policy_loss`` take it as their ``config``. Metrics are tensors. They may carry a graph of
autograd, which is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from maestro_fast.specs import LossFunction, LossInputs, PolicyLoss, PolicyLossConfig

_Function = TypeVar("_Function", bound=LossFunction)


def loss_function(*, row_wise: bool = False, entropies: bool = False) -> Callable[[_Function], _Function]:
    """A decorator that tells ``linear_policy_loss`` and the trainers what a user's own loss reads.

    A function without this decorator works, too. Then both arguments are taken to be False.

    Args:
        row_wise: whether the derivative of the loss by a token's log-prob depends on no other token's log-prob or
            entropy. That is so for a sum of terms that depend on one token each, divided by any fixed number. It is not
            so where ratios are averaged over a response. With a row-wise loss, ``linear_policy_loss`` sends every token
            through the head once, with any other loss twice.
        entropies: whether the function reads ``LossInputs.entropies``.
    """

    def mark(function: _Function) -> _Function:
        function.row_wise, function.entropies = row_wise, entropies  # type: ignore[attr-defined]
        return function

    return mark


def is_row_wise(function: LossFunction) -> bool:
    return bool(getattr(function, "row_wise", False))


def wants_entropies(loss: PolicyLossConfig | LossFunction) -> bool:
    """Whether the loss reads the entropies of the current policy, with their gradient."""
    if isinstance(loss, PolicyLossConfig):
        return loss.entropy_coef > 0
    return bool(getattr(loss, "entropies", False))


# --- calling it ---


def call_loss_function(function: LossFunction, inputs: LossInputs) -> PolicyLoss:
    """Calls the function, checks what it returned, and drops the graph of the metrics.

    Raises:
        ValueError: the function returned anything but a scalar loss and a dict of scalar metrics.
    """
    found: Any = function(inputs)
    returned = f"config: {function_name(function)} returned"
    expected = "expected a scalar loss and a dict of scalar metrics, all of them tensors"
    if not isinstance(found, tuple) or len(found) != 2:
        raise ValueError(f"{returned} {_said(found)}, {expected}")
    loss, metrics = found
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
        raise ValueError(f"{returned} a loss that is {_said(loss)}, {expected}")
    if not isinstance(metrics, dict):
        raise ValueError(f"{returned} metrics that are {_said(metrics)}, {expected}")
    for name, value in metrics.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.ndim != 0:
            raise ValueError(f"{returned} a metric {name!r} that is {_said(value)}, {expected}")
    return PolicyLoss(loss, {name: value.detach() for name, value in metrics.items()})


class LogprobGradients(NamedTuple):
    """dL/dlog p [T] and dL/dH [T] (None where the loss reads no entropies), without a graph."""

    logprobs: Tensor
    entropies: Tensor | None


def loss_function_gradient(function: LossFunction, inputs: LossInputs) -> tuple[PolicyLoss, LogprobGradients]:
    """Calls the function once, for loss and metrics without a graph and the gradient by log-probs and entropies.

    Raises:
        ValueError: see ``call_loss_function``; or the loss does not depend on the log-probs.
    """
    leaves = [x for x in (inputs.logprobs, inputs.entropies) if x is not None]

    def call(*given: Tensor) -> tuple[Tensor, PolicyLoss]:
        result = call_loss_function(function, inputs._replace(logprobs=given[0], entropies=(*given, None)[1]))
        return result.loss, PolicyLoss(result.loss.detach(), result.metrics)

    if torch.compiler.is_compiling():  # Dynamo traces torch.func alone.
        gradients, result = torch.func.grad(call, argnums=tuple(range(len(leaves))), has_aux=True)(*leaves)
        return result, LogprobGradients(gradients[0], (*gradients, None)[1])
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in leaves]
        loss, result = call(*leaves)
        if not loss.requires_grad:
            raise ValueError(
                f"config: {function_name(function)} returned a loss without a graph, expected one that is computed "
                "from inputs.logprobs"
            )
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
    first, *rest = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))
    return result, LogprobGradients(first, rest[0] if rest else None)


def function_name(function: Any) -> str:
    """The name of a loss function, for errors."""
    function = getattr(function, "function", function)  # that of a ``FunctionLoss``
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _said(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a {str(x.dtype).removeprefix('torch.')} tensor of shape {tuple(x.shape)}"
    return f"a tuple of {len(x)}" if isinstance(x, tuple) else f"a {type(x).__name__}"
