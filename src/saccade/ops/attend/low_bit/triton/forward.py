"""Attention kernel over codes: products of 8-bit numbers, a running softmax in float32, then values in 8, 16 or 32 bits.

A program owns the rows of one query tile of one head and walks, in ascending order,

    1. steps of BN keys that every row sees, without a mask,
    2. the last steps, masked by causality and by the end of the keys,
    3. single keys and key tiles that are not made of steps, gathered row by row.

`q_step` of a row holds the logit's scale, so that a logit in units of log2(e) is code product * q_step * k_step (with a cap, in natural
units, plus `dot`, the product with the mean key). Codes are finite wherever they are read, so rows past the end need no blanking.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.attend.low_bit.triton.quantise import SIMULATED, to_float8

LOG2E = tl.constexpr(1.4426950408889634)
RAISED = tl.constexpr(8.0)  # float8 weights are 2^8 times as large


@triton.jit
def product(q, k):
    """Codes q `(BM, D)` times k `(BN, D)` transposed, as float32."""
    return tl.dot(q, tl.trans(k)).to(tl.float32)


@triton.jit
def capped(s, cap):
    """Logits in natural units to `cap * tanh(s / cap)` in units of log2(e); 1 - 2 / (1 + exp(2x)) is finite for any x."""
    return cap * (1.0 - 2.0 / (1.0 + tl.exp2(2.0 * LOG2E / cap * s))) * LOG2E


@triton.jit
def add_values(p, v, acc, forget, FLOAT8: tl.constexpr, PRECISION: tl.constexpr):
    """`acc * forget + p @ v`, v `(BN, DV)`, or `(DV, BN)` for float8."""
    if FLOAT8:
        # sums inside the matrix units keep 14 bits for float8: what was summed before stays outside
        acc = acc * forget[:, None] + tl.dot(to_float8(p), tl.trans(v))
    elif SIMULATED:  # the interpreter has no bfloat16 products
        acc = tl.dot(p.to(v.dtype).to(tl.float32), v.to(tl.float32), acc * forget[:, None], input_precision="ieee")
    else:
        acc = tl.dot(p.to(v.dtype), v, acc * forget[:, None], input_precision=PRECISION)
    return acc


@triton.jit
def soften(s, factor, peak, v, acc, m, total, MASKED: tl.constexpr, FLOAT8: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the running softmax: logits `s * factor`, row by row, whose maxima are `peak`."""
    top = tl.maximum(m, peak)
    if MASKED:
        # a row that has seen no key yet stays at -inf: shifted by 0, its weights are 0
        shift = tl.where(top == float("-inf"), 0.0, top)
    else:
        shift = top
    forget = tl.exp2(m - shift)
    if FLOAT8:
        shift -= RAISED
    p = tl.exp2(s * factor[:, None] - shift[:, None])
    total = total * forget + tl.sum(p, 1)
    acc = add_values(p, v, acc, forget, FLOAT8, PRECISION)
    return acc, top, total


@triton.jit
def keep_tile(peak, m, rows_ok, skip_below):
    """Whether some row's largest logit is not more than skip_below under the largest before."""
    gain = tl.where(rows_ok & (peak > float("-inf")), peak - m, float("-inf"))
    return tl.max(gain, 0) >= -skip_below


@triton.jit
def load_values(
    desc, base, row0, col0, begin, n, n_padded, stride_n, BN: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, TMA: tl.constexpr,
    FLOAT8: tl.constexpr,
):  # fmt: skip
    """Values of keys begin ... begin + BN - 1: `(BN, BDV)`, or codes `(BDV, BN)`."""
    if TMA:
        v = desc.load([row0, begin]) if FLOAT8 else desc.load([row0 + begin, col0])
    elif FLOAT8:
        keys = tl.minimum(begin + tl.arange(0, BN), n_padded - 1)
        at = base + tl.arange(0, BDV)[:, None].to(tl.int64) * n_padded + keys[None, :]
        v = tl.load(at)
    else:
        rows = begin + tl.arange(0, BN)
        cols = tl.arange(0, BDV)
        at = base + rows[:, None].to(tl.int64) * stride_n + cols[None, :]
        v = tl.load(at, mask=(rows < n)[:, None] & (cols < DV)[None, :], other=0.0)
    return v


@triton.jit
def key_steps(base, begin, count, BN: tl.constexpr):
    """The step size of each of BN keys from `begin` on, where these lie in two sets."""
    index = (begin + tl.arange(0, BN)) // BN
    return tl.load(base + index, mask=index < count, other=0.0)


