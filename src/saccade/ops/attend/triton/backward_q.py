"""Backward kernel, query-major: the gradient of the queries, and of keys that are read one by one.

With p the probabilities, rebuilt from the log-sum-exp, and delta = sum(out * d_out) - d_lse per row:

    d_s = p * (d_out v^T - delta),   d_q = scale * d_s k,   d_k = scale * d_s^T q,   d_v = p^T d_out

Key tiles with a program of their own get d_k and d_v from the key-major kernel. Single keys and odd tiles are gathered here, and their
d_k and d_v are added to float32 buffers atomically: the sum's order, and with it the last bits, vary from run to run.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.attend.triton.forward import LOG2E, load_tile


@triton.jit
def score_gradient(s, dp, lse2, delta, seen, scale, cap, HAS_CAP: tl.constexpr, MASKED: tl.constexpr):
    """From products s = q.k and dp = d_out.v: probabilities p and the gradient of s. seen: which pairs are read.

    lse2 is the log-sum-exp in units of log2(e), +inf for rows that read nothing, so that p is 0 there.
    """
    if HAS_CAP:
        x = s * scale / cap
        t = 1.0 - 2.0 / (1.0 + tl.exp2(2.0 * LOG2E * x))
        p = tl.exp2(cap * t * LOG2E - lse2)
    else:
        p = tl.exp2(s * (scale * LOG2E) - lse2)
    if MASKED:
        p = tl.where(seen, p, 0.0)
    ds = p * (dp - delta) * scale
    if HAS_CAP:
        ds = ds * (1.0 - t * t)
    return p, ds


@triton.jit
def gathered_gradient(
    q, do, k_base, v_base, dk_base, dv_base, keys, weight, dq, lse2, delta, scale, cap, n_k, limit, stride_kn, stride_vn,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, WEIGHT: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A step over keys named one by one, `(BT,)` ids; n_k and above name none. dk_base and dv_base are contiguous float32."""
    cols = tl.arange(0, BD)
    cols_v = tl.arange(0, BDV)
    ok = keys < n_k
    row = keys.to(tl.int64)[:, None]
    mask_k = ok[:, None] & (cols < D)[None, :]
    mask_v = ok[:, None] & (cols_v < DV)[None, :]
    k = tl.load(k_base + row * stride_kn + cols[None, :], mask=mask_k, other=0.0)
    v = tl.load(v_base + row * stride_vn + cols_v[None, :], mask=mask_v, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    seen = keys[None, :] <= limit[:, None]
    shift = lse2[:, None]
    if WEIGHT:
        shift = shift - weight[None, :]
    p, ds = score_gradient(s, dp, shift, delta[:, None], seen, scale, cap, HAS_CAP, True)
    ds = ds.to(q.dtype)
    dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
    dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
    tl.atomic_add(dk_base + row * D + cols[None, :], dk, mask=mask_k, sem="relaxed")
    tl.atomic_add(dv_base + row * DV + cols_v[None, :], dv, mask=mask_v, sem="relaxed")
    return dq


@triton.jit
def backward_q_kernel(
    q_ptr, k_ptr, v_ptr, desc_q, desc_k, desc_v, desc_do, do_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
    starts_ptr, start_counts_ptr, tokens_ptr, token_counts_ptr, weight_ptr,
    scale, cap, n_q, n_k,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_sb, stride_sh, stride_st, stride_cb, stride_ch, stride_tb, stride_th, stride_tt, stride_ub, stride_uh,
    heads, group, list_group, tiles,
    block_q: tl.constexpr, block_k: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    CAUSAL: tl.constexpr, LISTED: tl.constexpr, SMALL: tl.constexpr, TOKENS: tl.constexpr, WEIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr, TMA: tl.constexpr, TMA_Q: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    split: tl.constexpr = (block_q + ROWS - 1) // ROWS
    tile = tiles - 1 - tl.program_id(0) // split
    begin_row = (split - 1 - tl.program_id(0) % split) * ROWS
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    kv = head // group
    listing = head // list_group
    batch64 = batch.to(tl.int64)
    rows = tl.arange(0, BM)
    inside = begin_row + rows
    query = tile * block_q + inside
    rows_ok = (rows < ROWS) & (inside < block_q) & (query < n_q)
    position = query + (n_k - n_q)
    first = tile * block_q + begin_row + (n_k - n_q)
    limit = tl.minimum(position, n_k - 1) if CAUSAL else tl.zeros_like(position) + (n_k - 1)
    cols = tl.arange(0, BD)
    cols_v = tl.arange(0, BDV)
    row = (batch64 * heads + head) * n_q + query
    if TMA_Q:
        # into shared memory, where the matrix units read it: registers are short. Rows past the tile's end are never stored
        q_off = batch64 * stride_qb + head.to(tl.int64) * stride_qh
        q = desc_q.load([(q_off // stride_qn).to(tl.int32) + tile * block_q + begin_row, (q_off % stride_qn).to(tl.int32)])
        do = desc_do.load([((batch64 * heads + head) * n_q).to(tl.int32) + tile * block_q + begin_row, 0])
    else:
        q_at = q_ptr + batch64 * stride_qb + head.to(tl.int64) * stride_qh + query.to(tl.int64)[:, None] * stride_qn
        q = tl.load(q_at + cols[None, :], mask=rows_ok[:, None] & (cols < D)[None, :], other=0.0)
        do = tl.load(do_ptr + row[:, None] * DV + cols_v[None, :], mask=rows_ok[:, None] & (cols_v < DV)[None, :], other=0.0)
    lse = tl.load(lse_ptr + row, mask=rows_ok, other=float("inf"))
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    delta = tl.load(delta_ptr + row, mask=rows_ok, other=0.0)
    k_off = batch64 * stride_kb + kv.to(tl.int64) * stride_kh
    v_off = batch64 * stride_vb + kv.to(tl.int64) * stride_vh
    k_base = k_ptr + k_off
    v_base = v_ptr + v_off
    k_row = (k_off // stride_kn).to(tl.int32)
    v_row = (v_off // stride_vn).to(tl.int32)
    k_col = (k_off % stride_kn).to(tl.int32)
    v_col = (v_off % stride_vn).to(tl.int32)
    kv_row = (batch64 * (heads // group) + kv) * n_k
    dk_base = dk_ptr + kv_row * D
    dv_base = dv_ptr + kv_row * DV

    dq = tl.zeros([BM, BD], tl.float32)
    inner: tl.constexpr = 1 if not LISTED else block_k // BN if block_k >= BN else 1
    if LISTED:
        starts = starts_ptr + batch64 * stride_sb + listing.to(tl.int64) * stride_sh + tile.to(tl.int64) * stride_st
        count = tl.load(start_counts_ptr + batch * stride_cb + listing * stride_ch + tile)
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
        whole = tl.maximum((first + 1) // BN, 0) if CAUSAL else n_k // BN
        whole = tl.minimum(whole, count)

    if not SMALL:
        for i in tl.range(0, whole * inner, num_stages=STAGES):
            if LISTED:
                begin = tl.load(starts + i // inner) + (i % inner) * BN
            else:
                begin = i * BN
            k = load_tile(desc_k, k_base, k_row, k_col, begin, n_k, stride_kn, BN, D, BD, TMA)
            v = load_tile(desc_v, v_base, v_row, v_col, begin, n_k, stride_vn, BN, DV, BDV, TMA)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            _, ds = score_gradient(s, dp, lse2[:, None], delta[:, None], None, scale, cap, HAS_CAP, False)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        for i in tl.range(whole * inner, count * inner, num_stages=STAGES if EVEN else 1):
            if LISTED:
                begin = tl.load(starts + i // inner) + (i % inner) * BN
            else:
                begin = i * BN
            keys = begin + tl.arange(0, BN)
            k = load_tile(desc_k, k_base, k_row, k_col, begin, n_k, stride_kn, BN, D, BD, TMA)
            v = load_tile(desc_v, v_base, v_row, v_col, begin, n_k, stride_vn, BN, DV, BDV, TMA)
            if TMA and not EVEN:
                # what lies past the last key is other data: 0 times a nan there would be nan
                k = tl.where((keys < n_k)[:, None], k, 0.0)
                v = tl.where((keys < n_k)[:, None], v, 0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            seen = keys[None, :] <= limit[:, None]
            _, ds = score_gradient(s, dp, lse2[:, None], delta[:, None], seen, scale, cap, HAS_CAP, True)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if SMALL:
        for i in tl.range(0, tl.cdiv(count * block_k, BT), num_stages=1):
            lane = i * BT + tl.arange(0, BT)
            keys = tl.load(starts + lane // block_k, mask=lane // block_k < count, other=n_k) + lane % block_k
            dq = gathered_gradient(
                q, do, k_base, v_base, dk_base, dv_base, keys, None, dq, lse2, delta, scale, cap, n_k, limit, stride_kn, stride_vn,
                D, DV, BD, BDV, False, HAS_CAP, PRECISION,
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
            dq = gathered_gradient(
                q, do, k_base, v_base, dk_base, dv_base, keys, weight, dq, lse2, delta, scale, cap, n_k, limit, stride_kn, stride_vn,
                D, DV, BD, BDV, WEIGHT, HAS_CAP, PRECISION,
            )  # fmt: skip
    out_mask = rows_ok[:, None] & (cols < D)[None, :]
    tl.store(dq_ptr + row[:, None] * D + cols[None, :], dq.to(dq_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def delta_kernel(out_ptr, do_ptr, d_lse_ptr, delta_ptr, rows, DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, HAS_LSE: tl.constexpr):
    """delta = sum(out * d_out) - d_lse per row; all of them contiguous."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BDV)
    mask = (row < rows)[:, None] & (cols < DV)[None, :]
    at = row[:, None] * DV + cols[None, :]
    out = tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    do = tl.load(do_ptr + at, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(out * do, 1)
    if HAS_LSE:
        delta -= tl.load(d_lse_ptr + row, mask=row < rows, other=0.0)
    tl.store(delta_ptr + row, delta, mask=row < rows)
