"""The keys that a Selection lists: tiles of any size and start, then single keys, over a contiguous or paged cache."""
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.decode.triton.tile import LOG2E, normalised, program, rows, share, step, store


@triton.jit
def _load(
    ids, there, k_base, v_base, table_row, stride_kb, stride_kn, stride_vb, stride_vn,
    D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Keys `(D, N)` and values `(N, Dv)` of tokens `ids`, 0 where not `there`."""
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    if PAGE > 0:
        page = tl.load(table_row + ids // PAGE, mask=there, other=0).to(tl.int64)
        k_row = k_base + page * stride_kb + (ids % PAGE) * stride_kn
        v_row = v_base + page * stride_vb + (ids % PAGE) * stride_vn
    else:
        k_row = k_base + ids.to(tl.int64) * stride_kn
        v_row = v_base + ids.to(tl.int64) * stride_vn
    k_mask = there[None, :]
    v_mask = there[:, None]
    if BLOCK_D != D:
        k_mask = k_mask & (columns < D)[:, None]
    if BLOCK_DV != DV:
        v_mask = v_mask & (value_columns < DV)[None, :]
    k = tl.load(k_row[None, :] + columns[:, None], mask=k_mask, other=0.0)
    v = tl.load(v_row[:, None] + value_columns[None, :], mask=v_mask, other=0.0)
    return k, v


@triton.jit(do_not_specialize=["n", "starts", "tokens", "block_k"])
def listed(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, length_ptr, table_ptr,
    start_ptr, start_count_ptr, token_ptr, token_count_ptr, weight_ptr, starts, tokens, block_k, scale, cap, n, m,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_table,
    START_BATCH: tl.constexpr, START_HEADS: tl.constexpr, TOKEN_BATCH: tl.constexpr, TOKEN_HEADS: tl.constexpr,
    BLOCK_K: tl.constexpr, TILED: tl.constexpr, SINGLE: tl.constexpr, WEIGHTED: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, ROW_BLOCKS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, LENGTHS: tl.constexpr, PAGE: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    PARTIAL: tl.constexpr, WRITE_LSE: tl.constexpr, PRECISION: tl.constexpr, QT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid (batch * HEADS * TILES * ROW_BLOCKS, splits).

    Lists `(START_BATCH, START_HEADS, TILES, starts)` and `(TOKEN_BATCH, TOKEN_HEADS, TILES, tokens)` int32, contiguous, with
    counts and weights alike; a batch or head count of 1 is shared, otherwise it is the batch size, or a divisor of HEADS.
    BLOCK_K: keys of a tile where that is a power of two, else 0 and `block_k` tells: a tail that grows has a new size at every step,
    which must not be a new kernel.
    """
    batch, head, tile, block = program(HEADS, TILES, ROW_BLOCKS)
    query_head, query, valid = rows(head, tile, block, m, GROUP, QT, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    batch = batch.to(tl.int64)
    kv_head = (head // (HEADS // KV_HEADS)).to(tl.int64)

    length = n
    if LENGTHS:
        length = tl.minimum(tl.load(length_ptr + batch).to(tl.int32), n)
    k_base = k_ptr + kv_head * stride_kh
    v_base = v_ptr + kv_head * stride_vh
    if PAGE == 0:
        k_base += batch * stride_kb
        v_base += batch * stride_vb
    table_row = table_ptr + batch * stride_table

    q = tl.load(
        q_ptr + batch * stride_qb + query_head[:, None].to(tl.int64) * stride_qh + query[:, None] * stride_qm + columns[None, :],
        mask=valid[:, None] & (columns < D)[None, :], other=0.0,
    )  # fmt: skip
    seen = length - m + query + 1
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    size = block_k
    if BLOCK_K > 0:
        size = BLOCK_K
    if TILED:
        at = (((batch % START_BATCH) * START_HEADS + head // (HEADS // START_HEADS)) * TILES + tile).to(tl.int64)
        count = tl.load(start_count_ptr + at).to(tl.int32) * size
        begin, end = share(count, BLOCK_N)
        for entry in range(begin, end, BLOCK_N):
            entries = entry + tl.arange(0, BLOCK_N)
            ids = tl.load(start_ptr + at * starts + entries // size, mask=entries < end, other=0) + entries % size
            there = (entries < end) & (ids < length)
            k, v = _load(
                ids, there, k_base, v_base, table_row, stride_kb, stride_kn, stride_vb, stride_vn, D, DV, PAGE, BLOCK_D, BLOCK_DV
            )  # fmt: skip
            keep = there[None, :]
            if CAUSAL:
                keep = keep & (ids[None, :] < seen[:, None])
            top, sums, acc = step(q, k, v, keep, 0.0, top, sums, acc, scale, cap, SOFTCAP, False, PRECISION)

    if SINGLE:
        at = (((batch % TOKEN_BATCH) * TOKEN_HEADS + head // (HEADS // TOKEN_HEADS)) * TILES + tile).to(tl.int64)
        count = tl.load(token_count_ptr + at).to(tl.int32)
        begin, end = share(count, BLOCK_N)
        for entry in range(begin, end, BLOCK_N):
            entries = entry + tl.arange(0, BLOCK_N)
            ids = tl.load(token_ptr + at * tokens + entries, mask=entries < end, other=0)
            there = (entries < end) & (ids < length)
            k, v = _load(
                ids, there, k_base, v_base, table_row, stride_kb, stride_kn, stride_vb, stride_vn, D, DV, PAGE, BLOCK_D, BLOCK_DV
            )  # fmt: skip
            keep = there[None, :]
            if CAUSAL:
                keep = keep & (ids[None, :] < seen[:, None])
            weight = 0.0
            if WEIGHTED:
                weight = tl.load(weight_ptr + at * tokens + entries, mask=there, other=0.0) * LOG2E
            top, sums, acc = step(q, k, v, keep, weight, top, sums, acc, scale, cap, SOFTCAP, WEIGHTED, PRECISION)

    value, lse = normalised(top, sums, acc)
    row = (batch * (HEADS * GROUP) + query_head) * m + query
    store(value, lse, out_ptr, lse_ptr, row, valid, value_columns, DV, PARTIAL, WRITE_LSE)
