"""Products inside a chunk under the delta rule, for gates shared by all channels: of queries and keys, and of keys and keys."""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.scan.triton.inside import NO_GATE, TOKEN_GATE, chunk_gates, matmul, pair_gates, segment_of


@triton.jit
def products(
    q, k, gate, pairs, systems, lines, table, n, per_sequence, heads, scale,
    query_group, query_b, query_h, query_n, key_group, key_b, key_h, key_n, gate_b, gate_h, gate_n,
    d: tl.constexpr, CHUNK: tl.constexpr, BD: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """pairs `(chunks, H, CHUNK, CHUNK)`, lower triangle: scale times the gated products of q and k. systems, float32, below the
    diagonal: those of k and k, which `solve` reads. lines `(B, H, 2, N)` float32, with a gate a token: e^(gates) from the chunk's start up
    to each token, and after each up to its end; the walks read them in every chunk."""
    slot = tl.program_id(0)
    h = tl.program_id(1)
    batch, _owner, at, end, first, _last, chunk = segment_of(slot, n, per_sequence, table, CHUNK, CHUNK, PACKED)
    batch = batch.to(tl.int64)
    i = tl.arange(0, CHUNK)
    di = tl.arange(0, BD)
    token = (at + i).to(tl.int64)
    wanted = (at + i < end)[:, None] & (di < d)[None, :]
    q += batch * query_b + (h // query_group).to(tl.int64) * query_h
    k += batch * key_b + (h // key_group).to(tl.int64) * key_h
    kt = tl.load(k + token[:, None] * key_n + di[None, :], mask=wanted, other=0.0)
    qt = tl.load(q + token[:, None] * query_n + di[None, :], mask=wanted, other=0.0)
    pair = matmul(qt, tl.trans(kt), PRECISION) * scale
    system = matmul(kt, tl.trans(kt), PRECISION)
    near = i[:, None] >= i[None, :]
    if GATE != NO_GATE:
        gate += batch * gate_b + h.to(tl.int64) * gate_h
        up_to, after, _total, high, low = chunk_gates(gate, gate_n, at, end, CHUNK, GATE)
        if GATE == TOKEN_GATE:
            lines += (batch * heads + h) * 2 * n
            tl.store(lines + token, tl.exp2(up_to), mask=at + i < end)
            tl.store(lines + n + token, tl.exp2(after), mask=at + i < end)
        weight = tl.exp2(tl.where(near, pair_gates(high, low, GATE), float("-inf")))
        pair = pair * weight
        system = system * weight
    square = ((chunk + (at - first) // CHUNK).to(tl.int64) * heads + h) * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :]
    tl.store(pairs + square, pair.to(pairs.dtype.element_ty), mask=near & (at < end))
    tl.store(systems + square, system, mask=(i[:, None] > i[None, :]) & (at < end))
