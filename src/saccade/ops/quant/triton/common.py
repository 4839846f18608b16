"""Arithmetic that kernels share: rounding, division and extrema, the same on a GPU and in the interpreter."""
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.gpu import interpreting

# the interpreter cuts bfloat16 instead of rounding and mistakes its smallest numbers, fuses no product with a sum, and drops what is
# not a number from extrema
SIMULATED = tl.constexpr(interpreting())
EXACT = {"enable_fp_fusion": False}  # a product and a sum are rounded one after the other, as they are defined


@triton.jit
def to_bfloat16(x):
    """The nearest bfloat16, the even one of two, still as float32: a cast rounds on a GPU and cuts in the interpreter."""
    whole = x.to(tl.int32, bitcast=True)
    near = ((whole + 0x7FFF + ((whole >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return tl.where(x == x, near, x)


@triton.jit
def rounded(x, KIND: tl.constexpr):
    """float32 x in KIND."""
    if SIMULATED and tl.bfloat16 == KIND:
        return (to_bfloat16(x).to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(KIND, bitcast=True)
    return x.to(KIND)


@triton.jit
def widened(x):
    """x in float32."""
    if SIMULATED and tl.bfloat16 == x.dtype:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def least(x):
    """The minimum of each row, not a number where one of the row is not."""
    if SIMULATED:
        return tl.where(tl.max((x != x).to(tl.int32), axis=1) > 0, float("nan"), tl.min(x, axis=1))
    return tl.reduce(x, 1, _smaller)


@triton.jit
def most(x):
    """The maximum of each row, not a number where one of the row is not."""
    if SIMULATED:
        return tl.where(tl.max((x != x).to(tl.int32), axis=1) > 0, float("nan"), tl.max(x, axis=1))
    return tl.reduce(x, 1, _larger)


@triton.jit
def fused(a, b, c):
    """a * b + c rounded once. The products and sums of `quotient` are exact in float64 up to what can't change their rounding."""
    if SIMULATED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def quotient(a, step, BOUND: tl.constexpr, SHORT: tl.constexpr):
    """a `(K, R)` over step `(K)` > 0 as a division rounded to nearest gives it, where it lies within BOUND (0: it is known to).

    SHORT: steps have at most 11 significant bits, those of float16 and bfloat16. Then a quotient of the size of codes is a middle
    between two float32 numbers or at least 2^-12 units in the last place away from it, and a product with a rough inverse, corrected
    once by its remainder, is nearer than that: it rounds to the same number at a fraction of the cost. Steps are moved into the
    middle of the exponents first, where the inverse and the remainder lose no digits.
    """
    if not SHORT:
        return tl.div_rn(a, tl.broadcast_to(step[:, None], a.shape))
    shift = tl.where(step > 1.152921504606847e18, 5.421010862427522e-20, tl.where(step < 8.673617379884035e-19, 1.8446744073709552e19, 1.0))
    endless = step == float("inf")
    shift = tl.where(endless, 0.0, shift)
    base = tl.where(endless, 1.0, step * shift)[:, None]
    inverse = 1.0 / base
    a = a * shift[:, None]
    near = a * inverse
    if BOUND > 0:
        near = tl.minimum(tl.maximum(near, -BOUND * 1.0), BOUND * 1.0)
    return fused(fused(-base, near, a), inverse, near)


@triton.jit
def to_codes(value, low, step, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, OWN: tl.constexpr, SHORT: tl.constexpr):
    """Codes, as the low 8 bits of int32, of value `(K, R)` with step and low `(K)`. OWN: these are of value's own range, not clipped."""
    MOST: tl.constexpr = 2 ** (BITS - 1) - 1 if SYMMETRIC else 2**BITS - 1
    safe = tl.where(step > 0, step, 1.0)
    if SYMMETRIC:
        ratio = quotient(value, safe, 0 if OWN else 512, SHORT)
        within = tl.minimum(tl.maximum(ratio, -MOST * 1.0), MOST * 1.0)
    else:
        ratio = quotient(value - low[:, None], safe, 0 if OWN else 512, SHORT)
        if SIMULATED:  # of a number and one that is not, a GPU takes the number
            ratio = tl.where(ratio == ratio, ratio, 0.0)
        within = tl.minimum(tl.maximum(ratio, 0.0), MOST * 1.0)
    # adding 1.5 * 2^23 leaves the nearest whole number, the even one of two, in the low bits
    code = (within + 12582912.0).to(tl.int32, bitcast=True)
    if SYMMETRIC:
        code = tl.where(ratio == ratio, code + 2 ** (BITS - 1), 0)
    elif not OWN:
        code = tl.where((step == 0)[:, None], 0, code)
    return code


@triton.jit
def along(i, high, low, RUN: tl.constexpr):
    """Where value i of two nested axes lies, the inner one RUN long; RUN 0: there is one axis."""
    if RUN > 0:
        return (i // RUN).to(tl.int64) * high + (i % RUN).to(tl.int64) * low
    return i.to(tl.int64) * low


@triton.jit
def places(k, r, outer_k, inner_k, outer_r, inner_r, RUN: tl.constexpr, SEGMENT: tl.constexpr, EIGHTS: tl.constexpr):
    """Where values r of sets k lie, `(K, R)`. EIGHTS: a thread takes 8 neighbours at a time, of sets (1) or of values (2); 0: as many
    as the memory moves at once."""
    at = along(k, outer_k, inner_k, RUN)[:, None] + along(r, outer_r, inner_r, SEGMENT)[None, :]
    if EIGHTS == 1:
        at = tl.max_contiguous(at, (8, 1))
    if EIGHTS == 2:
        at = tl.max_contiguous(at, (1, 8))
    return at


@triton.jit
def tile_of(outer, inner, tiles, parts, KEEP: tl.constexpr, RED: tl.constexpr):
    """Of a program: its two outer sets, the line of parameters of its inner sets, these, and the values that it works on."""
    pid = tl.program_id(0)
    r, o = (pid % parts) * RED + tl.arange(0, RED), pid // parts // tiles
    k = (pid // parts % tiles) * KEEP + tl.arange(0, KEEP)
    return (o // outer).to(tl.int64), (o % outer).to(tl.int64), o.to(tl.int64) * inner + k, k, r
