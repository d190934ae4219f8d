"""What the loss from hidden states is given besides the head: checked, moved to one device, and read by the host."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maestro_fast.ops.backend import Backend
from maestro_fast.ops.policy_loss import PolicyLoss, check_bounds, check_loss_inputs, policy_gradient, policy_loss
from maestro_fast.ops.sweep import Known
from maestro_fast.ops.tensors import readable
from maestro_fast.specs import PolicyLossConfig

IGNORED = -100  # as a target


class LossInputs(NamedTuple):
    """The arguments of ``policy_loss`` but for log-probs and entropies, and ``active``."""

    advantages: Tensor
    cu_seqlens: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    sampling_logprobs: Tensor | None
    token_mask: Tensor | None
    active: Tensor | None
    normalizer: float | Tensor | None
    entropy_normalizer: float | Tensor | None

    def tokenwise(self, entropies: Tensor | None) -> dict[str, Tensor | None]:
        return {
            "old_logprobs": self.old_logprobs,
            "ref_logprobs": self.ref_logprobs,
            "sampling_logprobs": self.sampling_logprobs,
            "entropies": entropies,
            "token_mask": self.token_mask,
        }

    def loss(
        self, logprobs: Tensor, entropies: Tensor | None, config: PolicyLossConfig, backend: Backend | None
    ) -> PolicyLoss:
        return policy_loss(
            logprobs,
            self.advantages,
            self.cu_seqlens,
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
            sampling_logprobs=self.sampling_logprobs,
            entropies=entropies,
            token_mask=self.token_mask,
            normalizer=self.normalizer,
            entropy_normalizer=self.entropy_normalizer,
            config=config,
            backend=backend,
        )

    def gradient(
        self, logprobs: Tensor, entropies: Tensor | None, config: PolicyLossConfig, backend: Backend | None
    ) -> tuple[Tensor, Tensor | None]:
        """dL/dlog p and dL/dH [T]; None without an entropy bonus."""
        divisors = self.normalizer, self.entropy_normalizer
        tokenwise = self.tokenwise(entropies)
        return policy_gradient(logprobs, self.advantages, self.cu_seqlens, tokenwise, *divisors, config, backend)

    def known(self, targets: Tensor, config: PolicyLossConfig) -> Known:
        """What the host can read, without waiting for a device."""
        bounds = self.cu_seqlens.long() if readable(self.cu_seqlens) else None
        loud_B = worked_T = None
        if readable(self.advantages) and not _keeps_every_gradient(config):
            loud_B = self.advantages != 0
        for mask_T in (targets != IGNORED if readable(targets) else None, self.token_mask):
            if mask_T is not None and readable(mask_T):
                worked_T = mask_T != 0 if worked_T is None else worked_T & (mask_T != 0)
        if self.active is not None and readable(self.active) and bounds is not None:
            active_T = self.active.repeat_interleave(bounds.diff())
            worked_T = active_T if worked_T is None else worked_T & active_T
        return Known(bounds, worked_T, loud_B)

    def needs_whole_responses(self, config: PolicyLossConfig) -> bool:
        """Whether a token's gradient depends on the log-probs of others."""
        if config.ratio == "sequence" and self.old_logprobs is not None:
            return True
        return config.sampler_correction.startswith("sequence") and self.old_logprobs is None


def loss_inputs(inputs: LossInputs, hidden: Tensor, config: PolicyLossConfig) -> LossInputs:
    """The same on the device of ``hidden``.

    Raises:
        ValueError, TypeError: see ``linear_policy_loss``.
    """
    for name, x in inputs._asdict().items():
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires a gradient, which only hidden, lm_head and bias get; expected none")
    moved = {}
    for name in ("advantages", "cu_seqlens", "token_mask", "active"):  # the host may read them on the CPU
        x = getattr(inputs, name)
        if x is None:
            continue
        if x.device.type != "cpu" and x.device != hidden.device:
            raise ValueError(f"{name}: on {x.device}, expected {hidden.device} as hidden, or the CPU")
        moved[name] = upload(name, x, hidden.device)
    for name in ("normalizer", "entropy_normalizer"):  # else every chunk's loss would upload it again
        x = getattr(inputs, name)
        if isinstance(x, Tensor):
            moved[name] = upload(name, x, hidden.device)
    here = inputs._replace(**moved)
    tokens = hidden.new_empty(hidden.shape[0], dtype=torch.float32)  # log-probs and entropies to come
    check_loss_inputs(tokens, here.advantages, here.cu_seqlens, here.tokenwise(tokens), here.normalizer, config)
    check_bounds(inputs.cu_seqlens, hidden.shape[0])
    _check_active(inputs, config)
    if torch.compiler.is_compiling():  # which cannot pass one tensor to an autograd.Function under two names
        return here._replace(**{name: x.view_as(x) for name, x in here._asdict().items() if isinstance(x, Tensor)})
    return here


def upload(name: str, x: Tensor, device: torch.device) -> Tensor:
    """``x`` on the device. From the CPU it goes through pinned memory: a copy from pageable memory would make the host
    wait for all that is queued on the device.

    Raises:
        ValueError: while a CUDA graph is captured, whose replays would read what is no longer in that memory.
    """
    if device.type == "cpu" or x.device.type != "cpu":
        return x.to(device)
    if torch.compiler.is_compiling():
        return x.to(device, non_blocking=True)
    if _captures(device):
        raise ValueError(f"{name}: on the CPU while a CUDA graph is captured, expected {device}")
    return _pinned(x).to(device, non_blocking=True)


def _captures(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _pinned(x: Tensor) -> Tensor:
    return x.pin_memory()


def _check_active(inputs: LossInputs, config: PolicyLossConfig) -> None:
    active = inputs.active
    if active is None:
        return
    if active.shape != inputs.advantages.shape:
        raise ValueError(f"active: shape {tuple(active.shape)}, expected {tuple(inputs.advantages.shape)}")
    if active.dtype is not torch.bool:
        raise TypeError(f"active: dtype {active.dtype}, expected torch.bool")
    if _keeps_every_gradient(config):
        raise ValueError(
            f"active: given with kl_coef={config.kl_coef} and entropy_coef={config.entropy_coef}, which give every "
            "response a gradient; expected None"
        )
    if readable(active) and readable(inputs.advantages):
        wrong = ~active & (inputs.advantages != 0)
        if bool(wrong.any()):
            response = int(wrong.nonzero()[0])
            advantage = float(inputs.advantages[response])
            raise ValueError(f"active: False for response {response} with advantage {advantage:g}, expected 0")


def _keeps_every_gradient(config: PolicyLossConfig) -> bool:
    """Whether a response whose advantage is 0 has a gradient all the same."""
    return config.kl_coef > 0 or config.entropy_coef > 0
