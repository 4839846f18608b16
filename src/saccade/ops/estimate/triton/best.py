"""The highest of a row, by id, a row per program and nothing sorted.

A score becomes a whole number of the same order; the edge is the number that exactly `count` entries reach or pass, up to ties.

Short rows lie in registers, and the edge is found bit by bit (32 counts). Long rows are read twice. Every n/m-th entry is a sample, in
which the edge is at rank m count / n, give or take 4 standard deviations: two numbers between which it almost surely lies. The first
reading counts what lies above both and keeps the few entries between them, among which the edge is found as in a short row; the second
writes ids in order. Where the sample misled, as it does when values repeat with a period or tie in masses, the bits are counted over
the whole row, which is slower and gives the same.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.estimate.triton.common import empty
from saccade.ops.gpu import ceil_div, next_power_of_two

NOTHING: tl.constexpr = tl.constexpr(-2147483648)  # below the order of every score


@triton.jit
def _order(x):
    """float32 to int32 of the same order, above NOTHING; a nan is above all, and both zeros are one."""
    bits = (tl.where(x != x, 0.0, x) + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, 2147483647, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _load(scores, c, n):
    """Orders of entries c; of those past the end NOTHING."""
    x = tl.load(scores + c, mask=c < n, other=0.0).to(tl.float32)
    return tl.where(c < n, _order(x), NOTHING)


@triton.jit
def _edge(key, count):
    """The largest number that at least `count` of the keys reach (count >= 1), int32."""
    edge = tl.full((), -2147483648, tl.int64)
    bit = tl.full((), 2147483648, tl.int64)
    for _ in range(32):
        trial = edge + bit
        enough = tl.sum((key >= trial.to(tl.int32)).to(tl.int32), axis=0) >= count
        edge = tl.where(enough & (trial < 2147483648), trial, edge)
        bit = bit // 2
    return edge.to(tl.int32)


@triton.jit
def _take(key, c, edge, room, equals, written, to):
    """Write the ids c that are above the edge, and of those on it as many as there is room for; (equals, written) so far."""
    above = key > edge
    equal = (key == edge).to(tl.int32)
    keep = (above | ((equal > 0) & (equals + tl.cumsum(equal, axis=0) <= room))).to(tl.int32)
    place = written + tl.cumsum(keep, axis=0) - 1
    tl.store(to + place, c.to(tl.int64), mask=keep > 0)
    return equals + tl.sum(equal, axis=0), written + tl.sum(keep, axis=0)


@triton.jit
def _short(scores, ids, n, count, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    key = _load(scores + row * n, c, n)
    edge = _edge(key, count)
    room = count - tl.sum((key > edge).to(tl.int32), axis=0)
    zero = tl.full((), 0, tl.int32)
    _take(key, c, edge, room, zero, zero, ids + row * count)


@triton.jit
def _long(
    scores, ids, between, n, count, stride, upper_rank, lower_rank, SAMPLE: tl.constexpr, BLOCK: tl.constexpr, KEPT: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    mine, kept = scores + row * n, between + row * KEPT
    s = tl.arange(0, SAMPLE)
    sample = _load(mine, s * stride, n)
    upper, lower = tl.full((), 2147483647, tl.int32), tl.full((), -2147483648, tl.int32)
    if upper_rank >= 1:
        upper = _edge(sample, upper_rank)
    if lower_rank <= SAMPLE:
        lower = _edge(sample, lower_rank)

    above, inside = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for first in range(0, n, BLOCK):
        c = first + tl.arange(0, BLOCK)
        key = _load(mine, c, n)
        above += tl.sum((key > upper).to(tl.int32), axis=0)
        middle = ((key <= upper) & (key >= lower) & (c < n)).to(tl.int32)
        place = inside + tl.cumsum(middle, axis=0) - 1
        tl.store(kept + place, key, mask=(middle > 0) & (place < KEPT))
        inside += tl.sum(middle, axis=0)
    tl.debug_barrier()  # what other threads have kept is read below

    edge = upper
    if (above < count) & (above + inside >= count) & (inside <= KEPT):
        k = tl.arange(0, KEPT)
        edge = _edge(tl.load(kept + k, mask=k < inside, other=-2147483648), count - above)
    else:
        far = tl.full((), -2147483648, tl.int64)
        bit = tl.full((), 2147483648, tl.int64)
        for _ in range(32):
            trial = far + bit
            reached = tl.full((), 0, tl.int32)
            for first in range(0, n, BLOCK):
                reached += tl.sum((_load(mine, first + tl.arange(0, BLOCK), n) >= trial.to(tl.int32)).to(tl.int32), axis=0)
            far = tl.where((reached >= count) & (trial < 2147483648), trial, far)
            bit = bit // 2
        edge = far.to(tl.int32)

    higher = tl.full((), 0, tl.int32)
    for first in range(0, n, BLOCK):
        higher += tl.sum((_load(mine, first + tl.arange(0, BLOCK), n) > edge).to(tl.int32), axis=0)
    equals, written = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for first in range(0, n, BLOCK):
        c = first + tl.arange(0, BLOCK)
        equals, written = _take(_load(mine, c, n), c, edge, count - higher, equals, written, ids + row * count)


@dataclass(frozen=True)
class Sizes:
    """short: rows up to this long lie in registers. sample, kept: powers of two; block: entries read at a time."""

    short: int = 16384
    sample: int = 4096
    block: int = 4096
    kept: int = 8192


def launch(scores: Tensor, count: int, sizes: Sizes | None = None) -> Tensor:
    """int64 `(R, count)` of scores `(R, n)`, 0 < count < n."""
    sizes = sizes or Sizes()
    scores = scores.contiguous()
    rows, n = scores.shape
    ids = empty(scores, rows, count, dtype=torch.int64)
    if n <= sizes.short:
        block = next_power_of_two(n)
        _short[(rows,)](scores, ids, n, count, BLOCK=block, num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16)
        return ids
    # every so many-th entry, which fills the sample only where that divides n
    stride = ceil_div(n, sizes.sample)
    taken, share = ceil_div(n, stride), count / n
    spread = 4 * math.sqrt(taken * share * (1 - share)) + 4
    between = empty(scores, rows, sizes.kept, dtype=torch.int32)
    upper, lower = math.floor(share * taken - spread), math.ceil(share * taken + spread)
    _long[(rows,)](
        scores, ids, between, n, count, stride, upper, lower, SAMPLE=sizes.sample, BLOCK=sizes.block,
        KEPT=sizes.kept, num_warps=16,
    )  # fmt: skip
    return ids


@torch.library.custom_op("saccade::best_ids", mutates_args=())
def best(scores: Tensor, count: int) -> Tensor:
    """int64 `(R, count)`: ids of the highest scores `(R, n)`, ascending, ties to the lower; 0 < count < n."""
    return launch(scores, count)


@best.register_fake
def _(scores: Tensor, count: int) -> Tensor:
    return scores.new_empty((scores.shape[0], count), dtype=torch.int64)
