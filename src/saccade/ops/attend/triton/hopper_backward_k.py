"""Key-major backward kernel for Hopper GPUs, in Gluon: dV = sum_i P_i^T dO_i, dK = scale sum_i (P_i * (dO_i V^T - delta_i))^T Q_i.

A program owns 128 keys, 64 for each of two groups of warps, and walks the query tiles of all query heads that share them, so nothing is
added atomically and every run gives the same bits. Scores are taken transposed: weights and their gradients are left factors straight
from registers.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from saccade.ops.attend.triton.hopper_backward_q import place


@gluon.jit
def readers_of(
    g, sizes, lists, BQ: gl.constexpr, KEYS: gl.constexpr, INNER: gl.constexpr, CAUSAL: gl.constexpr, LISTED: gl.constexpr
):  # fmt: skip
    """Of the g-th query head of this program: (head with its batch, pointer to the query tiles that read its keys, first and last step)."""
    n_q, n_k, heads, group, list_group, list_batch, list_heads, key_tiles, width, tile_keys = sizes
    kv_heads = heads // group
    batch = gl.program_id(1) // kv_heads
    head = gl.program_id(1) % kv_heads * group + g
    first_key = gl.program_id(0) * KEYS
    readers, counts = lists
    begin = 0
    if LISTED:
        listing = (batch % list_batch * list_heads + head // list_group).to(gl.int64) * key_tiles + first_key // tile_keys
        readers = readers + listing * width
        count = gl.load(counts + listing) * INNER
    else:
        count = n_q // BQ
        if CAUSAL:
            begin = gl.minimum(gl.maximum(first_key - (n_k - n_q), 0) // BQ, count)
    return batch * heads + head, readers, begin, count


@gluon.jit
def reader_row(readers, i, count, BQ: gl.constexpr, INNER: gl.constexpr, LISTED: gl.constexpr):
    """First query row of step i; any row for a step there isn't."""
    if LISTED:
        i = gl.minimum(i, count - 1)
        return (gl.load(readers + i // INNER) * INNER + i % INNER) * BQ
    else:
        return i * BQ


@gluon.jit
def bring_queries(
    descs, strides, sizes, lists, smem, bars, BQ: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, INNER: gl.constexpr,
    CAUSAL: gl.constexpr, LISTED: gl.constexpr,
):  # fmt: skip
    """Producer of the key-major kernel."""
    desc_k, desc_v, desc_q, desc_do = descs
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn = strides
    k_smem, v_smem, q_smem, do_smem = smem
    kv_full, q_full, q_empty, do_full, do_empty = bars
    n_q, heads, group = sizes[0], sizes[2], sizes[3]
    kv_heads = heads // group
    batch = gl.program_id(1) // kv_heads
    kv = gl.program_id(1) % kv_heads
    k_row, k_col = place(batch.to(gl.int64) * stride_kb + kv.to(gl.int64) * stride_kh, stride_kn)
    v_row, v_col = place(batch.to(gl.int64) * stride_vb + kv.to(gl.int64) * stride_vh, stride_vn)
    mbarrier.expect(kv_full, 2 * (desc_k.block_type.nbytes + desc_v.block_type.nbytes))
    for half in gl.static_range(2):
        at = gl.program_id(0) * KEYS + half * (KEYS // 2)
        tma.async_copy_global_to_shared(desc_k, [k_row + at, k_col], kv_full, k_smem.index(half))
        tma.async_copy_global_to_shared(desc_v, [v_row + at, v_col], kv_full, v_smem.index(half))
    step = 0
    for g in range(0, group):
        line, readers, begin, count = readers_of(g, sizes, lists, BQ, KEYS, INNER, CAUSAL, LISTED)
        q_row, q_col = place(batch.to(gl.int64) * stride_qb + (line % heads).to(gl.int64) * stride_qh, stride_qn)
        for i in range(begin, count):
            row = reader_row(readers, i, count, BQ, INNER, LISTED)
            slot = step % STAGES
            phase = ((step // STAGES) & 1) ^ 1
            mbarrier.wait(q_empty.index(slot), phase)
            mbarrier.expect(q_full.index(slot), desc_q.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_q, [q_row + row, q_col], q_full.index(slot), q_smem.index(slot))
            mbarrier.wait(do_empty.index(slot), phase)
            mbarrier.expect(do_full.index(slot), desc_do.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_do, [line * n_q + row, 0], do_full.index(slot), do_smem.index(slot))
            step += 1


@gluon.jit
def key_step(
    k, v, dk, dv, slot, phase, row, base, lse2_ptr, delta_ptr, keys, offset, scale2, q_smem, do_smem, bars,
    BQ: gl.constexpr, MASK: gl.constexpr, s_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """Queries row ... row + BQ - 1; base: their head's place among rows of all heads."""
    _kv_full, q_full, q_empty, do_full, do_empty = bars
    dtype: gl.constexpr = q_smem.dtype
    query = gl.arange(0, BQ, layout=gl.SliceLayout(0, s_layout))
    ROWS: gl.constexpr = k.shape[0]
    zero = gl.zeros([ROWS, BQ], gl.float32, s_layout)
    mbarrier.wait(q_full.index(slot), phase)
    s = warpgroup_mma(k, q_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(slot), phase)
    dp = warpgroup_mma(v, do_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    lse2 = gl.load(lse2_ptr + base + row + query)
    s = warpgroup_mma_wait(1, deps=[s])
    p = gl.exp2(s * scale2 - lse2[None, :])
    if MASK:
        p = gl.where(keys[:, None] <= (row + offset + query)[None, :], p, 0.0)
    low = p.to(dtype)
    delta = gl.load(delta_ptr + base + row + query)
    dp = warpgroup_mma_wait(0, deps=[dp])
    # registers are short: the weights stay in their 16 bits
    ds = low.to(gl.float32) * (dp - delta[None, :])
    dv = warpgroup_mma(gl.convert_layout(low, p_layout), do_smem.index(slot), dv, is_async=True)
    dk = warpgroup_mma(gl.convert_layout(ds.to(dtype), p_layout), q_smem.index(slot), dk, is_async=True)
    dv = warpgroup_mma_wait(1, deps=[dv])
    mbarrier.arrive(do_empty.index(slot), count=1)
    dk = warpgroup_mma_wait(0, deps=[dk])
    mbarrier.arrive(q_empty.index(slot), count=1)
    return dk, dv


@gluon.jit
def key_gradient(
    WHICH: gl.constexpr, pointers, scale, sizes, lists, smem, bars,
    BQ: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, INNER: gl.constexpr, CAUSAL: gl.constexpr,
    LISTED: gl.constexpr,
):  # fmt: skip
    """Half a tile of keys: dV = sum_i P_i^T dO_i, dK = scale sum_i (P_i * (dO_i V^T - delta_i))^T Q_i."""
    dk_ptr, dv_ptr, lse2_ptr, delta_ptr = pointers
    k_smem, v_smem, q_smem, do_smem = smem
    n_q, n_k, group = sizes[0], sizes[1], sizes[3]
    kv_full = bars[0]
    dtype: gl.constexpr = q_smem.dtype
    ROWS: gl.constexpr = k_smem.shape[1]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BQ, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    first_key = gl.program_id(0) * KEYS + WHICH * ROWS
    keys = first_key + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    offset = n_k - n_q
    k = k_smem.index(WHICH)
    v = v_smem.index(WHICH)
    dk = gl.zeros([ROWS, D], gl.float32, o_layout)
    dv = gl.zeros([ROWS, D], gl.float32, o_layout)
    scale2 = scale * 1.4426950408889634
    mbarrier.wait(kv_full, 0)
    step = 0
    for g in range(0, group):
        line, readers, begin, count = readers_of(g, sizes, lists, BQ, KEYS, INNER, CAUSAL, LISTED)
        base = line.to(gl.int64) * n_q
        # ascending queries: the first ones don't see every key of this half
        cut = begin
        if CAUSAL:
            while (cut < count) & (reader_row(readers, cut, count, BQ, INNER, LISTED) + offset < first_key + ROWS - 1):
                cut += 1
        for i in range(begin, cut):
            row = reader_row(readers, i, count, BQ, INNER, LISTED)
            dk, dv = key_step(
                k, v, dk, dv, step % STAGES, (step // STAGES) & 1, row, base, lse2_ptr, delta_ptr, keys, offset, scale2, q_smem, do_smem,
                bars, BQ, True, s_layout, p_layout,
            )  # fmt: skip
            step += 1
        for i in range(cut, count):
            row = reader_row(readers, i, count, BQ, INNER, LISTED)
            dk, dv = key_step(
                k, v, dk, dv, step % STAGES, (step // STAGES) & 1, row, base, lse2_ptr, delta_ptr, keys, offset, scale2, q_smem, do_smem,
                bars, BQ, False, s_layout, p_layout,
            )  # fmt: skip
            step += 1
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, o_layout))
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    at = (gl.program_id(1).to(gl.int64) * n_k + first_key + rows)[:, None] * D + cols[None, :]
    gl.store(dk_ptr + at, (dk * scale).to(dtype))
    gl.store(dv_ptr + at, dv.to(dtype))


@gluon.jit
def key_major_kernel(
    desc_k, desc_v, desc_q, desc_do, dk_ptr, dv_ptr, lse2_ptr, delta_ptr, readers_ptr, counts_ptr, scale, n_q, n_k,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    heads, group, list_group, list_batch, list_heads, key_tiles, width, tile_keys,
    KEYS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, INNER: gl.constexpr, CAUSAL: gl.constexpr, LISTED: gl.constexpr,
    MORE: gl.constexpr, FEW: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    BQ: gl.constexpr = desc_q.block_type.shape[0]
    k_smem = gl.allocate_shared_memory(desc_q.dtype, [2, KEYS // 2, D], desc_k.layout)
    v_smem = gl.allocate_shared_memory(desc_q.dtype, [2, KEYS // 2, D], desc_v.layout)
    q_smem = gl.allocate_shared_memory(desc_q.dtype, [STAGES, BQ, D], desc_q.layout)
    do_smem = gl.allocate_shared_memory(desc_q.dtype, [STAGES, BQ, D], desc_do.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=2)
        mbarrier.init(do_full.index(slot), count=1)
        mbarrier.init(do_empty.index(slot), count=2)
    fence_async_shared()
    descs = (desc_k, desc_v, desc_q, desc_do)
    pointers = (dk_ptr, dv_ptr, lse2_ptr, delta_ptr)
    sizes = (n_q, n_k, heads, group, list_group, list_batch, list_heads, key_tiles, width, tile_keys)
    lists = (readers_ptr, counts_ptr)
    strides = (stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn)
    smem = (k_smem, v_smem, q_smem, do_smem)
    bars = (kv_full, q_full, q_empty, do_full, do_empty)
    gl.warp_specialize(
        [
            (key_gradient, (0, pointers, scale, sizes, lists, smem, bars, BQ, KEYS, D, STAGES, INNER, CAUSAL, LISTED)),
            (key_gradient, (1, pointers, scale, sizes, lists, smem, bars, BQ, KEYS, D, STAGES, INNER, CAUSAL, LISTED)),
            (bring_queries, (descs, strides, sizes, lists, smem, bars, BQ, KEYS, STAGES, INNER, CAUSAL, LISTED)),
        ],
        [4, 1],
        [MORE, FEW],
    )
