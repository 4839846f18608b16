"""The two walks of the backward pass: states from left to right, their gradients from right to left.

Every form is the same here, given what `prepare` made of a chunk: with S the state before it, dS the gradient of the state behind it,
A the products of queries and keys (with scale and gates) and Q, K the queries and keys times their gates,

    V'   = U - W S                          (V without the delta rule)
    dV'  = A^T dO + K dS
    dS  <- e^(gates of the chunk) dS + Q^T dO - W^T dV'

Both keep a state a chunk. They start from segments' states, so that all segments run at once.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.scan.triton.inside import CHANNEL_GATE, NO_GATE, chunk_weights, matmul, matmul_add, segment_of


@triton.jit
def keep_states(
    col, val, w, gate, totals, starts, states, new, table, n, per_sequence, heads,
    col_group, col_b, col_h, col_n: tl.constexpr, val_group, val_b, val_h, val_n: tl.constexpr, gate_b, gate_h, gate_n,
    d: tl.constexpr, dv: tl.constexpr,
    LENGTH, CHUNK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr, GATE: tl.constexpr,
    DELTA: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, START: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """states `(chunks, H, D, Dv)`: before each chunk. new `(B, H, N, Dv)`: V' under the delta rule; it may lie where val (u) lies."""
    pid = tl.program_id(0)
    block = pid % BLOCKS
    slot = pid // BLOCKS
    h = tl.program_id(1)
    batch, sequence, start, end, first, _last, chunk = segment_of(slot, n, per_sequence, table, LENGTH, CHUNK, PACKED)
    batch = batch.to(tl.int64)
    here = (batch * heads + h) * n
    col += batch * col_b + (h // col_group).to(tl.int64) * col_h
    val += batch * val_b + (h // val_group).to(tl.int64) * val_h
    if GATE != NO_GATE:
        gate += batch * gate_b + h.to(tl.int64) * gate_h
    i = tl.arange(0, CHUNK)
    di = tl.arange(0, BD)
    vi = block * BV + tl.arange(0, BV)
    d_in = (di < d)[None, :]
    v_in = (vi < dv)[None, :]
    entry = di[:, None] * dv + vi[None, :]
    entry_in = (di < d)[:, None] & v_in
    if SPLIT:
        state = tl.load(starts + (slot.to(tl.int64) * heads + h) * d * dv + entry, mask=entry_in, other=0.0)
    elif START:
        state = tl.load(starts + (sequence.to(tl.int64) * heads + h) * d * dv + entry, mask=entry_in, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BD, BV], tl.float32)
    for c in tl.range(0, tl.cdiv(end - start, CHUNK), num_stages=STAGES):
        at = start + c * CHUNK
        far_at = at.to(tl.int64)
        inside = (at + i < end)[:, None]
        ct = tl.load(col + far_at * col_n + (i[:, None] * col_n + di[None, :]), mask=inside & d_in, other=0.0)
        vt = tl.load(val + far_at * val_n + (i[:, None] * val_n + vi[None, :]), mask=inside & v_in, other=0.0)
        where = (chunk + (at - first) // CHUNK).to(tl.int64) * heads + h
        low = state.to(ct.dtype)
        tl.store(states + where * d * dv + entry, low, mask=entry_in)
        added = vt.to(tl.float32)
        if DELTA:
            wt = tl.load(w + (here + far_at) * d + (i[:, None] * d + di[None, :]), mask=inside & d_in, other=0.0)
            added = added - matmul(wt, low, PRECISION)
            tl.store(new + (here + far_at) * dv + (i[:, None] * dv + vi[None, :]), added.to(new.dtype.element_ty), mask=inside & v_in)
        if GATE == CHANNEL_GATE:
            total = tl.load(totals + where * d + di, mask=di < d, other=0.0)
            state = state * tl.exp2(total)[:, None]
        elif GATE != NO_GATE:
            _into, out_of, over_all = chunk_weights(gate, gate_n, at, end, CHUNK, GATE)
            added = added * out_of[:, None]
            state = state * over_all
        state = matmul_add(tl.trans(ct), added.to(ct.dtype), state, PRECISION)


@triton.jit
def keep_state_gradients(
    row, col, w, pairs, dout, gate, totals, ends, states, new, first_state, table, n, per_sequence, heads, scale,
    row_group, row_b, row_h, row_n: tl.constexpr, col_group, col_b, col_h, col_n: tl.constexpr,
    out_group, out_b, out_h, out_n: tl.constexpr, gate_b, gate_h, gate_n,
    d: tl.constexpr, dv: tl.constexpr,
    LENGTH, CHUNK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr, GATE: tl.constexpr,
    DELTA: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, START: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """states `(chunks, H, D, Dv)`: the gradient of the state behind each chunk. new `(B, H, N, Dv)`: dV'. first_state `(S, H, D, Dv)`.

    Without KEEP only the map of a segment is wanted: it starts from 0, and first_state `(slots, H, D, Dv)` takes what it ends with.
    """
    pid = tl.program_id(0)
    block = pid % BLOCKS
    slot = pid // BLOCKS
    h = tl.program_id(1)
    batch, sequence, start, end, first, _last, chunk = segment_of(slot, n, per_sequence, table, LENGTH, CHUNK, PACKED)
    batch = batch.to(tl.int64)
    here = (batch * heads + h) * n
    row += batch * row_b + (h // row_group).to(tl.int64) * row_h
    col += batch * col_b + (h // col_group).to(tl.int64) * col_h
    dout += batch * out_b + (h // out_group).to(tl.int64) * out_h
    if GATE != NO_GATE:
        gate += batch * gate_b + h.to(tl.int64) * gate_h
    i = tl.arange(0, CHUNK)
    di = tl.arange(0, BD)
    vi = block * BV + tl.arange(0, BV)
    d_in = (di < d)[None, :]
    v_in = (vi < dv)[None, :]
    entry = di[:, None] * dv + vi[None, :]
    entry_in = (di < d)[:, None] & v_in
    near = i[:, None] >= i[None, :]
    if SPLIT:
        state = tl.load(ends + (slot.to(tl.int64) * heads + h) * d * dv + entry, mask=entry_in, other=0.0)
    elif START:
        state = tl.load(ends + (sequence.to(tl.int64) * heads + h) * d * dv + entry, mask=entry_in, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BD, BV], tl.float32)
    count = tl.cdiv(end - start, CHUNK)
    if not KEEP:  # nobody asks what comes out of the first segment
        count = tl.where(start == first, 0, count)
    for c in tl.range(0, count, num_stages=STAGES):
        at = start + (count - 1 - c) * CHUNK
        far_at = at.to(tl.int64)
        inside = (at + i < end)[:, None]
        where = (chunk + (at - first) // CHUNK).to(tl.int64) * heads + h
        rt = tl.load(row + far_at * row_n + (i[:, None] * row_n + di[None, :]), mask=inside & d_in, other=0.0)
        ct = tl.load(col + far_at * col_n + (i[:, None] * col_n + di[None, :]), mask=inside & d_in, other=0.0)
        ot = tl.load(dout + far_at * out_n + (i[:, None] * out_n + vi[None, :]), mask=inside & v_in, other=0.0)
        pair = tl.load(pairs + where * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :], mask=near, other=0.0)
        low = state.to(ct.dtype)
        if KEEP:
            tl.store(states + where * d * dv + entry, low, mask=entry_in)
        back = matmul(ct, low, PRECISION)
        if GATE == CHANNEL_GATE:
            total = tl.load(totals + where * d + di, mask=di < d, other=0.0)
            state = state * tl.exp2(total)[:, None]
        elif GATE != NO_GATE:
            into, out_of, over_all = chunk_weights(gate, gate_n, at, end, CHUNK, GATE)
            back = back * out_of[:, None]
            state = state * over_all
        back = matmul_add(tl.trans(pair), ot, back, PRECISION)
        if KEEP:
            tl.store(new + (here + far_at) * dv + (i[:, None] * dv + vi[None, :]), back.to(new.dtype.element_ty), mask=inside & v_in)
        if DELTA:
            wt = tl.load(w + (here + far_at) * d + (i[:, None] * d + di[None, :]), mask=inside & d_in, other=0.0)
            state = matmul_add(tl.trans(wt), (-back).to(wt.dtype), state, PRECISION)
        if GATE == CHANNEL_GATE:
            read = ot
        elif GATE != NO_GATE:
            read = (ot.to(tl.float32) * (into * scale)[:, None]).to(ot.dtype)
        else:
            read = (ot.to(tl.float32) * scale).to(ot.dtype)
        state = matmul_add(tl.trans(rt), read, state, PRECISION)
    if KEEP:
        done = (end > start) & (start == first)
        tl.store(first_state + (sequence.to(tl.int64) * heads + h) * d * dv + entry, state, mask=entry_in & done)
    else:
        tl.store(first_state + (slot.to(tl.int64) * heads + h) * d * dv + entry, state, mask=entry_in)
