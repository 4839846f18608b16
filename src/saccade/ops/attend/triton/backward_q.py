"""Backward kernel, query-major: the gradient of the queries, and of keys that are read one by one.

With p the probabilities, rebuilt from the log-sum-exp, and delta = sum(out * d_out) - d_lse per row:

    d_s = p * (d_out v^T - delta),   d_q = scale * d_s k,   d_k = scale * d_s^T q,   d_v = p^T d_out,   d_a = d_s b,   d_b = d_s^T a

Key tiles with a program of their own get d_k and d_v from the key-major kernel. Single keys and odd tiles are gathered here, and their
d_k, d_v and d_b are added to float32 buffers atomically: the sum's order, and with it the last bits, vary from run to run.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.attend.triton.extras import query_positions, rank_rows, row_bounds, seen_pairs
from saccade.ops.attend.triton.forward import LOG2E, load_tile
from saccade.ops.attend.triton.walk import bounded_tiles, step_begin, tile_list, whole_tiles


@triton.jit
def score_gradient(s, dp, lse2, delta, seen, scale, cap, HAS_CAP: tl.constexpr, MASKED: tl.constexpr):
    """From products s = q.k and dp = d_out.v: probabilities p, the gradient of s and that of the logits. seen: which pairs are read.

    lse2 is the log-sum-exp in units of log2(e) less what is added to the logits, +inf for rows that read nothing, so that p is 0 there.
    """
    if HAS_CAP:
        x = s * scale / cap
        t = 1.0 - 2.0 / (1.0 + tl.exp2(2.0 * LOG2E * x))
        p = tl.exp2(cap * t * LOG2E - lse2)
    else:
        p = tl.exp2(s * (scale * LOG2E) - lse2)
    if MASKED:
        p = tl.where(seen, p, 0.0)
    d_logits = p * (dp - delta)
    ds = d_logits * scale
    if HAS_CAP:
        ds = ds * (1.0 - t * t)
    return p, ds, d_logits


@triton.jit
def gathered_gradient(
    q, do, k_base, v_base, dk_base, dv_base, keys, weight, dq, da, lse2, delta, scale, cap, n_k, key_from, key_to, limit, lo, q_pos,
    k_pos, a, b_at, b_row, db_base, stride_kn, stride_vn, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    WEIGHT: tl.constexpr, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, BR: tl.constexpr,
    RANK_PRECISION: tl.constexpr,
):  # fmt: skip
    """A step over keys named one by one, `(BT,)` ids; n_k and above name none. dk_base, dv_base, db_base are contiguous float32."""
    cols = tl.arange(0, BD)
    cols_v = tl.arange(0, BDV)
    ok = keys < n_k
    if lo is not None:
        ok = (keys >= key_from) & (keys < key_to)
    row = keys.to(tl.int64)[:, None]
    mask_k = ok[:, None] & (cols < D)[None, :]
    mask_v = ok[:, None] & (cols_v < DV)[None, :]
    k = tl.load(k_base + row * stride_kn + cols[None, :], mask=mask_k, other=0.0)
    v = tl.load(v_base + row * stride_vn + cols_v[None, :], mask=mask_v, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    seen = seen_pairs(keys, limit, lo, q_pos, k_pos, n_k)
    shift = lse2[:, None]
    if WEIGHT:
        shift = shift - weight[None, :]
    if a is not None:
        b = rank_rows(b_at, keys, b_row, key_from, key_to, R, BR)
        shift = shift - tl.dot(a, tl.trans(b), input_precision=RANK_PRECISION) * LOG2E
    p, ds, d_logits = score_gradient(s, dp, shift, delta[:, None], seen, scale, cap, HAS_CAP, True)
    ds = ds.to(q.dtype)
    dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
    dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
    tl.atomic_add(dk_base + row * D + cols[None, :], dk, mask=mask_k, sem="relaxed")
    tl.atomic_add(dv_base + row * DV + cols_v[None, :], dv, mask=mask_v, sem="relaxed")
    if db_base is not None:
        d_logits = d_logits.to(a.dtype)
        da = tl.dot(d_logits, b, da, input_precision=RANK_PRECISION)
        db = tl.dot(tl.trans(d_logits), a, input_precision=RANK_PRECISION)
        cols_r = tl.arange(0, BR)
        tl.atomic_add(db_base + row * R + cols_r[None, :], db, mask=ok[:, None] & (cols_r < R)[None, :], sem="relaxed")
    return dq, da


@triton.jit
def tile_gradient(
    q, do, desc_k, desc_v, k_base, v_base, k_row, k_col, v_row, v_col, begin, dq, da, lse2, delta, scale, cap, n_k, key_from, key_to,
    limit, lo, q_pos, k_pos, a, b_at, b_row, stride_kn, stride_vn, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BDV: tl.constexpr, MASKED: tl.constexpr, HAS_CAP: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    R: tl.constexpr, BR: tl.constexpr, RANK_PRECISION: tl.constexpr, RANK_GRAD: tl.constexpr,
):  # fmt: skip
    """A step over keys begin ... begin + BN - 1."""
    keys = begin + tl.arange(0, BN)
    k = load_tile(desc_k, k_base, k_row, k_col, begin, n_k, stride_kn, BN, D, BD, TMA)
    v = load_tile(desc_v, v_base, v_row, v_col, begin, n_k, stride_vn, BN, DV, BDV, TMA)
    seen = None
    if MASKED:
        # what lies past the last key is other data, and padding may be anything: 0 times a nan there would be nan
        if lo is not None:
            inside = ((keys >= key_from) & (keys < key_to))[:, None]
            k = tl.where(inside, k, 0.0)
            v = tl.where(inside, v, 0.0)
        elif TMA and not EVEN:
            k = tl.where((keys < n_k)[:, None], k, 0.0)
            v = tl.where((keys < n_k)[:, None], v, 0.0)
        seen = seen_pairs(keys, limit, lo, q_pos, k_pos, n_k)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    shift = lse2[:, None]
    if a is not None:
        b = rank_rows(b_at, keys, b_row, key_from, key_to, R, BR)
        shift = shift - tl.dot(a, tl.trans(b), input_precision=RANK_PRECISION) * LOG2E
    _, ds, d_logits = score_gradient(s, dp, shift, delta[:, None], seen, scale, cap, HAS_CAP, MASKED)
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if RANK_GRAD:
        da = tl.dot(d_logits.to(a.dtype), b, da, input_precision=RANK_PRECISION)
    return dq, da


@triton.jit
def backward_q_kernel(
    q_ptr, k_ptr, v_ptr, desc_q, desc_k, desc_v, desc_do, do_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, da_ptr, db_ptr,
    starts_ptr, start_counts_ptr, tokens_ptr, token_counts_ptr, weight_ptr,
    scale, cap, n_q, n_k, bounds, positions, rank,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_sb, stride_sh, stride_st, stride_cb, stride_ch, stride_tb, stride_th, stride_tt, stride_ub, stride_uh,
    heads, group, list_group, tiles,
    block_q: tl.constexpr, block_k: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    CAUSAL: tl.constexpr, LISTED: tl.constexpr, SMALL: tl.constexpr, TOKENS: tl.constexpr, WEIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr, TMA: tl.constexpr, TMA_Q: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, RANK_PRECISION: tl.constexpr, RANK_GRAD: tl.constexpr,
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

    lo = None
    q_pos = None
    k_pos = None
    a = None
    b_at = None
    b_row = None
    db_base = None
    key_from = 0
    key_to = n_k
    if bounds is not None:
        lo, hi, key_from, last_lo, first_hi, key_to = row_bounds(bounds, batch64, query, rows_ok, n_k)
        limit = hi - 1
    else:
        limit = tl.minimum(position, n_k - 1) if CAUSAL else tl.zeros_like(position) + (n_k - 1)
    if positions is not None:
        q_pos = query_positions(positions, batch64, head, query, rows_ok)
        k_pos = positions.k + batch64 * positions.k_batch + (head // positions.k_share).to(tl.int64) * positions.k_head
    cols_r = tl.arange(0, BR)
    if rank is not None:
        a_at = rank.a + batch64 * rank.a_batch + head.to(tl.int64) * rank.a_head + query.to(tl.int64)[:, None] * rank.a_row
        a = tl.load(a_at + cols_r[None, :], mask=rows_ok[:, None] & (cols_r < R)[None, :], other=0.0)
        b_at = rank.b + batch64 * rank.b_batch + head.to(tl.int64) * rank.b_head
        b_row = rank.b_row
        limit = tl.where(rows_ok, limit, -1)  # rows past the last have a = 0, which b = -inf makes nan
    da = tl.zeros([BM if RANK_GRAD else 1, BR], tl.float32)  # functions can't return None: one row stands for no gradient
    if RANK_GRAD:
        db_base = db_ptr + (batch64 * heads + head) * n_k * R

    dq = tl.zeros([BM, BD], tl.float32)
    inner: tl.constexpr = 1 if not LISTED else block_k // BN if block_k >= BN else 1
    starts = starts_ptr
    count = 0
    if LISTED:
        starts, count = tile_list(
            starts_ptr, start_counts_ptr, batch, listing, tile, stride_sb, stride_sh, stride_st, stride_cb, stride_ch
        )  # fmt: skip
    begin_tile = 0
    left = 0
    if bounds is not None:
        begin_tile, left, whole, count = bounded_tiles(
            starts, count, block_k if LISTED else BN, key_from, last_lo, first_hi, key_to, LISTED
        )  # fmt: skip
    elif LISTED:
        whole = whole_tiles(starts, count, (tl.minimum(first, n_k - 1) if CAUSAL else n_k - 1) - (block_k - 1), 0)
    else:
        last = tl.minimum(first + ROWS, n_k) if CAUSAL else n_k
        count = tl.cdiv(tl.maximum(last, 0), BN)
        whole = tl.maximum((first + 1) // BN, 0) if CAUSAL else n_k // BN
        whole = tl.minimum(whole, count)
    if positions is not None:
        left = begin_tile
        whole = begin_tile

    if not SMALL:
        if bounds is not None:
            for i in tl.range(begin_tile * inner, left * inner, num_stages=1):
                begin = step_begin(starts, i, inner, BN, LISTED)
                dq, da = tile_gradient(
                    q, do, desc_k, desc_v, k_base, v_base, k_row, k_col, v_row, v_col, begin, dq, da, lse2, delta, scale, cap, n_k,
                    key_from, key_to, limit, lo, q_pos, k_pos, a, b_at, b_row, stride_kn, stride_vn, BN, D, DV, BD, BDV, True, HAS_CAP,
                    TMA, EVEN, PRECISION, R, BR, RANK_PRECISION, RANK_GRAD,
                )  # fmt: skip
        for i in tl.range(left * inner, whole * inner, num_stages=STAGES):
            begin = step_begin(starts, i, inner, BN, LISTED)
            dq, da = tile_gradient(
                q, do, desc_k, desc_v, k_base, v_base, k_row, k_col, v_row, v_col, begin, dq, da, lse2, delta, scale, cap, n_k,
                key_from, key_to, limit, lo, q_pos, k_pos, a, b_at, b_row, stride_kn, stride_vn, BN, D, DV, BD, BDV, False, HAS_CAP,
                TMA, EVEN, PRECISION, R, BR, RANK_PRECISION, RANK_GRAD,
            )  # fmt: skip
        for i in tl.range(whole * inner, count * inner, num_stages=STAGES if EVEN else 1):
            begin = step_begin(starts, i, inner, BN, LISTED)
            dq, da = tile_gradient(
                q, do, desc_k, desc_v, k_base, v_base, k_row, k_col, v_row, v_col, begin, dq, da, lse2, delta, scale, cap, n_k,
                key_from, key_to, limit, lo, q_pos, k_pos, a, b_at, b_row, stride_kn, stride_vn, BN, D, DV, BD, BDV, True, HAS_CAP,
                TMA, EVEN, PRECISION, R, BR, RANK_PRECISION, RANK_GRAD,
            )  # fmt: skip
    if SMALL:
        for i in tl.range(0, tl.cdiv((count - begin_tile) * block_k, BT), num_stages=1):
            lane = i * BT + tl.arange(0, BT) + begin_tile * block_k
            keys = tl.load(starts + lane // block_k, mask=lane // block_k < count, other=n_k) + lane % block_k
            dq, da = gathered_gradient(
                q, do, k_base, v_base, dk_base, dv_base, keys, None, dq, da, lse2, delta, scale, cap, n_k, key_from, key_to, limit, lo,
                q_pos, k_pos, a, b_at, b_row, db_base, stride_kn, stride_vn, D, DV, BD, BDV, False, HAS_CAP, PRECISION, R, BR,
                RANK_PRECISION,
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
            dq, da = gathered_gradient(
                q, do, k_base, v_base, dk_base, dv_base, keys, weight, dq, da, lse2, delta, scale, cap, n_k, key_from, key_to, limit, lo,
                q_pos, k_pos, a, b_at, b_row, db_base, stride_kn, stride_vn, D, DV, BD, BDV, WEIGHT, HAS_CAP, PRECISION, R, BR,
                RANK_PRECISION,
            )  # fmt: skip
    out_mask = rows_ok[:, None] & (cols < D)[None, :]
    tl.store(dq_ptr + row[:, None] * D + cols[None, :], dq.to(dq_ptr.dtype.element_ty), mask=out_mask)
    if RANK_GRAD:
        tl.store(da_ptr + row[:, None] * R + cols_r[None, :], da, mask=rows_ok[:, None] & (cols_r < R)[None, :])


@triton.jit
def delta_kernel(
    out_ptr, do_ptr, lse_ptr, d_lse_ptr, delta_ptr, lse2_ptr, rows, DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    HAS_LSE: tl.constexpr, LSE2: tl.constexpr,
):  # fmt: skip
    """delta = sum(out * d_out) - d_lse per row; all of them contiguous. LSE2: also the log-sum-exp in powers of two, inf for empty rows."""
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
    if LSE2:
        lse = tl.load(lse_ptr + row, mask=row < rows, other=0.0)
        tl.store(lse2_ptr + row, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), mask=row < rows)
