"""Forward kernel: online softmax of one query tile over listed key tiles and single keys, in one pass.

A program owns one query tile of `PACK` query heads that share a key/value head and read the same list: their rows lie under each
other, so K and V are read once for all of them. It walks

    1. key tiles that every row sees, without a mask (most of the work),
    2. the last key tiles, masked by causality and by the end of the keys,
    3. single keys and key tiles smaller than BN, gathered row by row.

With bounds there are masked tiles before the first kind as well; with positions every tile is masked.
Logits are kept in units of log2(e), so that exp is exp2. A row that reads no key gives 0 and a log-sum-exp of -inf.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.attend.triton.extras import query_positions, rank_rows, row_bounds, seen_pairs
from saccade.ops.attend.triton.walk import bounded_tiles, step_begin, tile_list, whole_tiles

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def to_log2(
    s, scale, cap, bias, rows_ok, keys, stride_bias_q, stride_bias_k, n_k, a, b, HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    RANK_PRECISION: tl.constexpr,
):  # fmt: skip
    """Products q.k `(BM, BN)` to logits in units of log2(e); `scale` holds log2(e) unless there is a cap or a bias of low rank.

    a `(BM, BR)`, b `(BN, BR)` or None.
    """
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (1 + exp(2x)), finite for any x
        x = s * scale / cap
        s = cap * (1.0 - 2.0 / (1.0 + tl.exp2(2.0 * LOG2E * x)))
    else:
        s = s * scale
    if a is not None:
        s = tl.dot(a, tl.trans(b), s, input_precision=RANK_PRECISION) * LOG2E
    elif HAS_CAP:
        s = s * LOG2E
    if HAS_BIAS:
        more = tl.load(bias[:, None] + keys[None, :].to(tl.int64) * stride_bias_k, mask=rows_ok[:, None] & (keys[None, :] < n_k), other=0.0)
        s += more.to(tl.float32) * LOG2E
    return s


@triton.jit
def softmax_step(s, v, acc, m, total, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax: s `(BM, BN)` logits in log2 units, v `(BN, BD)`."""
    top = tl.maximum(m, tl.max(s, 1))
    if MASKED:
        # a row that has seen no key yet stays at -inf: shift it by 0, its weights are exp2(-inf) = 0
        shift = tl.where(top == float("-inf"), 0.0, top)
    else:
        shift = top
    p = tl.exp2(s - shift[:, None])
    forget = tl.exp2(m - shift)
    total = total * forget + tl.sum(p, 1)
    acc = acc * forget[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, top, total


@triton.jit
def fast_step(q, k, v, acc, m, total, scale, PRECISION: tl.constexpr):
    """The unmasked step with neither cap nor bias: the scale is folded into the exponent's multiply-add."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    top = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - top[:, None])
    forget = tl.exp2(m - top)
    total = total * forget + tl.sum(p, 1)
    acc = acc * forget[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, top, total


@triton.jit
def load_tile(desc, base, row0, col0, begin, n, stride_n, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    """Rows begin ... begin + BN - 1 of K or V, `(BN, BD)`; rows past n are other data with TMA, 0 without."""
    if TMA:
        return desc.load([row0 + begin, col0])
    rows = begin + tl.arange(0, BN)
    cols = tl.arange(0, BD)
    at = base + rows[:, None].to(tl.int64) * stride_n + cols[None, :]
    if D == BD:
        return tl.load(at, mask=(rows < n)[:, None], other=0.0)
    return tl.load(at, mask=(rows < n)[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, desc_q, desc_k, desc_v, out_ptr, lse_ptr, bias_ptr,
    starts_ptr, start_counts_ptr, tokens_ptr, token_counts_ptr, weight_ptr,
    scale, cap, n_q, n_k, bounds, positions, sinks, rank,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_bb, stride_bh, stride_bq, stride_bk,
    stride_sb, stride_sh, stride_st, stride_cb, stride_ch, stride_tb, stride_th, stride_tt, stride_ub, stride_uh,
    heads, group, list_group, tiles,
    block_q: tl.constexpr, block_k: tl.constexpr, ROWS: tl.constexpr, EDGE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PACK: tl.constexpr, CAUSAL: tl.constexpr, LISTED: tl.constexpr, SMALL: tl.constexpr, TOKENS: tl.constexpr, WEIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LSE: tl.constexpr, TMA: tl.constexpr, TMA_Q: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, RANK_PRECISION: tl.constexpr,
):  # fmt: skip
    # long tiles first: with causality the last query tiles read most
    split: tl.constexpr = (block_q + ROWS - 1) // ROWS
    tile = tiles - 1 - tl.program_id(0) // split
    begin_row = (split - 1 - tl.program_id(0) % split) * ROWS
    batch = tl.program_id(1) // (heads // PACK)
    head = (tl.program_id(1) % (heads // PACK)) * PACK
    kv = head // group
    listing = head // list_group
    batch64 = batch.to(tl.int64)
    rows = tl.arange(0, BM)
    packed = rows // ROWS
    inside = begin_row + rows - packed * ROWS  # the list's tile
    query = tile * block_q + inside
    rows_ok = (rows < PACK * ROWS) & (inside < block_q) & (query < n_q)
    position = query + (n_k - n_q)
    first = tile * block_q + begin_row + (n_k - n_q)
    cols = tl.arange(0, BD)
    if TMA_Q:
        # into shared memory, where the matrix units read it: registers are short. Rows past the tile's end are never stored
        q_off = batch64 * stride_qb + head.to(tl.int64) * stride_qh
        q = desc_q.load([(q_off // stride_qn).to(tl.int32) + tile * block_q + begin_row, (q_off % stride_qn).to(tl.int32)])
    else:
        q_at = q_ptr + batch64 * stride_qb + (head + packed).to(tl.int64)[:, None] * stride_qh + query.to(tl.int64)[:, None] * stride_qn
        q = tl.load(q_at + cols[None, :], mask=rows_ok[:, None] & (cols < D)[None, :], other=0.0)
    k_base = k_ptr + batch64 * stride_kb + kv.to(tl.int64) * stride_kh
    v_base = v_ptr + batch64 * stride_vb + kv.to(tl.int64) * stride_vh
    k_off = batch64 * stride_kb + kv.to(tl.int64) * stride_kh
    v_off = batch64 * stride_vb + kv.to(tl.int64) * stride_vh
    k_row = (k_off // stride_kn).to(tl.int32)
    v_row = (v_off // stride_vn).to(tl.int32)
    k_col = (k_off % stride_kn).to(tl.int32)
    v_col = (v_off % stride_vn).to(tl.int32)
    bias = bias_ptr + batch64 * stride_bb + (head + packed).to(tl.int64) * stride_bh + query.to(tl.int64) * stride_bq

    # what each row sees: keys up to its limit, from lo on, and by position; the keys of all rows lie in key_from ... key_to - 1
    lo = None
    q_pos = None
    k_pos = None
    a = None
    b_at = None
    b_row = None
    key_from = 0
    key_to = n_k
    if bounds is not None:
        lo, hi, key_from, last_lo, first_hi, key_to = row_bounds(bounds, batch64, query, rows_ok, n_k)
        limit = hi - 1
    else:
        limit = tl.minimum(position, n_k - 1) if CAUSAL else tl.zeros_like(position) + (n_k - 1)
    if positions is not None:
        q_pos = query_positions(positions, batch64, head + packed, query, rows_ok)
        k_pos = positions.k + batch64 * positions.k_batch + (head // positions.k_share).to(tl.int64) * positions.k_head
    if rank is not None:
        a_at = rank.a + batch64 * rank.a_batch + (head + packed).to(tl.int64)[:, None] * rank.a_head
        a_ok = rows_ok[:, None] & (tl.arange(0, BR) < R)[None, :]
        a = tl.load(a_at + query.to(tl.int64)[:, None] * rank.a_row + tl.arange(0, BR)[None, :], mask=a_ok, other=0.0)
        b_at = rank.b + batch64 * rank.b_batch + head.to(tl.int64) * rank.b_head
        b_row = rank.b_row

    if sinks is not None:
        m = tl.load(sinks + head + packed, mask=rows_ok, other=0.0) * LOG2E
        total = tl.full([BM], 1.0, tl.float32)
    else:
        m = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
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
        # sorted starts: at most EDGE tiles, where the list names no invisible ones, are cut by causality or by the end of the keys
        whole = whole_tiles(starts, count, (tl.minimum(first, n_k - 1) if CAUSAL else n_k - 1) - (block_k - 1), EDGE)
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
                acc, m, total = masked_step(
                    q, desc_k, desc_v, k_base, v_base, k_row, k_col, v_row, v_col, begin, acc, m, total, scale, cap, bias, rows_ok,
                    n_k, key_from, key_to, limit, lo, q_pos, k_pos, a, b_at, b_row, stride_kn, stride_vn, stride_bq, stride_bk,
                    BN, D, DV, BD, BDV, HAS_CAP, HAS_BIAS, TMA, EVEN, PRECISION, R, BR, RANK_PRECISION,
                )  # fmt: skip
        for i in tl.range(left * inner, whole * inner, num_stages=STAGES):
            begin = step_begin(starts, i, inner, BN, LISTED)
            k = load_tile(desc_k, k_base, k_row, k_col, begin, n_k, stride_kn, BN, D, BD, TMA)
            v = load_tile(desc_v, v_base, v_row, v_col, begin, n_k, stride_vn, BN, DV, BDV, TMA)
            if HAS_CAP or HAS_BIAS or rank is not None:
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                keys = begin + tl.arange(0, BN)
                b = None
                if rank is not None:
                    b = rank_rows(b_at, keys, b_row, key_from, key_to, R, BR)
                s = to_log2(
                    s, scale, cap, bias, rows_ok, keys, stride_bq, stride_bk, n_k, a, b, HAS_CAP, HAS_BIAS, RANK_PRECISION
                )  # fmt: skip
                # a bias of -inf hides a key just as a mask does
                acc, m, total = softmax_step(s, v, acc, m, total, HAS_BIAS or rank is not None, PRECISION)
            else:
                acc, m, total = fast_step(q, k, v, acc, m, total, scale, PRECISION)
        for i in tl.range(whole * inner, count * inner, num_stages=STAGES if EVEN else 1):
            begin = step_begin(starts, i, inner, BN, LISTED)
            acc, m, total = masked_step(
                q, desc_k, desc_v, k_base, v_base, k_row, k_col, v_row, v_col, begin, acc, m, total, scale, cap, bias, rows_ok,
                n_k, key_from, key_to, limit, lo, q_pos, k_pos, a, b_at, b_row, stride_kn, stride_vn, stride_bq, stride_bk,
                BN, D, DV, BD, BDV, HAS_CAP, HAS_BIAS, TMA, EVEN, PRECISION, R, BR, RANK_PRECISION,
            )  # fmt: skip

    if SMALL:  # key tiles too small, or of too odd a size, for a step of their own
        for i in tl.range(0, tl.cdiv((count - begin_tile) * block_k, BT), num_stages=STAGES):
            lane = i * BT + tl.arange(0, BT) + begin_tile * block_k
            entry = lane // block_k
            keys = tl.load(starts + entry, mask=entry < count, other=n_k) + lane % block_k
            acc, m, total = gathered_step(
                q, k_base, v_base, keys, None, bias, acc, m, total, scale, cap, n_k, key_from, key_to, limit, lo, q_pos, k_pos, a, b_at,
                b_row, rows_ok, stride_kn, stride_vn, stride_bq, stride_bk, D, DV, BD, BDV, False, HAS_CAP, HAS_BIAS, PRECISION, R, BR,
                RANK_PRECISION,
            )  # fmt: skip
    if TOKENS:
        at = batch64 * stride_tb + listing.to(tl.int64) * stride_th + tile.to(tl.int64) * stride_tt
        n_tokens = tl.load(token_counts_ptr + batch * stride_ub + listing * stride_uh + tile)
        for i in tl.range(0, tl.cdiv(n_tokens, BT), num_stages=STAGES):
            lane = i * BT + tl.arange(0, BT)
            keys = tl.load(tokens_ptr + at + lane, mask=lane < n_tokens, other=n_k)
            if WEIGHT:
                weight = tl.load(weight_ptr + at + lane, mask=lane < n_tokens, other=0.0) * LOG2E
            else:
                weight = None
            acc, m, total = gathered_step(
                q, k_base, v_base, keys, weight, bias, acc, m, total, scale, cap, n_k, key_from, key_to, limit, lo, q_pos, k_pos, a, b_at,
                b_row, rows_ok, stride_kn, stride_vn, stride_bq, stride_bk, D, DV, BD, BDV, WEIGHT, HAS_CAP, HAS_BIAS, PRECISION, R, BR,
                RANK_PRECISION,
            )  # fmt: skip

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    cols_v = tl.arange(0, BDV)
    # out (B, H, n_q, DV) and lse (B, H, n_q) are contiguous
    row = (batch64 * heads + head + packed) * n_q + query
    out_ok = rows_ok[:, None] & (cols_v < DV)[None, :]
    tl.store(out_ptr + row[:, None] * DV + cols_v[None, :], acc.to(out_ptr.dtype.element_ty), mask=out_ok)
    if HAS_LSE:
        lse = tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, total))) / LOG2E)
        tl.store(lse_ptr + row, lse, mask=rows_ok)


@triton.jit
def masked_step(
    q, desc_k, desc_v, k_base, v_base, k_row, k_col, v_row, v_col, begin, acc, m, total, scale, cap, bias, rows_ok,
    n_k, key_from, key_to, limit, lo, q_pos, k_pos, a, b_at, b_row, stride_kn, stride_vn, stride_bq, stride_bk,
    BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_BIAS: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, BR: tl.constexpr,
    RANK_PRECISION: tl.constexpr,
):  # fmt: skip
    """A step over keys begin ... begin + BN - 1, not all of which every row sees."""
    keys = begin + tl.arange(0, BN)
    k = load_tile(desc_k, k_base, k_row, k_col, begin, n_k, stride_kn, BN, D, BD, TMA)
    v = load_tile(desc_v, v_base, v_row, v_col, begin, n_k, stride_vn, BN, DV, BDV, TMA)
    # what lies past the last key is other data, and padding may be anything: 0 times a nan there would be nan
    if lo is not None:
        v = tl.where(((keys >= key_from) & (keys < key_to))[:, None], v, 0.0)
    elif TMA and not EVEN:
        v = tl.where((keys < n_k)[:, None], v, 0.0)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    b = None
    if a is not None:
        b = rank_rows(b_at, keys, b_row, key_from, key_to, R, BR)
    s = to_log2(s, scale, cap, bias, rows_ok, keys, stride_bq, stride_bk, n_k, a, b, HAS_CAP, HAS_BIAS, RANK_PRECISION)
    s = tl.where(seen_pairs(keys, limit, lo, q_pos, k_pos, n_k), s, float("-inf"))
    return softmax_step(s, v, acc, m, total, True, PRECISION)


@triton.jit
def gathered_step(
    q, k_base, v_base, keys, weight, bias, acc, m, total, scale, cap, n_k, key_from, key_to, limit, lo, q_pos, k_pos, a, b_at, b_row,
    rows_ok, stride_kn, stride_vn, stride_bq, stride_bk, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    WEIGHT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, BR: tl.constexpr,
    RANK_PRECISION: tl.constexpr,
):  # fmt: skip
    """A step over keys named one by one, `(BT,)` ids; n_k and above name none."""
    cols = tl.arange(0, BD)
    cols_v = tl.arange(0, BDV)
    ok = keys < n_k
    if lo is not None:
        ok = (keys >= key_from) & (keys < key_to)
    k = tl.load(k_base + keys.to(tl.int64)[:, None] * stride_kn + cols[None, :], mask=ok[:, None] & (cols < D)[None, :], other=0.0)
    v = tl.load(v_base + keys.to(tl.int64)[:, None] * stride_vn + cols_v[None, :], mask=ok[:, None] & (cols_v < DV)[None, :], other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    b = None
    if a is not None:
        b = rank_rows(b_at, keys, b_row, key_from, key_to, R, BR)
    s = to_log2(s, scale, cap, bias, rows_ok, keys, stride_bq, stride_bk, n_k, a, b, HAS_CAP, HAS_BIAS, RANK_PRECISION)
    if WEIGHT:
        s += weight[None, :]
    s = tl.where(seen_pairs(keys, limit, lo, q_pos, k_pos, n_k), s, float("-inf"))
    return softmax_step(s, v, acc, m, total, True, PRECISION)
