"""Group-relative advantages from K rewards and their weights.

    r'_k = (r_k - mean_k) / (std_k + eps)      per reward, over the profile's scopes
    s    = sum_k w_k r'_k  -  beta * KL        the score of a response
    A    = (s - mean) / (std + eps)            over the profile's scopes; verl_gdpo: / sqrt(std^2 + eps)

The maximum of each scope is subtracted before the mean is taken. In exact arithmetic that changes nothing. In floating
point it makes groups of identical rewards exactly 0, where r - mean would leave rounding noise, which the division by a
tiny std would blow up.

A number that is not finite (an infinite reward, a NaN weight or KL) makes everything that is compared with it not
finite, and touches nothing else: that is its group, or the whole batch under a profile with the scope batch or tokens.
Groups without spread have the advantage 0 all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from maestro_fast.ops import cpp
from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.gpu import operator
from maestro_fast.ops.groups import Groups, GroupsLike
from maestro_fast.ops.tensors import check_number, check_tensors, floats, is_integer, readable, wide
from maestro_fast.specs import (
    AdvantageProfile,
    Center,
    GroupAdvantages,
    ScoreCenter,
    ScoreScale,
    Singleton,
    as_text,
    from_text,
    resolve_profile,
)

if TYPE_CHECKING:
    from maestro_fast import _C

__all__ = ["GroupAdvantages", "group_advantages"]


def group_advantages(
    rewards: Tensor,
    weights: Tensor | None = None,
    groups: GroupsLike | None = None,
    *,
    kl: Tensor | None = None,
    beta: float = 0.0,
    lengths: Tensor | None = None,
    profile: str | AdvantageProfile = "maestro",
    backend: Backend | None = None,
) -> GroupAdvantages:
    """Advantages of B responses in N groups from K rewards.

    Args:
        rewards: [B, K] or [B]; NaN where a reward abstained.
        weights: [B, K], [K], or None for weights of 1. Differentiable.
        groups: G, a [B] list or CPU tensor of group ids, or ``Groups``. Required.
        kl: [B], the mean of log pi - log pi_ref over the tokens of each response, in nats. It needs a profile with
            ``kl_in="score"``.
        beta: the coefficient of the KL.
        lengths: [B], integer or floating, the number of tokens of each completion. Profiles with the scope ``tokens``
            need it, and no others take it. In that scope alone a response counts as often as it has tokens. A response
            of length 0 still counts in its group, and has an advantage, which no token carries.
        profile: a name of ``PROFILES`` or an ``AdvantageProfile``.
        backend: "cpp", "triton" or "torch". None takes C++ on the CPU and Triton on a CUDA device, unless there is
            float64 or a gradient to compute.

    Raises:
        ValueError: a shape, a device or a name is wrong; a KL is given to a profile whose KL is in the loss; lengths
            are missing, given but not wanted, or (where the host can read them) not finite or negative.
        TypeError: a dtype is wrong, or groups are missing.
    """
    prof = resolve_profile(profile)
    if groups is None:
        raise TypeError("groups: missing, expected an int, a [B] sequence of ids or Groups")
    check_inputs(rewards, weights, kl, beta, prof)
    check_lengths(lengths, rewards, prof)
    chosen = resolve("group_advantages", backend, rewards, weights, kl, lengths)
    if chosen == "cpp":
        partition = CppGroups.of(groups, rewards.shape[0])
        return _by_cpp(rewards, weights, kl, float(beta), lengths, partition, prof)
    if chosen == "triton":
        index_NG = Groups.of(groups, rewards.shape[0]).to(rewards.device).index_NG
        return _by_triton(rewards, weights, kl, float(beta), lengths, index_NG, prof)
    rewards_BK, weights_BK = as_matrices(rewards, weights)
    grouping = Groups.of(groups, rewards.shape[0]).to(rewards.device)
    return _reference(rewards_BK, weights_BK, grouping, kl, beta, lengths, prof)


# --- checks ---


def check_inputs(
    rewards: Tensor, weights: Tensor | None, kl: Tensor | None, beta: float, profile: AdvantageProfile
) -> None:
    """Raises an error that names the argument. This has to be quick, because the C++ kernel takes only 10 us."""
    check_tensors(1, rewards=rewards, weights=weights, kl=kl)
    if not rewards.is_floating_point():
        raise TypeError(f"rewards: dtype {rewards.dtype}, expected a floating dtype")
    if rewards.ndim not in (1, 2) or (rewards.ndim == 2 and rewards.shape[1] == 0):
        raise ValueError(f"rewards: shape {tuple(rewards.shape)}, expected [B, K] with K >= 1 or [B]")
    if weights is not None:
        if not weights.is_floating_point():
            raise TypeError(f"weights: dtype {weights.dtype}, expected a floating dtype")
        whole = rewards.shape if rewards.ndim == 2 else (rewards.shape[0], 1)
        if weights.shape != whole and weights.shape != whole[1:]:
            raise ValueError(f"weights: shape {tuple(weights.shape)}, expected {tuple(whole)} or ({whole[1]},)")
    if kl is not None and not kl.is_floating_point():
        raise TypeError(f"kl: dtype {kl.dtype}, expected a floating dtype")
    if kl is not None and kl.shape != rewards.shape[:1]:
        raise ValueError(f"kl: shape {tuple(kl.shape)}, expected ({rewards.shape[0]},)")
    if kl is not None and profile.kl_in == "loss":
        raise ValueError("kl: given, but this profile has the KL in the loss (kl_in='loss'); it must enter once")
    check_number("beta", beta)
    if kl is None and beta != 0.0:
        raise ValueError(f"beta: {beta} without kl, expected the [B] tensor kl beside it")
    if weights is not None and weights.device != rewards.device:
        raise ValueError(f"weights: on {weights.device}, expected {rewards.device} as rewards")
    if kl is not None and kl.device != rewards.device:
        raise ValueError(f"kl: on {kl.device}, expected {rewards.device} as rewards")


def check_lengths(lengths: Tensor | None, rewards: Tensor, profile: AdvantageProfile) -> None:
    """Raises an error unless lengths are given if and only if the profile needs them, and are valid."""
    if lengths is None:
        if profile.needs_lengths:
            raise ValueError(f"lengths: missing, expected ({rewards.shape[0]},) with a profile of scope 'tokens'")
        return
    check_tensors(1, lengths=lengths)
    if not profile.needs_lengths:
        raise ValueError("lengths: given, but no scope of this profile is 'tokens'")
    if lengths.shape != rewards.shape[:1]:
        raise ValueError(f"lengths: shape {tuple(lengths.shape)}, expected ({rewards.shape[0]},)")
    if not (is_integer(lengths) or lengths.is_floating_point()):
        raise TypeError(f"lengths: dtype {lengths.dtype}, expected a signed integer or floating dtype")
    if lengths.device != rewards.device:
        raise ValueError(f"lengths: on {lengths.device}, expected {rewards.device} as rewards")
    if readable(lengths) and not bool(((lengths >= 0) & lengths.isfinite()).all()):
        raise ValueError("lengths: negative or not finite, expected numbers of tokens")


# --- PyTorch, the reference ---

Scope = ScoreCenter | ScoreScale


@dataclass(frozen=True)
class Members:
    """The elements that are compared with each other, in the padded [N, G_max, ...] layout of ``Groups``.

    Further dimensions after the second are independent columns.

    Attributes:
        live_NG: bool [N, G_max, ...], the elements that count.
        singleton: how a group with one live element is treated, see ``AdvantageProfile``.
        lengths_NG: [N, G_max, ...], how often an element counts in the scope ``tokens``. It counts once in all others.
    """

    live_NG: Tensor
    singleton: Singleton = "zero"
    lengths_NG: Tensor | None = None

    def centred(self, x_NG: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
        """x minus the mean of its scope, and that mean, both [N, G_max, ...]."""
        if scope == "none":
            return x_NG, torch.zeros_like(x_NG)
        shifted, top = self._shifted(x_NG, scope)
        total, count = self._sum(shifted, scope), self._count(scope)
        if scope == "leave_one_out":
            mean = (total - shifted) / (count - self.live_NG.long()).clamp(min=1)  # over the other live elements
        else:
            mean = (total / count.clamp(min=1)).expand_as(x_NG)
        if self.singleton == "raw" and scope in ("group", "leave_one_out"):
            raw_NG = self.alone_N1.expand_as(x_NG)
            return torch.where(raw_NG, x_NG, shifted - mean), torch.where(raw_NG, 0.0, mean + top)
        return shifted - mean, mean + top

    def deviation(self, x_NG: Tensor, scope: Scope, ddof: int) -> Tensor:
        """The standard deviation over the scope, [N, G_max, ...]. It is 0 for fewer than two live elements."""
        shifted, _ = self._shifted(x_NG, scope)
        count = self._count(scope)
        mean = self._sum(shifted, scope) / count.clamp(min=1)
        # Elements that count 0 times may be as far away as they like.
        counted = self.live_NG if scope != "tokens" or self.lengths_NG is None else self.live_NG & (self.lengths_NG > 0)
        unit = unit_of(mean)
        squares = self._sum(torch.where(counted, (shifted - mean) / unit, 0.0) ** 2, scope)
        variance = squares / (count - ddof).clamp(min=1)
        none = variance == 0  # sqrt has no finite derivative at 0
        std = torch.where(none, 0.0, torch.where(none, 1.0, variance).sqrt()) * unit
        if self.singleton == "raw" and scope == "group":
            std = torch.where(self.alone_N1, 1.0, std)
        return std.expand_as(x_NG)

    def flat(self, x_NG: Tensor) -> Tensor:
        """bool [N, 1, ...], whether all live elements of a group are the same. With a NaN among them they are not."""
        x_NG = x_NG.detach()
        top = torch.where(self.live_NG, x_NG, float("-inf")).amax(1, keepdim=True)
        low = torch.where(self.live_NG, x_NG, float("inf")).amin(1, keepdim=True)
        return top <= low

    @property
    def alone_N1(self) -> Tensor:
        """bool [N, 1, ...], whether a group has exactly one live element."""
        return self.live_NG.sum(1, keepdim=True) == 1

    def _shifted(self, x_NG: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
        """x minus the maximum of the scope's live elements (0 where not live), and that maximum."""
        top = torch.where(self.live_NG, x_NG.detach(), float("-inf")).amax(dims(scope), keepdim=True)
        top = torch.where(top == float("-inf"), 0.0, top)
        return torch.where(self.live_NG, x_NG - top, 0.0), top

    def _sum(self, x_NG: Tensor, scope: Scope) -> Tensor:
        """The sum of x over the scope. Elements that are not live have to be 0 already."""
        if scope == "tokens":
            assert self.lengths_NG is not None
            x_NG = x_NG * self.lengths_NG
        return x_NG.sum(dims(scope), keepdim=True)

    def _count(self, scope: Scope) -> Tensor:
        """The number of live elements in the scope, or of their tokens in the scope ``tokens``."""
        counted = self.live_NG
        if scope == "tokens":
            assert self.lengths_NG is not None
            counted = torch.where(self.live_NG, self.lengths_NG, 0.0)
        return counted.sum(dims(scope), keepdim=True)


