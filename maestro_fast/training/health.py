"""Stops a run at the first loss, gradient or parameter that is not finite, and says which responses it came from.

Losses and the norm of the gradient are read once per optimiser step, before the optimiser applies the gradient. So the
parameters are still those of the last good step when the run stops. Parameters are read before they sample a batch and
before they are saved, so no checkpoint ever holds one that is not finite.

With several processes, all read the same norm and tell each other about their losses, so all stop at the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maestro_fast.records import StepRecord, plain_text
from maestro_fast.training.batches import MicroBatch, Processes

_ROWS = 8  # the number of responses that a message names
_NO_GAP = (0.0, "", "")
_WIDE = 40.0  # nats; two log-probs that lie further apart have a ratio or a k3 beyond 1e17


class NonFiniteError(ValueError):
    """A loss, a gradient or a parameter is not finite.

    Attributes:
        remedy: what to change before the run goes on from its last good checkpoint.
    """

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy

    @staticmethod
    def of_parameter(name: str, step: int, learning_rate: float) -> NonFiniteError:
        """The error about the parameter ``name`` after ``step`` optimiser steps."""
        return NonFiniteError(
            f"step {step}: the parameter {name} is not finite: the update was too large. Nothing of it is saved",
            f"lower trainer.learning_rate (now {learning_rate:g})",
        )


@dataclass(frozen=True)
class Trained:
    """What is known of a micro-batch after its forward.

    Attributes:
        loss: its loss, a scalar tensor.
        batch: its responses.
        logprobs_C: the policy's log-probs of their tokens.
    """

    loss: Tensor
    batch: MicroBatch
    logprobs_C: Tensor


@dataclass(frozen=True)
class Origins:
    """Where the responses of a generation batch come from.

    Attributes:
        rows_N: the data set's indices of the prompts, over all processes.
        group_size: the number of responses to each.
        first: the index of this process's first response among those of all processes.
        name_of: what messages call the row with an index.
    """

    rows_N: list[int]
    group_size: int
    first: int
    name_of: Callable[[int], str] = "row {}".format


class Health:
    """Watches the losses and the gradients of a run."""

    def __init__(self, processes: Processes, model: nn.Module, learning_rate: float) -> None:
        """
        Args:
            processes: lets the processes of the run tell each other about their losses.
            model: the policy.
            learning_rate: the configured one, for the messages.
        """
        self._processes, self._model, self._learning_rate = processes, model, learning_rate
        self._trained: list[Trained] = []

    def see(self, loss: Tensor, batch: MicroBatch, logprobs_C: Tensor) -> None:
        """Notes a micro-batch of the current optimiser step. This does not wait for the device."""
        self._trained.append(Trained(loss.detach(), batch, logprobs_C.detach()))

    def forget(self) -> None:
        """Forgets the micro-batches of a step that failed."""
        self._trained = []

    def check(self, norm: Tensor | float | None, step: int, origins: Origins, record: StepRecord | None = None) -> None:
        """Checks the losses of an optimiser step and the norm of its gradient; all processes call it together.

        A norm that overflowed because the gradient scaler of fp16 multiplies the loss is none of its business: the
        scaler leaves such a step out and multiplies by less.

        Args:
            norm: the norm over all parameters; None if it is not known.
            step: the number of the step, from 1.
            origins: where its responses come from.
            record: what their batch produced; None in the first batch after a resume, because it is not saved.

        Raises:
            NonFiniteError: one of them is not finite.
        """
        trained, self._trained = self._trained, []
        losses = torch.stack([each.loss.float() for each in trained]).tolist() if trained else []
        broken = [each for each, loss in zip(trained, losses, strict=True) if not math.isfinite(loss)]
        value = math.nan if norm is None else float(norm)
        bad_norm = norm is not None and not math.isfinite(value) and not self._scaler_overflowed()
        if not self._anywhere(bool(broken) or bad_norm):
            return
        what = f"the loss of {_micro_batches(len(broken))}" if broken else f"the norm of the gradient ({value})"
        own = self._finding(what, broken or trained, bool(broken), origins, record) if broken or bad_norm else None
        # A process whose loss is not finite knows more than one that only sees the gradient of all.
        known = sorted(filter(None, self._processes.gather_objects([own])), key=lambda finding: not finding[0])
        _, words, remedy = known[0]
        raise NonFiniteError(f"step {step}: {words}", remedy)

    def check_parameters(self, step: int) -> None:
        """Checks the parameters that ``step`` optimiser steps have made, before they sample or are saved.

        All processes call it together.

        Raises:
            NonFiniteError: one of them is not finite. All processes raise it.
        """
        own = broken_parameter(self._model)
        if self._anywhere(own is not None):
            found = list(filter(None, self._processes.gather_objects([own])))
            raise NonFiniteError.of_parameter(found[0], step, self._learning_rate)

    def _anywhere(self, found: bool) -> bool:
        """Whether something was found in any process; all processes call it together.

        A number is gathered. What was found is an object, and gathering objects, of which every process unpickles as
        many as there are processes, would cost every step what only a failing one needs.
        """
        if self._processes.count == 1:
            return found
        flag = torch.tensor([float(found)], device=self._processes.device)
        return bool(self._processes.gather(flag).any())

    def _scaler_overflowed(self) -> bool:
        """Whether a gradient may have overflowed only because the loss was scaled up for fp16."""
        scaler = self._processes.accelerator.scaler
        return scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1.0

    def _finding(
        self, what: str, trained: Sequence[Trained], broken_loss: bool, origins: Origins, record: StepRecord | None
    ) -> tuple[bool, str, str]:
        """Whether a loss of this process is broken; what was found, the likely cause and the responses; the remedy."""
        cause, remedy = self._cause(trained, broken_loss)
        lines = [line for each in trained for line in _responses(each, origins, record)]
        lines.sort(key=lambda line: line[0])
        rest = len(lines) - _ROWS
        shown = [text for _, text in lines[:_ROWS]] + ([f"  and {rest} more"] if rest > 0 else [])
        words = f"{what} is not finite. {cause}\nResponses, the likeliest first:\n" + "\n".join(shown)
        return broken_loss, words, remedy

    def _cause(self, trained: Sequence[Trained], broken_loss: bool) -> tuple[str, str]:
        """The likely cause and the remedy, each in one sentence."""
        lower = f"lower trainer.learning_rate (now {self._learning_rate:g})"
        if (name := broken_parameter(self._model)) is not None:
            return f"The weights themselves are not finite ({name}): the update before was too large.", lower
        if not all(bool(each.batch.advantages_B.isfinite().all()) for each in trained):
            return (
                "Advantages are not finite: rewards, weights or the KL in the score overflowed.",
                "bound the rewards, or lower loss.kl_coef",
            )
        if not all(bool(each.logprobs_C.isfinite().all()) for each in trained):
            return (
                f"Log-probs of the policy are not finite, but its weights are: its forward overflows in {self._dtype}.",
                f"train in float32 or bfloat16 (model.dtype), and {lower}",
            )
        gap, other, remedy = max((_widest(each) for each in trained), key=lambda found: found[0], default=_NO_GAP)
        if gap > _WIDE:
            return (
                f"The policy's log-probs are finite, but lie up to {gap:.3g} nats from those of {other}, so their "
                "ratio overflows.",
                f"{remedy}, or {lower}",
            )
        if not broken_loss:
            return (
                f"The losses are finite: the gradient overflows on its way back, in {self._dtype}.",
                f"train in float32 or bfloat16 (model.dtype), and {lower}",
            )
        return "Log-probs and advantages are finite: the loss makes such a value out of them.", "mend the loss function"

    @property
    def _dtype(self) -> str:
        mixed = {"bf16": "bfloat16", "fp16": "float16"}.get(str(self._processes.accelerator.mixed_precision))
        return mixed or str(next(self._model.parameters()).dtype).removeprefix("torch.")


def broken_parameter(model: nn.Module) -> str | None:
    """The name of a trainable parameter that is not finite, or None. It waits for the device once.

    With sharded weights each process reads its own share.
    """
    trained = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad and p.numel()]
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, parameter in trained:
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if local.numel() and local.is_floating_point():
            by_device.setdefault(local.device, []).append((name, local))
    for own in by_device.values():
        # The largest absolute value is NaN or inf exactly if an element is; unlike a sum, it cannot overflow itself.
        largest = torch.stack([torch.linalg.vector_norm(p, float("inf")).float() for _, p in own])
        for (name, _), finite in zip(own, largest.isfinite().tolist(), strict=True):
            if not finite:
                return name
    return None


def _micro_batches(count: int) -> str:
    return "a micro-batch" if count == 1 else f"{count} micro-batches"


def _widest(trained: Trained) -> tuple[float, str, str]:
    """The largest gap, in nats, between the policy's log-probs and others, whose they are, and what lowers it."""
    others = trained.batch.logprobs
    gaps = [
        (_gap(trained.logprobs_C, other), name, remedy)
        for other, name, remedy in (
            (others.old_C, "the policy before these updates", "lower batch.updates_per_batch"),
            (others.ref_C, "the reference", "lower loss.kl_coef"),
            (others.sampling_C, "the sampler", "see that the engine samples from this policy at this temperature"),
        )
        if other is not None
    ]
    return max(gaps, key=lambda found: found[0], default=_NO_GAP)


