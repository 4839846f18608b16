"""Gradients of queries, keys, beta and gates from those of states and products: the last step, for gates shared by all channels.

A token's query and key stand in the rows of products, its key in the columns too. With G = dA and H = Y V'^T of `pairs`, S the state
before the chunk and dS the gradient of the state behind it:

    dq = scale e^P dO S^T + G K        r = e^P Y S^T + H K        dk = e^R V' dS^T + G^T Q - H^T diag(beta) K - diag(beta) r
    dbeta = Y.V - k.r

The gates' gradients are summed as `outputs` says: pairs of tokens inside the chunk by `pairs`, all others here.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.scan.triton.inside import NO_GATE, chunk_weights, matmul_add, segment_of


@triton.jit
def times_state(
    x, x_n, states, token, inside, ci, d: tl.constexpr, dv: tl.constexpr,
    CHUNK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, VALUE_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x S^T of a block of channels, `(CHUNK, BD)`: x points to a head's tokens, states to a state."""
    product = tl.zeros([CHUNK, BD], tl.float32)
    for block in range(0, VALUE_BLOCKS):
        vi = block * BV + tl.arange(0, BV)
        st = tl.load(states + ci[:, None] * dv + vi[None, :], mask=(ci < d)[:, None] & (vi < dv)[None, :], other=0.0)
        xt = tl.load(x + token[:, None] * x_n + vi[None, :], mask=inside[:, None] & (vi < dv)[None, :], other=0.0)
        product = matmul_add(xt, tl.trans(st), product, PRECISION)
    return product


@triton.jit
def state_dots(
    states, ends, ci, d: tl.constexpr, dv: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, VALUE_BLOCKS: tl.constexpr
):  # fmt: skip
    """<S, dS> of the rows of a block of channels, `(BD,)`."""
    total = tl.zeros([BD], tl.float32)
    for block in range(0, VALUE_BLOCKS):
        vi = block * BV + tl.arange(0, BV)
        mask = (ci < d)[:, None] & (vi < dv)[None, :]
        st = tl.load(states + ci[:, None] * dv + vi[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(st * tl.load(ends + ci[:, None] * dv + vi[None, :], mask=mask, other=0.0).to(tl.float32), axis=1)
    return total


@triton.jit
def token_gradients(
    q, k, beta, gate, dout, new, back, by_query, by_key, states, ends, dq, dk, dbeta, dgate, table, n, per_sequence, heads, scale,
    query_group, query_b, query_h, query_n, key_group, key_b, key_h, key_n, new_group, new_b, new_h, new_n,
    out_group, out_b, out_h, out_n, gate_b, gate_h, gate_n, beta_b, beta_h, beta_n,
    d: tl.constexpr, dv: tl.constexpr,
    CHUNK: tl.constexpr, BD: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr, BV: tl.constexpr, VALUE_BLOCKS: tl.constexpr, GATE: tl.constexpr,
    PACKED: tl.constexpr, GATE_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk `(B, H, N, D)`; dbeta, dgate `(B, H, N)` float32, which `pairs` began."""
    slot = tl.program_id(0)
    h = tl.program_id(1)
    batch, _owner, at, end, first, _last, chunk = segment_of(slot, n, per_sequence, table, CHUNK, CHUNK, PACKED)
    batch = batch.to(tl.int64)
    here = (batch * heads + h) * n
    place = (chunk + (at - first) // CHUNK).to(tl.int64) * heads + h
    i = tl.arange(0, CHUNK)
    token = (at + i).to(tl.int64)
    inside = at + i < end
    square = place * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :]
    q += batch * query_b + (h // query_group).to(tl.int64) * query_h
    k += batch * key_b + (h // key_group).to(tl.int64) * key_h
    dout += batch * out_b + (h // out_group).to(tl.int64) * out_h
    new += batch * new_b + (h // new_group).to(tl.int64) * new_h
    back += here * dv
    states += place * d * dv
    ends += place * d * dv
    bt = tl.load(beta + batch * beta_b + h.to(tl.int64) * beta_h + token * beta_n, mask=inside, other=0.0).to(tl.float32)
    strength = tl.load(dbeta + here + token, mask=inside, other=0.0)
    if GATE != NO_GATE:
        gate += batch * gate_b + h.to(tl.int64) * gate_h
        into, out_of, over_all = chunk_weights(gate, gate_n, at, end, CHUNK, GATE)
        into = into[:, None]
        out_of = out_of[:, None]
    from_before = tl.zeros([CHUNK], tl.float32)
    to_behind = tl.zeros([CHUNK], tl.float32)
    through = 0.0
    for block in range(0, CHANNEL_BLOCKS):
        ci = block * BD + tl.arange(0, BD)
        mask = inside[:, None] & (ci < d)[None, :]
        at_out = (here + token[:, None]) * d + ci[None, :]
        qt = tl.load(q + token[:, None] * query_n + ci[None, :], mask=mask, other=0.0)
        kt = tl.load(k + token[:, None] * key_n + ci[None, :], mask=mask, other=0.0)

        to_query = times_state(dout, out_n, states, token, inside, ci, d, dv, CHUNK, BD, BV, VALUE_BLOCKS, PRECISION) * scale
        if GATE != NO_GATE:
            to_query = to_query * into
        if GATE_GRAD:
            from_before += tl.sum(qt.to(tl.float32) * to_query, axis=1)
        g = tl.load(by_query + square, mask=i[:, None] >= i[None, :], other=0.0)
        to_query = matmul_add(g, kt, to_query, PRECISION)
        tl.store(dq + at_out, to_query.to(dq.dtype.element_ty), mask=mask)

        to_key = times_state(new, new_n, ends, token, inside, ci, d, dv, CHUNK, BD, BV, VALUE_BLOCKS, PRECISION)
        if GATE != NO_GATE:
            to_key = to_key * out_of
        if GATE_GRAD:
            to_behind += tl.sum(kt.to(tl.float32) * to_key, axis=1)
            through += tl.sum(state_dots(states, ends, ci, d, dv, BD, BV, VALUE_BLOCKS))
        to_key = matmul_add(tl.trans(g), qt, to_key, PRECISION)
        h_t = tl.load(by_key + square, mask=i[:, None] > i[None, :], other=0.0)
        to_key = matmul_add(tl.trans(h_t), (kt.to(tl.float32) * -bt[:, None]).to(kt.dtype), to_key, PRECISION)

        to_read = times_state(back, dv, states, token, inside, ci, d, dv, CHUNK, BD, BV, VALUE_BLOCKS, PRECISION)
        if GATE != NO_GATE:
            to_read = to_read * into
        if GATE_GRAD:
            from_before -= tl.sum(kt.to(tl.float32) * to_read, axis=1) * bt
        to_read = matmul_add(h_t, kt, to_read, PRECISION)
        strength -= tl.sum(kt.to(tl.float32) * to_read, axis=1)
        to_key = to_key - to_read * bt[:, None]
        tl.store(dk + at_out, to_key.to(dk.dtype.element_ty), mask=mask)
    tl.store(dbeta + here + token, strength, mask=inside)
    if GATE_GRAD:
        given = tl.load(dgate + here + token, mask=inside, other=0.0)
        given += tl.cumsum(from_before, 0, reverse=True) + tl.cumsum(to_behind, 0) - to_behind + through * over_all
        tl.store(dgate + here + token, given, mask=inside)
