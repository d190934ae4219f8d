"""Adam over named tensors, with a state that can be saved beside them and resumed bitwise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class NamedAdam:
    """Minimises a loss over tensors that require a gradient. Its betas are (0.9, 0.99).

    Args:
        named: the tensors by name. They are written to in place.
        learning_rate: the learning rate.
    """

    def __init__(self, named: Mapping[str, Tensor], learning_rate: float) -> None:
        self.named = dict(named)
        self._optimizer = torch.optim.Adam(list(self.named.values()), lr=learning_rate, betas=(0.9, 0.99))

    @property
    def stepped(self) -> bool:
        """Whether there has been a step, before the state was saved or after."""
        return bool(self._optimizer.state)

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of ``loss``, a scalar."""
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    def descend(self, gradient: Mapping[str, Tensor]) -> None:
        """One step down a gradient that is known, by the names of the tensors."""
        for name, tensor in self.named.items():
            tensor.grad = gradient[name]
        self._optimizer.step()

    def grad_norm(self) -> float:
        """The L2 norm of the last gradient, over all tensors."""
        norms = [tensor.grad.norm() for tensor in self.named.values() if tensor.grad is not None]
        return float(torch.stack(norms).norm())

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors by name, and Adam's state of each as ``optimizer.<name>.<key>``; that only after a first step."""
        moments = {
            f"{prefix}optimizer.{name}.{key}": value.detach().clone()
            for name, tensor in self.named.items()
            for key, value in self._optimizer.state.get(tensor, {}).items()
        }
        return {prefix + name: tensor.detach().clone() for name, tensor in self.named.items()} | moments

    def saved_shapes(self, prefix: str = "") -> dict[str, tuple[int, ...]]:
        """The shapes that ``load_state_dict`` expects, by name."""
        return {prefix + name: tuple(tensor.shape) for name, tensor in self.named.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        """Takes over a ``state_dict`` whose shapes were checked. It may hold other tensors beside its own."""
        for name, tensor in self.named.items():
            tensor.data.copy_(state[prefix + name])
            own = f"{prefix}optimizer.{name}."
            found = {key.removeprefix(own): value for key, value in state.items() if key.startswith(own)}
            self._optimizer.state.pop(tensor, None)
            if found:
                self._optimizer.state[tensor] = {key: value.clone() for key, value in found.items()}
