"""Lists of a vertical-slash pattern in four steps, none of which sorts or holds more than tables of n_k and the lists themselves.

    tables   below[u]: the greatest chosen offset < u;  before[x]: how many chosen columns are < x
    count    each thread takes the walk of one query tile, step by step in `u = end - block - start`, to
             `min(below[u], u - block)`; columns inside its tiles are differences of `before`
    walk     the same walk again, which now knows where its list lies
    columns  a program a query tile: each column looks for the last tile that begins at or before it

A walk is a chain of dependent reads, up to `n_k / block` of them, of a table that lies in the L2 cache: all walks go side by side.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.estimate.triton.common import empty

LANES = 32  # walks of a program, one a thread
POSITIONS = 1024  # of the tables, for a program
COLUMNS = 512  # looked for at a time


@triton.jit
def _fewer(at, size, levels, x):
    """How many of the `size` ascending numbers from `at` on are less than x; levels: bits of size."""
    low = tl.zeros_like(x)
    high = low + size
    for _ in range(0, levels):
        middle = (low + high) >> 1
        open_ = low < high
        less = open_ & (tl.load(at + middle, mask=open_, other=0) < x)
        low = tl.where(less, middle + 1, low)
        high = tl.where(open_ & ~less, middle, high)
    return low


@triton.jit
def _tables(columns, offsets, below, before, n_k, wide, far, column_levels, offset_levels, parts, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    row = (pid // parts).to(tl.int64)
    x = (pid % parts) * BLOCK + tl.arange(0, BLOCK)
    to = row * (n_k + 1) + x
    found = _fewer(columns + row * wide, wide, column_levels, x)
    tl.store(before + to, found, mask=x <= n_k)
    found = _fewer(offsets + row * far, far, offset_levels, x)
    greatest = tl.load(offsets + row * far + found - 1, mask=(found > 0) & (x <= n_k), other=-1)
    tl.store(below + to, greatest, mask=x <= n_k)


@triton.jit
def _walk(
    below, before, ends, starts, lengths, tiles, walks, parts, n_k, block, limit, FILL: tl.constexpr, LANES: tl.constexpr
):
    """With FILL `limit` entries of each list; without, the lengths of both lists, the first of at most `limit`."""
    pid = tl.program_id(0)
    row = (pid // parts).to(tl.int64)
    tile = (pid % parts) * LANES + tl.arange(0, LANES)
    there = tile < tiles
    end = tl.load(ends + tile, mask=there, other=0).to(tl.int32)
    near = tl.maximum(tl.minimum(end, n_k), 0)
    first = end - block
    below += row * (n_k + 1)
    before += row * (n_k + 1)
    furthest = tl.load(below + near, mask=there, other=-1)
    alive = furthest >= 0
    u = tl.minimum(furthest, first)
    mine = row * tiles + tile
    if FILL:
        for step in range(0, limit):
            start = first - u
            tl.store(starts + mine * limit + step, tl.where(alive & (start < n_k), start, n_k), mask=there)
            left = tl.load(below + tl.maximum(u, 0), mask=alive, other=-1)
            alive = alive & (left >= 0)
            u = tl.minimum(left, u - block)
    else:
        taken, inside = tl.zeros_like(tile), tl.zeros_like(tile)
        # each step is a block further down, until one passes the newest row
        most = tl.minimum(limit, tl.maximum(tl.max(first, axis=0), 0) // block + 2)
        for _ in range(0, most):
            start = first - u
            real = alive & (start < n_k)
            inside += tl.load(before + tl.minimum(start + block, near), mask=real, other=0) - tl.load(before + start, mask=real, other=0)
            taken += alive.to(tl.int32)
            left = tl.load(below + tl.maximum(u, 0), mask=alive, other=-1)
            alive = alive & (left >= 0)
            u = tl.minimum(left, u - block)
        tl.store(lengths + mine, taken, mask=there)
        tl.store(lengths + walks + mine, tl.load(before + near, mask=there, other=0) - inside, mask=there)


@triton.jit
def _columns(columns, before, ends, starts, tokens, tiles, n_k, block, wide, most, longest, levels, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    row, tile = pid // tiles, pid % tiles
    end = tl.maximum(tl.minimum(tl.load(ends + tile).to(tl.int32), n_k), 0)
    seen = tl.load(before + row * (n_k + 1) + end)
    mine, to = starts + pid * most, tokens + pid * longest
    kept = tl.full((), 0, tl.int32)
    for begin in range(0, seen, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        c = tl.load(columns + row * wide + j, mask=j < seen, other=-1)
        # entries past the end of the list hold n_k, which no column reaches
        at = _fewer(mine, most, levels, c + 1)
        last = tl.load(mine + at - 1, mask=at > 0, other=-block - 1)
        keep = (j < seen) & (c >= last + block)
        place = kept + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        tl.store(to + place, c, mask=keep)
        kept += tl.sum(keep.to(tl.int32), axis=0)
    for begin in range(kept, longest, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        tl.store(to + j, tl.zeros_like(j) + n_k, mask=j < longest)


def launch_counts(columns: Tensor, offsets: Tensor, ends: Tensor, n_k: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    b, h, wide = columns.shape
    far, tiles, rows = offsets.shape[2], ends.shape[0], b * h
    below, before = (empty(columns, b, h, n_k + 1, dtype=torch.int32) for _ in range(2))
    parts = triton.cdiv(n_k + 1, POSITIONS)
    _tables[(rows * parts,)](
        columns, offsets, below, before, n_k, wide, far, wide.bit_length(), far.bit_length(), parts, BLOCK=POSITIONS, num_warps=4
    )
    lengths = empty(columns, 2, b, h, tiles, dtype=torch.int32)
    parts = triton.cdiv(tiles, LANES)
    # a step covers an offset at least
    _walk[(rows * parts,)](
        below, before, ends, lengths, lengths, tiles, rows * tiles, parts, n_k, block, far, FILL=False, LANES=LANES, num_warps=1
    )
    return below, before, lengths


def launch_fill(
    columns: Tensor, below: Tensor, before: Tensor, ends: Tensor, n_k: int, block: int, most: int, longest: int
) -> tuple[Tensor, Tensor]:
    b, h, wide = columns.shape
    tiles, rows = ends.shape[0], b * h
    starts, tokens = (empty(columns, b, h, tiles, size, dtype=torch.int32) for size in (most, longest))
    if most:
        parts = triton.cdiv(tiles, LANES)
        _walk[(rows * parts,)](
            below, before, ends, starts, starts, tiles, rows * tiles, parts, n_k, block, most, FILL=True, LANES=LANES, num_warps=1
        )
    if longest:
        _columns[(rows * tiles,)](
            columns, before, ends, starts, tokens, tiles, n_k, block, wide, most, longest, most.bit_length(), BLOCK=COLUMNS, num_warps=4
        )
    return starts, tokens


@torch.library.custom_op("saccade::estimate_slash_measure", mutates_args=())
def measure(columns: Tensor, offsets: Tensor, ends: Tensor, n_k: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """(below `(B, H, n_k + 1)`, before of that shape, lengths of starts and tokens `(2, B, H, Tq)`) int32 of contiguous columns `(B, H, C)`
    and offsets `(B, H, O)` int32 and ends `(Tq,)` int64."""
    return launch_counts(columns, offsets, ends, n_k, block)


@measure.register_fake
def _(columns: Tensor, offsets: Tensor, ends: Tensor, n_k: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    table = (*columns.shape[:2], n_k + 1)
    return columns.new_empty(table), columns.new_empty(table), columns.new_empty((2, *columns.shape[:2], ends.shape[0]))


@torch.library.custom_op("saccade::estimate_slash_fill", mutates_args=())
def fill(
    columns: Tensor, below: Tensor, before: Tensor, ends: Tensor, n_k: int, block: int, most: int, longest: int
) -> tuple[Tensor, Tensor]:
    """(starts `(B, H, Tq, most)`, tokens `(B, H, Tq, longest)`) int32 from what `measure` found."""
    return launch_fill(columns, below, before, ends, n_k, block, most, longest)


@fill.register_fake
def _(
    columns: Tensor, below: Tensor, before: Tensor, ends: Tensor, n_k: int, block: int, most: int, longest: int
) -> tuple[Tensor, Tensor]:
    shape = (*columns.shape[:2], ends.shape[0])
    return columns.new_empty((*shape, most)), columns.new_empty((*shape, longest))