class Standardised(NamedTuple):
    """The fields of ``GroupAdvantages`` that follow from the scores, all [N, G_max, ...]."""

    advantages_NG: Tensor
    mean_NG: Tensor
    std_NG: Tensor
    degenerate_NG: Tensor


def standardise_scores(raw_NG: Tensor, scores_NG: Tensor, members: Members, profile: AdvantageProfile) -> Standardised:
    """Advantages from scores. A group is degenerate if its scores before the KL, ``raw_NG``, are all the same."""
    centred_NG, mean_NG = members.centred(scores_NG, profile.score_center)
    spread: Scope = "group" if profile.score_scale == "none" else profile.score_scale
    std_NG = members.deviation(scores_NG, spread, profile.ddof)
    if profile.score_scale != "none":
        centred_NG = over(centred_NG, divisor(std_NG, profile))
    flat_N1 = members.flat(raw_NG)
    zero_N1 = flat_N1 & ~members.alone_N1 if profile.singleton == "raw" else flat_N1
    advantages_NG = torch.where(zero_N1 | ~members.live_NG, 0.0, centred_NG)
    return Standardised(advantages_NG, mean_NG, std_NG, flat_N1.expand_as(members.live_NG))


def normalize_rewards(rewards_BK: Tensor, live_BK: Tensor, groups: Groups, profile: AdvantageProfile) -> Tensor:
    """Rewards [B, K] normalised over the profile's scopes.

    They are 0 where a reward is not live, or is the only live one of its scope (unless the profile keeps it raw).
    """
    if profile.reward_center == "none" and profile.reward_scale == "none":
        return rewards_BK
    x_NGK, live_NGK = groups.gather(rewards_BK, 0.0), groups.gather(live_BK, False)
    members = Members(live_NGK, profile.singleton)
    out_NGK, _ = members.centred(x_NGK, profile.reward_center)
    scope: Center = profile.reward_center
    if profile.reward_scale != "none":
        scope = profile.reward_scale
        out_NGK = over(out_NGK, members.deviation(x_NGK, scope, profile.ddof) + profile.reward_eps)
    if profile.singleton == "zero" or scope == "batch":
        alone = live_NGK.sum(dims(scope), keepdim=True) < 2  # a single value has nothing to be compared with
        out_NGK = torch.where(alone, x_NGK - x_NGK, out_NGK)  # 0, or NaN for one that is not finite
    return torch.where(live_BK, groups.scatter(out_NGK), 0.0)


