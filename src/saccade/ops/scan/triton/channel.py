"""Gates per channel inside a chunk: q and k times their gates, and the products of tokens, weighted channel by channel.

    pairs_ij = sum_c q_ic k_jc e^(gates of c after j up to i)

One common reference point would need e^(+large). Instead the chunk is cut into blocks of 16. Across blocks the weight is a product of
three factors of at most 1: from the start of i's block to i, after j to the end of j's block, and the blocks between: a matmul for each
distance of blocks. Inside a block the sums of gates are built up token by token, from the last to the first, and used as they grow: no
gate is ever subtracted, so none is ever lost behind a larger one.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.scan.triton.inside import LOG2E, LOWEST, join_blocks, matmul, segment_of, solve_small


@triton.jit
def block_gates(gate, gate_n, at, end, back, d, CHUNK: tl.constexpr, BD: tl.constexpr):
    """Gates `(blocks, 16, BD)` of a chunk in powers of two, of the tokens `back` before each; 0 outside of the chunk."""
    position = tl.arange(0, CHUNK // 16)[:, None, None] * 16 + tl.arange(0, 16)[None, :, None] - back
    di = tl.arange(0, BD)[None, None, :]
    token = (at + position).to(tl.int64)
    mask = (position >= 0) & (position < CHUNK) & (at + position < end) & (di < d)
    raw = tl.load(gate + token * gate_n + di, mask=mask, other=0.0).to(tl.float32)
    return tl.maximum(raw, LOWEST) * LOG2E


@triton.jit
def block_tokens(x, x_n, at, end, d, CHUNK: tl.constexpr, BD: tl.constexpr):
    """Rows `(blocks, 16, BD)` of a chunk."""
    token = at + tl.arange(0, CHUNK // 16)[:, None, None] * 16 + tl.arange(0, 16)[None, :, None]
    di = tl.arange(0, BD)[None, None, :]
    return tl.load(x + token.to(tl.int64) * x_n + di, mask=(token < end) & (di < d), other=0.0)


@triton.jit
def across_blocks(x, x_n, scale, columns, gate, gate_n, at, end, d, CHUNK: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):
    """Products of rows x with `columns` of earlier blocks, one distance of blocks after another; and x times the gates up to each token."""
    BLOCKS: tl.constexpr = CHUNK // 16
    rows = block_tokens(x, x_n, at, end, d, CHUNK, BD)
    wide = rows.to(tl.float32) * scale
    reach = tl.cumsum(block_gates(gate, gate_n, at, end, 0, d, CHUNK, BD), axis=1)
    i = tl.arange(0, CHUNK)
    distance = i[:, None] // 16 - i[None, :] // 16
    products = tl.zeros([CHUNK, CHUNK], tl.float32)
    for apart in tl.static_range(1, BLOCKS):
        left = tl.reshape((wide * tl.exp2(reach)).to(rows.dtype), [CHUNK, BD])
        products = tl.where(distance == apart, matmul(left, columns, PRECISION), products)
        back = block_gates(gate, gate_n, at, end, 16 * apart, d, CHUNK, BD)
        reach = reach + tl.sum(back, axis=1)[:, None, :]
    return products, wide * tl.exp2(reach)


@triton.jit
def transform(
    q, k, v, beta, gate, q_gated, k_gated, pairs, totals, u, w, inverses, table, n, per_sequence, heads, scale,
    query_group, query_b, query_h, query_n, key_group, key_b, key_h, key_n, val_group, val_b, val_h, val_n,
    gate_b, gate_h, gate_n, beta_b, beta_h, beta_n,
    d: tl.constexpr, dv: tl.constexpr,
    CHUNK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, VALUE_BLOCKS: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """q_gated: scale q e^(gates up to it), k_gated: k e^(gates after it), both `(B, H, N, D)`; pairs `(chunks, H, CHUNK, CHUNK)` with
    scale, only the lower triangle is written; totals `(chunks, H, D)`: log2 of the gates over the chunk; u, w and, with KEEP,
    the inverse as in `delta`."""
    BLOCKS: tl.constexpr = CHUNK // 16
    slot = tl.program_id(0)
    h = tl.program_id(1)
    batch, _owner, at, end, first, _last, chunk = segment_of(slot, n, per_sequence, table, CHUNK, CHUNK, PACKED)
    chunk += (at - first) // CHUNK
    batch = batch.to(tl.int64)
    here = (batch * heads + h) * n
    place = chunk.to(tl.int64) * heads + h
    q += batch * query_b + (h // query_group).to(tl.int64) * query_h
    k += batch * key_b + (h // key_group).to(tl.int64) * key_h
    gate += batch * gate_b + h.to(tl.int64) * gate_h
    a3 = tl.arange(0, BLOCKS)[:, None, None]
    r3 = tl.arange(0, 16)[None, :, None]
    d3 = tl.arange(0, BD)[None, None, :]
    t3 = at + a3 * 16 + r3
    in3 = (t3 < end) & (d3 < d)
    t3 = t3.to(tl.int64)
    q_wide = block_tokens(q, query_n, at, end, d, CHUNK, BD).to(tl.float32) * scale
    k3 = block_tokens(k, key_n, at, end, d, CHUNK, BD)
    dtype = k3.dtype
    k_wide = k3.to(tl.float32)

    # inside blocks: the j-th token of every block against the later ones
    gathered = tl.zeros([BLOCKS, 16, BD], tl.float32)
    c3 = tl.arange(0, 16)[None, None, :]
    near_q = tl.zeros([BLOCKS, 16, 16], tl.float32)
    near_k = tl.zeros([BLOCKS, 16, 16], tl.float32)
    token_b = at + tl.arange(0, BLOCKS)[:, None] * 16
    d2 = tl.arange(0, BD)[None, :]
    for step in range(0, 16):
        j = 15 - step
        mask = (token_b + j < end) & (d2 < d)
        tj = (token_b + j).to(tl.int64)
        kj = tl.load(k + tj * key_n + d2, mask=mask, other=0.0).to(tl.float32)
        gj = tl.maximum(tl.load(gate + tj * gate_n + d2, mask=mask, other=0.0).to(tl.float32), LOWEST) * LOG2E
        weighted = tl.exp2(gathered) * kj[:, None, :]
        near_q = tl.where(c3 == j, tl.sum(q_wide * weighted, axis=2)[:, :, None], near_q)
        if DELTA:
            near_k = tl.where(c3 == j, tl.sum(k_wide * weighted, axis=2)[:, :, None], near_k)
        gathered = gathered + tl.where(r3 >= j, gj[:, None, :], 0.0)
    i = tl.arange(0, CHUNK)
    pairs += place * CHUNK * CHUNK
    lower = (r3 >= c3) & (at < end)
    tl.store(pairs + (a3 * 16 + r3) * CHUNK + a3 * 16 + c3, near_q.to(pairs.dtype.element_ty), mask=lower)

    # after each token: to its block's end, then over the blocks behind to the chunk's end
    next3 = block_gates(gate, gate_n, at, end, -1, d, CHUNK, BD)
    after = tl.cumsum(tl.where(r3 < 15, next3, 0.0), axis=1, reverse=True)
    columns = tl.trans(tl.reshape((k_wide * tl.exp2(after)).to(dtype), [CHUNK, BD]))
    per_block = tl.sum(block_gates(gate, gate_n, at, end, 0, d, CHUNK, BD), axis=1)
    block = tl.arange(0, BLOCKS)
    behind = tl.sum(tl.where(block[None, :, None] > block[:, None, None], per_block[None, :, :], 0.0), axis=1)
    k_last = k_wide * tl.exp2(after + behind[:, None, :])
    tl.store(k_gated + (here + t3) * d + d3, k_last.to(k_gated.dtype.element_ty), mask=in3)
    di = tl.arange(0, BD)
    tl.store(totals + place * d + di, tl.sum(per_block, axis=0), mask=(di < d) & (at < end))

    far_q, q_first = across_blocks(q, query_n, scale, columns, gate, gate_n, at, end, d, CHUNK, BD, PRECISION)
    apart = (i[:, None] // 16 > i[None, :] // 16) & (at < end)
    tl.store(pairs + i[:, None] * CHUNK + i[None, :], far_q.to(pairs.dtype.element_ty), mask=apart)
    tl.store(q_gated + (here + t3) * d + d3, q_first.to(q_gated.dtype.element_ty), mask=in3)

    if DELTA:
        far_k, k_first = across_blocks(k, key_n, 1.0, columns, gate, gate_n, at, end, d, CHUNK, BD, PRECISION)
        read = tl.reshape(k_first.to(dtype), [CHUNK, BD])
        token = (at + i).to(tl.int64)
        inside = at + i < end
        bt = tl.load(beta + batch * beta_b + h.to(tl.int64) * beta_h + token * beta_n, mask=inside, other=0.0).to(tl.float32)
        b3 = tl.reshape(bt, [BLOCKS, 16])
        small = solve_small(tl.where(r3 > c3, near_k * b3[:, :, None], 0.0), BLOCKS)
        inverse = join_blocks(small, far_k * bt[:, None], CHUNK, SOLVE)
        if KEEP:
            square = place * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :]
            tl.store(inverses + square, inverse.to(inverses.dtype.element_ty), mask=at < end)
        inverse = inverse * bt[None, :]
        weights = inverse.to(dtype)
        wt = matmul(weights, read, PRECISION)
        tl.store(w + (here + token[:, None]) * d + di[None, :], wt.to(w.dtype.element_ty), mask=inside[:, None] & (di < d)[None, :])
        v += batch * val_b + (h // val_group).to(tl.int64) * val_h
        for b in range(0, VALUE_BLOCKS):
            vi = b * BV + tl.arange(0, BV)
            mask = inside[:, None] & (vi < dv)[None, :]
            vt = tl.load(v + token[:, None] * val_n + vi[None, :], mask=mask, other=0.0)
            ut = matmul(weights, vt, PRECISION)
            tl.store(u + (here + token[:, None]) * dv + vi[None, :], ut.to(u.dtype.element_ty), mask=mask)
