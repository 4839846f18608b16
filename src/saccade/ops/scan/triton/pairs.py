"""Gradients of a chunk's products: of queries and keys, and of keys and keys; first of the two steps that end the backward pass.

With A_ij = scale q_i.k_j and L_ij = k_i.k_j, both with their gates, a chunk computes O = Q S + A V' and (I + diag(beta) L) V' =
diag(beta) (V - K S). So with Y = (I + diag(beta) L)^-T dV' there is no need to go through the inverse:

    dA = dO V'^T for j <= i        dL = -diag(beta) Y V'^T for j < i        dV = diag(beta) Y
    dbeta_i = Y_i . (V_i - k_i S - sum_j L_ij V'_j)
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.scan.triton.inside import CHANNEL_GATE, NO_GATE, chunk_gates, matmul, matmul_add, pair_gates, segment_of


@triton.jit
def products(
    x, x_n, y, y_n, token, inside, d, CHUNK: tl.constexpr, BD: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr, PRECISION: tl.constexpr
):
    """x @ y^T of a chunk's rows, over all channels."""
    total = tl.zeros([CHUNK, CHUNK], tl.float32)
    for block in range(0, CHANNEL_BLOCKS):
        ci = block * BD + tl.arange(0, BD)
        wanted = inside[:, None] & (ci < d)[None, :]
        xt = tl.load(x + token[:, None] * x_n + ci[None, :], mask=wanted, other=0.0)
        yt = tl.load(y + token[:, None] * y_n + ci[None, :], mask=wanted, other=0.0)
        total = matmul_add(xt, tl.trans(yt), total, PRECISION)
    return total