def live_weights(weights: Tensor, live: Tensor, profile: AdvantageProfile) -> tuple[Tensor, Tensor]:
    """Weights [..., K] that are 0 for abstained rewards, and bool [...], which responses count at all."""
    masked = torch.where(live, weights, 0.0)
    scorable = live.any(-1)
    if profile.missing == "zero":
        return masked, scorable
    whole, rest = sum_over_rewards(weights), sum_over_rewards(masked)
    partial = ~live.all(-1)
    scorable = scorable & ~(partial & (rest == 0))  # their weights cannot be scaled up
    factor = torch.where(partial & scorable, whole / torch.where(rest == 0, 1.0, rest), 1.0)
    return masked * factor[..., None], scorable


def sum_over_rewards(x: Tensor) -> Tensor:
    """Sums over the last axis in its order. With torch.sum, whose order depends on strides, equal rows could differ."""
    total = x[..., 0]
    for k in range(1, x.shape[-1]):
        total = total + x[..., k]
    return total


def divisor(std: Tensor, profile: AdvantageProfile) -> Tensor:
    """What the centred score is divided by."""
    if profile.score_eps_in == "std" or profile.score_eps == 0:
        return std + profile.score_eps
    large = std > 1e15  # Its square may be beyond float32, and an epsilon beside it changes no bit.
    return torch.where(large, std, (torch.where(large, 1.0, std) ** 2 + profile.score_eps).sqrt())


