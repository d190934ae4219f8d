"""A packed batch for the loss from hidden states, and the composition that the loss has to equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from maestro_fast.ops import PolicyLoss, PolicyLossConfig, linear_policy_loss, policy_loss
from tests.ops.parity import TOKENS_ELSEWHERE, VARIANTS, make

# One response is longer than a chunk of 16 rows, one as long, and some are empty.
LENGTHS = (4, 0, 16, 1, 7, 37, 5, 2, 0, 3)
CHUNK = 16
WIDTH, VOCABULARY = 12, 61
EVERYTHING: dict[str, Any] = {"logit_scale": 1.3, "softcap": 6.0, "temperature": 0.8}

ALL_VARIANTS: dict[str, PolicyLossConfig] = VARIANTS | {
    "gspo, KL, entropy bonus": make("dapo", ratio="sequence", kl_coef=0.1, entropy_coef=0.05),
    "gspo, two-sided clip, sampler": make(
        "grpo", ratio="sequence", clip_max=1.3, sampler_correction="sequence_truncate", sampler_cap=1.5
    ),
    "gspo, sampler by tokens": make("grpo", ratio="sequence", sampler_correction="token_truncate", sampler_cap=1.2),
    "cispo by sequences": make("bnpo", objective="cispo", ratio="sequence", clip_max=1.2),
    "cispo, entropy bonus": make("grpo", objective="cispo", clip_max=1.2, entropy_coef=0.05),
}


@dataclass(frozen=True)
class Batch:
    """Float64 tensors of T rows. ``tokenwise`` has the [T] arguments of the loss by their names."""

    hidden: Tensor
    lm_head: Tensor
    bias: Tensor | None
    targets: Tensor
    advantages: Tensor
    lengths: tuple[int, ...]
    tokenwise: dict[str, Tensor | None]

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0)

    def to(self, dtype: torch.dtype) -> Batch:
        """Head and hidden states become leaves in a dtype; the rest becomes float32, or float64 for float64."""
        other = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in self.leaves]
        tokenwise = {name: None if x is None else x.to(other) for name, x in self.tokenwise.items()}
        hidden, lm_head, bias = leaves
        assert hidden is not None and lm_head is not None
        return replace(
            self, hidden=hidden, lm_head=lm_head, bias=bias, tokenwise=tokenwise, advantages=self.advantages.to(other)
        )

    @property
    def leaves(self) -> tuple[Tensor | None, ...]:
        return self.hidden, self.lm_head, self.bias

    def given(self, config: PolicyLossConfig, options: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the loss that the variant needs."""
        given = {**self.tokenwise, **options}
        if config.kl_coef == 0:
            given.pop("ref_logprobs", None)
        if config.sampler_correction == "none":
            given.pop("sampling_logprobs", None)
        if config.normalization == "dapo":
            given.setdefault("normalizer", float(len(self.targets) + TOKENS_ELSEWHERE))
        return given

    def ours(self, config: PolicyLossConfig, head: dict[str, Any] | None = None, **options: Any) -> PolicyLoss:
        return linear_policy_loss(
            self.hidden,
            self.lm_head,
            self.targets,
            self.advantages,
            self.cu_seqlens,
            bias=self.bias,
            config=config,
            **(head or {}),
            **self.given(config, options),
        )

    def composed(self, config: PolicyLossConfig, head: dict[str, Any] | None = None, **options: Any) -> PolicyLoss:
        """The loss from all logits and log_softmax."""
        given = self.given(config, options)
        mean_entropy = given.pop("mean_entropy", False)
        logprobs, entropies = written_logprobs(self, **(head or {}))
        loss, metrics = policy_loss(
            logprobs, self.advantages, self.cu_seqlens, entropies=entropies, config=config, backend="torch", **given
        )
        if mean_entropy:
            mask = given.get("token_mask")
            live = torch.ones_like(entropies, dtype=torch.bool) if mask is None else mask != 0
            metrics["entropy"] = entropies[live].detach().mean()
        return PolicyLoss(loss, metrics)


def written_logprobs(
    batch: Batch, *, logit_scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(batch.hidden, batch.lm_head) * logit_scale
    if batch.bias is not None:
        logits = logits + batch.bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits / temperature, -1)
    return logp[torch.arange(len(batch.targets)), batch.targets], -(logp.exp() * logp).sum(-1)


def random_batch(
    *,
    lengths: tuple[int, ...] = LENGTHS,
    vocabulary: int = VOCABULARY,
    width: int = WIDTH,
    bias: bool = True,
    masked: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Batch:
    """Values that ``dtype`` holds, whose logits are about +-3 and whose ratios lie on either side of every clip."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64, generator=generator) * size).to(dtype).double()

    hidden, lm_head = normal(tokens, width), normal(vocabulary, width, size=3 / width**0.5)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    mask = (torch.rand(tokens, generator=generator) < 0.8).double() if masked else None
    batch = Batch(hidden, lm_head, normal(vocabulary) if bias else None, targets, normal(len(lengths)), lengths, {})
    current = written_logprobs(batch)[0]
    noise = torch.randn(3, tokens, dtype=torch.float64, generator=generator) * 0.4
    # A whole response shares a part of the noise; otherwise the ratios of sequences would all be near 1.
    sizes = torch.tensor(lengths, dtype=torch.int64)
    shared = torch.randn(len(lengths), dtype=torch.float64, generator=generator).repeat_interleave(sizes)
    old = (current + noise[0] + 0.3 * shared).float().double()
    ref, sampling = (current + noise[1]).float().double(), (old + noise[2] / 4 + 0.1 * shared).float().double()
    tokenwise = {"old_logprobs": old, "ref_logprobs": ref, "sampling_logprobs": sampling, "token_mask": mask}
    return replace(batch, tokenwise=tokenwise)


def gradients(result: PolicyLoss, batch: Batch) -> list[Tensor]:
    return list(torch.autograd.grad(result.loss, [x for x in batch.leaves if x is not None and x.requires_grad]))


def values_and_gradients(loss: Callable[..., PolicyLoss], batch: Batch, *args: Any, **options: Any) -> list[Tensor]:
    """The loss, its metrics in the order of their names, its gradients."""
    result = loss(batch, *args, **options)
    metrics = [result.metrics[name] for name in sorted(result.metrics)]
    return [result.loss.detach(), *metrics, *gradients(result, batch)]
