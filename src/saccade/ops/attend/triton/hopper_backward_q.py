"""Query-major backward kernel for Hopper GPUs, in Gluon: dQ = scale sum_j (P_j * (dO V_j^T - delta)) K_j.

A program stays on its multiprocessor and works through tiles of 128 queries: a warp brings tiles, two groups of four warps hold 64 query
rows each. Products of scores have the gradient's rows as rows, so their gradients are left factors straight from registers.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from saccade.ops.attend.triton.hopper import tile_begin, work_of


@gluon.jit
def place(offset, stride):
    """Row and column of an offset in a matrix whose rows are `stride` apart."""
    return (offset // stride).to(gl.int32), (offset % stride).to(gl.int32)


@gluon.jit
def bring_keys(descs, strides, sizes, lists, work, smem, bars, BN: gl.constexpr, STAGES: gl.constexpr, INNER: gl.constexpr,
    CAUSAL: gl.constexpr, LISTED: gl.constexpr):  # fmt: skip
    """Producer of the query-major kernel."""
    desc_q, desc_do, desc_k, desc_v = descs
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn = strides
    q_smem, do_smem, k_smem, v_smem = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    ROWS: gl.constexpr = desc_q.block_type.shape[0]
    n_q, heads, group = sizes[0], sizes[2], sizes[3]
    step = 0
    for w in range(gl.program_id(0), work, gl.num_programs(0)):
        turn = w // gl.num_programs(0)
        tile, batch, head, starts, count = work_of(w, sizes, lists, 2 * ROWS, BN, INNER, CAUSAL, LISTED)
        kv = head // group
        q_row, q_col = place(batch.to(gl.int64) * stride_qb + head.to(gl.int64) * stride_qh, stride_qn)
        k_row, k_col = place(batch.to(gl.int64) * stride_kb + kv.to(gl.int64) * stride_kh, stride_kn)
        v_row, v_col = place(batch.to(gl.int64) * stride_vb + kv.to(gl.int64) * stride_vh, stride_vn)
        do_row = (batch * heads + head) * n_q
        for half in gl.static_range(2):
            row = tile * (2 * ROWS) + half * ROWS
            mbarrier.wait(q_empty.index(half), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(half), desc_q.block_type.nbytes + desc_do.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_q, [q_row + row, q_col], q_full.index(half), q_smem.index(half))
            tma.async_copy_global_to_shared(desc_do, [do_row + row, 0], q_full.index(half), do_smem.index(half))
        for j in range(0, count):
            begin = tile_begin(starts, j, count, BN, INNER, LISTED)
            slot = step % STAGES
            phase = ((step // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), desc_k.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_k, [k_row + begin, k_col], k_full.index(slot), k_smem.index(slot))
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), desc_v.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_v, [v_row + begin, v_col], v_full.index(slot), v_smem.index(slot))
            step += 1


@gluon.jit
def query_step(
    q, do, dq, slot, phase, begin, keys, position, lse2, delta, scale2, k_smem, v_smem, bars,
    MASK: gl.constexpr, s_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """Keys begin ... begin + BN - 1, which lie in `slot`; with MASK those after `position` are left out."""
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty = bars
    dtype: gl.constexpr = k_smem.dtype
    ROWS: gl.constexpr = q.shape[0]
    BN: gl.constexpr = k_smem.shape[1]
    zero = gl.zeros([ROWS, BN], gl.float32, s_layout)
    mbarrier.wait(k_full.index(slot), phase)
    s = warpgroup_mma(q, k_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(slot), phase)
    dp = warpgroup_mma(do, v_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    p = gl.exp2(s * scale2 - lse2[:, None])
    if MASK:
        p = gl.where((begin + keys)[None, :] <= position[:, None], p, 0.0)
    dp = warpgroup_mma_wait(0, deps=[dp])
    mbarrier.arrive(v_empty.index(slot), count=1)
    ds = gl.convert_layout((p * (dp - delta[:, None])).to(dtype), p_layout)
    dq = warpgroup_mma(ds, k_smem.index(slot), dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[dq])
    mbarrier.arrive(k_empty.index(slot), count=1)
    return dq


@gluon.jit
def query_gradient(
    WHICH: gl.constexpr, pointers, scale, sizes, lists, work, smem, bars,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, INNER: gl.constexpr, CAUSAL: gl.constexpr, LISTED: gl.constexpr,
):  # fmt: skip
    """Half a tile of queries at a time: dQ = scale sum_j (P_j * (dO V_j^T - delta)) K_j."""
    dq_ptr, lse2_ptr, delta_ptr = pointers
    q_smem, do_smem, k_smem, v_smem = smem
    q_full, q_empty = bars[0], bars[1]
    n_q, n_k, heads = sizes[0], sizes[1], sizes[2]
    dtype: gl.constexpr = q_smem.dtype
    ROWS: gl.constexpr = q_smem.shape[1]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    rows_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows_o: gl.constexpr = gl.SliceLayout(1, o_layout)
    keys = gl.arange(0, BN, layout=gl.SliceLayout(0, s_layout))
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    q = q_smem.index(WHICH)
    do = do_smem.index(WHICH)
    scale2 = scale * 1.4426950408889634
    step = 0
    for w in range(gl.program_id(0), work, gl.num_programs(0)):
        turn = w // gl.num_programs(0)
        tile, batch, head, starts, count = work_of(w, sizes, lists, 2 * ROWS, BN, INNER, CAUSAL, LISTED)
        first = tile * (2 * ROWS) + WHICH * ROWS
        position = first + n_k - n_q + gl.arange(0, ROWS, layout=rows_s)
        # the steps at the end of the list that some row doesn't see whole
        cut = 0
        if CAUSAL:
            whole_until = first + n_k - n_q - (BN - 1)
            at = tile_begin(starts, 0, count, BN, INNER, LISTED)
            while (cut < count) & (at > whole_until):
                cut += 1
                at = tile_begin(starts, cut, count, BN, INNER, LISTED)
        base = (batch * heads + head).to(gl.int64) * n_q + first
        row = gl.arange(0, ROWS, layout=rows_s)
        lse2 = gl.load(lse2_ptr + base + row)
        delta = gl.load(delta_ptr + base + row)
        dq = gl.zeros([ROWS, D], gl.float32, o_layout)
        mbarrier.wait(q_full.index(WHICH), turn & 1)
        for j in range(0, cut):
            begin = tile_begin(starts, j, count, BN, INNER, LISTED)
            dq = query_step(
                q, do, dq, step % STAGES, (step // STAGES) & 1, begin, keys, position, lse2, delta, scale2, k_smem, v_smem, bars, True,
                s_layout, p_layout,
            )  # fmt: skip
            step += 1
        for _ in range(cut, count):
            dq = query_step(
                q, do, dq, step % STAGES, (step // STAGES) & 1, 0, keys, position, lse2, delta, scale2, k_smem, v_smem, bars, False,
                s_layout, p_layout,
            )  # fmt: skip
            step += 1
        mbarrier.arrive(q_empty.index(WHICH), count=1)
        row_o = gl.arange(0, ROWS, layout=rows_o)
        gl.store(dq_ptr + (base + row_o)[:, None] * D + cols[None, :], (dq * scale).to(dtype))


@gluon.jit
def query_major_kernel(
    desc_q, desc_do, desc_k, desc_v, dq_ptr, lse2_ptr, delta_ptr, starts_ptr, counts_ptr, scale, n_q, n_k,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_sb, stride_sh, stride_st, stride_cb, stride_ch, heads, group, list_group, tiles, together, work,
    D: gl.constexpr, STAGES: gl.constexpr, INNER: gl.constexpr, CAUSAL: gl.constexpr, LISTED: gl.constexpr,
    MORE: gl.constexpr, FEW: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = desc_q.block_type.shape[0]
    BN: gl.constexpr = desc_k.block_type.shape[0]
    q_smem = gl.allocate_shared_memory(desc_q.dtype, [2, ROWS, D], desc_q.layout)
    do_smem = gl.allocate_shared_memory(desc_q.dtype, [2, ROWS, D], desc_do.layout)
    k_smem = gl.allocate_shared_memory(desc_q.dtype, [STAGES, BN, D], desc_k.layout)
    v_smem = gl.allocate_shared_memory(desc_q.dtype, [STAGES, BN, D], desc_v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(q_full.index(half), count=1)
        mbarrier.init(q_empty.index(half), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(v_empty.index(slot), count=2)
    fence_async_shared()
    descs = (desc_q, desc_do, desc_k, desc_v)
    pointers = (dq_ptr, lse2_ptr, delta_ptr)
    sizes = (n_q, n_k, heads, group, list_group, tiles, together)
    lists = (starts_ptr, counts_ptr, stride_sb, stride_sh, stride_st, stride_cb, stride_ch)
    strides = (stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn)
    smem = (q_smem, do_smem, k_smem, v_smem)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (query_gradient, (0, pointers, scale, sizes, lists, work, smem, bars, BN, D, STAGES, INNER, CAUSAL, LISTED)),
            (query_gradient, (1, pointers, scale, sizes, lists, work, smem, bars, BN, D, STAGES, INNER, CAUSAL, LISTED)),
            (bring_keys, (descs, strides, sizes, lists, work, smem, bars, BN, STAGES, INNER, CAUSAL, LISTED)),
        ],
        [4, 1],
        [MORE, FEW],
    )
