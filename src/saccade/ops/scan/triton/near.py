"""Gradients of queries, keys, beta and gates per channel from pairs of tokens of one block of 16; `levels` adds up all others.

The sums are those that `levels` explains, of its first four levels. A program is one warp and serves 16 tokens, as in `channel`: a
chunk's whole squares, of which these pairs are a sixteenth, took most of the time of the last step.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.scan.triton.channel import parts_of, rows_of
from saccade.ops.scan.triton.inside import matmul, segment_of
from saccade.ops.scan.triton.sums import add_sums, in_parts, level_ranges


@triton.jit
def add_near(
    q, k, beta, gate, by_query, by_key, dq, dk, dbeta, dgate, table, n, per_sequence, heads,
    query_group, query_b, query_h, query_n, key_group, key_b, key_h, key_n, gate_b, gate_h, gate_n, beta_b, beta_h, beta_n,
    d: tl.constexpr, CHUNK: tl.constexpr, BD: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr,
    DELTA: tl.constexpr, PACKED: tl.constexpr, GATE_GRAD: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dq, dk, dgate `(B, H, N, D)`, which `levels` began; dbeta `(B, H, N)` float32 is a line of its own."""
    BLOCKS: tl.constexpr = CHUNK // 16
    slot = tl.program_id(0) // BLOCKS
    own = tl.program_id(0) % BLOCKS
    h = tl.program_id(1)
    batch, _owner, at, end, first, _last, chunk = segment_of(slot, n, per_sequence, table, CHUNK, CHUNK, PACKED)
    place = (chunk + (at - first) // CHUNK).to(tl.int64) * heads + h
    batch = batch.to(tl.int64)
    begin = at + own * 16
    here = (batch * heads + h) * n + begin
    i = tl.arange(0, 16)
    row = i[:, None]
    token = begin + i
    inside = token < end
    q += batch * query_b + (h // query_group).to(tl.int64) * query_h
    k += batch * key_b + (h // key_group).to(tl.int64) * key_h
    gate += batch * gate_b + h.to(tl.int64) * gate_h
    square = (place * CHUNK + own * 16) * CHUNK + own * 16 + (row * CHUNK + i[None, :])
    there = (begin < end) & (row >= 0) & (i[None, :] >= 0)
    of_query = tl.load(by_query + square, mask=there, other=0.0)
    of_key = of_query
    turn = i * 0.0 + 1.0
    strength = tl.zeros([16], tl.float32)
    if DELTA:
        of_key = tl.load(by_key + square, mask=there, other=0.0)
        beta += batch * beta_b + h.to(tl.int64) * beta_h
        turn = -tl.load(beta + token.to(tl.int64) * beta_n, mask=inside, other=0.0).to(tl.float32)
    apart = row ^ i[None, :]
    nothing = tl.zeros([16, BD], tl.float32)
    for block in tl.range(0, CHANNEL_BLOCKS, num_stages=STAGES):
        di = block * BD + tl.arange(0, BD)
        raw = rows_of(gate, gate_n, begin, end, di, d)
        kt = rows_of(k, key_n, begin, end, di, d)
        qt = rows_of(q, query_n, begin, end, di, d)
        to = here * d + (row * d + di[None, :])
        mask = inside[:, None] & (di < d)[None, :]
        dq_t = tl.load(dq + to, mask=mask, other=0.0).to(tl.float32)
        dk_t = tl.load(dk + to, mask=mask, other=0.0).to(tl.float32)
        dg_t = nothing
        read = nothing
        if GATE_GRAD:
            dg_t += tl.load(dgate + to, mask=mask, other=0.0).to(tl.float32)
        high, low = parts_of(raw, PRECISION)
        dtype = kt.dtype
        k_wide = kt.to(tl.float32)
        for level in tl.static_range(0, 4):
            is_late = ((i >> level) & 1) == 1
            late = is_late[:, None]
            pair = (apart >> level) == 1
            x = tl.exp2(add_sums(level_ranges(level, 16, False, PRECISION), high, low, nothing, PRECISION))
            z = tl.where(late, qt.to(tl.float32), k_wide)
            y = matmul(tl.where(pair, of_query, 0.0).to(dtype), (z * x).to(dtype), PRECISION) * x
            given = z * y
            dq_t += tl.where(late, y, 0.0)
            dk_t += tl.where(late, 0.0, y)
            if DELTA:
                turned = tl.where(is_late, turn, 1.0)[:, None]
                z = k_wide * turned
                y = matmul(tl.where(pair, of_key, 0.0).to(dtype), (z * x).to(dtype), PRECISION) * x
                given += z * y
                read += tl.where(late, k_wide * y, 0.0)
                dk_t += y * turned
            if GATE_GRAD:
                given_high, given_low = in_parts(given, PRECISION)
                dg_t = add_sums(level_ranges(level, 16, True, PRECISION), given_high, given_low, dg_t, PRECISION)
        if DELTA:
            strength -= tl.sum(read, axis=1)
        tl.store(dq + to, dq_t.to(dq.dtype.element_ty), mask=mask)
        tl.store(dk + to, dk_t.to(dk.dtype.element_ty), mask=mask)
        if GATE_GRAD:
            tl.store(dgate + to, dg_t.to(dgate.dtype.element_ty), mask=mask)
    if DELTA:
        tl.store(dbeta + here + i, strength, mask=inside)