@triton.jit
def pair_gradients(
    q, k, v, dout, new, back, inverses, beta, gate, by_query, by_key, dval, dbeta, dgate, table, n, per_sequence, heads, scale,
    query_group, query_b, query_h, query_n, key_group, key_b, key_h, key_n, val_group, val_b, val_h, val_n,
    new_group, new_b, new_h, new_n, out_group, out_b, out_h, out_n, gate_b, gate_h, gate_n, beta_b, beta_h, beta_n,
    d: tl.constexpr, dv: tl.constexpr,
    CHUNK: tl.constexpr, BD: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr, BV: tl.constexpr, VALUE_BLOCKS: tl.constexpr, GATE: tl.constexpr,
    DELTA: tl.constexpr, PACKED: tl.constexpr, GATE_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """by_query, by_key `(chunks, H, CHUNK, CHUNK)`, lower triangle: scale dO V'^T and Y V'^T, with the gates; where those are per channel
    without them, and mirrored into the upper triangle.

    back `(B, H, N, Dv)`: dV', turned into Y in place. dval: dV. dbeta `(B, H, N)`: Y.V for now. dgate `(B, H, N)`, of gates that are not
    per channel: what the pairs of the chunk that a gate lies between give to it.
    """
    slot = tl.program_id(0)
    h = tl.program_id(1)
    batch, _owner, at, end, first, _last, chunk = segment_of(slot, n, per_sequence, table, CHUNK, CHUNK, PACKED)
    batch = batch.to(tl.int64)
    here = (batch * heads + h) * n
    i = tl.arange(0, CHUNK)
    token = (at + i).to(tl.int64)
    inside = at + i < end
    place = ((chunk + (at - first) // CHUNK).to(tl.int64) * heads + h) * CHUNK * CHUNK
    square = place + i[:, None] * CHUNK + i[None, :]
    mirrored = place + i[None, :] * CHUNK + i[:, None]
    dout += batch * out_b + (h // out_group).to(tl.int64) * out_h
    new += batch * new_b + (h // new_group).to(tl.int64) * new_h
    if DELTA:
        v += batch * val_b + (h // val_group).to(tl.int64) * val_h
        bt = tl.load(beta + batch * beta_b + h.to(tl.int64) * beta_h + token * beta_n, mask=inside, other=0.0).to(tl.float32)
        turn = tl.load(inverses + mirrored, mask=(i[:, None] <= i[None, :]) & (at < end), other=0.0)
        by_k = tl.zeros([CHUNK, CHUNK], tl.float32)
        dots = tl.zeros([CHUNK], tl.float32)
    by_q = tl.zeros([CHUNK, CHUNK], tl.float32)
    for block in range(0, VALUE_BLOCKS):
        vi = block * BV + tl.arange(0, BV)
        mask = inside[:, None] & (vi < dv)[None, :]
        ot = tl.load(dout + token[:, None] * out_n + vi[None, :], mask=mask, other=0.0)
        nt = tl.load(new + token[:, None] * new_n + vi[None, :], mask=mask, other=0.0)
        by_q = matmul_add(ot, tl.trans(nt), by_q, PRECISION)
        if DELTA:
            row = (here + token[:, None]) * dv + vi[None, :]
            raw = tl.load(back + row, mask=mask, other=0.0)
            yt = matmul(turn, raw, PRECISION)
            low = yt.to(nt.dtype)
            by_k = matmul_add(low, tl.trans(nt), by_k, PRECISION)
            vt = tl.load(v + token[:, None] * val_n + vi[None, :], mask=mask, other=0.0)
            dots += tl.sum(yt * vt.to(tl.float32), axis=1)
            tl.store(back + row, low, mask=mask)
            tl.store(dval + row, (yt * bt[:, None]).to(dval.dtype.element_ty), mask=mask)
    by_q = by_q * scale
    if GATE != NO_GATE and GATE != CHANNEL_GATE:
        gate += batch * gate_b + h.to(tl.int64) * gate_h
        _up_to, _after, _total, high, low_part = chunk_gates(gate, gate_n, at, end, CHUNK, GATE)
        weight = tl.exp2(tl.where(i[:, None] >= i[None, :], pair_gates(high, low_part, GATE), float("-inf")))
        by_q = by_q * weight
        if DELTA:
            by_k = by_k * weight
    if GATE == CHANNEL_GATE:
        low_q = by_q.to(by_query.dtype.element_ty)
        tl.store(by_query + square, low_q, mask=(i[:, None] >= i[None, :]) & (at < end))
        tl.store(by_query + mirrored, low_q, mask=(i[:, None] > i[None, :]) & (at < end))
    else:
        tl.store(by_query + square, by_q.to(by_query.dtype.element_ty), mask=(i[:, None] >= i[None, :]) & (at < end))
    if DELTA:
        low_k = by_k.to(by_key.dtype.element_ty)
        if GATE == CHANNEL_GATE:
            tl.store(by_key + mirrored, low_k, mask=(i[:, None] > i[None, :]) & (at < end))
            tl.store(by_key + square, low_k, mask=(i[:, None] >= i[None, :]) & (at < end))
        else:
            tl.store(by_key + square, low_k, mask=at < end)
        tl.store(dbeta + here + token, dots, mask=inside)
    if GATE_GRAD and GATE != CHANNEL_GATE:
        q += batch * query_b + (h // query_group).to(tl.int64) * query_h
        k += batch * key_b + (h // key_group).to(tl.int64) * key_h
        given = by_q * products(q, query_n, k, key_n, token, inside, d, CHUNK, BD, CHANNEL_BLOCKS, PRECISION)
        if DELTA:
            given -= by_k * products(k, key_n, k, key_n, token, inside, d, CHUNK, BD, CHANNEL_BLOCKS, PRECISION) * bt[:, None]
        # entry (t, j): what tokens from t on get from token j; of these, gate t sees the tokens before it
        given = tl.cumsum(tl.where(i[:, None] > i[None, :], given, 0.0), axis=0, reverse=True)
        between = tl.sum(tl.where(i[:, None] > i[None, :], given, 0.0), axis=1)
        tl.store(dgate + here + token, between, mask=inside)
