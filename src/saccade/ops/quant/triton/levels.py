"""Codebooks: the nearest level of each value, and the level that each code stands for."""
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.gpu import ceil_div, next_power_of_two
from saccade.ops.quant.triton.common import widened

BLOCK = 2048


@triton.jit
def _bound(bounds, i: tl.constexpr, COUNT: tl.constexpr):
    """Bound i, or one that no number lies above."""
    if i < COUNT:
        return widened(tl.load(bounds + i))
    return tl.full((), float("inf"), tl.float32)


@triton.jit(do_not_specialize=["tiles"])
def _nearest(x, bounds, codes, n, tiles, COUNT: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """A search by halving in STEPS >= 3: the first three among 7 bounds that all values share, the others look each bound up.

    What is not a number counts as above all bounds, as in a sorted row.
    """
    row = (tl.program_id(0) // tiles).to(tl.int64)
    at = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = widened(tl.load(x + row * n + at, mask=at < n, other=0.0))
    own = bounds + row * COUNT
    SPAN: tl.constexpr = 2 ** (STEPS - 3)
    upper = value <= _bound(own, 4 * SPAN - 1, COUNT)
    second = tl.where(upper, _bound(own, 2 * SPAN - 1, COUNT), _bound(own, 6 * SPAN - 1, COUNT))
    right = value <= second
    below = tl.where(upper, _bound(own, SPAN - 1, COUNT), _bound(own, 5 * SPAN - 1, COUNT))
    above = tl.where(upper, _bound(own, 3 * SPAN - 1, COUNT), _bound(own, 7 * SPAN - 1, COUNT))
    last = value <= tl.where(right, below, above)
    code = tl.where(upper, 0, 4 * SPAN) + tl.where(right, 0, 2 * SPAN) + tl.where(last, 0, SPAN)
    for i in tl.static_range(STEPS - 3):
        ahead = code + 2 ** (STEPS - 4 - i)
        bound = widened(tl.load(own + ahead - 1, mask=ahead <= COUNT, other=float("inf")))
        code = tl.where(value <= bound, code, ahead)
    if COUNT < 2**STEPS - 1:
        code = tl.minimum(code, COUNT)
    tl.store(codes + row * n + at, code.to(tl.uint8), mask=at < n)


@triton.jit(do_not_specialize=["tiles"])
def _levels_of(codes, levels, y, n, tiles, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    at = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(codes + row * n + at, mask=at < n, other=0).to(tl.int32)
    # a code without a level is met by the last one: nothing outside the book is read
    level = tl.load(levels + row * COUNT + tl.minimum(code, COUNT - 1))
    tl.store(y + row * n + at, level, mask=at < n)


def _grid(x: Tensor, books: Tensor) -> tuple[int, int, int, int]:
    """Rows with a book of their own, values of each, values of a program, programs of a row."""
    rows = 1 if books.ndim == 1 else x[..., 0].numel()
    n = x.numel() // rows
    block = min(BLOCK, next_power_of_two(n))
    return rows, n, block, ceil_div(n, block)


def nearest(x: Tensor, bounds: Tensor) -> Tensor:
    """How many of the ascending `bounds (L - 1,)` or `(..., L - 1)`, without gaps, each of x `(..., n)` lies above: uint8."""
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    rows, n, block, tiles = _grid(x, bounds)
    count = bounds.shape[-1]
    _nearest[(rows * tiles,)](
        x, bounds, codes, n, tiles, COUNT=count, STEPS=max(3, count.bit_length()), BLOCK=block,
        num_warps=max(1, block // 512),
    )  # fmt: skip
    return codes


def levels_of(codes: Tensor, levels: Tensor) -> Tensor:
    """The levels `(L,)` or `(..., L)`, without gaps, that codes `(..., n)` stand for."""
    codes = codes.contiguous()
    y = torch.empty(codes.shape, dtype=levels.dtype, device=codes.device)
    rows, n, block, tiles = _grid(codes, levels)
    _levels_of[(rows * tiles,)](codes, levels, y, n, tiles, COUNT=levels.shape[-1], BLOCK=block, num_warps=max(1, block // 512))
    return y
