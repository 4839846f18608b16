"""Backward kernel, key-major: d_k and d_v of one key tile, from the query tiles that read it.

A program owns BN keys of one key/value head and walks the query tiles of every query head of its group, so nothing is added
atomically and the result is the same in every run. Products are taken transposed, `(BN, BM)`: both gradients then have the keys as rows.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.attend.triton.backward_q import score_gradient
from saccade.ops.attend.triton.extras import query_positions, rank_rows
from saccade.ops.attend.triton.forward import LOG2E, load_tile


@triton.jit
def key_step(
    k, v, dk, dv, db, begin, desc_q, desc_do, q_base, do_base, q_row, q_col, do_row, lse_at, delta_at, scale, cap, n_q, offset, stride_qn,
    keys, bounds, bounds_at, positions, batch64, head, k_pos, b, a_at, a_row, D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_CAP: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, RANK_PRECISION: tl.constexpr,
    RANK_GRAD: tl.constexpr,
):  # fmt: skip
    """Queries begin ... begin + BM - 1."""
    query = begin + tl.arange(0, BM)
    ok = query < n_q
    q = load_tile(desc_q, q_base, q_row, q_col, begin, n_q, stride_qn, BM, D, BD, TMA)
    do = load_tile(desc_do, do_base, do_row, 0, begin, n_q, DV, BM, DV, BDV, TMA)
    if MASKED and TMA and not EVEN:
        # rows past the last query are other data: 0 times a nan there would be nan
        q = tl.where(ok[:, None], q, 0.0)
        do = tl.where(ok[:, None], do, 0.0)
    lse = tl.load(lse_at + query, mask=ok, other=float("inf"))
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    delta = tl.load(delta_at + query, mask=ok, other=0.0)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    seen = None
    if MASKED:
        # rows past the last query have p = 0 by their log-sum-exp
        seen = keys[:, None] <= (query + offset)[None, :] if CAUSAL else keys[:, None] >= 0
        if bounds is not None:
            lo = tl.load(bounds.lo + bounds_at + query, mask=ok, other=0)
            hi = tl.load(bounds.hi + bounds_at + query, mask=ok, other=0)
            seen = seen & (keys[:, None] >= lo[None, :]) & (keys[:, None] < hi[None, :])
        if positions is not None:
            seen = seen & (k_pos[:, None] <= query_positions(positions, batch64, head, query, ok)[None, :])
        if b is not None:
            seen = seen & ok[None, :]  # unless b is -inf somewhere, and 0 times that nan
    shift = lse2[None, :]
    if b is not None:
        a = rank_rows(a_at, query, a_row, 0, n_q, R, BR)
        shift = shift - tl.dot(b, tl.trans(a), input_precision=RANK_PRECISION) * LOG2E
    p, ds, d_logits = score_gradient(s, dp, shift, delta[None, :], seen, scale, cap, HAS_CAP, MASKED)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    if RANK_GRAD:
        db = tl.dot(d_logits.to(a.dtype), a, db, input_precision=RANK_PRECISION)
    return dk, dv, db


@triton.jit
def backward_k_kernel(
    q_ptr, k_ptr, v_ptr, desc_q, desc_k, desc_v, desc_do, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, db_ptr, readers_ptr, counts_ptr,
    scale, cap, n_q, n_k, width, bounds, seers_ptr, positions, rank,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    heads, group, list_heads, list_batch,
    block_q: tl.constexpr, block_k: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    CAUSAL: tl.constexpr, LISTED: tl.constexpr, ADD: tl.constexpr, HAS_CAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, RANK_PRECISION: tl.constexpr, RANK_GRAD: tl.constexpr,
):  # fmt: skip
    # first key tiles first: with causality they are read by most queries
    first_key = tl.program_id(0) * BN
    kv_heads = heads // group
    batch = tl.program_id(1) // kv_heads
    kv = tl.program_id(1) % kv_heads
    batch64 = batch.to(tl.int64)
    offset = n_k - n_q
    keys = first_key + tl.arange(0, BN)
    keys_ok = keys < n_k
    cols = tl.arange(0, BD)
    cols_v = tl.arange(0, BDV)
    # by tensor memory access they go to shared memory, where the matrix units read them: registers are short
    k_off = batch64 * stride_kb + kv.to(tl.int64) * stride_kh
    v_off = batch64 * stride_vb + kv.to(tl.int64) * stride_vh
    k_row, k_col = (k_off // stride_kn).to(tl.int32), (k_off % stride_kn).to(tl.int32)
    v_row, v_col = (v_off // stride_vn).to(tl.int32), (v_off % stride_vn).to(tl.int32)
    k = load_tile(desc_k, k_ptr + k_off, k_row, k_col, first_key, n_k, stride_kn, BN, D, BD, TMA)
    v = load_tile(desc_v, v_ptr + v_off, v_row, v_col, first_key, n_k, stride_vn, BN, DV, BDV, TMA)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BDV], tl.float32)
    inner: tl.constexpr = block_q // BM if LISTED else 1
    key_tile = first_key // block_k
    key_tiles = tl.cdiv(n_k, block_k)
    bounds_at = None
    cols_r = tl.arange(0, BR)
    mask_r = keys_ok[:, None] & (cols_r < R)[None, :]
    inside = keys_ok
    if bounds is not None:
        bounds_at = batch64 * bounds.batch
        inside = (keys >= tl.load(bounds.lo + bounds_at)) & (keys < tl.load(bounds.hi + bounds_at + n_q - 1))
    for g in range(0, group):
        head = kv * group + g
        head_row = (batch64 * heads + head) * n_q
        q_off = batch64 * stride_qb + head.to(tl.int64) * stride_qh
        q_base = q_ptr + q_off
        q_row = (q_off // stride_qn).to(tl.int32)
        q_col = (q_off % stride_qn).to(tl.int32)
        do_base = do_ptr + head_row * DV
        do_row = head_row.to(tl.int32)
        lse_at = lse_ptr + head_row
        delta_at = delta_ptr + head_row
        k_pos = None
        b = None
        a_at = None
        a_row = None
        db = tl.zeros([BN if RANK_GRAD else 1, BR], tl.float32)  # functions can't return None: one row stands for no gradient
        if positions is not None:
            k_pos_at = positions.k + batch64 * positions.k_batch + (head // positions.k_share).to(tl.int64) * positions.k_head
            k_pos = tl.load(k_pos_at + keys, mask=keys_ok, other=0)
        if rank is not None:
            b = rank_rows(rank.b + batch64 * rank.b_batch + head.to(tl.int64) * rank.b_head, keys, rank.b_row, 0, n_k, R, BR)
            a_at = rank.a + batch64 * rank.a_batch + head.to(tl.int64) * rank.a_head
            a_row = rank.a_row
        if LISTED:
            listing = (batch64 % list_batch * list_heads + head // (heads // list_heads)) * key_tiles + key_tile
            readers = readers_ptr + listing * width
            count = tl.load(counts_ptr + listing)
            masked = 0
            if bounds is not None or positions is not None:
                masked = count
            elif CAUSAL:
                # ascending query tiles: those that begin before the last key of this program are cut by the diagonal
                at = tl.load(readers, mask=count > 0, other=n_q)
                while at * block_q + offset < first_key + BN - 1:
                    masked += 1
                    at = tl.load(readers + masked, mask=masked < count, other=n_q)
            masked = tl.minimum(masked, count)
            full = count
            if n_q % block_q != 0 and bounds is None and positions is None:
                last_reader = tl.load(readers + count - 1, mask=count > 0, other=0)
                full = tl.where((last_reader + 1) * block_q > n_q, count - 1, count)
            full = tl.maximum(full, masked)
        elif bounds is not None:
            readers = readers_ptr
            # the query rows that see some key of this program, and among them those that see every key
            seers = seers_ptr + (bounds_at // n_q * tl.num_programs(0) + tl.program_id(0)) * 4
            begin = tl.load(seers) // BM
            count = tl.maximum(tl.cdiv(tl.load(seers + 3), BM), begin)
            masked = tl.minimum(tl.maximum(tl.cdiv(tl.load(seers + 1), BM), begin), count)
            full = tl.minimum(tl.maximum(tl.load(seers + 2) // BM, masked), count)
            if positions is not None:
                masked = count
                full = count
        else:
            readers = readers_ptr
            begin = tl.maximum(first_key - offset, 0) // BM if CAUSAL else 0
            count = tl.cdiv(n_q, BM)
            masked = tl.minimum(tl.maximum(tl.cdiv(first_key + BN - 1 - offset, BM), begin), count) if CAUSAL else begin
            full = tl.maximum(n_q // BM, masked)
            if positions is not None:
                masked = count
                full = count
        for i in tl.range(0 if LISTED else begin, masked * inner, num_stages=STAGES if EVEN else 1):
            row = tl.load(readers + i // inner) * block_q + (i % inner) * BM if LISTED else i * BM
            dk, dv, db = key_step(
                k, v, dk, dv, db, row, desc_q, desc_do, q_base, do_base, q_row, q_col, do_row, lse_at, delta_at, scale, cap,
                n_q, offset, stride_qn, keys, bounds, bounds_at, positions, batch64, head, k_pos, b, a_at, a_row, D, DV, BM, BD, BDV,
                True, CAUSAL, HAS_CAP, TMA, PRECISION, EVEN, R, BR, RANK_PRECISION, RANK_GRAD,
            )  # fmt: skip
        for i in tl.range(masked * inner, full * inner, num_stages=STAGES):
            row = tl.load(readers + i // inner) * block_q + (i % inner) * BM if LISTED else i * BM
            dk, dv, db = key_step(
                k, v, dk, dv, db, row, desc_q, desc_do, q_base, do_base, q_row, q_col, do_row, lse_at, delta_at, scale, cap,
                n_q, offset, stride_qn, keys, bounds, bounds_at, positions, batch64, head, k_pos, b, a_at, a_row, D, DV, BM, BD, BDV,
                False, CAUSAL, HAS_CAP, TMA, PRECISION, EVEN, R, BR, RANK_PRECISION, RANK_GRAD,
            )  # fmt: skip
        if not EVEN or bounds is not None:  # the last query tiles, cut by the end of the queries
            for i in tl.range(full * inner, count * inner, num_stages=1):
                row = tl.load(readers + i // inner) * block_q + (i % inner) * BM if LISTED else i * BM
                dk, dv, db = key_step(
                    k, v, dk, dv, db, row, desc_q, desc_do, q_base, do_base, q_row, q_col, do_row, lse_at, delta_at, scale, cap,
                    n_q, offset, stride_qn, keys, bounds, bounds_at, positions, batch64, head, k_pos, b, a_at, a_row, D, DV, BM, BD, BDV,
                    True, CAUSAL, HAS_CAP, TMA, PRECISION, EVEN, R, BR, RANK_PRECISION, RANK_GRAD,
                )  # fmt: skip
        if RANK_GRAD:
            if bounds is not None:
                db = tl.where(inside[:, None], db, 0.0)
            db_at = db_ptr + ((batch64 * heads + head) * n_k + keys)[:, None] * R + cols_r[None, :]
            if ADD:
                db += tl.load(db_at, mask=mask_r, other=0.0)
            tl.store(db_at, db, mask=mask_r)
    if bounds is not None:  # padding may be anything, also what gives nan here
        dk = tl.where(inside[:, None], dk, 0.0)
        dv = tl.where(inside[:, None], dv, 0.0)
    row_k = ((batch64 * kv_heads + kv) * n_k + keys)[:, None]
    mask_k = keys_ok[:, None] & (cols < D)[None, :]
    mask_v = keys_ok[:, None] & (cols_v < DV)[None, :]
    dk_at = dk_ptr + row_k * D + cols[None, :]
    dv_at = dv_ptr + row_k * DV + cols_v[None, :]
    if ADD:  # to what the query-major kernel has gathered
        dk += tl.load(dk_at, mask=mask_k, other=0.0)
        dv += tl.load(dv_at, mask=mask_v, other=0.0)
    tl.store(dk_at, dk.to(dk_ptr.dtype.element_ty), mask=mask_k)
    tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=mask_v)