@triton.jit
def low_bit_kernel(
    desc_q, desc_k, desc_v, k_ptr, v_ptr, q_step_ptr, k_step_ptr, v_step_ptr, dot_ptr, out_ptr, lse_ptr,
    starts_ptr, start_counts_ptr, tokens_ptr, token_counts_ptr, weight_ptr,
    cap, skip_below, n_q, n_k, padded_q, padded_k,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_sb, stride_sh, stride_st, stride_cb, stride_ch,
    stride_tb, stride_th, stride_tt, stride_ub, stride_uh, heads, group, list_group, tiles,
    block_q: tl.constexpr, block_k: tl.constexpr, ROWS: tl.constexpr, QUERY_ROWS: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, CAUSAL: tl.constexpr, LISTED: tl.constexpr,
    SMALL: tl.constexpr, TOKENS: tl.constexpr, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_DOT: tl.constexpr, HAS_LSE: tl.constexpr, SKIP: tl.constexpr, FLOAT8: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # long tiles first: with causality the last query tiles read most
    split: tl.constexpr = (block_q + ROWS - 1) // ROWS
    tile = tiles - 1 - tl.program_id(0) // split
    begin_row = (split - 1 - tl.program_id(0) % split) * ROWS
    pid = tl.program_id(1).to(tl.int64)  # batch * heads + head
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    listing = head // list_group
    batch64 = batch.to(tl.int64)
    kv = pid // group
    rows = tl.arange(0, BM)
    inside = begin_row + rows
    query = tile * block_q + inside
    rows_ok = (rows < ROWS) & (inside < block_q) & (query < n_q)
    position = query + (n_k - n_q)
    first = tile * block_q + begin_row + (n_k - n_q)
    q = desc_q.load([(pid * padded_q).to(tl.int32) + tile * block_q + begin_row, 0])
    # rows of other tiles have the factor 0: what stands in their codes doesn't matter
    q_step = tl.load(q_step_ptr + pid * (padded_q // QUERY_ROWS) + query // QUERY_ROWS, mask=rows_ok, other=0.0)
    dot = tl.zeros([BM], tl.float32)
    if HAS_DOT:
        dot = tl.load(dot_ptr + pid * n_q + query, mask=rows_ok, other=0.0)
    k_row = (kv * padded_k).to(tl.int32)
    k_base = k_ptr + kv * padded_k * BD
    v_off = batch64 * stride_vb + (head // group).to(tl.int64) * stride_vh
    v_base = v_ptr + v_off
    if FLOAT8:
        v_row = (kv * BDV).to(tl.int32)
        v_col = v_row * 0
    else:
        v_row = (v_off // stride_vn).to(tl.int32)
        v_col = (v_off % stride_vn).to(tl.int32)
    steps = padded_k // BN
    k_step = k_step_ptr + kv * steps

    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    inner: tl.constexpr = 1 if not LISTED else block_k // BN if block_k >= BN else 1

    if LISTED:
        starts = starts_ptr + batch64 * stride_sb + listing.to(tl.int64) * stride_sh + tile.to(tl.int64) * stride_st
        count = tl.load(start_counts_ptr + batch * stride_cb + listing * stride_ch + tile)
        # starts are sorted: from the end, the tiles that causality or the end of the keys cuts
        whole_until = (tl.minimum(first, n_k - 1) if CAUSAL else n_k - 1) - (block_k - 1)
        whole = count
        last_start = tl.load(starts + whole - 1, mask=whole > 0, other=whole_until)
        while last_start > whole_until:
            whole -= 1
            last_start = tl.load(starts + whole - 1, mask=whole > 0, other=whole_until)
    else:
        starts = starts_ptr
        last = tl.minimum(first + ROWS, n_k) if CAUSAL else n_k
        count = tl.cdiv(tl.maximum(last, 0), BN)
        whole = tl.minimum(tl.maximum((first + 1) // BN, 0) if CAUSAL else n_k // BN, count)

    if not SMALL:
        for i in tl.range(0, whole * inner, num_stages=STAGES):
            if LISTED:
                begin = tl.load(starts + i // inner) + (i % inner) * BN
            else:
                begin = i * BN
            k = desc_k.load([k_row + begin, 0])
            v = load_values(desc_v, v_base, v_row, v_col, begin, n_k, padded_k, stride_vn, BN, DV, BDV, TMA, FLOAT8)
            s = product(q, k)
            if ALIGNED:
                factor = q_step * tl.load(k_step + begin // BN)
            else:
                s = s * key_steps(k_step, begin, steps, BN)[None, :]
                factor = q_step
            if HAS_CAP:
                s = capped(s * factor[:, None] + dot[:, None], cap)
                factor = tl.full([BM], 1.0, tl.float32)
            peak = tl.max(s, 1) * factor
            if SKIP:
                if keep_tile(peak, m, rows_ok, skip_below):
                    acc, m, total = soften(s, factor, peak, v, acc, m, total, False, FLOAT8, PRECISION)
            else:
                acc, m, total = soften(s, factor, peak, v, acc, m, total, False, FLOAT8, PRECISION)
        for i in tl.range(whole * inner, count * inner, num_stages=1):
            if LISTED:
                begin = tl.load(starts + i // inner) + (i % inner) * BN
            else:
                begin = i * BN
            keys = begin + tl.arange(0, BN)
            k = desc_k.load([k_row + begin, 0])
            v = load_values(desc_v, v_base, v_row, v_col, begin, n_k, padded_k, stride_vn, BN, DV, BDV, TMA, FLOAT8)
            if TMA and not FLOAT8 and not EVEN:
                # what lies past the last key is other data: 0 times a nan there would be nan
                v = tl.where((keys < n_k)[:, None], v, 0.0)
            s = product(q, k) * key_steps(k_step, begin, steps, BN)[None, :] * q_step[:, None]
            if HAS_CAP:
                s = capped(s + dot[:, None], cap)
            limit = tl.minimum(position, n_k - 1) if CAUSAL else tl.zeros_like(position) + (n_k - 1)
            s = tl.where(keys[None, :] <= limit[:, None], s, float("-inf"))
            peak = tl.max(s, 1)
            one = tl.full([BM], 1.0, tl.float32)
            if SKIP:
                if keep_tile(peak, m, rows_ok, skip_below):
                    acc, m, total = soften(s, one, peak, v, acc, m, total, True, FLOAT8, PRECISION)
            else:
                acc, m, total = soften(s, one, peak, v, acc, m, total, True, FLOAT8, PRECISION)

    if SMALL:  # key tiles that are not made of steps
        for i in tl.range(0, tl.cdiv(count * block_k, BT), num_stages=1):
            lane = i * BT + tl.arange(0, BT)
            entry = lane // block_k
            keys = tl.load(starts + entry, mask=entry < count, other=n_k) + lane % block_k
            acc, m, total = gathered(
                q, k_base, v_base, k_step, keys, None, q_step, dot, acc, m, total, cap, n_k, position, stride_vn, stride_vd,
                DV, BN, BD, BDV, CAUSAL, False, HAS_CAP, FLOAT8, PRECISION,
            )  # fmt: skip
    if TOKENS:
        at = batch64 * stride_tb + listing.to(tl.int64) * stride_th + tile.to(tl.int64) * stride_tt
        n_tokens = tl.load(token_counts_ptr + batch * stride_ub + listing * stride_uh + tile)
        for i in tl.range(0, tl.cdiv(n_tokens, BT), num_stages=1):
            lane = i * BT + tl.arange(0, BT)
            keys = tl.load(tokens_ptr + at + lane, mask=lane < n_tokens, other=n_k)
            if WEIGHT:
                weight = tl.load(weight_ptr + at + lane, mask=lane < n_tokens, other=0.0) * LOG2E
            else:
                weight = None
            acc, m, total = gathered(
                q, k_base, v_base, k_step, keys, weight, q_step, dot, acc, m, total, cap, n_k, position, stride_vn, stride_vd,
                DV, BN, BD, BDV, CAUSAL, WEIGHT, HAS_CAP, FLOAT8, PRECISION,
            )  # fmt: skip

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    cols_v = tl.arange(0, BDV)
    if FLOAT8:
        acc = acc * tl.load(v_step_ptr + kv * DV + cols_v, mask=cols_v < DV, other=0.0)[None, :]
        m = m - RAISED
    row = pid * n_q + query
    out_ok = rows_ok[:, None] & (cols_v < DV)[None, :]
    tl.store(out_ptr + row[:, None] * DV + cols_v[None, :], acc.to(out_ptr.dtype.element_ty), mask=out_ok)
    if HAS_LSE:
        lse = (m + tl.log2(tl.where(empty, 1.0, total))) / LOG2E
        if HAS_DOT and not HAS_CAP:
            lse += dot  # what all keys have in common was left out
        tl.store(lse_ptr + row, tl.where(empty, float("-inf"), lse), mask=rows_ok)


@triton.jit
def gathered(
    q, k_base, v_base, k_step, keys, weight, q_step, dot, acc, m, total, cap, n_k, position, stride_vn, stride_vd, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, CAUSAL: tl.constexpr, WEIGHT: tl.constexpr, HAS_CAP: tl.constexpr,
    FLOAT8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A step over keys named one by one, `(BT,)` ids; n_k and above name none."""
    cols = tl.arange(0, BD)
    cols_v = tl.arange(0, BDV)
    ok = keys < n_k
    row = keys.to(tl.int64)
    k = tl.load(k_base + row[:, None] * BD + cols[None, :], mask=ok[:, None], other=0.0)
    if FLOAT8:
        v = tl.load(v_base + cols_v[:, None] * stride_vd.to(tl.int64) + row[None, :], mask=ok[None, :], other=0.0)
    else:
        v = tl.load(v_base + row[:, None] * stride_vn + cols_v[None, :], mask=ok[:, None] & (cols_v < DV)[None, :], other=0.0)
    s = product(q, k) * tl.load(k_step + keys // BN, mask=ok, other=0.0)[None, :] * q_step[:, None]
    if HAS_CAP:
        s = capped(s + dot[:, None], cap)
    if WEIGHT:
        s += weight[None, :]
    limit = tl.minimum(position, n_k - 1) if CAUSAL else tl.zeros_like(position) + (n_k - 1)
    s = tl.where(keys[None, :] <= limit[:, None], s, float("-inf"))
    return soften(s, tl.full([q.shape[0]], 1.0, tl.float32), tl.max(s, 1), v, acc, m, total, True, FLOAT8, PRECISION)
