"""What every generator offers: sampled responses with the log-probs of the distribution they were sampled from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from maestro_fast.records import Prompts, Rollouts


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled.

    Attributes:
        group_size: G, responses per prompt; at least 2, a single response has no group to be compared with.
        max_new_tokens: token limit of a response.
        temperature: divides the logits, in sampling and in every log-prob of the loss.
        top_p, top_k: nucleus and top-k truncation; 1.0 and 0 are off. Truncation makes the sampling distribution
            differ from the policy whose log-probs the loss uses.
        stop: strings that end a response, kept in its text; they count in the response alone, not across its start.
    """

    group_size: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"group_size: {self.group_size}, expected at least 2: an advantage is relative to the response's group"
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens}, expected at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature}, expected a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p}, expected 0 < top_p <= 1")
        if self.top_k < 0:
            raise ValueError(f"top_k: {self.top_k}, expected at least 0 (0: off)")
        if "" in self.stop:
            raise ValueError("stop: holds an empty string, which would end every response at once")


class Generator(Protocol):
    """Samples one response for each prompt of a batch in which every group's prompt is already repeated.

    Attributes:
        concurrent_parts: 0 if it works in this process, on the devices of the policy. Else into how many parts, of
            whole groups, a batch is divided; ``generate`` is called for them at once, each in a thread of its own.
    """

    concurrent_parts: int = 0

    def generate(self, model: nn.Module, prompts: Prompts, *, seed: int) -> Rollouts:
        """Samples with the current weights of ``model``; the same seed, prompts and weights give the same responses."""
        ...
