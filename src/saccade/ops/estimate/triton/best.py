"""The highest of a row, by id, with nothing sorted and nothing asked of the host.

A score becomes a whole number of the same order; the edge is the number that exactly `count` entries reach or pass, up to ties. It is
found by halving a range until the count is met.

Short rows lie in registers of one program. Long rows are cut in parts, a program each:

    bound    a program a row: every n/m-th entry is a sample, in which the edge is at rank m count / n, give or take 4 standard
             deviations: two numbers between which it almost surely lies.
    gather   entries not below both bounds are noted in order, a list for each part; those between the bounds go to one list of the row.
    settle   a program a row: the edge among the few between the bounds, as in a short row.
    write    a part's list less what the edge leaves out; what earlier parts write is known from their counts and the list of the row.

Where the sample misled, as it does when values repeat with a period, settle does all of the row, which is slower and gives the same.

Rows begin anywhere and are read 16 bytes at a time all the same: from the multiple of 16 bytes at or before their first entry to the
one at or after their last. What lies around a row is read with it and never chosen. So neighbours share a thread, which makes ranks
cheap.
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

from saccade.ops.estimate.triton.common import empty, rows_in_groups
from saccade.ops.gpu import ceil_div, multiprocessors, next_power_of_two

NOTHING: tl.constexpr = tl.constexpr(-2147483648)  # below the order of every score
MOST: tl.constexpr = tl.constexpr(2147483647)  # the order of a nan
HALF: tl.constexpr = tl.constexpr(65536)  # two counts in one sum: neither may reach half of this
UPPER: tl.constexpr = tl.constexpr(0)  # what the kernels tell each other of a row, at these places
LOWER: tl.constexpr = tl.constexpr(1)
SIZE: tl.constexpr = tl.constexpr(2)
EDGE: tl.constexpr = tl.constexpr(3)
ROOM: tl.constexpr = tl.constexpr(4)
STATE: tl.constexpr = tl.constexpr(8)
LONGEST_PART = 32768  # entries: places in a part are int16
# lengths and strides grow with a cache: a kernel is compiled once for all
ANY = ["stride", "lead", "n", "count", "blocks", "parts", "step", "upper_rank", "lower_rank", "slack"]


@triton.jit
def _order(x):
    """float32 to int32 of the same order, above NOTHING; a nan is above all, and both zeros are one."""
    bits = (tl.where(x != x, 0.0, x) + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, MOST, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _begin(scores, row, stride, lead, GROUP: tl.constexpr):
    """Where the groups begin that hold a row, and how many entries of the first are not the row's."""
    at = row * stride + lead
    even = at // GROUP * GROUP
    return scores + even, (at - even).to(tl.int32)


