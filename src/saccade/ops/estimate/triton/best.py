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
LEAST, INFINITE = tl.constexpr(-2139095041), tl.constexpr(2139095040)  # the orders of -inf and inf
HALF: tl.constexpr = tl.constexpr(65536)  # two counts in one sum: neither may reach half of this
# what the kernels tell each other of a row, and how long it is
UPPER, LOWER, SIZE, EDGE, ROOM, STATE = (tl.constexpr(i) for i in (0, 1, 2, 3, 4, 8))
LONGEST_PART = 32768  # entries: places in a part are int16
# lengths and strides grow with a cache: a kernel is compiled once for all
ANY = ["stride", "lead", "n", "count", "blocks", "parts", "step", "upper_rank", "lower_rank", "slack"]


@triton.jit
def _order(x):
    """float32 to int32 of the same order, above NOTHING; a nan is above all, and both zeros are one."""
    bits = (tl.where(x != x, 0.0, x) + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, 2147483647, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _number(order):
    """The float32 of an order from that of -inf to that of inf."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _begin(scores, row, stride, lead, GROUP: tl.constexpr):
    """Where the groups begin that hold a row, and how many entries of the first are not the row's."""
    at = row * stride + lead
    even = at // GROUP * GROUP
    return scores + even, (at - even).to(tl.int32)


@triton.jit
def _places(first, BLOCK: tl.constexpr):
    """`(BLOCK / 4, 4)`: the BLOCK places from `first` on; a thread holds whole rows."""
    return first + tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def _read(mine, p, end, GROUP: tl.constexpr):
    """The entries at places p before `end`, and what is left of a group."""
    return tl.load(mine + p, mask=p < (end + GROUP - 1) // GROUP * GROUP, other=0.0).to(tl.float32)


@triton.jit
def _within(p, begin, end):
    """begin <= p < end, by one comparison."""
    return (p - begin).to(tl.uint32, bitcast=True) < (end - begin).to(tl.uint32, bitcast=True)


@triton.jit
def _load(mine, p, begin, end, GROUP: tl.constexpr):
    """Orders of the entries at places p from `begin` to `end`, NOTHING at others."""
    return tl.where(_within(p, begin, end), _order(_read(mine, p, end, GROUP)), NOTHING)


@triton.jit
def _columns(x):
    """The four columns of `(T, 4)`."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _middle(low, high):
    """Half-way between two int32, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def _edge_between(key, count, low, high):
    """A number from `low` to `high`, int32: `count` keys (at least 1) reach it, and of more than these only as ties.

    At least `count` keys reach `low`, less are above `high`.
    """
    while low < high:
        trial = _middle(low, high)
        reached = tl.sum((key >= trial).to(tl.int32))
        low = tl.where(reached >= count, trial, low)
        high = tl.where(reached > count, high, trial - (reached < count).to(tl.int32))
    return low


@triton.jit
def _edge(key, count):
    """The same where nothing is known of the keys."""
    return _edge_between(key, count, tl.full((), -2147483648, tl.int32), tl.max(key))


@triton.jit
def _put(key, c, edge, room, higher, equals, to):
    """Write the ids c of chosen keys, each after so many that are higher or equal."""
    to += higher + tl.minimum(equals, room)
    tl.store(to, c.to(tl.int64), mask=(key > edge) | ((key == edge) & (equals < room)))


@triton.jit
def _take(key, c, edge, room, higher, equals, to):
    """Write the ids of keys `(T, 4)` above the edge, and of as many on it as there is room for; c `(T,)`: ids of the first column;
    (higher, equals): how many there were so far."""
    both = (key > edge).to(tl.int32) * HALF + (key == edge).to(tl.int32)
    k0, k1, k2, k3 = _columns(key)
    b0, b1, b2, b3 = _columns(both)
    b1 += b0
    b2 += b1
    b3 += b2
    before = tl.cumsum(b3, axis=0) - b3
    total = tl.sum(b3, axis=0)
    b0, b1, b2 = b0 + before, b1 + before, b2 + before
    _put(k0, c, edge, room, higher + (before >> 16), equals + (before & (HALF - 1)), to)
    _put(k1, c + 1, edge, room, higher + (b0 >> 16), equals + (b0 & (HALF - 1)), to)
    _put(k2, c + 2, edge, room, higher + (b1 >> 16), equals + (b1 & (HALF - 1)), to)
    _put(k3, c + 3, edge, room, higher + (b2 >> 16), equals + (b2 & (HALF - 1)), to)
    return higher + (total >> 16), equals + (total & (HALF - 1))


@triton.jit(do_not_specialize=ANY)
def _short(scores, ids, stride, lead, n, count, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    mine, skip = _begin(scores, row, stride, lead, GROUP)
    key = _load(mine, _places(0, BLOCK), skip, skip + n, GROUP)
    edge = _edge(key, count)
    room = count - tl.sum((key > edge).to(tl.int32))
    zero = tl.full((), 0, tl.int32)
    _take(key, tl.arange(0, BLOCK // 4) * 4 - skip, edge, room, zero, zero, ids + row * count)


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
    taken = (n + step - 1) // step
    while (upper < highest) | (lower < deepest):
        higher, deeper = _middle(upper, highest), _middle(lower, deepest)
        found = tl.sum((key >= higher).to(tl.int32) * HALF + (key >= deeper).to(tl.int32), axis=0)
        past, reached = (found >> 16) - upper_rank, (found & (HALF - 1)) - tl.minimum(lower_rank, taken)
        upper = tl.where(past >= 0, higher, upper)
        highest = tl.where(past > slack, highest, higher - (past < 0).to(tl.int32))
        lower = tl.where(reached >= 0, deeper, lower)
        deepest = tl.where(reached > slack, deepest, deeper - (reached < 0).to(tl.int32))
    upper = tl.where(upper_rank >= 1, upper, INFINITE)
    lower = tl.where(lower_rank <= taken, lower, LEAST)
    state += row * STATE
    # numbers only, as entries are compared with them, and not -1, the negative zero: an upper bound there would be below 0
    tl.store(state + UPPER, tl.minimum(tl.maximum(tl.where(upper == -1, 0, upper), LEAST), INFINITE))
    tl.store(state + LOWER, tl.minimum(tl.maximum(lower, LEAST), INFINITE))
    tl.store(state + SIZE, 0)


@triton.jit(do_not_specialize=ANY)
def _gather(
    scores, state, tallies, listed, parts_of, noted, stride, lead, n, blocks, parts, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    AGAIN: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """noted `(R, parts, blocks BLOCK)`: places in the part of entries not below the lower bound, in order. listed, parts_of `(R, LISTED)`:
    orders and parts of those not above the upper, in any order; those that find no room are only counted. tallies `(R, parts, 2)`: how
    many of either the part has."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mine, skip = _begin(scores, row, stride, lead, GROUP)
    state += row * STATE
    upper, lower = _number(tl.load(state + UPPER)), _number(tl.load(state + LOWER))
    begin = part * blocks * BLOCK
    end = tl.minimum(begin + blocks * BLOCK, skip + n)
    tally = row * parts + part
    noted += tally * blocks * BLOCK
    found, between = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for first in range(begin, end, BLOCK):
        p = _places(first, BLOCK)
        # a nan is kept
        kept = _within(p, skip, skip + n) & ~(_read(mine, p, end, GROUP) < lower)
        k0, k1, k2, k3 = _columns(kept.to(tl.int32))
        own = k0 + k1 + k2 + k3
        rank = tl.cumsum(own, axis=0) - own
        to = noted + found + rank
        c = (first - begin + tl.arange(0, BLOCK // 4) * 4).to(tl.int16)
        tl.store(to, c, mask=k0 > 0)
        tl.store(to + k0, c + 1, mask=k1 > 0)
        tl.store(to + (k0 + k1), c + 2, mask=k2 > 0)
        tl.store(to + (k0 + k1 + k2), c + 3, mask=k3 > 0)
        found += tl.sum(own, axis=0)
    tl.debug_barrier()  # each thread reads what others have noted
    for first in range(0, found, AGAIN):
        # backwards: neighbours in different threads, as the scattered reads and writes that follow have them
        k = first + (AGAIN - 1 - tl.arange(0, AGAIN))
        x = tl.load(mine + begin + tl.load(noted + k, mask=k < found, other=0).to(tl.int32), mask=k < found, other=0.0).to(tl.float32)
        middle = (k < found) & (x <= upper)
        rank = tl.cumsum(middle.to(tl.int32), axis=0) - 1
        total = tl.sum(middle.to(tl.int32), axis=0)
        at = tl.atomic_add(state + SIZE, total, sem="relaxed") + rank
        inside = middle & (at < LISTED)
        tl.store(listed + row * LISTED + at, _order(x), mask=inside)
        tl.store(parts_of + row * LISTED + at, tl.zeros_like(at) + part, mask=inside)
        between += total
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
        key = tl.where(k < size, tl.load(listed + row * LISTED + k), NOTHING)
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
                reached += tl.sum((_load(mine, _places(first, BLOCK), skip, end, GROUP) >= trial).to(tl.int32))
            low = tl.where(reached >= count, trial, low)
            high = tl.where(reached > count, high, trial - (reached < count).to(tl.int32))
        past = tl.full((), 0, tl.int32)
        for first in range(0, end, BLOCK):
            past += tl.sum((_load(mine, _places(first, BLOCK), skip, end, GROUP) > low).to(tl.int32))
        above, equals = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
        for first in range(0, end, BLOCK):
            key = _load(mine, _places(first, BLOCK), skip, end, GROUP)
            c = first + tl.arange(0, BLOCK // 4) * 4 - skip
            above, equals = _take(key, c, low, count - past, above, equals, ids + row * count)
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
            PIECE: tl.constexpr = BLOCK if BLOCK < LISTED else LISTED
            for first in range(0, size, PIECE):
                k = first + tl.arange(0, PIECE)
                key = tl.load(listed + row * LISTED + k)
                before = (k < size) & (tl.load(parts_of + row * LISTED + k) < part)
                both = tl.sum((before & (key > edge)).to(tl.int32) * HALF + (before & (key == edge)).to(tl.int32), axis=0)
                higher += both >> 16
                equals += both & (HALF - 1)
        begin = part * blocks * READ
        noted += (row * parts + part) * blocks * READ
        own = tl.load(tallies + 2 * (row * parts + part))
        for first in range(0, own, BLOCK):
            k = first + tl.arange(0, BLOCK)
            at = begin + tl.load(noted + k, mask=k < own, other=0).to(tl.int32)
            key = tl.where(k < own, _order(tl.load(mine + at, mask=k < own, other=0.0).to(tl.float32)), NOTHING)
            both = (key > edge).to(tl.int32) * HALF + (key == edge).to(tl.int32)
            before = tl.cumsum(both, axis=0) - both
            _put(key, at - skip, edge, room, higher + (before >> 16), equals + (before & (HALF - 1)), ids + row * count)
            total = tl.sum(both, axis=0)
            higher += total >> 16
            equals += total & (HALF - 1)


@dataclass(frozen=True)
class Sizes:
    """short: rows up to this long lie in registers. sample: of a row, a power of two below 32768; None: by its length. block: entries
    read at a time. noted: of a part's list, or the row's. listed: entries that a row's list may hold at most. programs: a
    multiprocessor, of the parts of long rows; parts: of a row, where that is given. warps: of gather and write."""

    short: int = 8192
    sample: int | None = None
    block: int = 2048
    noted: int = 1024
    listed: int = 32768
    programs: int = 4
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
        _short[(rows,)](memory, ids, stride, lead, n, count, GROUP=group, BLOCK=block, num_warps=_warps(block), maxnreg=128)
        return ids
    # every so many-th entry, which fills the sample only where that divides n
    sample = sizes.sample or min(4096, max(1024, next_power_of_two(n // 32)))
    step = ceil_div(n, sample)
    taken, share = ceil_div(n, step), count / n
    spread = 4 * math.sqrt(taken * share * (1 - share)) + 4
    slack = int(spread) // 8
    upper, lower = math.floor(share * taken - spread) - slack, math.ceil(share * taken + spread)
    # the list holds what is expected and a third more, as ranks of a sample vary
    listed = min(sizes.listed, next_power_of_two(round(3 * spread * step)))
    wanted = sizes.parts or ceil_div(sizes.programs * multiprocessors(scores), rows)
    parts = max(ceil_div(reach, LONGEST_PART), min(ceil_div(reach, sizes.block), wanted))
    blocks = ceil_div(ceil_div(reach, parts), sizes.block)
    parts = ceil_div(reach, blocks * sizes.block)
    state, tallies = (empty(scores, rows, size, dtype=torch.int32) for size in (STATE.value, 2 * parts))
    keys, parts_of = (empty(scores, rows, listed, dtype=torch.int32) for _ in range(2))
    noted = empty(scores, rows, parts * blocks * sizes.block, dtype=torch.int16)
    _bound[(rows,)](memory, state, stride, lead, n, step, upper, lower, slack, SAMPLE=sample, num_warps=_warps(2 * sample))
    _gather[(rows, parts)](
        memory, state, tallies, keys, parts_of, noted, stride, lead, n, blocks, parts, GROUP=group, BLOCK=sizes.block,
        AGAIN=sizes.noted, LISTED=listed, num_warps=sizes.warps,
    )  # fmt: skip
    _settle[(rows,)](
        memory, ids, state, tallies, keys, stride, lead, n, count, parts, GROUP=group,
        PARTS=next_power_of_two(parts), BLOCK=2 * sizes.block, LISTED=listed, num_warps=_warps(2 * listed),
    )  # fmt: skip
    _write[(rows, parts)](
        memory, ids, state, tallies, keys, parts_of, noted, stride, lead, count, blocks, parts, GROUP=group, PARTS=next_power_of_two(parts),
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
