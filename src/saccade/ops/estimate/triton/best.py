"""The highest of a row, by id, with nothing sorted and nothing asked of the host.

A score becomes a whole number of the same order; the edge is the number that exactly `count` entries reach or pass, up to ties.

Short rows lie in registers of one program, and the edge is found bit by bit (32 counts). Long rows are cut in parts, a program each,
and read twice:

    gather   every n/m-th entry is a sample, in which the edge is at rank m count / n, give or take 4 standard deviations: two numbers
             between which it almost surely lies. Entries above both are counted, the few between them go to a list.
    settle   a program a row: the edge among the listed entries, as in a short row.
    write    ids in order; what earlier parts wrote is known from their counts and the list.

Where the sample misled, as it does when values repeat with a period or tie in masses, settle counts the bits over the whole row, which
is slower and gives the same.
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
from saccade.ops.gpu import ceil_div, multiprocessors, next_power_of_two

NOTHING: tl.constexpr = tl.constexpr(-2147483648)  # below the order of every score
PROGRAMS = 4  # a multiprocessor, of the parts of long rows
HALF: tl.constexpr = tl.constexpr(65536)  # two counts of a sample in one sum


@triton.jit
def _order(x):
    """float32 to int32 of the same order, above NOTHING; a nan is above all, and both zeros are one."""
    bits = (tl.where(x != x, 0.0, x) + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, 2147483647, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _load(scores, c, end):
    """Orders of entries c; of those from `end` on NOTHING."""
    x = tl.load(scores + c, mask=c < end, other=0.0).to(tl.float32)
    return tl.where(c < end, _order(x), NOTHING)


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
def _bounds(key, upper_rank, lower_rank, SAMPLE: tl.constexpr):
    """The edges of two ranks in one search; without a bound where a rank is none of the sample's."""
    upper = tl.full((), -2147483648, tl.int64)
    lower = tl.full((), -2147483648, tl.int64)
    bit = tl.full((), 2147483648, tl.int64)
    for _ in range(32):
        higher, deeper = upper + bit, lower + bit
        both = (key >= higher.to(tl.int32)).to(tl.int32) * HALF + (key >= deeper.to(tl.int32)).to(tl.int32)
        found = tl.sum(both, axis=0)
        upper = tl.where((found // HALF >= upper_rank) & (higher < 2147483648), higher, upper)
        lower = tl.where((found % HALF >= lower_rank) & (deeper < 2147483648), deeper, lower)
        bit = bit // 2
    upper = tl.where(upper_rank >= 1, upper, 2147483647)
    lower = tl.where(lower_rank <= SAMPLE, lower, -2147483648)
    return upper.to(tl.int32), lower.to(tl.int32)


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
def _gather(
    scores, above, listed, places, sizes, n, chunk, stride, upper_rank, lower_rank, parts, SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """above `(R, parts)`: entries past both bounds. listed, places `(R, LISTED)`: orders and parts of those between, in any order, of
    which there are `sizes (R,)`; those that find no room are counted only."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mine = scores + row * n
    upper, lower = _bounds(_load(mine, tl.arange(0, SAMPLE) * stride, n), upper_rank, lower_rank, SAMPLE)
    begin = part * chunk
    end = tl.minimum(begin + chunk, n)
    higher = tl.full((), 0, tl.int32)
    for first in range(begin, end, BLOCK):
        c = first + tl.arange(0, BLOCK)
        key = _load(mine, c, end)
        higher += tl.sum((key > upper).to(tl.int32), axis=0)
        middle = ((key <= upper) & (key >= lower) & (c < end)).to(tl.int32)
        rank = tl.cumsum(middle, axis=0)
        at = tl.atomic_add(sizes + row, tl.sum(middle, axis=0), sem="relaxed") + rank - 1
        inside = (middle > 0) & (at < LISTED)
        tl.store(listed + row * LISTED + at, key, mask=inside)
        tl.store(places + row * LISTED + at, tl.zeros_like(at) + part, mask=inside)
    tl.store(above + row * parts + part, higher)


@triton.jit
def _settle(
    scores, above, listed, sizes, edges, rooms, n, count, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr, LISTED: tl.constexpr
):
    """edges `(R,)`, and rooms `(R,)`: how many entries on the edge are taken; less than 0 where the list is of no use: -1 - room."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, PARTS)
    higher = tl.sum(tl.load(above + row * parts + p, mask=p < parts, other=0), axis=0)
    size = tl.load(sizes + row)
    if (higher < count) & (higher + size >= count) & (size <= LISTED):
        k = tl.arange(0, LISTED)
        key = tl.load(listed + row * LISTED + k, mask=k < size, other=-2147483648)
        edge = _edge(key, count - higher)
        tl.store(edges + row, edge)
        tl.store(rooms + row, count - higher - tl.sum((key > edge).to(tl.int32), axis=0))
    else:
        mine = scores + row * n
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
        past = tl.full((), 0, tl.int32)
        for first in range(0, n, BLOCK):
            past += tl.sum((_load(mine, first + tl.arange(0, BLOCK), n) > edge).to(tl.int32), axis=0)
        tl.store(edges + row, edge)
        tl.store(rooms + row, past - count - 1)


@triton.jit
def _write(
    scores, ids, above, listed, places, sizes, edges, rooms, n, count, chunk, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mine = scores + row * n
    edge, room = tl.load(edges + row), tl.load(rooms + row)
    begin = part * chunk
    higher, equals = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    if room >= 0:
        p = tl.arange(0, PARTS)
        higher += tl.sum(tl.load(above + row * parts + p, mask=p < part, other=0), axis=0)
        size = tl.load(sizes + row)
        for first in range(0, size, BLOCK):
            k = first + tl.arange(0, BLOCK)
            before = (k < size) & (tl.load(places + row * LISTED + k, mask=k < size, other=0) < part)
            key = tl.load(listed + row * LISTED + k, mask=before, other=-2147483648)
            higher += tl.sum((before & (key > edge)).to(tl.int32), axis=0)
            equals += tl.sum((before & (key == edge)).to(tl.int32), axis=0)
    else:
        room = -1 - room
        for first in range(0, begin, BLOCK):
            key = _load(mine, first + tl.arange(0, BLOCK), begin)
            higher += tl.sum((key > edge).to(tl.int32), axis=0)
            equals += tl.sum((key == edge).to(tl.int32), axis=0)
    written = higher + tl.minimum(equals, room)
    end = tl.minimum(begin + chunk, n)
    for first in range(begin, end, BLOCK):
        c = first + tl.arange(0, BLOCK)
        equals, written = _take(_load(mine, c, end), c, edge, room, equals, written, ids + row * count)


@dataclass(frozen=True)
class Sizes:
    """short: rows up to this long lie in registers. sample: of a row, a power of two below 65536. block: entries read at a time.
    listed: entries that a row's list may hold at most, a power of two. parts: of a row; None: as many as fill the GPU."""

    short: int = 4096
    sample: int = 4096
    block: int = 4096
    listed: int = 32768
    parts: int | None = None


def launch(scores: Tensor, count: int, sizes: Sizes | None = None) -> Tensor:
    """int64 `(R, count)` of scores `(R, n)`, 0 < count < n."""
    sizes = sizes or Sizes()
    scores = scores.contiguous()
    rows, n = scores.shape
    ids = empty(scores, rows, count, dtype=torch.int64)
    if n <= sizes.short:
        block = next_power_of_two(n)
        _short[(rows,)](scores, ids, n, count, BLOCK=block, num_warps=4 if block <= 2048 else 8)
        return ids
    # every so many-th entry, which fills the sample only where that divides n
    stride = ceil_div(n, sizes.sample)
    taken, share = ceil_div(n, stride), count / n
    spread = 4 * math.sqrt(taken * share * (1 - share)) + 4
    upper, lower = math.floor(share * taken - spread), math.ceil(share * taken + spread)
    # the list holds what is expected and a third more, as ranks of a sample vary
    listed = min(sizes.listed, next_power_of_two(round(2.7 * spread * stride)))
    parts = sizes.parts or max(1, min(ceil_div(n, sizes.block), ceil_div(PROGRAMS * multiprocessors(scores), rows)))
    chunk = ceil_div(ceil_div(n, parts), sizes.block) * sizes.block
    parts = ceil_div(n, chunk)
    counts = empty(scores, 3, rows, dtype=torch.int32)
    length, edges, rooms = counts.unbind()
    length.zero_()
    above, keys, places = (empty(scores, rows, size, dtype=torch.int32) for size in (parts, listed, listed))
    padded = next_power_of_two(parts)
    _gather[(rows, parts)](
        scores, above, keys, places, length, n, chunk, stride, upper, lower, parts, SAMPLE=sizes.sample, BLOCK=sizes.block,
        LISTED=listed, num_warps=8,
    )  # fmt: skip
    _settle[(rows,)](
        scores, above, keys, length, edges, rooms, n, count, parts, PARTS=padded, BLOCK=sizes.block, LISTED=listed,
        num_warps=8 if listed <= 8192 else 16,
    )  # fmt: skip
    _write[(rows, parts)](
        scores, ids, above, keys, places, length, edges, rooms, n, count, chunk, parts, PARTS=padded, BLOCK=sizes.block, LISTED=listed,
        num_warps=8,
    )  # fmt: skip
    return ids


@torch.library.custom_op("saccade::best_ids", mutates_args=())
def best(scores: Tensor, count: int) -> Tensor:
    """int64 `(R, count)`: ids of the highest scores `(R, n)`, ascending, ties to the lower; 0 < count < n."""
    return launch(scores, count)


@best.register_fake
def _(scores: Tensor, count: int) -> Tensor:
    return scores.new_empty((scores.shape[0], count), dtype=torch.int64)