@triton.jit
def _load(mine, p, begin, end, GROUP: tl.constexpr):
    """Orders of the entries at places p from `begin` to `end`, NOTHING at others. Whole groups are read."""
    x = tl.load(mine + p, mask=p < (end + GROUP - 1) // GROUP * GROUP, other=0.0).to(tl.float32)
    return tl.where((p >= begin) & (p < end), _order(x), NOTHING)


@triton.jit
def _middle(low, high):
    """Half-way between two int32, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def _edge_between(key, count, low, high):
    """A number from `low` to `high`, int32: `count` keys (at least 1) reach it, and of more than these only as ties.

    At least `count` keys reach `low`, less are above `high`. Where keys of rank `count` and after are two numbers, any between them, else
    the key of that rank.
    """
    while low < high:
        trial = _middle(low, high)
        reached = tl.sum((key >= trial).to(tl.int32), axis=0)
        low = tl.where(reached >= count, trial, low)
        high = tl.where(reached > count, high, trial - (reached < count).to(tl.int32))
    return low


@triton.jit
def _edge(key, count):
    """The same where nothing is known of the keys."""
    return _edge_between(key, count, tl.full((), -2147483648, tl.int32), tl.max(key, axis=0))


@triton.jit
def _take(key, c, edge, room, higher, equals, to):
    """Write the ids c of keys above the edge, and of as many on it as there is room for; (higher, equals): how many there were so far."""
    above, equal = key > edge, key == edge
    both = above.to(tl.int32) * HALF + equal.to(tl.int32)
    ranks, total = tl.cumsum(both, axis=0), tl.sum(both, axis=0)
    equal_rank = equals + (ranks & (HALF - 1))
    place = higher + (ranks >> 16) + tl.minimum(equal_rank, room) - 1
    tl.store(to + place, c.to(tl.int64), mask=above | (equal & (equal_rank <= room)))
    return higher + (total >> 16), equals + (total & (HALF - 1))


@triton.jit(do_not_specialize=ANY)
def _short(scores, ids, stride, lead, n, count, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    mine, skip = _begin(scores, row, stride, lead, GROUP)
    p = tl.arange(0, BLOCK)
    key = _load(mine, p, skip, skip + n, GROUP)
    edge = _edge(key, count)
    room = count - tl.sum((key > edge).to(tl.int32), axis=0)
    zero = tl.full((), 0, tl.int32)
    _take(key, p - skip, edge, room, zero, zero, ids + row * count)


@triton.jit(do_not_specialize=ANY)
def _bound(scores, state, stride, lead, n, step, upper_rank, lower_rank, slack, SAMPLE: tl.constexpr):
    """Numbers that as many entries of the sample reach as the ranks say, or up to `slack` more; none where a rank is not the sample's."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, SAMPLE) * step
    x = tl.load(scores + row * stride + lead + c, mask=c < n, other=0.0).to(tl.float32)
    key = tl.where(c < n, _order(x), NOTHING)
    upper = tl.full((), -2147483648, tl.int32)
    lower, highest = upper, tl.max(key, axis=0)
    deepest = highest
    while (upper < highest) | (lower < deepest):
        higher, deeper = _middle(upper, highest), _middle(lower, deepest)
        found = tl.sum((key >= higher).to(tl.int32) * HALF + (key >= deeper).to(tl.int32), axis=0)
        past, reached = (found >> 16) - upper_rank, (found & (HALF - 1)) - lower_rank
        upper = tl.where(past >= 0, higher, upper)
        highest = tl.where(past > slack, highest, higher - (past < 0).to(tl.int32))
        lower = tl.where(reached >= 0, deeper, lower)
        deepest = tl.where(reached > slack, deepest, deeper - (reached < 0).to(tl.int32))
    taken = (n + step - 1) // step
    state += row * STATE
    tl.store(state + UPPER, tl.where(upper_rank >= 1, upper, MOST))
    # what lies outside the row is never reached
    tl.store(state + LOWER, tl.maximum(tl.where(lower_rank <= taken, lower, NOTHING), NOTHING + 1))
    tl.store(state + SIZE, 0)


@triton.jit(do_not_specialize=ANY)
def _gather(
    scores, state, tallies, listed, parts_of, noted, stride, lead, n, blocks, parts, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """noted `(R, parts, chunk)`: places in the part of entries that reach the lower bound, in order. listed, parts_of `(R, LISTED)`:
    orders and parts of those not above the upper, in any order; those that find no room are only counted. tallies `(R, parts, 2)`: how
    many of either the part has."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mine, skip = _begin(scores, row, stride, lead, GROUP)
    state += row * STATE
    upper, lower = tl.load(state + UPPER), tl.load(state + LOWER)
    chunk = blocks * BLOCK
    begin = part * chunk
    end = tl.minimum(begin + chunk, skip + n)
    tally = row * parts + part
    found, between = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for first in range(begin, end, BLOCK):
        p = first + tl.arange(0, BLOCK)
        key = _load(mine, p, skip, end, GROUP)
        kept = key >= lower
        middle = kept & (key <= upper)
        both = kept.to(tl.int32) * HALF + middle.to(tl.int32)
        ranks, total = tl.cumsum(both, axis=0), tl.sum(both, axis=0)
        at = tl.atomic_add(state + SIZE, total & (HALF - 1), sem="relaxed") + (ranks & (HALF - 1)) - 1
        tl.store(noted + tally * chunk + found + (ranks >> 16) - 1, (p - begin).to(tl.int16), mask=kept)
        inside = middle & (at < LISTED)
        tl.store(listed + row * LISTED + at, key, mask=inside)
        tl.store(parts_of + row * LISTED + at, tl.zeros_like(at) + part, mask=inside)
        found += total >> 16
        between += total & (HALF - 1)
    tl.store(tallies + 2 * tally, found)
    tl.store(tallies + 2 * tally + 1, between)


@triton.jit(do_not_specialize=ANY)
def _settle(
    scores, ids, state, tallies, listed, stride, lead, n, count, parts, GROUP: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """The edge of a row and how many entries on it are taken; where the list is of no use the row's ids, and a room below 0."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, PARTS)
    tally = tallies + 2 * (row * parts + p)
    found, between = tl.load(tally, mask=p < parts, other=0), tl.load(tally + 1, mask=p < parts, other=0)
    higher = tl.sum(found - between, axis=0)
    state += row * STATE
    upper, lower, size = tl.load(state + UPPER), tl.load(state + LOWER), tl.load(state + SIZE)
    # bounds that are one number are the edge, however many entries lie on it
    if (higher < count) & (higher + size >= count) & ((size <= LISTED) | (upper == lower)):
        k = tl.arange(0, LISTED)
        key = tl.load(listed + row * LISTED + k, mask=k < size, other=-2147483648)
        edge = _edge_between(key, count - higher, lower, upper)
        tl.store(state + EDGE, edge)
        tl.store(state + ROOM, count - higher - tl.sum((key > edge).to(tl.int32), axis=0))
    else:
        mine, skip = _begin(scores, row, stride, lead, GROUP)
        end = skip + n
        low, high = tl.full((), -2147483648, tl.int32), tl.full((), 2147483647, tl.int32)
        while low < high:
            trial = _middle(low, high)
            reached = tl.full((), 0, tl.int32)
            for first in range(0, end, BLOCK):
                reached += tl.sum((_load(mine, first + tl.arange(0, BLOCK), skip, end, GROUP) >= trial).to(tl.int32), axis=0)
            low = tl.where(reached >= count, trial, low)
            high = tl.where(reached > count, high, trial - (reached < count).to(tl.int32))
        past = tl.full((), 0, tl.int32)
        for first in range(0, end, BLOCK):
            past += tl.sum((_load(mine, first + tl.arange(0, BLOCK), skip, end, GROUP) > low).to(tl.int32), axis=0)
        above, equals = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
        for first in range(0, end, BLOCK):
            c = first + tl.arange(0, BLOCK)
            above, equals = _take(_load(mine, c, skip, end, GROUP), c - skip, low, count - past, above, equals, ids + row * count)
        tl.store(state + ROOM, -1)


@triton.jit(do_not_specialize=ANY)
def _write(
    scores, ids, state, tallies, listed, parts_of, noted, stride, lead, count, blocks, parts, GROUP: tl.constexpr, PARTS: tl.constexpr,
    READ: tl.constexpr, BLOCK: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    state += row * STATE
    edge, room, size = tl.load(state + EDGE), tl.load(state + ROOM), tl.load(state + SIZE)
    if room >= 0:
        mine, skip = _begin(scores, row, stride, lead, GROUP)
        p = tl.arange(0, PARTS)
        tally = tallies + 2 * (row * parts + p)
        found, between = tl.load(tally, mask=p < part, other=0), tl.load(tally + 1, mask=p < part, other=0)
        higher = tl.sum(found - between, axis=0)
        equals = tl.full((), 0, tl.int32)
        if tl.load(state + UPPER) == tl.load(state + LOWER):
            equals += tl.sum(between, axis=0)
        else:
            for first in range(0, size, BLOCK):
                k = first + tl.arange(0, BLOCK)
                key = tl.load(listed + row * LISTED + k, mask=k < size, other=-2147483648)
                before = (k < size) & (tl.load(parts_of + row * LISTED + k, mask=k < size, other=0) < part)
                both = tl.sum((before & (key > edge)).to(tl.int32) * HALF + (before & (key == edge)).to(tl.int32), axis=0)
                higher += both >> 16
                equals += both & (HALF - 1)
        chunk = blocks * READ
        begin = part * chunk
        noted += (row * parts + part) * chunk
        mine += begin
        own = tl.load(tallies + 2 * (row * parts + part))
        for first in range(0, own, BLOCK):
            k = first + tl.arange(0, BLOCK)
            at = tl.load(noted + k, mask=k < own, other=0).to(tl.int32)
            x = tl.load(mine + at, mask=k < own, other=0.0).to(tl.float32)
            key = tl.where(k < own, _order(x), NOTHING)
            higher, equals = _take(key, begin + at - skip, edge, room, higher, equals, ids + row * count)


@dataclass(frozen=True)
class Sizes:
    """short: rows up to this long lie in registers. sample: of a row, a power of two below 32768; None: by its length. block: entries
    read at a time. noted: entries of a part's list read at a time. listed: entries that a row's list may hold at most. programs: a
    multiprocessor, of the parts of long rows; parts: of a row, where that is given. warps: of gather and write."""

    short: int = 16384
    sample: int | None = None
    block: int = 2048
    noted: int = 1024
    listed: int = 32768
    programs: int = 8
    parts: int | None = None
    warps: int = 4


def _warps(entries: int) -> int:
    """Of a program that holds so many entries in registers: 32 a thread, in at least 4 warps and at most 16."""
    return min(16, max(4, entries // 1024))


def launch(scores: Tensor, count: int, sizes: Sizes | None = None) -> Tensor:
    """int64 `(R, count)` of scores `(R, n)`, 0 < count < n; a copy is made only where neighbours in a row are none in memory."""
    sizes = sizes or Sizes()
    rows, n = scores.shape
    ids = empty(scores, rows, count, dtype=torch.int64)
    if not rows:
        return ids
    memory, stride, lead, group = rows_in_groups(scores)
    # a row may begin in the midst of a group
    reach = n if stride % group == lead % group == 0 else n + group - 1
    if reach <= sizes.short:
        block = next_power_of_two(reach)
        _short[(rows,)](memory, ids, stride, lead, n, count, GROUP=group, BLOCK=block, num_warps=_warps(block))
        return ids
    # every so many-th entry, which fills the sample only where that divides n
    sample = sizes.sample or min(4096, max(1024, next_power_of_two(n // 32)))
    step = ceil_div(n, sample)
    taken, share = ceil_div(n, step), count / n
    spread = 4 * math.sqrt(taken * share * (1 - share)) + 4
    slack = int(spread) // 8
    upper, lower = math.floor(share * taken - spread) - slack, math.ceil(share * taken + spread)
    # the list holds what is expected and a third more, as ranks of a sample vary
    listed = min(sizes.listed, next_power_of_two(round(2.7 * spread * step)))
    wanted = sizes.parts or ceil_div(sizes.programs * multiprocessors(scores), rows)
    parts = max(ceil_div(reach, LONGEST_PART), min(ceil_div(reach, sizes.block), wanted))
    blocks = ceil_div(ceil_div(reach, parts), sizes.block)
    parts = ceil_div(reach, blocks * sizes.block)
    state, tallies = (empty(scores, rows, size, dtype=torch.int32) for size in (STATE.value, 2 * parts))
    keys, parts_of = (empty(scores, rows, listed, dtype=torch.int32) for _ in range(2))
    noted = empty(scores, rows, parts * blocks * sizes.block, dtype=torch.int16)
    padded = next_power_of_two(parts)
    _bound[(rows,)](memory, state, stride, lead, n, step, upper, lower, slack, SAMPLE=sample, num_warps=_warps(2 * sample))
    _gather[(rows, parts)](
        memory, state, tallies, keys, parts_of, noted, stride, lead, n, blocks, parts, GROUP=group, BLOCK=sizes.block, LISTED=listed,
        num_warps=sizes.warps,
    )  # fmt: skip
    _settle[(rows,)](
        memory, ids, state, tallies, keys, stride, lead, n, count, parts, GROUP=group, PARTS=padded, BLOCK=2 * sizes.block, LISTED=listed,
        num_warps=_warps(2 * listed),
    )  # fmt: skip
    _write[(rows, parts)](
        memory, ids, state, tallies, keys, parts_of, noted, stride, lead, count, blocks, parts, GROUP=group, PARTS=padded,
        READ=sizes.block, BLOCK=sizes.noted, LISTED=listed, num_warps=sizes.warps,
    )  # fmt: skip
    return ids


@torch.library.custom_op("saccade::best_ids", mutates_args=())
def best(scores: Tensor, count: int) -> Tensor:
    """int64 `(R, count)`: ids of the highest scores `(R, n)`, ascending, ties to the lower; 0 < count < n."""
    return launch(scores, count)


@best.register_fake
def _(scores: Tensor, count: int) -> Tensor:
    return scores.new_empty((scores.shape[0], count), dtype=torch.int64)
