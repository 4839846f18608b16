"""Gates per channel inside a chunk: q and k times their gates, and the products of tokens, weighted channel by channel.

    pairs_ij = sum_c q_ic k_jc e^(gates of c after j up to i)

One common reference point would need e^(+large). Instead every pair of tokens j < i meets at a boundary between them, and its weight is
e^(gates from the boundary to i) e^(gates after j to the boundary): two factors of at most 1, one a token, so all pairs of a boundary are
one matmul. Tokens of different blocks of 16 meet at the start of the later block, those of one block at the halves of the smallest
aligned block of 2, 4, 8 or 16 that holds both. Sums of gates are products with matrices of ones, of what is summed in two bfloat16
parts (16 bits) where the inputs have 16 bits: no gate is ever subtracted, so none is lost behind a larger one.

A program is one warp and serves 16 tokens: what one product gives has the layout that the next one wants, so weights, weighted queries
and weighted keys stay where they are. It meets its own block first and those before it next, as both at once would not fit in registers.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.scan.triton.inside import LOG2E, LOWEST, matmul_add, segment_of
from saccade.ops.scan.triton.sums import add_sums, in_parts, level_ranges, ranges


@triton.jit
def rows_of(x, x_n, at, end, di, d: tl.constexpr):
    """The 16 rows from token `at` of a head, columns di; 0 from `end` on."""
    i = tl.arange(0, 16)
    # one far offset for all, so that a tile's addresses differ by 32 bits
    x += at.to(tl.int64) * x_n
    return tl.load(x + (i[:, None] * x_n + di[None, :]), mask=(at + i < end)[:, None] & (di < d)[None, :], other=0.0)


@triton.jit
def parts_of(raw, PRECISION: tl.constexpr):
    """Gates in powers of two, in parts for `add_sums`."""
    return in_parts(tl.maximum(raw.to(tl.float32), LOWEST) * LOG2E, PRECISION)


@triton.jit
def put(to, place, x, mask):
    tl.store(to + place, x.to(to.dtype.element_ty), mask=mask)


@triton.jit
def among_themselves(
    q, k, gate, k_gated, pairs, systems, here, begin, end, own, live, scale, query_n, key_n, gate_n,
    d: tl.constexpr, CHUNK: tl.constexpr, BD: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr, DELTA: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Pairs of tokens of one block, and keys with the gates after them: up to the end of the chunk."""
    BLOCKS: tl.constexpr = CHUNK // 16
    i = tl.arange(0, 16)
    row = i[:, None]
    col = i[None, :]
    none = i * 0
    by_q = tl.zeros([16, 16], tl.float32)
    by_k = tl.zeros([16, 16], tl.float32)
    every = ranges(none, none + 15, 16, False, PRECISION)
    following = ranges(none, i - 1, 16, False, PRECISION)
    zero = tl.zeros([16, 16], tl.float32)
    nothing = tl.zeros([16, BD], tl.float32)
    for block in tl.range(0, CHANNEL_BLOCKS, num_stages=STAGES):
        di = block * BD + tl.arange(0, BD)
        # all that is read comes first: no load is moved over the barriers between
        raw = rows_of(gate, gate_n, begin, end, di, d)
        kt = rows_of(k, key_n, begin, end, di, d)
        qt = rows_of(q, query_n, begin, end, di, d)
        raw_1 = rows_of(gate, gate_n, begin + 16, tl.where(own < BLOCKS - 1, end, 0), di, d)
        if BLOCKS > 2:
            raw_2 = rows_of(gate, gate_n, begin + 32, tl.where(own < BLOCKS - 2, end, 0), di, d)
            raw_3 = rows_of(gate, gate_n, begin + 48, tl.where(own < BLOCKS - 3, end, 0), di, d)
        high, low = parts_of(raw, PRECISION)
        dtype = kt.dtype
        q_wide = qt.to(tl.float32) * scale
        k_wide = kt.to(tl.float32)
        by_q += tl.where(row == col, matmul_add(q_wide.to(dtype), tl.trans(kt), zero, PRECISION), 0.0)
        for level in tl.static_range(0, 4):
            x = tl.exp2(add_sums(level_ranges(level, 16, False, PRECISION), high, low, nothing, PRECISION))
            keys = (k_wide * x).to(dtype)
            # the row is in a second half, the column in the first half before it
            meet = ((row >> level) == (col >> level) + 1) & (((row >> level) & 1) == 1)
            by_q += tl.where(meet, matmul_add((q_wide * x).to(dtype), tl.trans(keys), zero, PRECISION), 0.0)
            if DELTA:
                by_k += tl.where(meet, matmul_add(keys, tl.trans(keys), zero, PRECISION), 0.0)
        behind = nothing
        if own < BLOCKS - 1:
            behind = all_of(raw_1, every, behind, PRECISION)
        if BLOCKS > 2:
            if own < BLOCKS - 2:
                behind = all_of(raw_2, every, behind, PRECISION)
            if own < BLOCKS - 3:
                behind = all_of(raw_3, every, behind, PRECISION)
        x = tl.exp2(add_sums(following, high, low, behind, PRECISION))
        put(k_gated, (here + begin) * d + (row * d + di[None, :]), k_wide * x, (begin + i < end)[:, None] & (di < d)[None, :])
    square = (own * 16 + row) * CHUNK + own * 16 + col
    put(pairs, square, by_q, (row >= col) & live)
    if DELTA:
        put(systems, square, by_k, (row > col) & live)


