"""Gradients of queries, keys, beta and gates where every channel has a gate of its own: the last step but one of the backward pass.

Two tokens j < i of a chunk are parted by one boundary: that between the halves of the smallest aligned block of 2, 4, ... tokens that
holds both. At the level of that block the pair's weight is e^(gates from the boundary to i) e^(gates after j to the boundary): two
factors of at most 1, one a token, so the pairs of a level are one matmul. With x_r the factor of token r at a level, z = q in second
halves and k in first halves, and N the symmetric matrix of the level's pairs, y = x (N (x z)) holds dq in second halves and dk in
first ones. A token's factor holds the gates between it and the boundary, and those are the gates that all its pairs of the level lie
around: each gets the sum of z_r y_r over the tokens r whose factor it is in. Every pair comes in once, and nothing is taken away again,
so the gates' gradients are as exact as their sums. The state before the chunk and that behind it are two more levels. Pairs within 16
tokens are left to `near`, which adds to what this gives.

Sums of gates are products with matrices of ones: what is summed is cut in two bfloat16 parts (16 bits) where the inputs have 16 bits.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.scan.triton.inside import LOG2E, LOWEST, matmul, segment_of
from saccade.ops.scan.triton.sums import in_parts, level_ranges, ranges, sums
from saccade.ops.scan.triton.tokens import state_dots, times_state


@triton.jit
def channel_gradients(
    q, k, beta, gate, dout, new, back, by_query, by_key, states, ends, totals, dq, dk, dbeta, dgate, plane,
    table, n, per_sequence, heads, scale,
    query_group, query_b, query_h, query_n, key_group, key_b, key_h, key_n, new_group, new_b, new_h, new_n,
    out_group, out_b, out_h, out_n, gate_b, gate_h, gate_n, beta_b, beta_h, beta_n,
    d: tl.constexpr, dv: tl.constexpr,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, BD: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr, BV: tl.constexpr, VALUE_BLOCKS: tl.constexpr,
    DELTA: tl.constexpr, PACKED: tl.constexpr, GATE_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dgate `(B, H, N, D)`; dbeta `(blocks of channels, B, H, N)` float32; `pairs` and `near` have a line each of their own."""
    pid = tl.program_id(0)
    block = pid % CHANNEL_BLOCKS
    slot = pid // CHANNEL_BLOCKS
    h = tl.program_id(1)
    batch, _owner, at, end, first, _last, chunk = segment_of(slot, n, per_sequence, table, CHUNK, CHUNK, PACKED)
    batch = batch.to(tl.int64)
    here = (batch * heads + h) * n
    place = (chunk + (at - first) // CHUNK).to(tl.int64) * heads + h
    i = tl.arange(0, CHUNK)
    col = i[None, :]
    none = i * 0
    token = (at + i).to(tl.int64)
    inside = at + i < end
    q += batch * query_b + (h // query_group).to(tl.int64) * query_h
    k += batch * key_b + (h // key_group).to(tl.int64) * key_h
    gate += batch * gate_b + h.to(tl.int64) * gate_h
    dout += batch * out_b + (h // out_group).to(tl.int64) * out_h
    new += batch * new_b + (h // new_group).to(tl.int64) * new_h
    back += here * dv
    states += place * d * dv
    ends += place * d * dv
    by_query += place * CHUNK * CHUNK
    by_key += place * CHUNK * CHUNK
    square = i[:, None] * CHUNK + i[None, :]
    own = tl.load(by_query + i * CHUNK + i, mask=inside, other=0.0).to(tl.float32)
    if DELTA:
        bt = tl.load(beta + batch * beta_b + h.to(tl.int64) * beta_h + token * beta_n, mask=inside, other=0.0).to(tl.float32)
        dbeta += block.to(tl.int64) * plane + here
        strength = tl.zeros([CHUNK], tl.float32)
    ci = block * BD + tl.arange(0, BD)
    mask = inside[:, None] & (ci < d)[None, :]
    dq += here * d
    dk += here * d
    dgate += here * d
    at_out = token[:, None] * d + ci[None, :]
    qt = tl.load(q + token[:, None] * query_n + ci[None, :], mask=mask, other=0.0)
    kt = tl.load(k + token[:, None] * key_n + ci[None, :], mask=mask, other=0.0)
    gt = tl.load(gate + token[:, None] * gate_n + ci[None, :], mask=mask, other=0.0).to(tl.float32)
    g_high, g_low = in_parts(tl.maximum(gt, LOWEST) * LOG2E, PRECISION)
    dtype = kt.dtype
    dg_t = tl.zeros([CHUNK, BD], tl.float32)
    if GATE_GRAD:
        total = tl.load(totals + place * d + ci, mask=ci < d, other=0.0)
        dg_t += (state_dots(states, ends, ci, d, dv, BD, BV, VALUE_BLOCKS) * tl.exp2(total))[None, :]

    # from and to the states
    ones = ranges(none, i - 1, CHUNK, False, PRECISION)
    x = tl.exp2(sums(ones, g_high, g_low, PRECISION))
    dk_t = times_state(new, new_n, ends, token, inside, ci, d, dv, CHUNK, BD, BV, VALUE_BLOCKS, PRECISION) * x
    if GATE_GRAD:
        high, low = in_parts(kt.to(tl.float32) * dk_t, PRECISION)
        dg_t += sums(ranges(none, i - 1, CHUNK, True, PRECISION), high, low, PRECISION)
    ones = ranges(i, none + CHUNK - 1, CHUNK, False, PRECISION)
    x = tl.exp2(sums(ones, g_high, g_low, PRECISION))
    dq_t = times_state(dout, out_n, states, token, inside, ci, d, dv, CHUNK, BD, BV, VALUE_BLOCKS, PRECISION) * (x * scale)
    given = qt.to(tl.float32) * dq_t
    if DELTA:
        y = times_state(back, dv, states, token, inside, ci, d, dv, CHUNK, BD, BV, VALUE_BLOCKS, PRECISION) * x
        strength -= tl.sum(kt.to(tl.float32) * y, axis=1)
        y = y * -bt[:, None]
        dk_t += y
        given += kt.to(tl.float32) * y
    if GATE_GRAD:
        high, low = in_parts(given, PRECISION)
        dg_t += sums(ranges(i, none + CHUNK - 1, CHUNK, True, PRECISION), high, low, PRECISION)
    dq_t += own[:, None] * kt.to(tl.float32)
    dk_t += own[:, None] * qt.to(tl.float32)

    apart = i[:, None] ^ col
    for level in range(4, LEVELS):  # the ones before are `near`
        begin = (i >> level) << level
        is_late = ((i >> level) & 1) == 1
        late = is_late[:, None]
        # a token's factor holds the gates between the boundary and it; so a gate is in those of the tokens on its other side
        ones = level_ranges(level, CHUNK, False, PRECISION)
        x = tl.exp2(sums(ones, g_high, g_low, PRECISION))
        z = tl.where(late, qt, kt).to(tl.float32)
        there = (begin < end - at)[:, None]
        pair = (apart >> level) == 1
        both = tl.load(by_query + square, mask=there, other=0.0)
        y = matmul(tl.where(pair, both, 0.0).to(dtype), (z * x).to(dtype), PRECISION) * x
        given = z * y
        dq_t += tl.where(late, y, 0.0)
        dk_t += tl.where(late, 0.0, y)
        if DELTA:
            turned = tl.where(is_late, -bt, 1.0)[:, None]
            z = kt.to(tl.float32) * turned
            both = tl.load(by_key + square, mask=there, other=0.0)
            y = matmul(tl.where(pair, both, 0.0).to(dtype), (z * x).to(dtype), PRECISION) * x
            given += z * y
            strength -= tl.where(is_late, tl.sum(kt.to(tl.float32) * y, axis=1), 0.0)
            dk_t += y * turned
        if GATE_GRAD:
            high, low = in_parts(given, PRECISION)
            dg_t += sums(level_ranges(level, CHUNK, True, PRECISION), high, low, PRECISION)
    tl.store(dq + at_out, dq_t.to(dq.dtype.element_ty), mask=mask)
    tl.store(dk + at_out, dk_t.to(dk.dtype.element_ty), mask=mask)
    if GATE_GRAD:
        tl.store(dgate + at_out, dg_t.to(dgate.dtype.element_ty), mask=mask)
    if DELTA:
        tl.store(dbeta + token, strength, mask=inside)
