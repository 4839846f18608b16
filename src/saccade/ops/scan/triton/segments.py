"""States across segments: what each segment does to a state, all at once, then one short walk over the segments.

Without the delta rule a segment multiplies the state by its gates and adds a matrix. Under it the segment's map is S -> M S + A: the
same loop over chunks, started from the identity without values, gives M.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.scan.triton.inside import CHANNEL_GATE, NO_GATE, TOKEN_LINES, chunk_gates, chunk_weights, matmul, matmul_add, segment_of


@triton.jit
def segment_maps(
    col, val, w, gate, totals, added, kept, moved, table, n, per_sequence, heads, scale,
    col_group, col_b, col_h, col_n: tl.constexpr, val_group, val_b, val_h, val_n: tl.constexpr, gate_b, gate_h, gate_n,
    d: tl.constexpr, dv: tl.constexpr,
    LENGTH, CHUNK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, VALUE_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, START: tl.constexpr, BOTH: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """added `(slots, H, D, Dv)`: a segment's map of the zero state. kept: log2 of the gates over it, `(slots, H)` or `(slots, H, D)`.

    moved `(slots, H, D, D)`, under the delta rule: what the segment does to a state without adding values. Left out, with something finite
    in its place: what the last segment of a sequence adds, what the first does to a state of zeros (START: to the one given), and what
    the last does to a state, unless the gradients come BOTH ways.
    """
    pid = tl.program_id(0)
    block = pid % BLOCKS
    slot = pid // BLOCKS
    h = tl.program_id(1)
    batch, _owner, start, end, first, last, chunk = segment_of(slot, n, per_sequence, table, LENGTH, CHUNK, PACKED)
    batch = batch.to(tl.int64)
    col += batch * col_b + (h // col_group).to(tl.int64) * col_h
    val += batch * val_b + (h // val_group).to(tl.int64) * val_h
    if GATE != NO_GATE:
        gate += batch * gate_b + h.to(tl.int64) * gate_h
    i = tl.arange(0, CHUNK)
    di = tl.arange(0, BD)
    vi = block * BV + tl.arange(0, BV)
    is_map = block >= VALUE_BLOCKS
    mi = vi - VALUE_BLOCKS * BV
    from_val = (vi < dv) & (vi < VALUE_BLOCKS * BV)
    state = tl.where((di[:, None] == mi[None, :]) & is_map, 1.0, 0.0)
    seen = tl.zeros([BD], tl.float32)
    seen_all = 0.0
    if DELTA:
        w += (batch * heads + h) * n * d
    if REVERSE:
        is_last = start == first
        is_first = end == last
    else:
        is_last = end == last
        is_first = start == first
    if BOTH:
        # without the delta rule what it adds comes with what it keeps
        unwanted = is_last & (block < VALUE_BLOCKS) & DELTA
    else:
        unwanted = is_last
    if not START:
        unwanted = unwanted | (is_first & is_map)
    count = tl.where(unwanted, 0, tl.cdiv(end - start, CHUNK))
    for c in tl.range(0, count, num_stages=STAGES):
        at = start + c * CHUNK
        if REVERSE:
            at = start + (count - 1 - c) * CHUNK
        inside = at + i < end
        far_at = at.to(tl.int64)
        ct = tl.load(col + far_at * col_n + (i[:, None] * col_n + di[None, :]), mask=inside[:, None] & (di < d)[None, :], other=0.0)
        vt = tl.load(val + far_at * val_n + (i[:, None] * val_n + vi[None, :]), mask=inside[:, None] & from_val[None, :], other=0.0)
        if DELTA:
            wt = tl.load(w + far_at * d + (i[:, None] * d + di[None, :]), mask=inside[:, None] & (di < d)[None, :], other=0.0)
            new = vt.to(tl.float32) - matmul(wt, state.to(wt.dtype), PRECISION)
        else:
            new = vt.to(tl.float32)
        if GATE == CHANNEL_GATE:
            where = (chunk + (at - first) // CHUNK).to(tl.int64) * heads + h
            total = tl.load(totals + where * d + di, mask=di < d, other=0.0)
            seen += total
            state = state * tl.exp2(total)[:, None]
        elif GATE == TOKEN_LINES:
            _into, out_of, over_all = chunk_weights(gate, gate_n, at, end, CHUNK, GATE)
            state = state * over_all
            new = new * out_of[:, None]
        elif GATE != NO_GATE:
            up_to, after, over_all, _high, _low = chunk_gates(gate, gate_n, at, end, CHUNK, GATE)
            seen_all += over_all
            state = state * tl.exp2(over_all)
            if REVERSE:
                new = new * tl.exp2(up_to)[:, None]
            else:
                new = new * tl.exp2(after)[:, None]
        if REVERSE:
            new = new * scale
        state = matmul_add(tl.trans(ct), new.to(ct.dtype), state, PRECISION)
    place = slot.to(tl.int64) * heads + h
    tl.store(added + (place * d + di[:, None]) * dv + vi[None, :], state, mask=(di < d)[:, None] & from_val[None, :])
    if DELTA:
        tl.store(moved + (place * d + di[:, None]) * d + mi[None, :], state, mask=(di < d)[:, None] & (is_map & (mi < d))[None, :])
    if block == 0:
        if GATE == CHANNEL_GATE:
            tl.store(kept + place * d + di, seen, mask=di < d)
        elif GATE != NO_GATE and GATE != TOKEN_LINES:
            tl.store(kept + place, seen_all)


@triton.jit
def carry(
    added, kept, initial, cu, n, per_sequence, heads,
    d: tl.constexpr, dv: tl.constexpr,
    LENGTH, BLOCK: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Turns `added` into the state that every segment starts from, in place: entry by entry, segment after segment."""
    sequence = tl.program_id(0)
    h = tl.program_id(1)
    if PACKED:
        begin = tl.load(cu + sequence).to(tl.int32)
        stop = tl.load(cu + sequence + 1).to(tl.int32)
        slot = begin // LENGTH + sequence
        count = tl.cdiv(stop - begin, LENGTH)
    else:
        slot = sequence * per_sequence
        count = slot * 0 + per_sequence
    e = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = e < d * dv
    if START:
        state = tl.load(initial + (sequence.to(tl.int64) * heads + h) * d * dv + e, mask=mask, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BLOCK], tl.float32)
    for j in range(0, count):
        place = (slot + j).to(tl.int64) * heads + h
        if REVERSE:
            place = (slot + count - 1 - j).to(tl.int64) * heads + h
        add = tl.load(added + place * d * dv + e, mask=mask, other=0.0)
        tl.store(added + place * d * dv + e, state, mask=mask)
        if GATE == CHANNEL_GATE:
            state = state * tl.exp2(tl.load(kept + place * d + e // dv, mask=mask, other=0.0))
        elif GATE != NO_GATE:
            state = state * tl.exp2(tl.load(kept + place))
        state += add


@triton.jit
def carry_delta(
    added, moved, initial, cu, n, per_sequence, heads,
    d: tl.constexpr, dv: tl.constexpr,
    LENGTH, BD: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, START: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The same under the delta rule: state <- moved state + added, a block of columns per program. The gradient of the state goes the
    other way, through the transposed maps."""
    sequence = tl.program_id(0)
    h = tl.program_id(1)
    if PACKED:
        begin = tl.load(cu + sequence).to(tl.int32)
        stop = tl.load(cu + sequence + 1).to(tl.int32)
        slot = begin // LENGTH + sequence
        count = tl.cdiv(stop - begin, LENGTH)
    else:
        slot = sequence * per_sequence
        count = slot * 0 + per_sequence
    di = tl.arange(0, BD)
    vi = tl.program_id(2) * BV + tl.arange(0, BV)
    mask = (di < d)[:, None] & (vi < dv)[None, :]
    entry = di[:, None] * dv + vi[None, :]
    if START:
        state = tl.load(initial + (sequence.to(tl.int64) * heads + h) * d * dv + entry, mask=mask, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BD, BV], tl.float32)
    for j in range(0, count):
        place = (slot + j).to(tl.int64) * heads + h
        if REVERSE:
            place = (slot + count - 1 - j).to(tl.int64) * heads + h
        add = tl.load(added + place * d * dv + entry, mask=mask, other=0.0)
        tl.store(added + place * d * dv + entry, state, mask=mask)
        if j + 1 < count:
            move = tl.load(moved + place * d * d + di[:, None] * d + di[None, :], mask=(di < d)[:, None] & (di < d)[None, :], other=0.0)
            if REVERSE:
                move = tl.trans(move)
            state = matmul_add(move, state, add, PRECISION)
