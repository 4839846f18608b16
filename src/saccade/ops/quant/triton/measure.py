"""Ranges of sets of values, and their codes: in one pass where a program holds whole sets, else extrema of parts first."""
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.gpu import ceil_div, multiprocessors, next_power_of_two
from saccade.ops.quant.sets import Sets
from saccade.ops.quant.triton.common import EXACT, along, least, most, places, rounded, to_codes, widened
from saccade.ops.quant.triton.steps import encode

PARTS = 1024  # most parts of a set whose extrema are joined by one program


@triton.jit
def _steps_of(low, high, clip, KIND: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, CLIPPED: tl.constexpr):
    """(scale, zero) in KIND from the extrema of sets; symmetric: high is the largest size, zero means nothing."""
    if CLIPPED:
        low, high = low * clip, high * clip
    zero = rounded(low, KIND)
    if SYMMETRIC:
        span = high
    else:
        span = high - widened(zero)
        # a comparison keeps what is not a number, a maximum would not
        span = tl.where(span < 0, 0.0, span)
    MOST: tl.constexpr = 2 ** (BITS - 1) - 1 if SYMMETRIC else 2**BITS - 1
    return rounded(tl.div_rn(span, tl.zeros_like(span) + MOST), KIND), zero


@triton.jit(do_not_specialize=["clip", "outer", "tiles"])
def _quantise(
    x, codes, scales, zeros, clip, outer, inner, length, tiles, x_o, x_p, x_k, x_l, x_r, x_s, c_o, c_p, c_k, c_l, c_r, c_s,
    RUN: tl.constexpr, SEGMENT: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, CLIPPED: tl.constexpr, CODES: tl.constexpr,
    WHOLE: tl.constexpr, EIGHTS: tl.constexpr, KEEP: tl.constexpr, RED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    o, k, r = pid // tiles, (pid % tiles) * KEEP + tl.arange(0, KEEP), tl.arange(0, RED)
    first, second = (o // outer).to(tl.int64), (o % outer).to(tl.int64)
    there = k < inner
    inside = there[:, None] if WHOLE else there[:, None] & (r < length)[None, :]
    at = places(k, r, x_k, x_l, x_r, x_s, RUN, SEGMENT, 0)
    value = widened(tl.load(x + first * x_o + second * x_p + at, mask=inside, other=0.0))
    KIND: tl.constexpr = scales.dtype.element_ty
    if SYMMETRIC:  # what lies outside is 0, the least size
        high = most(tl.abs(value))
        low = high
    elif WHOLE:
        low, high = least(value), most(value)
    else:
        low = least(tl.where((r < length)[None, :], value, float("inf")))
        high = most(tl.where((r < length)[None, :], value, float("-inf")))
    if not SYMMETRIC:  # one that is not a number may be so at one end only where signs differ
        lost = (low != low) | (high != high)
        low, high = tl.where(lost, float("nan"), low), tl.where(lost, float("nan"), high)
    scale, zero = _steps_of(low, high, clip, KIND, BITS, SYMMETRIC, CLIPPED)
    line = o.to(tl.int64) * inner + k
    tl.store(scales + line, scale, mask=there)
    if not SYMMETRIC:
        tl.store(zeros + line, zero, mask=there)
    if CODES:
        code = to_codes(value, widened(zero), widened(scale), BITS, SYMMETRIC, not CLIPPED, tl.float32 != KIND)
        at = places(k, r, c_k, c_l, c_r, c_s, RUN, SEGMENT, EIGHTS)
        tl.store(codes + first * c_o + second * c_p + at, code.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["outer", "tiles", "parts", "part"])
def _extrema(
    x, lows, highs, outer, inner, length, tiles, parts, part, x_o, x_p, x_k, x_l, x_r, x_s, RUN: tl.constexpr, SEGMENT: tl.constexpr,
    SYMMETRIC: tl.constexpr, KEEP: tl.constexpr, RED: tl.constexpr,
):  # fmt: skip
    """Of `part` values of each set, a multiple of RED: float32 lows and highs `(parts, sets)`."""
    pid = tl.program_id(0)
    p, o = pid % parts, pid // parts // tiles
    k = (pid // parts % tiles) * KEEP + tl.arange(0, KEEP)
    there = k < inner
    base = x + (o // outer).to(tl.int64) * x_o + (o % outer).to(tl.int64) * x_p + along(k, x_k, x_l, RUN)[:, None]
    low = tl.full((KEEP, RED), float("inf"), tl.float32)
    high = tl.full((KEEP, RED), 0.0 if SYMMETRIC else float("-inf"), tl.float32)
    for start in range(p * part, min((p + 1) * part, length), RED):
        r = start + tl.arange(0, RED)
        inside = there[:, None] & (r < length)[None, :]
        value = widened(tl.load(base + along(r, x_r, x_s, SEGMENT)[None, :], mask=inside, other=0.0))
        if SYMMETRIC:
            high = tl.maximum(high, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
        else:
            low = tl.minimum(low, tl.where(inside, value, float("inf")), propagate_nan=tl.PropagateNan.ALL)
            high = tl.maximum(high, tl.where(inside, value, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    line = p.to(tl.int64) * (tl.num_programs(0) // parts // tiles) * inner + o.to(tl.int64) * inner + k
    tl.store(highs + line, most(high), mask=there)
    if not SYMMETRIC:
        tl.store(lows + line, least(low), mask=there)


@triton.jit(do_not_specialize=["clip", "count", "parts"])
def _join(
    lows, highs, scales, zeros, clip, count, parts, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, CLIPPED: tl.constexpr,
    SETS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Parameters of sets from the extrema of their parts."""
    k, p = tl.program_id(0).to(tl.int64) * SETS + tl.arange(0, SETS), tl.arange(0, PARTS)
    at, inside = p[None, :] * count + k[:, None], (k < count)[:, None] & (p < parts)[None, :]
    high = most(tl.load(highs + at, mask=inside, other=0.0 if SYMMETRIC else float("-inf")))
    low = high
    if not SYMMETRIC:
        low = least(tl.load(lows + at, mask=inside, other=float("inf")))
        lost = (low != low) | (high != high)
        low, high = tl.where(lost, float("nan"), low), tl.where(lost, float("nan"), high)
    scale, zero = _steps_of(low, high, clip, scales.dtype.element_ty, BITS, SYMMETRIC, CLIPPED)
    tl.store(scales + k, scale, mask=k < count)
    if not SYMMETRIC:
        tl.store(zeros + k, zero, mask=k < count)


def parameters(x: Tensor, sets: Sets, bits: int, clip: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(scale, zero) of the sets of x, flat, in the dtype of x; symmetric: zero is of no use."""
    return _in_one(x, sets, bits, clip, symmetric, None) if sets.fits else _in_parts(x, sets, bits, clip, symmetric)


def quantise(x: Tensor, sets: Sets, bits: int, clip: float, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero): codes uint8 in the shape of x, without gaps; the others as `parameters` gives them."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    if sets.fits:
        return codes, *_in_one(x, sets, bits, clip, symmetric, codes)
    scale, zero = _in_parts(x, sets, bits, clip, symmetric)
    return encode(x, sets, bits, scale, None if symmetric else zero, codes, own=clip == 1), scale, zero


def _made(x: Tensor, sets: Sets, symmetric: bool) -> tuple[Tensor, Tensor]:
    scale = torch.empty(sets.count, dtype=x.dtype, device=x.device)
    return scale, scale if symmetric else torch.empty_like(scale)


def _in_one(x: Tensor, sets: Sets, bits: int, clip: float, symmetric: bool, codes: Tensor | None) -> tuple[Tensor, Tensor]:
    scale, zero = _made(x, sets, symmetric)
    keep, red, warps = sets.tile()
    tiles = sets.tiles(keep)
    _quantise[(sets.outer[0] * sets.outer[1] * tiles,)](
        x, scale if codes is None else codes, scale, zero, float(clip), sets.outer[1], sets.inner, sets.length, tiles, *sets.given,
        *sets.made, RUN=sets.run, SEGMENT=sets.segment, BITS=bits, SYMMETRIC=symmetric, CLIPPED=clip != 1, CODES=codes is not None,
        WHOLE=red == sets.length, EIGHTS=sets.eights(sets.made) if sets.across else 0, KEEP=keep, RED=red, num_warps=warps, **EXACT,
    )  # fmt: skip
    return scale, zero


def _in_parts(x: Tensor, sets: Sets, bits: int, clip: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    scale, zero = _made(x, sets, symmetric)
    keep, red, warps = sets.tile()
    tiles = sets.tiles(keep)
    programs = sets.outer[0] * sets.outer[1] * tiles
    # enough programs for the device, each long enough that its last reduction costs little beside its reading
    wanted = min(PARTS, ceil_div(16 * multiprocessors(x), programs), ceil_div(sets.length, 4 * red))
    part = ceil_div(ceil_div(sets.length, wanted), red) * red
    parts = ceil_div(sets.length, part)
    low, high = torch.empty((2, parts, sets.count), dtype=torch.float32, device=x.device)
    _extrema[(programs * parts,)](
        x, low, high, sets.outer[1], sets.inner, sets.length, tiles, parts, part, *sets.given, RUN=sets.run, SEGMENT=sets.segment,
        SYMMETRIC=symmetric, KEEP=keep, RED=red, num_warps=warps, **EXACT,
    )  # fmt: skip
    room = next_power_of_two(parts)
    each = max(1, min(next_power_of_two(sets.count), 2048 // room))
    _join[(ceil_div(sets.count, each),)](
        low, high, scale, zero, float(clip), sets.count, parts, BITS=bits, SYMMETRIC=symmetric, CLIPPED=clip != 1, SETS=each, PARTS=room,
        num_warps=4, **EXACT,
    )  # fmt: skip
    return scale, zero
