"""Forward kernel: online softmax of one query tile over listed key tiles and single keys, in one pass.

A program owns one query tile of `PACK` query heads that share a key/value head and read the same list: their rows lie under each
other, so K and V are read once for all of them. It walks

    1. key tiles that every row sees, without a mask (most of the work),
    2. the last key tiles, masked by causality and by the end of the keys,
    3. single keys and key tiles smaller than BN, gathered row by row.

Logits are kept in units of log2(e), so that exp is exp2. A row that reads no key gives 0 and a log-sum-exp of -inf.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def to_log2(s, scale, cap, bias, rows_ok, keys, stride_bias_q, stride_bias_k, n_k, HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Products q.k `(BM, BN)` to logits in units of log2(e); `scale` holds log2(e) unless there is a cap."""
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (1 + exp(2x)), finite for any x
        x = s * scale / cap
        s = cap * (1.0 - 2.0 / (1.0 + tl.exp2(2.0 * LOG2E * x))) * LOG2E
    else:
        s = s * scale
    if HAS_BIAS:
        b = tl.load(bias[:, None] + keys[None, :].to(tl.int64) * stride_bias_k, mask=rows_ok[:, None] & (keys[None, :] < n_k), other=0.0)
        s += b.to(tl.float32) * LOG2E
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
    scale, cap, n_q, n_k,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_bb, stride_bh, stride_bq, stride_bk,
    stride_sb, stride_sh, stride_st, stride_cb, stride_ch, stride_tb, stride_th, stride_tt, stride_ub, stride_uh,
    heads, group, list_group, tiles,
    block_q: tl.constexpr, block_k: tl.constexpr, ROWS: tl.constexpr, EDGE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PACK: tl.constexpr, CAUSAL: tl.constexpr, LISTED: tl.constexpr, SMALL: tl.constexpr, TOKENS: tl.constexpr, WEIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LSE: tl.constexpr, TMA: tl.constexpr, TMA_Q: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr,
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

    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    inner: tl.constexpr = 1 if not LISTED else block_k // BN if block_k >= BN else 1

    if LISTED:
        starts = starts_ptr + batch64 * stride_sb + listing.to(tl.int64) * stride_sh + tile.to(tl.int64) * stride_st
        count = tl.load(start_counts_ptr + batch * stride_cb + listing * stride_ch + tile)
        # sorted starts: at most EDGE tiles, where the list names no invisible ones, are cut by causality or by the end of the keys
        whole_until = (tl.minimum(first, n_k - 1) if CAUSAL else n_k - 1) - (block_k - 1)
        whole = tl.maximum(count - EDGE, 0)
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
                if inner == 1:
                    begin = tl.load(starts + i)
                else:
                    begin = tl.load(starts + i // inner) + (i % inner) * BN
            else:
                begin = i * BN
            k = load_tile(desc_k, k_base, k_row, k_col, begin, n_k, stride_kn, BN, D, BD, TMA)
            v = load_tile(desc_v, v_base, v_row, v_col, begin, n_k, stride_vn, BN, DV, BDV, TMA)
            if HAS_CAP or HAS_BIAS:
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                keys = begin + tl.arange(0, BN)
                s = to_log2(s, scale, cap, bias, rows_ok, keys, stride_bq, stride_bk, n_k, HAS_CAP, HAS_BIAS)
                acc, m, total = softmax_step(s, v, acc, m, total, False, PRECISION)
            else:
                acc, m, total = fast_step(q, k, v, acc, m, total, scale, PRECISION)
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
                v = tl.where((keys < n_k)[:, None], v, 0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            s = to_log2(s, scale, cap, bias, rows_ok, keys, stride_bq, stride_bk, n_k, HAS_CAP, HAS_BIAS)
            limit = tl.minimum(position, n_k - 1) if CAUSAL else tl.zeros_like(position) + (n_k - 1)
            s = tl.where(keys[None, :] <= limit[:, None], s, float("-inf"))
            acc, m, total = softmax_step(s, v, acc, m, total, True, PRECISION)

    if SMALL:  # key tiles too small, or of too odd a size, for a step of their own
        for i in tl.range(0, tl.cdiv(count * block_k, BT), num_stages=STAGES):
            lane = i * BT + tl.arange(0, BT)
            entry = lane // block_k
            keys = tl.load(starts + entry, mask=entry < count, other=n_k) + lane % block_k
            acc, m, total = gathered_step(
                q, k_base, v_base, keys, None, bias, acc, m, total, scale, cap, n_k, position, rows_ok, stride_kn, stride_vn,
                stride_bq, stride_bk, D, DV, BD, BDV, CAUSAL, False, HAS_CAP, HAS_BIAS, PRECISION,
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
                q, k_base, v_base, keys, weight, bias, acc, m, total, scale, cap, n_k, position, rows_ok, stride_kn, stride_vn,
                stride_bq, stride_bk, D, DV, BD, BDV, CAUSAL, WEIGHT, HAS_CAP, HAS_BIAS, PRECISION,
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
def gathered_step(
    q, k_base, v_base, keys, weight, bias, acc, m, total, scale, cap, n_k, position, rows_ok, stride_kn, stride_vn,
    stride_bq, stride_bk, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, CAUSAL: tl.constexpr,
    WEIGHT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A step over keys named one by one, `(BT,)` ids; n_k and above name none."""
    cols = tl.arange(0, BD)
    cols_v = tl.arange(0, BDV)
    ok = keys < n_k
    k = tl.load(k_base + keys.to(tl.int64)[:, None] * stride_kn + cols[None, :], mask=ok[:, None] & (cols < D)[None, :], other=0.0)
    v = tl.load(v_base + keys.to(tl.int64)[:, None] * stride_vn + cols_v[None, :], mask=ok[:, None] & (cols_v < DV)[None, :], other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s = to_log2(s, scale, cap, bias, rows_ok, keys, stride_bq, stride_bk, n_k, HAS_CAP, HAS_BIAS)
    if WEIGHT:
        s += weight[None, :]
    limit = tl.minimum(position, n_k - 1) if CAUSAL else tl.zeros_like(position) + (n_k - 1)
    s = tl.where(keys[None, :] <= limit[:, None], s, float("-inf"))
    return softmax_step(s, v, acc, m, total, True, PRECISION)