def _gap(logprobs_C: Tensor, other_C: Tensor) -> float:
    difference = (logprobs_C.cpu() - other_C.cpu()).abs()
    return math.inf if not bool(difference.isfinite().all()) else max(difference.tolist(), default=0.0)


def _responses(trained: Trained, origins: Origins, record: StepRecord | None) -> list[tuple[tuple[float, ...], str]]:
    """A line for each response of a micro-batch, with a key by which the likeliest culprits come first."""
    batch = trained.batch
    bounds = batch.cu_seqlens.tolist()
    lines: list[tuple[tuple[float, ...], str]] = []
    for i, advantage in enumerate(batch.advantages_B.tolist()):
        own_C = trained.logprobs_C[bounds[i] : bounds[i + 1]].float().cpu()
        bad = not (math.isfinite(advantage) and bool(own_C.isfinite().all()))
        words = [f"advantage {advantage:.4g}", f"{bounds[i + 1] - bounds[i]} tokens"]
        if own_C.numel():
            words.append(f"log-probs {own_C.min().item():.4g} to {own_C.max().item():.4g}")
        place = "response"
        if batch.members:
            index = origins.first + batch.members[i]
            row = origins.name_of(origins.rows_N[index // origins.group_size])
            place = f"data {row}, response {index % origins.group_size}"
            if record is not None:
                rewards = zip(record.reward_names, record.rewards_BK[index].tolist(), strict=True)
                words = [", ".join(f"{name} {value:.4g}" for name, value in rewards), *words]
                place += f" to {plain_text(record.prompts[index])[:40]!r}"
        key = (0.0 if bad else 1.0, -abs(advantage) if math.isfinite(advantage) else 0.0)
        lines.append((key, f"  {place}: {'; '.join(words)}"))
    return lines