def unit_of(mean: Tensor) -> Tensor:
    """A unit in which squares of deviations from the mean neither overflow nor vanish.

    The mean is that of x minus its maximum, so its size lies between the range of x and that over the number of
    elements. Dividing by a power of 2 is exact, so the unit changes no bit of a deviation that did without it.
    """
    size = mean.detach().abs().clamp(2.0**-100, 2.0**100)
    return size / torch.frexp(size).mantissa


def over(x: Tensor, divisor: Tensor) -> Tensor:
    """x / divisor, and 0 where the divisor is 0, so that groups without spread get 0 even without an epsilon."""
    return torch.where(divisor == 0, 0.0, x / torch.where(divisor == 0, 1.0, divisor))


def dims(scope: Scope) -> tuple[int, ...]:
    """The axes of the padded layout that a scope reduces."""
    return (0, 1) if scope in ("batch", "tokens") else (1,)


def as_matrices(rewards: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rewards and weights as [B, K] tensors of one dtype, float32 or float64."""
    rewards_BK = wide(rewards)[:, None] if rewards.ndim == 1 else wide(rewards)
    if weights is None:
        return rewards_BK, torch.ones_like(rewards_BK)
    return rewards_BK, weights.to(rewards_BK.dtype).expand_as(rewards_BK)


def _reference(
    rewards_BK: Tensor,
    weights_BK: Tensor,
    groups: Groups,
    kl: Tensor | None,
    beta: float,
    lengths: Tensor | None,
    profile: AdvantageProfile,
) -> GroupAdvantages:
    """The formula of the module in PyTorch, differentiable. Other backends are compared with it."""
    live_BK = ~rewards_BK.isnan()
    rewards_BK = torch.where(live_BK, rewards_BK, 0.0)
    if rewards_BK.shape[0] == 0:  # an empty tensor has no maximum
        empty_B = rewards_BK.sum(-1)
        return GroupAdvantages(empty_B, empty_B, rewards_BK, empty_B, empty_B, empty_B.bool())
    normalized_BK = normalize_rewards(rewards_BK, live_BK, groups, profile)
    weights_BK, live_B = live_weights(weights_BK, live_BK, profile)
    raw_B = torch.where(live_B, sum_over_rewards(weights_BK * normalized_BK), 0.0)
    scores_B = raw_B if kl is None else torch.where(live_B, raw_B - beta * kl.to(raw_B.dtype), 0.0)

    lengths_NG = None if lengths is None else groups.gather(lengths.to(raw_B.dtype), 0.0)
    members = Members(groups.gather(live_B, False), profile.singleton, lengths_NG)
    out = standardise_scores(groups.gather(raw_B, 0.0), groups.gather(scores_B, 0.0), members, profile)
    advantages_B, mean_B, std_B, degenerate_B = (groups.scatter(x_NG) for x_NG in out)
    return GroupAdvantages(advantages_B, scores_B, normalized_BK, mean_B, std_B, degenerate_B)


# --- C++ and Triton ---

_RESULTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"


def advantage_shapes(rewards: Tensor, *rest: Any) -> GroupAdvantages:
    """Empty outputs of the operators that compute ``GroupAdvantages``."""
    return GroupAdvantages.empty(rewards)


class CppGroups(NamedTuple):
    """A partition as the C++ kernels take it.

    Attributes:
        size: G for consecutive groups of G responses, else 0.
        offsets, order: ``offsets_N1`` and ``order_B`` of ``Groups`` on the CPU; None for consecutive groups.
    """

    size: int
    offsets: Tensor | None
    order: Tensor | None

    @staticmethod
    def of(groups: GroupsLike, batch: int) -> CppGroups:
        if type(groups) is int and 0 < groups <= max(batch, 1) and batch % groups == 0:
            return CppGroups(groups, None, None)
        known = Groups.of(groups, batch)
        if known.size:
            return CppGroups(known.size, None, None)
        if known.offsets_N1.device.type != "cpu":
            raise ValueError(f"groups: on {known.offsets_N1.device}, expected the CPU as rewards")
        return CppGroups(0, known.offsets_N1, known.order_B)

    def native(self, batch: int) -> _C.Partition:
        """The C++ object. It holds the addresses of these tensors, and must not outlive them."""
        if self.size:
            return _consecutive(self.size, batch)
        assert self.offsets is not None and self.order is not None
        return cpp._C.Partition(self.offsets.numel() - 1, batch, 0, self.offsets.data_ptr(), self.order.data_ptr())


@lru_cache(maxsize=1024)
def _consecutive(size: int, batch: int) -> _C.Partition:
    return cpp._C.Partition(batch // size, batch, size, 0, 0)


def cpp_flat(*arguments: Any) -> tuple[Any, ...]:
    """The arguments of a C++ launch, of which the last two are groups and a profile, as its operator takes them."""
    *others, groups, profile = arguments
    return *others, *groups, as_text(profile)


def cpp_whole(*arguments: Any) -> tuple[Any, ...]:
    """The opposite of ``cpp_flat``."""
    *others, size, offsets, order, profile = arguments
    return *others, CppGroups(size, offsets, order), from_text(AdvantageProfile, profile)


@cpp.operator(
    "group_advantages(Tensor rewards, Tensor? weights, Tensor? kl, float beta, Tensor? lengths, int size,"
    f" Tensor? offsets, Tensor? order, str profile) -> {_RESULTS}",
    advantage_shapes,
    flat=cpp_flat,
    whole=cpp_whole,
    result=GroupAdvantages,
)
def _by_cpp(
    rewards: Tensor,
    weights: Tensor | None,
    kl: Tensor | None,
    beta: float,
    lengths: Tensor | None,
    groups: CppGroups,
    profile: AdvantageProfile,
) -> GroupAdvantages:
    rewards = cpp.floats_or_bfloat16(rewards)
    weights = None if weights is None else floats(weights)
    kl = None if kl is None else floats(kl)
    lengths = None if lengths is None else floats(lengths)
    out = GroupAdvantages.empty(rewards)
    cpp._C.group_advantages(
        rewards.data_ptr(),
        rewards.dtype is torch.bfloat16,
        rewards.shape[1] if rewards.ndim == 2 else 1,
        cpp.address(weights),
        weights is not None and weights.ndim == 2,
        cpp.address(kl),
        beta,
        cpp.address(lengths),
        groups.native(rewards.shape[0]),
        cpp_profile(profile),
        out.advantages.data_ptr(),
        out.scores.data_ptr(),
        out.normalized_rewards.data_ptr(),
        out.mean.data_ptr(),
        out.std.data_ptr(),
        out.degenerate.data_ptr(),
        torch.get_num_threads(),
    )
    return out


_SCOPES = ("none", "group", "batch", "leave_one_out", "tokens")  # in the order of the enum Scope of csrc


@lru_cache(maxsize=256)
def cpp_profile(profile: AdvantageProfile) -> _C.AdvantageProfile:
    """The profile as the C++ kernels take it, without ``kl_in``, which only the checks read."""
    return cpp._C.AdvantageProfile(
        _SCOPES.index(profile.reward_center),
        _SCOPES.index(profile.reward_scale),
        _SCOPES.index(profile.score_center),
        _SCOPES.index(profile.score_scale),
        float(profile.reward_eps),
        float(profile.score_eps),
        profile.ddof,
        profile.singleton == "raw",
        profile.missing == "renormalize",
        profile.score_eps_in == "variance",
    )


def kernel_matrices(rewards: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rewards and weights as the Triton kernels take them, float32 [B, K]. Shared weights are expanded, not copied."""
    rewards_BK = rewards.float() if rewards.ndim == 2 else rewards.float()[:, None]
    weights = rewards_BK.new_ones(1) if weights is None else weights.float()
    return rewards_BK, weights if weights.shape == rewards_BK.shape else weights.expand_as(rewards_BK)


def triton_flat(*arguments: Any) -> tuple[Any, ...]:
    """The arguments of a Triton launch, of which the last is a profile, as its operator takes them."""
    return *arguments[:-1], as_text(arguments[-1])


def triton_whole(*arguments: Any) -> tuple[Any, ...]:
    """The opposite of ``triton_flat``."""
    return *arguments[:-1], from_text(AdvantageProfile, arguments[-1])


@operator(
    "triton_group_advantages(Tensor rewards, Tensor? weights, Tensor? kl, float beta, Tensor? lengths, Tensor index,"
    f" str profile) -> {_RESULTS}",
    advantage_shapes,
    flat=triton_flat,
    whole=triton_whole,
    result=GroupAdvantages,
)
def _by_triton(
    rewards: Tensor,
    weights: Tensor | None,
    kl: Tensor | None,
    beta: float,
    lengths: Tensor | None,
    index_NG: Tensor,
    profile: AdvantageProfile,
) -> GroupAdvantages:
    from maestro_fast.kernels import group_advantages as kernel

    rewards_BK, weights_BK = kernel_matrices(rewards, weights)
    kl, lengths = (None if x is None else x.contiguous() for x in (kl, lengths))
    return kernel.group_advantages(rewards_BK, weights_BK, index_NG, profile=profile, kl=kl, beta=beta, lengths=lengths)
