"""Outputs: one program walks over the chunks of a segment with the state in registers.

One kernel serves the forward pass and, with its operands in other places, the gradients of the forms without delta rule:

    out = rows, cols, vals = q, k, v            from left to right
    dq  =                    dout, v, k         from left to right
    dk  =                    v, dout, q         from right to left
    dv  =                    k, q, dout         from right to left

The gates' gradients come out of the two passes that give dq and dk. A pair of tokens j < i that adds p_ij to the loss' derivative gives
it to every gate between them, t in (j, i]. Summed where it belongs, and nowhere else, for a gate t of a chunk that starts from S:

    dg_t = sum_{j < t <= i} p_ij inside the chunk + sum_{i >= t} q_i.(dq_i from S) + sum_{j < t} k_j.(dk_j from dS) + <S, dS> over the chunk

The shorter sum_{i >= t} (q_i.dq_i - k_i.dk_i) is the same, but takes pairs away again that it has added, and its rounding errors add up.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.scan.triton.inside import CHANNEL_GATE, NO_GATE, chunk_gates, chunk_weights, matmul, matmul_add, pair_gates, segment_of


@triton.jit
def outputs(
    row, col, val, w, gate, totals, pairs, starts, out, final, partner, dots, states, dgate, table, plane, n, per_sequence, heads, scale,
    row_group, row_b, row_h, row_n: tl.constexpr,
    col_group, col_b, col_h, col_n: tl.constexpr, val_group, val_b, val_h,
    val_n: tl.constexpr, gate_b, gate_h, gate_n,
    par_group, par_b, par_h, par_n: tl.constexpr,
    d: tl.constexpr, dv: tl.constexpr,
    LENGTH, CHUNK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr, GATE: tl.constexpr,
    DELTA: tl.constexpr, PAIRS: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, START: tl.constexpr,
    DOTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out `(B, H, N, Dv)`, final `(S, H, D, Dv)`; starts: one state a segment (SPLIT) or a sequence. With PAIRS, `pairs` holds the
    products inside chunks; with a gate per channel, row and col hold scale * q and k times their gates; with DELTA val holds u."""
    pid = tl.program_id(0)
    block = pid % BLOCKS
    slot = pid // BLOCKS
    h = tl.program_id(1)
    batch, sequence, start, end, first, last, chunk = segment_of(slot, n, per_sequence, table, LENGTH, CHUNK, PACKED)
    batch = batch.to(tl.int64)
    row += batch * row_b + (h // row_group).to(tl.int64) * row_h
    col += batch * col_b + (h // col_group).to(tl.int64) * col_h
    val += batch * val_b + (h // val_group).to(tl.int64) * val_h
    here = (batch * heads + h) * n
    if GATE != NO_GATE:
        gate += batch * gate_b + h.to(tl.int64) * gate_h
    i = tl.arange(0, CHUNK)
    di = tl.arange(0, BD)
    vi = block * BV + tl.arange(0, BV)
    d_in = (di < d)[None, :]
    v_in = (vi < dv)[None, :]
    row_at = i[:, None] * row_n + di[None, :]
    col_at = i[:, None] * col_n + di[None, :]
    val_at = i[:, None] * val_n + vi[None, :]
    entry = di[:, None] * dv + vi[None, :]
    entry_in = (di < d)[:, None] & v_in
    if SPLIT:
        state = tl.load(starts + (slot.to(tl.int64) * heads + h) * d * dv + entry, mask=entry_in, other=0.0)
    elif START:
        state = tl.load(starts + (sequence.to(tl.int64) * heads + h) * d * dv + entry, mask=entry_in, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BD, BV], tl.float32)
    if REVERSE:
        near = i[:, None] <= i[None, :]
    else:
        near = i[:, None] >= i[None, :]
    if DELTA:
        w += here * d
    if DOTS:
        partner += batch * par_b + (h // par_group).to(tl.int64) * par_h
        dots += block.to(tl.int64) * plane + here
        dgate += block.to(tl.int64) * plane + here
    for c in tl.range(0, tl.cdiv(end - start, CHUNK), num_stages=STAGES):
        at = start + c * CHUNK
        if REVERSE:
            at = start + (tl.cdiv(end - start, CHUNK) - 1 - c) * CHUNK
        far_at = at.to(tl.int64)
        inside = (at + i < end)[:, None]
        rt = tl.load(row + far_at * row_n + row_at, mask=inside & d_in, other=0.0)
        ct = tl.load(col + far_at * col_n + col_at, mask=inside & d_in, other=0.0)
        vt = tl.load(val + far_at * val_n + val_at, mask=inside & v_in, other=0.0)
        low = state.to(rt.dtype)
        if GATE != NO_GATE and GATE != CHANNEL_GATE:
            if PAIRS:
                into, out_of, over_all = chunk_weights(gate, gate_n, at, end, CHUNK, GATE)
            else:
                up_to, after, total, high, rest = chunk_gates(gate, gate_n, at, end, CHUNK, GATE)
                into = tl.exp2(up_to)
                out_of = tl.exp2(after)
                over_all = tl.exp2(total)
        if PAIRS:
            where = (chunk + (at - first) // CHUNK).to(tl.int64) * heads + h
            pair = tl.load(pairs + where * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :], mask=near, other=0.0)
        else:
            product = matmul(rt, tl.trans(ct), PRECISION)
            if GATE == NO_GATE:
                product = tl.where(near, product, 0.0)
            else:
                between = pair_gates(high, rest, GATE)
                if REVERSE:
                    between = -between
                product *= tl.exp2(tl.where(near, between, float("-inf")))
            product *= scale
            pair = product.to(rt.dtype)
        far = matmul(rt, low, PRECISION)
        if DELTA:
            wt = tl.load(w + far_at * d + (i[:, None] * d + di[None, :]), mask=inside & d_in, other=0.0)
            new = vt.to(tl.float32) - matmul(wt, low, PRECISION)
            vt = new.to(vt.dtype)
        else:
            new = vt.to(tl.float32)
        if GATE != NO_GATE and GATE != CHANNEL_GATE:
            if REVERSE:
                far *= out_of[:, None]
                new *= into[:, None]
            else:
                far *= into[:, None]
                new *= out_of[:, None]
        if REVERSE:
            new *= scale
        elif GATE != CHANNEL_GATE:
            far *= scale
        if DOTS:
            pt = tl.load(partner + far_at * par_n + (i[:, None] * par_n + vi[None, :]), mask=inside & v_in, other=0.0)
            outer = tl.sum(pt.to(tl.float32) * far, axis=1)
        result = matmul_add(pair, vt, far, PRECISION)
        tl.store(out + (here + far_at) * dv + (i[:, None] * dv + vi[None, :]), result.to(out.dtype.element_ty), mask=inside & v_in)
        if DOTS:
            where_state = (chunk + (at - first) // CHUNK).to(tl.int64) * heads + h
            state_at = states + where_state * d * dv + entry
            if REVERSE:
                matching = tl.load(dots + at + i, mask=at + i < end, other=0.0)
                kept = tl.load(state_at, mask=entry_in, other=0.0).to(tl.float32)
                across = tl.sum(kept * state) * over_all
                # entry (j, t): what token j gives to tokens from t on; of these, gate t sees the tokens before it
                given = tl.cumsum(product * matmul(pt, tl.trans(vt), PRECISION), axis=1, reverse=True)
                inner = tl.sum(tl.where(i[:, None] < i[None, :], given, 0.0), axis=0)
                dg = inner + tl.cumsum(matching, 0, reverse=True) + tl.cumsum(outer, 0) - outer + across
                tl.store(dgate + at + i, dg, mask=at + i < end)
            else:
                tl.store(dots + at + i, outer, mask=at + i < end)
                tl.store(state_at, state.to(states.dtype.element_ty), mask=entry_in)
        if GATE == CHANNEL_GATE:
            total = tl.load(totals + where * d + di, mask=di < d, other=0.0)
            state = state * tl.exp2(total)[:, None]
        elif GATE != NO_GATE:
            state = state * over_all
        state = matmul_add(tl.trans(ct), new.to(ct.dtype), state, PRECISION)
    ends_here = end == last
    if REVERSE:
        ends_here = start == first
    done = (end > start) & ends_here
    tl.store(final + (sequence.to(tl.int64) * heads + h) * d * dv + entry, state, mask=entry_in & done)
