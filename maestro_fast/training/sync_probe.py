"""The comparison that follows every weight sync: log-probs of a few tokens, engine against trainer.

It catches weights that did not arrive (a skipped sync, a tied head that kept the old ones) and attention states of a
prefix cache that outlived the weights they were computed with: the engine has scored the same sequences before the
sync, so that they are in such a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maestro_fast.generation import Engine, ProbeConfig

# Largest difference on a token that rounding explains, in nats. Half precision: logits of about 20 are themselves
# rounded by 0.06 (bfloat16) or 0.008 (float16), and the layers below add to it.
THRESHOLDS = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
PolicyLogprobs = Callable[[nn.Module, list[list[int]]], list[Tensor]]


class StaleWeightsError(RuntimeError):
    """The engine does not compute what the policy does."""


@dataclass(frozen=True)
class SyncProbe:
    """
    Attributes:
        sequences: token ids, at least 2 each.
        policy_logprobs: of the trainer, as ``Engine.prompt_logprobs`` gives them of the engine.
        threshold: in nats.
    """

    sequences: list[list[int]]
    policy_logprobs: PolicyLogprobs
    threshold: float

    def warm(self, engine: Engine) -> None:
        """Before a sync: puts the sequences into the engine's prefix cache, where a sync has to throw them out."""
        engine.prompt_logprobs(self.sequences)

    def check(self, engine: Engine, model: nn.Module) -> dict[str, float]:
        """After a sync: the mean and the largest absolute difference over all tokens, for the log.

        Raises:
            StaleWeightsError: one is above the threshold, or not a number.
        """
        theirs = torch.cat(engine.prompt_logprobs(self.sequences))
        ours = torch.cat([logprobs.float().cpu() for logprobs in self.policy_logprobs(model, self.sequences)])
        gap = (theirs - ours).abs()
        if not (gap <= self.threshold).all():  # NaN is not
            self._fail(gap.nan_to_num(nan=torch.inf), theirs, ours)
        return {"sync/probe_mean": gap.mean().item(), "sync/probe_max": gap.max().item()}

    def _fail(self, gap: Tensor, theirs: Tensor, ours: Tensor) -> None:
        worst = int(gap.argmax())
        position, sequence = worst, 0
        while position >= len(self.sequences[sequence]) - 1:
            position -= len(self.sequences[sequence]) - 1
            sequence += 1
        token = self.sequences[sequence][position + 1]
        raise StaleWeightsError(
            f"weight sync: log-prob of token {token} at position {position + 1} of probe sequence {sequence} is "
            f"{theirs[worst]:.6g} in the engine and {ours[worst]:.6g} in the trainer, expected a difference of at most "
            f"{self.threshold:g} (generation.probe.threshold); {int((gap > self.threshold).sum())} of {len(gap)} "
            "tokens differ by more: the engine has other weights, or a prefix cache of earlier ones"
        )


def build_probe(
    config: ProbeConfig, engine: Engine, prompt_ids: list[list[int]], policy_logprobs: PolicyLogprobs
) -> SyncProbe:
    """A probe of real prompts, each sequence long enough to fill a block of the engine's prefix cache.

    Args:
        prompt_ids: token ids of the first prompts of the data: sequence k holds them one after the other from the k-th
            on, over and over.
    """
    block = engine.cache_block
    wanted = max(config.tokens, 2 * block + 8 if block else 0)
    length = min(wanted, engine.max_tokens - 1)  # the engine samples a token behind them
    if block and (length - 1) % block == 0:  # else no log-prob would be computed from what the cache holds
        length -= 1
    sequences = []
    for k in range(config.sequences):
        start = k % len(prompt_ids)
        joined = [token for ids in prompt_ids[start:] + prompt_ids[:start] for token in ids]
        sequences.append((joined * -(-length // len(joined)))[:length])
    threshold = THRESHOLDS[engine.dtype] if config.threshold is None else config.threshold
    return SyncProbe(sequences, policy_logprobs, threshold)
