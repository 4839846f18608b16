"""Every key of a cache: contiguous, of a length for each batch row, ragged per head, or paged."""
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.decode.triton.tile import normalised, program, rows, share, step, store


@triton.jit(do_not_specialize=["n"])
def stream(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, length_ptr, table_ptr, scale, cap, n, m,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_table,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROW_BLOCKS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    LENGTHS: tl.constexpr, RAGGED: tl.constexpr, PAGE: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    PARTIAL: tl.constexpr, WRITE_LSE: tl.constexpr, PRECISION: tl.constexpr, QT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid (batch * HEADS * ROW_BLOCKS, splits). QT is m.

    LENGTHS: length_ptr holds the number of keys of each batch row. RAGGED: it holds where each head's keys begin, and the end.
    PAGE: tokens of a page, 0 for none; stride_kb is then between pages, stride_kn inside one.
    """
    batch, head, tile, block = program(HEADS, 1, ROW_BLOCKS)
    query_head, query, valid = rows(head, tile, block, m, GROUP, QT, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    batch = batch.to(tl.int64)

    first = batch * 0  # int64, as what is added to it has to be
    length = n
    if LENGTHS:
        length = tl.minimum(tl.load(length_ptr + batch).to(tl.int32), n)
    if RAGGED:
        batch_row = batch * HEADS + head
        first = tl.load(length_ptr + batch_row).to(tl.int64)
        length = (tl.load(length_ptr + batch_row + 1).to(tl.int64) - first).to(tl.int32)
    k_base = k_ptr + head.to(tl.int64) * stride_kh
    v_base = v_ptr + head.to(tl.int64) * stride_vh
    if PAGE == 0:
        k_base += batch * stride_kb
        v_base += batch * stride_vb

    q = tl.load(
        q_ptr + batch * stride_qb + query_head[:, None].to(tl.int64) * stride_qh + query[:, None] * stride_qm + columns[None, :],
        mask=valid[:, None] & (columns < D)[None, :], other=0.0,
    )  # fmt: skip
    seen = length - m + query + 1
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    begin, end = share(length, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        inside = tl.arange(0, BLOCK_N)
        ids = start + inside
        there = ids < end
        if PAGE > 0:
            page = tl.load(table_ptr + batch * stride_table + ids // PAGE, mask=there, other=0).to(tl.int64)
            k_row = k_base + page * stride_kb + (ids % PAGE) * stride_kn
            v_row = v_base + page * stride_vb + (ids % PAGE) * stride_vn
        else:
            k_row = k_base + (first + start) * stride_kn + inside * stride_kn
            v_row = v_base + (first + start) * stride_vn + inside * stride_vn
        k_mask = there[None, :]
        v_mask = there[:, None]
        if BLOCK_D != D:
            k_mask = k_mask & (columns < D)[:, None]
        if BLOCK_DV != DV:
            v_mask = v_mask & (value_columns < DV)[None, :]
        k = tl.load(k_row[None, :] + columns[:, None], mask=k_mask, other=0.0)
        v = tl.load(v_row[:, None] + value_columns[None, :], mask=v_mask, other=0.0)
        keep = there[None, :]
        if CAUSAL:
            keep = keep & (ids[None, :] < seen[:, None])
        top, sums, acc = step(q, k, v, keep, 0.0, top, sums, acc, scale, cap, SOFTCAP, False, PRECISION)

    value, lse = normalised(top, sums, acc)
    row = (batch * (HEADS * GROUP) + query_head) * m + query
    store(value, lse, out_ptr, lse_ptr, row, valid, value_columns, DV, PARTIAL, WRITE_LSE)
