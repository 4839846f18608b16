"""The delta rule inside a chunk, for gates shared by all channels: the UT transform.

What a chunk writes is V' = U - W S with U = T V, W = T (e^P K), T = (I + diag(beta) L)^-1 diag(beta), L the gated products of keys below
the diagonal. U and W do not depend on the state, so all chunks are prepared at once. So are the gated products of
queries and keys, which every block of values reads. The backward pass also wants the inverse itself.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.scan.triton.inside import NO_GATE, chunk_gates, diagonal_blocks, join_blocks, matmul, pair_gates, segment_of, solve_small


@triton.jit
def transform(
    q, k, v, beta, gate, u, w, inverses, pairs, table, n, per_sequence, heads, scale,
    query_group, query_b, query_h, query_n, key_group, key_b, key_h, key_n, val_group, val_b, val_h, val_n,
    gate_b, gate_h, gate_n, beta_b, beta_h, beta_n,
    d: tl.constexpr, dv: tl.constexpr,
    CHUNK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, VALUE_BLOCKS: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """u `(B, H, N, Dv)`, w `(B, H, N, D)` of a chunk. pairs `(chunks, H, CHUNK, CHUNK)`, lower triangle: scale times the gated
    products of q and k; inverses, with KEEP: (I + diag(beta) L)^-1."""
    slot = tl.program_id(0)
    h = tl.program_id(1)
    batch, _owner, at, end, first, _last, chunk = segment_of(slot, n, per_sequence, table, CHUNK, CHUNK, PACKED)
    batch = batch.to(tl.int64)
    here = (batch * heads + h) * n
    i = tl.arange(0, CHUNK)
    di = tl.arange(0, BD)
    token = (at + i).to(tl.int64)
    inside = at + i < end
    k += batch * key_b + (h // key_group).to(tl.int64) * key_h
    v += batch * val_b + (h // val_group).to(tl.int64) * val_h
    kt = tl.load(k + token[:, None] * key_n + di[None, :], mask=inside[:, None] & (di < d)[None, :], other=0.0)
    bt = tl.load(beta + batch * beta_b + h.to(tl.int64) * beta_h + token * beta_n, mask=inside, other=0.0).to(tl.float32)
    product = matmul(kt, tl.trans(kt), PRECISION)
    under = i[:, None] > i[None, :]
    if GATE == NO_GATE:
        system = tl.where(under, product * bt[:, None], 0.0)
    else:
        gate += batch * gate_b + h.to(tl.int64) * gate_h
        up_to, _after, _total, high, low = chunk_gates(gate, gate_n, at, end, CHUNK, GATE)
        between = tl.where(under, pair_gates(high, low, GATE), float("-inf"))
        system = product * bt[:, None] * tl.exp2(between)
    small = solve_small(diagonal_blocks(system, CHUNK), CHUNK // 16)
    inverse = join_blocks(small, tl.where(i[:, None] // 16 > i[None, :] // 16, system, 0.0), CHUNK, SOLVE)
    square = ((chunk + (at - first) // CHUNK).to(tl.int64) * heads + h) * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :]
    near = (i[:, None] >= i[None, :]) & (at < end)
    q += batch * query_b + (h // query_group).to(tl.int64) * query_h
    qt = tl.load(q + token[:, None] * query_n + di[None, :], mask=inside[:, None] & (di < d)[None, :], other=0.0)
    pair = matmul(qt, tl.trans(kt), PRECISION) * scale
    if GATE != NO_GATE:
        pair = pair * tl.exp2(tl.where(near, pair_gates(high, low, GATE), float("-inf")))
    tl.store(pairs + square, pair.to(pairs.dtype.element_ty), mask=near)
    if KEEP:
        tl.store(inverses + square, inverse.to(inverses.dtype.element_ty), mask=at < end)
    inverse = inverse * bt[None, :]
    as_read = inverse
    if GATE != NO_GATE:
        as_read = inverse * tl.exp2(up_to)[None, :]
    wt = matmul(as_read.to(kt.dtype), kt, PRECISION)
    tl.store(w + (here + token[:, None]) * d + di[None, :], wt.to(w.dtype.element_ty), mask=inside[:, None] & (di < d)[None, :])
    weights = inverse.to(kt.dtype)
    for block in range(0, VALUE_BLOCKS):
        vi = block * BV + tl.arange(0, BV)
        mask = inside[:, None] & (vi < dv)[None, :]
        vt = tl.load(v + token[:, None] * val_n + vi[None, :], mask=mask, other=0.0)
        ut = matmul(weights, vt, PRECISION)
        tl.store(u + (here + token[:, None]) * dv + vi[None, :], ut.to(u.dtype.element_ty), mask=mask)
