"""Holds what is timed of shared prompts on both kinds of device: a group of responses, and a step that trains on them.

A step is what a trainer makes of a micro-batch: a forward without gradients for log-probs and entropies, then a forward
with head and loss in one sweep, and the backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from maestro_fast.model import Layouts, Sequences, head_of, last_hidden, score
from maestro_fast.ops import PolicyLossConfig, linear_policy_loss

CONFIG = PolicyLossConfig("dapo")


class Group(NamedTuple):
    """The tokens of a prompt, the tokens of each of its responses, and the number of these."""

    P: int
    R: int
    G: int

    @staticmethod
    def parse(text: str) -> Group:
        """Reads "256x32x8".

        Raises:
            ValueError: The text is not three numbers of at least 1.
        """
        numbers = [int(x) if x.isdecimal() else 0 for x in text.split("x")]
        if len(numbers) != 3 or min(numbers) < 1:
            raise ValueError(f"a group: {text!r}, expected PxRxG, for example 256x32x8")
        return Group(*numbers)

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @property
    def title(self) -> str:
        return ", ".join(f"{name} = {number:,}" for name, number in self._asdict().items())

    @property
    def tokens(self) -> int:
        """The number of tokens, where each response has a prompt of its own."""
        return self.G * (self.P + self.R)


class Batch:
    """The tokens of a group, which are the same in every run, and the advantages of its responses."""

    def __init__(self, group: Group, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def tokens(*shape: int) -> Tensor:  # The first ones of a vocabulary are special.
            return torch.randint(vocabulary // 10, vocabulary, shape, generator=generator)

        P, R, G = self.group = group
        self.prompt_GP, self.completion_GR = tokens(P).expand(G, P), tokens(G, R)
        self.advantages_G = torch.randn(G, generator=generator)
        self.sequences = Sequences(self.prompt_GP.tolist(), self.completion_GR.tolist())


class Step(NamedTuple):
    """What a step returns of its scoring: log-probs and entropies [G * R]."""

    logprobs: Tensor
    entropies: Tensor


def step(model: Any, batch: Batch, layouts: Layouts, micro_batch: int | None = None) -> Step:
    """Scores the responses and trains on them. The gradient of their mean loss is added to that of the model.

    Args:
        micro_batch: responses per forward; None takes all of them.
    """
    head, (_, R, G) = head_of(model), batch.group
    size = micro_batch or G
    options: dict[str, Any] = {"layout": layouts, "micro_batch": size, "temperature": 1.0, "entropy": True}
    scored = score(model, batch.sequences, head, **options)
    assert scored.entropies_C is not None
    for start in range(0, G, size):
        members = list(range(start, min(start + size, G)))
        hidden = last_hidden(model, batch.sequences.select(members), layouts)
        weight = head.weight
        states, targets = hidden.completions(weight.dtype)
        linear_policy_loss(
            states,
            weight,
            targets,
            batch.advantages_G[members],
            torch.arange(0, len(targets) + 1, R),
            **head.numbers,
            old_logprobs=scored.logprobs_C.view(G, R)[members].flatten(),
            normalizer=float(G * R),
            config=CONFIG,
        ).loss.backward()
    return Step(scored.logprobs_C, scored.entropies_C)
