"""The best policy so far, by the utility of its labelled responses.

Rewards that are optimised for long come apart from the utility that they stand for, so the last policy may be worse
than an earlier one. Let u(t) be the mean utility of the labelled responses of generation batch t, where batches without
labels are left out. The policy is kept that sampled the batch t >= ``first`` with the highest

    (u(t) + ... + u(t - window + 1)) / window
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors.torch import save_file
from torch import Tensor, nn

from maestro_fast.manifest import tensors_of
from maestro_fast.records import StepRecord
from maestro_fast.rewards import RewardSet

logger = logging.getLogger(__name__)
WINDOW, FIRST = 15, 20  # ``window`` and ``first`` in the formula above
BEST_FILE = "best_policy.safetensors"
ABOUT_FILE = "best.json"


def check_best(anchor: RewardSet | None, *, sharded: bool) -> None:
    """Checks that a run can keep its best policy.

    Raises:
        ValueError: there is no utility to judge by, or no process holds all weights.
    """
    if anchor is None:
        raise ValueError("keep_best: True without an anchor, expected the utility to judge by")
    if sharded:
        raise ValueError("final: the best policy cannot be kept where weights are sharded, expected final: last")


@dataclass
class BestPolicy:
    """A copy of the best policy's trained parameters, in host memory of the main process.

    Attributes:
        holds: whether this process holds the copy.
        window, first: the numbers in the formula at the top of this file; batches count from 0.
        recent: the last values of u, at most ``window`` of them.
        utility: the mean of u over the best window; None before there is one.
        step: the number of optimiser steps behind the policy that ended this window; None before there is one.
        parameters: the parameters of that policy, by name.
    """

    holds: bool = True
    window: int = field(default_factory=lambda: WINDOW)
    first: int = field(default_factory=lambda: FIRST)
    recent: list[float] = field(default_factory=list)
    utility: float | None = None
    step: int | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict)

    def see(self, number: int, record: StepRecord, model: nn.Module) -> dict[str, float]:
        """Takes in generation batch ``number``, which ``model`` sampled and is not trained on yet.

        Returns:
            Figures for the log.
        """
        assert record.utilities_B is not None
        known = record.utilities_B[record.utilities_B.isfinite()]
        if known.numel():
            self.recent = [*self.recent, known.double().mean().item()][-self.window :]
            mean = sum(self.recent) / len(self.recent)
            better = self.utility is None or mean > self.utility
            if better and number >= self.first and len(self.recent) == self.window:
                self.utility, self.step = mean, record.step - 1
                self.parameters = {n: p.detach().to("cpu", copy=True) for n, p in _trained(model)} if self.holds else {}
        return {} if self.utility is None else {"best/utility": self.utility}

    def load_into(self, model: nn.Module | None, accelerator: Accelerator) -> None:
        """Puts the best parameters into ``model``, on every process. If there are none, it only warns."""
        if self.step is None:
            logger.warning(
                "final/ holds the last policy: the best one by utility is known from batch %d on, after %d batches "
                "with labels",
                self.first,
                self.window,
            )
            return
        logger.info("final/ holds the policy after step %d, of the best mean utility, %.4g", self.step, self.utility)
        assert model is not None
        with torch.no_grad():
            for name, parameter in _trained(model):
                if self.holds:
                    parameter.copy_(self.parameters[name])
                if accelerator.num_processes > 1:
                    parameter.copy_(broadcast(parameter.detach().clone(), from_process=0))

    @property
    def about(self) -> dict[str, float | int | None]:
        """What ``best.json`` says beside the final policy."""
        return {"step": self.step, "utility": self.utility, "window": self.window, "first": self.first}

    def save(self, folder: Path) -> None:
        """Writes this object's part of a checkpoint; only the main process calls it."""
        about = {"recent": self.recent, "utility": self.utility, "step": self.step}
        save_file(self.parameters, folder / BEST_FILE, metadata={"about": json.dumps(about)})

    def load(self, folder: Path) -> None:
        """Takes over what ``save`` wrote into ``folder``.

        Raises:
            ValueError: there is no such file.
        """
        file = folder / BEST_FILE
        if not file.is_file():
            raise ValueError(
                f"resume_from_checkpoint: {folder} holds no {BEST_FILE}, its run did not keep the best policy; "
                "expected final: last"
            )
        with tensors_of(file) as saved:
            about = json.loads(saved.metadata()["about"])
            if self.holds:
                self.parameters = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        self.recent, self.utility, self.step = about["recent"], about["utility"], about["step"]


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
