"""Codes of values for given parameters, and the values that codes stand for."""
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.gpu import ceil_div, next_power_of_two
from saccade.ops.quant.sets import TILE, Sets
from saccade.ops.quant.triton.common import EXACT, places, rounded, tile_of, to_codes, widened


@triton.jit(do_not_specialize=["outer", "tiles", "parts"])
def _encode(
    x, codes, scales, zeros, outer, inner, length, tiles, parts, x_o, x_p, x_k, x_l, x_r, x_s, c_o, c_p, c_k, c_l, c_r, c_s,
    RUN: tl.constexpr, SEGMENT: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, OWN: tl.constexpr, EIGHTS: tl.constexpr,
    KEEP: tl.constexpr, RED: tl.constexpr,
):  # fmt: skip
    first, second, line, k, r = tile_of(outer, inner, tiles, parts, KEEP, RED)
    inside = (k < inner)[:, None] & (r < length)[None, :]
    at = places(k, r, x_k, x_l, x_r, x_s, RUN, SEGMENT, 0)
    value = widened(tl.load(x + first * x_o + second * x_p + at, mask=inside, other=0.0))
    step = widened(tl.load(scales + line, mask=k < inner, other=0.0))
    zero = step if SYMMETRIC else widened(tl.load(zeros + line, mask=k < inner, other=0.0))
    code = to_codes(value, zero, step, BITS, SYMMETRIC, OWN, scales.dtype.element_ty != tl.float32)
    at = places(k, r, c_k, c_l, c_r, c_s, RUN, SEGMENT, EIGHTS)
    tl.store(codes + first * c_o + second * c_p + at, code.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["outer", "tiles", "parts"])
def _decode(
    codes, y, scales, zeros, outer, inner, length, tiles, parts, c_o, c_p, c_k, c_l, c_r, c_s, y_o, y_p, y_k, y_l, y_r, y_s,
    RUN: tl.constexpr, SEGMENT: tl.constexpr, MIDDLE: tl.constexpr, ZERO: tl.constexpr, EIGHTS: tl.constexpr,
    KEEP: tl.constexpr, RED: tl.constexpr,
):  # fmt: skip
    first, second, line, k, r = tile_of(outer, inner, tiles, parts, KEEP, RED)
    inside = (k < inner)[:, None] & (r < length)[None, :]
    at = places(k, r, c_k, c_l, c_r, c_s, RUN, SEGMENT, EIGHTS)
    code = widened(tl.load(codes + first * c_o + second * c_p + at, mask=inside, other=0))
    step = widened(tl.load(scales + line, mask=k < inner, other=0.0))[:, None]
    value = (code - MIDDLE) * step
    if ZERO:
        value += widened(tl.load(zeros + line, mask=k < inner, other=0.0))[:, None]
    at = places(k, r, y_k, y_l, y_r, y_s, RUN, SEGMENT, 0)
    tl.store(y + first * y_o + second * y_p + at, rounded(value, y.dtype.element_ty), mask=inside)


def _grid(sets: Sets) -> tuple[int, int, int, int, int]:
    """Sets and values of a tile, its warps, and how many tiles cover the inner sets and a set's values."""
    keep, red, warps = sets.tile()
    if sets.across:  # no set needs to be held whole
        red = min(red, 64)
    keep = min(next_power_of_two(sets.inner), max(keep, TILE // red))
    return keep, red, min(warps, max(1, keep * red // 1024)), sets.tiles(keep), ceil_div(sets.length, red)


def encode(x: Tensor, sets: Sets, bits: int, scale: Tensor, zero: Tensor | None, codes: Tensor, own: bool = False) -> Tensor:
    """Writes the codes of x for the parameters of its sets, flat; zero None: symmetric. own: they are x's ranges, not clipped."""
    keep, red, warps, tiles, parts = _grid(sets)
    _encode[(sets.outer[0] * sets.outer[1] * tiles * parts,)](
        x, codes, scale, scale if zero is None else zero, sets.outer[1], sets.inner, sets.length, tiles, parts, *sets.given, *sets.made,
        RUN=sets.run, SEGMENT=sets.segment, BITS=bits, SYMMETRIC=zero is None, OWN=own,
        EIGHTS=sets.eights(sets.made) if sets.across else 0, KEEP=keep, RED=red, num_warps=warps, **EXACT,
    )  # fmt: skip
    return codes


def decode(codes: Tensor, sets: Sets, scale: Tensor, zero: Tensor | None, middle: int, dtype: torch.dtype) -> Tensor:
    """`scale * (codes - middle) + zero` with the parameters of the sets of codes, flat."""
    y = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    keep, red, warps, tiles, parts = _grid(sets)
    _decode[(sets.outer[0] * sets.outer[1] * tiles * parts,)](
        codes, y, scale, scale if zero is None else zero, sets.outer[1], sets.inner, sets.length, tiles, parts, *sets.given, *sets.made,
        RUN=sets.run, SEGMENT=sets.segment, MIDDLE=middle, ZERO=zero is not None,
        EIGHTS=sets.eights(sets.given), KEEP=keep, RED=red, num_warps=warps, **EXACT,
    )  # fmt: skip
    return y