@triton.jit
def all_of(raw, every, to, PRECISION: tl.constexpr):
    """to + the sums of a block's gates, in each of 16 rows."""
    high, low = parts_of(raw, PRECISION)
    return add_sums(every, high, low, to, PRECISION)


@triton.jit
def before(raw, kt, following, every, between, PRECISION: tl.constexpr):
    """Keys of a block of tokens before the own one, with the gates up to the own one's start, `(BD, 16)`; and all gates between that
    block's start and the own one's, in each of 16 rows: `between` holds those after the block."""
    high, low = parts_of(raw, PRECISION)
    x = tl.exp2(add_sums(following, high, low, between, PRECISION))
    return tl.trans((kt.to(tl.float32) * x).to(kt.dtype)), add_sums(every, high, low, between, PRECISION)


@triton.jit
def with_earlier(
    q, k, gate, q_gated, k_read, pairs, systems, totals, here, begin, end, own, live, scale, query_n, key_n, gate_n,
    d: tl.constexpr, CHUNK: tl.constexpr, BD: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr, DELTA: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Pairs with tokens of the blocks before, which meet at the start of the own one; and what has the gates from the chunk's start."""
    BLOCKS: tl.constexpr = CHUNK // 16
    i = tl.arange(0, 16)
    row = i[:, None]
    col = i[None, :]
    none = i * 0
    q_1 = tl.zeros([16, 16], tl.float32)
    q_2 = tl.zeros([16, 16], tl.float32)
    q_3 = tl.zeros([16, 16], tl.float32)
    k_1 = tl.zeros([16, 16], tl.float32)
    k_2 = tl.zeros([16, 16], tl.float32)
    k_3 = tl.zeros([16, 16], tl.float32)
    every = ranges(none, none + 15, 16, False, PRECISION)
    following = ranges(none, i - 1, 16, False, PRECISION)
    reached = ranges(i, none + 15, 16, False, PRECISION)
    for block in tl.range(0, CHANNEL_BLOCKS, num_stages=STAGES):
        di = block * BD + tl.arange(0, BD)
        raw = rows_of(gate, gate_n, begin, end, di, d)
        kt = rows_of(k, key_n, begin, end, di, d)
        qt = rows_of(q, query_n, begin, end, di, d)
        # of blocks that are not there no row is read: they may lie before the first token
        raw_1 = rows_of(gate, gate_n, begin - 16, tl.where(own > 0, end, -CHUNK), di, d)
        kt_1 = rows_of(k, key_n, begin - 16, tl.where(own > 0, end, -CHUNK), di, d)
        if BLOCKS > 2:
            raw_2 = rows_of(gate, gate_n, begin - 32, tl.where(own > 1, end, -CHUNK), di, d)
            kt_2 = rows_of(k, key_n, begin - 32, tl.where(own > 1, end, -CHUNK), di, d)
            raw_3 = rows_of(gate, gate_n, begin - 48, tl.where(own > 2, end, -CHUNK), di, d)
            kt_3 = rows_of(k, key_n, begin - 48, tl.where(own > 2, end, -CHUNK), di, d)
        high, low = parts_of(raw, PRECISION)
        dtype = kt.dtype
        q_wide = qt.to(tl.float32) * scale
        between = tl.zeros([16, BD], tl.float32)
        x = tl.exp2(add_sums(reached, high, low, between, PRECISION))
        q_late = (q_wide * x).to(dtype)
        k_late = (kt.to(tl.float32) * x).to(dtype)
        if own > 0:
            keys, between = before(raw_1, kt_1, following, every, between, PRECISION)
            q_1 = matmul_add(q_late, keys, q_1, PRECISION)
            if DELTA:
                k_1 = matmul_add(k_late, keys, k_1, PRECISION)
        if BLOCKS > 2:
            if own > 1:
                keys, between = before(raw_2, kt_2, following, every, between, PRECISION)
                q_2 = matmul_add(q_late, keys, q_2, PRECISION)
                if DELTA:
                    k_2 = matmul_add(k_late, keys, k_2, PRECISION)
            if own > 2:
                keys, between = before(raw_3, kt_3, following, every, between, PRECISION)
                q_3 = matmul_add(q_late, keys, q_3, PRECISION)
                if DELTA:
                    k_3 = matmul_add(k_late, keys, k_3, PRECISION)
        mask = (begin + i < end)[:, None] & (di < d)[None, :]
        to = (here + begin) * d + (row * d + di[None, :])
        x = x * tl.exp2(between)
        put(q_gated, to, q_wide * x, mask)
        if DELTA:
            put(k_read, to, kt.to(tl.float32) * x, mask)
        if own == BLOCKS - 1:
            # all rows are the same
            put(totals, row * 0 + di[None, :], add_sums(every, high, low, between, PRECISION), (row == 0) & (di < d)[None, :] & live)
    square = (own * 16 + row) * CHUNK + own * 16 + col
    live = (row >= 0) & (col >= 0) & live
    put(pairs, square - 16, q_1, live & (own > 0))
    if DELTA:
        put(systems, square - 16, k_1, live & (own > 0))
    if BLOCKS > 2:
        put(pairs, square - 32, q_2, live & (own > 1))
        put(pairs, square - 48, q_3, live & (own > 2))
        if DELTA:
            put(systems, square - 32, k_2, live & (own > 1))
            put(systems, square - 48, k_3, live & (own > 2))


@triton.jit
def products(
    q, k, gate, q_gated, k_gated, k_read, pairs, systems, totals, table, n, per_sequence, heads, scale,
    query_group, query_b, query_h, query_n, key_group, key_b, key_h, key_n, gate_b, gate_h, gate_n,
    d: tl.constexpr, CHUNK: tl.constexpr, BD: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q_gated: scale q e^(gates up to it), k_gated: k e^(gates after it), with DELTA k_read: k e^(gates up to it), all `(B, H, N, D)`;
    pairs `(chunks, H, CHUNK, CHUNK)`, lower triangle, with scale; with DELTA systems, float32, below the diagonal: the products of k and
    k, which `solve` reads; totals `(chunks, H, D)`: log2 of the gates over the chunk. CHUNK: 32 or 64."""
    BLOCKS: tl.constexpr = CHUNK // 16
    slot = tl.program_id(0) // BLOCKS
    # the last blocks have the most to do, and begin first
    own = BLOCKS - 1 - tl.program_id(0) % BLOCKS
    h = tl.program_id(1)
    batch, _owner, at, end, first, _last, chunk = segment_of(slot, n, per_sequence, table, CHUNK, CHUNK, PACKED)
    place = (chunk + (at - first) // CHUNK).to(tl.int64) * heads + h
    batch = batch.to(tl.int64)
    here = (batch * heads + h) * n
    q += batch * query_b + (h // query_group).to(tl.int64) * query_h
    k += batch * key_b + (h // key_group).to(tl.int64) * key_h
    gate += batch * gate_b + h.to(tl.int64) * gate_h
    pairs += place * CHUNK * CHUNK
    systems += place * CHUNK * CHUNK
    begin = at + own * 16
    among_themselves(
        q, k, gate, k_gated, pairs, systems, here, begin, end, own, at < end, scale, query_n, key_n, gate_n,
        d, CHUNK, BD, CHANNEL_BLOCKS, DELTA, STAGES, PRECISION,
    )  # fmt: skip
    with_earlier(
        q, k, gate, q_gated, k_read, pairs, systems, totals + place * d, here, begin, end, own, at < end, scale, query_n, key_n, gate_n,
        d, CHUNK, BD, CHANNEL_BLOCKS, DELTA, STAGES, PRECISION,
    )  # fmt: skip
