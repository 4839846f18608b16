"""Gates per channel inside a chunk: q and k times their gates, and the products of tokens, weighted channel by channel.

    pairs_ij = sum_c q_ic k_jc e^(gates of c after j up to i)

One common reference point would need e^(+large). Instead two tokens j < i meet at one boundary: that between the halves of the smallest
aligned block of 2, 4, ... tokens that holds both. Their weight is e^(gates from the boundary to i) e^(gates after j to the boundary):
two factors of at most 1, one a token, so the pairs of a level of blocks are one matmul. The last level joins the halves of the chunk.
Sums of gates are products with matrices of ones, of what is summed in two bfloat16 parts (16 bits) where the inputs have 16 bits: no
gate is ever subtracted, so none is lost behind a larger one. A program serves half a chunk.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.scan.triton.inside import LOG2E, LOWEST, matmul, segment_of
from saccade.ops.scan.triton.sums import in_parts, level_ranges, ranges, sums


@triton.jit
def rows_of(x, x_n, token, end, di, d: tl.constexpr):
    """Rows `token` of a head, columns di; 0 past the chunk."""
    return tl.load(x + token.to(tl.int64)[:, None] * x_n + di[None, :], mask=(token < end)[:, None] & (di < d)[None, :], other=0.0)


@triton.jit
def gates_of(gate, gate_n, token, end, di, d: tl.constexpr):
    """Gates in powers of two."""
    return tl.maximum(rows_of(gate, gate_n, token, end, di, d).to(tl.float32), LOWEST) * LOG2E


@triton.jit
def products(
    q, k, gate, q_gated, k_gated, k_read, pairs, systems, totals, table, n, per_sequence, heads, scale,
    query_group, query_b, query_h, query_n, key_group, key_b, key_h, key_n, gate_b, gate_h, gate_n,
    d: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, BD: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr, DELTA: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q_gated: scale q e^(gates up to it), k_gated: k e^(gates after it), with DELTA k_read: k e^(gates up to it), all `(B, H, N, D)`;
    pairs `(chunks, H, CHUNK, CHUNK)`, lower triangle, with scale; with DELTA systems, float32, below the diagonal: the products of k and
    k, which `solve` reads; totals `(chunks, H, D)`: log2 of the gates over the chunk. LEVELS: of a half."""
    HALF: tl.constexpr = CHUNK // 2
    slot = tl.program_id(0) // 2
    which = tl.program_id(0) % 2
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
    i = tl.arange(0, HALF)
    row = i[:, None]
    col = i[None, :]
    none = i * 0
    begin = at + which * HALF
    token = begin + i
    other = at + (1 - which) * HALF + i
    by_q = tl.zeros([HALF, HALF], tl.float32)
    by_k = tl.zeros([HALF, HALF], tl.float32)
    far_q = tl.zeros([HALF, HALF], tl.float32)
    far_k = tl.zeros([HALF, HALF], tl.float32)
    for block in range(0, CHANNEL_BLOCKS):
        di = block * BD + tl.arange(0, BD)
        g = gates_of(gate, gate_n, token, end, di, d)
        high, low = in_parts(g, PRECISION)
        kt = rows_of(k, key_n, token, end, di, d)
        dtype = kt.dtype
        q_wide = rows_of(q, query_n, token, end, di, d).to(tl.float32) * scale
        k_wide = kt.to(tl.float32)
        by_q += tl.where(row == col, tl.sum(q_wide * k_wide, axis=1)[:, None], 0.0)
        for level in range(0, LEVELS):
            x = tl.exp2(sums(level_ranges(level, HALF, False, PRECISION), high, low, PRECISION))
            keys = tl.trans((k_wide * x).to(dtype))
            # the row is in a second half, the column in the first half before it
            meet = ((row >> level) == (col >> level) + 1) & (((row >> level) & 1) == 1)
            by_q += tl.where(meet, matmul((q_wide * x).to(dtype), keys, PRECISION), 0.0)
            if DELTA:
                by_k += tl.where(meet, matmul((k_wide * x).to(dtype), keys, PRECISION), 0.0)

        # the other half's gates lie before this one or behind it
        mask = (token < end)[:, None] & (di < d)[None, :]
        to = (here + token.to(tl.int64)[:, None]) * d + di[None, :]
        g_other = gates_of(gate, gate_n, other, end, di, d)
        over_other = tl.sum(g_other, axis=0)
        behind = tl.where(which == 0, over_other, 0.0)[None, :]
        after = sums(ranges(none, i - 1, HALF, False, PRECISION), high, low, PRECISION) + behind
        tl.store(k_gated + to, (k_wide * tl.exp2(after)).to(k_gated.dtype.element_ty), mask=mask)
        reach = sums(ranges(i, none + HALF - 1, HALF, False, PRECISION), high, low, PRECISION)
        from_start = tl.exp2(reach + tl.where(which == 1, over_other, 0.0)[None, :])
        tl.store(q_gated + to, (q_wide * from_start).to(q_gated.dtype.element_ty), mask=mask)
        if DELTA:
            tl.store(k_read + to, (k_wide * from_start).to(k_read.dtype.element_ty), mask=mask)
        if which == 1:
            tl.store(totals + place * d + di, tl.sum(g, axis=0) + over_other, mask=(di < d) & (at < end))
            # pairs of both halves meet at the middle
            high, low = in_parts(g_other, PRECISION)
            to_middle = tl.exp2(sums(ranges(none, i - 1, HALF, False, PRECISION), high, low, PRECISION))
            k_other = rows_of(k, key_n, other, end, di, d).to(tl.float32)
            keys = tl.trans((k_other * to_middle).to(dtype))
            from_middle = tl.exp2(reach)
            far_q += matmul((q_wide * from_middle).to(dtype), keys, PRECISION)
            if DELTA:
                far_k += matmul((k_wide * from_middle).to(dtype), keys, PRECISION)
    square = (which * HALF + row) * CHUNK + which * HALF + col
    corner = (HALF + row) * CHUNK + col
    tl.store(pairs + square, by_q.to(pairs.dtype.element_ty), mask=(row >= col) & (at < end))
    tl.store(pairs + corner, far_q.to(pairs.dtype.element_ty), mask=(row >= 0) & (which == 1) & (at < end))
    if DELTA:
        tl.store(systems + square, by_k, mask=(row > col) & (at < end))
        tl.store(systems + corner, far_k, mask=(row >= 0) & (which == 1) & (at < end))
