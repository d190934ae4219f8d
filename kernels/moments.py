"""Device functions for the means and deviations of a tile of BN groups of at most BG members each.

    shifted = x - max      mean = sum(shifted) / n      std = sqrt(sum((shifted - mean)^2) / (n - ddof))

A tile is [BN, BG], or [BN, BG, KB] for KB rewards at once, whose chains of dependent instructions then overlap. Results
keep that rank, with 1 for an axis that was reduced. The maximum is subtracted first, so that identical values give
exactly 0. With the ``SCOPE`` "group" or "leave_one_out", axis 1 of the tile is reduced. With "batch" or "tokens" axes 0
and 1 are, and the tile has to hold the whole batch. Divisions and roots round to nearest, as on the host.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scope_sum(x_NG, SCOPE: tl.constexpr):
    """The sum of each group, or of the whole tile."""
    total = tl.sum(x_NG, 1, keep_dims=True)
    if SCOPE == "batch" or SCOPE == "tokens":
        total = tl.sum(total, 0, keep_dims=True)
    return total


@triton.jit
def scope_max(x_NG, SCOPE: tl.constexpr):
    """The maximum of each group, or of the whole tile."""
    top = tl.max(x_NG, 1, keep_dims=True)
    if SCOPE == "batch" or SCOPE == "tokens":
        top = tl.max(top, 0, keep_dims=True)
    return top


@triton.jit
def scope_shifted(x_NG, live_NG, SCOPE: tl.constexpr):
    """x minus the maximum of the scope's live elements (0 where not live), and that maximum."""
    top = scope_max(tl.where(live_NG, x_NG, float("-inf")), SCOPE)
    top = tl.where(top == float("-inf"), 0.0, top)  # a scope without a live element has no maximum
    return tl.where(live_NG, x_NG - top, 0.0), top


@triton.jit
def unit_of(mean):
    """A unit in which squares of deviations from the mean neither overflow nor vanish, and one over it.

    The mean is that of x minus its maximum, so its size lies between the range of x and that over the number of
    elements. Multiplying by a power of 2 is exact, so the unit changes no bit of a deviation that did without it.
    """
    size = tl.minimum(tl.maximum(tl.abs(mean), 2.0**-100), 2.0**100)
    bits = size.to(tl.int32, bitcast=True) & 0x7F800000  # the exponent without the mantissa
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def centred(x_NG, live_NG, counted_NG, SCOPE: tl.constexpr, RAW: tl.constexpr):
    """x minus its scope's mean, and that mean, both of the tile's shape.

    ``counted`` says how often each element counts: 0 times where it is not live, otherwise once, or once per token of
    its response in the scope "tokens". With RAW the mean of a group with one live element is taken to be 0.
    """
    if SCOPE == "none":
        return x_NG, x_NG * 0.0
    else:
        shifted_NG, top = scope_shifted(x_NG, live_NG, SCOPE)
        total, count = scope_sum(shifted_NG * counted_NG, SCOPE), scope_sum(counted_NG, SCOPE)
        zero_NG = tl.zeros_like(x_NG)  # adding it broadcasts a reduced value to the tile
        if SCOPE == "leave_one_out":
            # This is the mean of the other live elements of the group.
            mean_NG = tl.div_rn(total - shifted_NG, tl.maximum(count - counted_NG, 1.0))
        else:
            mean_NG = tl.div_rn(total, tl.maximum(count, 1.0)) + zero_NG
        out_NG, outer_NG = shifted_NG - mean_NG, mean_NG + top
        if RAW and (SCOPE == "group" or SCOPE == "leave_one_out"):
            alone_NG = (count + zero_NG) == 1.0
            out_NG, outer_NG = tl.where(alone_NG, x_NG, out_NG), tl.where(alone_NG, 0.0, outer_NG)
        return out_NG, outer_NG


@triton.jit
def deviation(x_NG, live_NG, counted_NG, SCOPE: tl.constexpr, DDOF: tl.constexpr, RAW: tl.constexpr):
    """The standard deviation over the scope, of the tile's shape. It is 0 for fewer than two live elements.

    With RAW the deviation of a group with one live element is taken to be 1.
    """
    shifted_NG, _ = scope_shifted(x_NG, live_NG, SCOPE)
    count = scope_sum(counted_NG, SCOPE)
    mean = tl.div_rn(scope_sum(shifted_NG * counted_NG, SCOPE), tl.maximum(count, 1.0))
    # A second pass over the registers adds up squares around the mean, because E[x^2] - E[x]^2 would cancel.
    # Elements that count 0 times may be as far away as they like.
    unit, per_unit = unit_of(mean)
    off_NG = tl.where(counted_NG > 0, (shifted_NG - mean) * per_unit, 0.0)
    squares = scope_sum(off_NG * off_NG * counted_NG, SCOPE)
    zero_NG = tl.zeros_like(x_NG)
    std_NG = tl.sqrt_rn(tl.div_rn(squares, tl.maximum(count - DDOF, 1.0)) + zero_NG) * unit
    if RAW and SCOPE == "group":
        std_NG = tl.where((count + zero_NG) == 1.0, 1.0, std_NG)
    return std_NG


@triton.jit
def spread(x_NG, live_NG):
    """int1 [BN, 1], whether the live elements of a group differ. With a NaN among them they do.

    NaN needs a test of its own, because the maximum and the minimum of a GPU pass over it.
    """
    top_N = tl.max(tl.where(live_NG, x_NG, float("-inf")), 1)
    low_N = tl.min(tl.where(live_NG, x_NG, float("inf")), 1)
    unknown_N = tl.max(tl.where(live_NG & (x_NG != x_NG), 1, 0), 1)
    return ((top_N > low_N) | (unknown_N > 0))[:, None]


@triton.jit
def over(x, divisor):
    """x / divisor rounded to nearest, and 0 where the divisor is 0, so no spread gives 0 even without an epsilon."""
    return tl.where(divisor == 0.0, 0.0, tl.div_rn(x, tl.where(divisor == 0.0, 1.0, divisor)))
