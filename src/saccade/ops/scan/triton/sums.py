"""Sums over ranges of tokens as products with matrices of ones."""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.scan.triton.inside import matmul, matmul_add


@triton.jit
def ranges(low, high, SIZE: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr):
    """A square of ones and zeros: column s (TURNED: row s) is 1 at [low_s, high_s], both `(SIZE,)`."""
    at = tl.arange(0, SIZE)
    if TURNED:
        inside = (at[None, :] >= low[:, None]) & (at[None, :] <= high[:, None])
    else:
        inside = (at[:, None] >= low[None, :]) & (at[:, None] <= high[None, :])
    ones = tl.where(inside, 1.0, 0.0)
    if PRECISION == "ieee":
        return ones
    else:
        return ones.to(tl.bfloat16)


@triton.jit
def level_ranges(level, SIZE: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr):
    """The `ranges` between each token and the boundary it meets others at: that inside its aligned block of 2^(level + 1) tokens."""
    i = tl.arange(0, SIZE)
    begin = (i >> level) << level
    late = ((i >> level) & 1) == 1
    low = tl.where(late, i, begin)
    high = tl.where(late, begin + (1 << level), i) - 1
    return ranges(low, high, SIZE, TURNED, PRECISION)


@triton.jit
def in_parts(x, PRECISION: tl.constexpr):
    """x as a sum of two bfloat16 parts, which hold 16 bits; float32 stays as it is."""
    if PRECISION == "ieee":
        return x, x
    else:
        # cut off, not rounded: what is left is known from bits, and both parts are turned into bfloat16 in pairs
        high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def sums(ones, high, low, PRECISION: tl.constexpr):
    """ones @ x, of the parts of x."""
    if PRECISION == "ieee":
        return matmul(ones, high, PRECISION)
    else:
        return matmul_add(ones, high, matmul(ones, low, PRECISION), PRECISION)


@triton.jit
def add_sums(ones, high, low, to, PRECISION: tl.constexpr):
    """to + ones @ x, of the parts of x."""
    if PRECISION == "ieee":
        return matmul_add(ones, high, to, PRECISION)
    else:
        return matmul_add(ones, high, matmul_add(ones, low, to, PRECISION), PRECISION)
