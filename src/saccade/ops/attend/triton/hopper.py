"""Forward kernel for Hopper GPUs, in Gluon: dense attention, and tiles of 64 keys or multiples read by tiles of 128 queries.

Four warps hold 128 queries, so that two programs share a multiprocessor. Keys and values come by tensor memory access into rings of
shared memory, last tile first: tiles cut by the diagonal or by the end of the keys come first, one at a time. The others are issued so:

    start  S_j = Q K_j^T         start  O += P_(j-1) V_(j-1)         wait S_j, softmax -> P_j         wait O, rescale

The assembler that comes with Triton 3.6 moves the second wait ahead of the softmax, so within a program the two products overlap with each
other and not with the exponentials; what covers those is the other program of the multiprocessor.
Everything else (caps, biases, single keys, other tiles and devices) is the portable kernel's.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from saccade.ops.attend.triton.launch import LOG2E, Lists, rows_layout
from saccade.ops.gpu import ceil_div

BLOCK_M, BLOCK_N, WARPS = 128, 64, 4


@gluon.jit
def tile_begin(starts, i, count, BN: gl.constexpr, INNER: gl.constexpr, LISTED: gl.constexpr):
    """First key of the i-th step, counted from the end; any key for a step there isn't."""
    back = gl.maximum(count - 1 - i, 0)
    if LISTED:
        return gl.load(starts + back // INNER) + (back % INNER) * BN
    else:
        return back * BN


@gluon.jit
def fetch(
    desc_k, desc_v, k_row, k_col, v_row, v_col, bars, k_smem, v_smem, i, starts, count, BN: gl.constexpr, INNER: gl.constexpr,
    LISTED: gl.constexpr,
):  # fmt: skip
    """Start loading what step i + 1 needs: its keys, and the values of step i. One barrier stands for both."""
    k_begin = tile_begin(starts, i + 1, count, BN, INNER, LISTED)
    v_begin = tile_begin(starts, i, count, BN, INNER, LISTED)
    wanted = i < count
    bar = bars.index(i % 2)
    mbarrier.expect(bar, desc_k.block_type.nbytes + desc_v.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(desc_k, [k_row + k_begin, k_col], bar, k_smem.index((i + 1) % 2), pred=wanted)
    tma.async_copy_global_to_shared(desc_v, [v_row + v_begin, v_col], bar, v_smem.index(i % 2), pred=wanted)


@gluon.jit
def blank_tail(v, begin, n_k, BN: gl.constexpr, D: gl.constexpr, num_warps: gl.constexpr):
    """Zeros for the values past the last key, which are other data: their weights are 0, but 0 times a nan there would be nan."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [num_warps, 1], [1, 0])
    if begin + BN > n_k:
        rows = begin + gl.arange(0, BN, layout=gl.SliceLayout(1, layout))
        x = v.load(layout)
        v.store(gl.where((rows < n_k)[:, None], x, 0.0))
        fence_async_shared()
        gl.thread_barrier()


@gluon.jit
def weigh(s, m, total, scale, begin, position, keys, n_k, MASK: gl.constexpr, CAUSAL: gl.constexpr):
    """The online softmax of one tile of raw products: weights, what the older sums shrink to, and the new maximum and sum."""
    if MASK:
        s = s * scale
        limit = gl.minimum(position, n_k - 1) if CAUSAL else gl.minimum(position * 0 + n_k, n_k - 1)
        s = gl.where((begin + keys)[None, :] <= limit[:, None], s, float("-inf"))
        top = gl.maximum(m, gl.max(s, 1))
        # a row that has seen no key yet stays at -inf: shifted by 0, its weights are 0
        shift = gl.where(top == float("-inf"), 0.0, top)
        p = gl.exp2(s - shift[:, None])
    else:
        top = gl.maximum(m, gl.max(s, 1) * scale)
        shift = top
        p = gl.exp2(s * scale - shift[:, None])
    forget = gl.exp2(m - shift)
    return p, forget, top, total * forget + gl.sum(p, 1)


@gluon.jit
def block_index(AXIS: gl.constexpr):
    """program_id, read anew: what was worked out from it before the loop need not be kept in registers through it."""
    if AXIS == 0:
        return gl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    else:
        return gl.inline_asm_elementwise("mov.u32 $0, %ctaid.y;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def hopper_kernel(
    desc_q, desc_k, desc_v, out_ptr, lse_ptr, starts_ptr, counts_ptr, scale, n_q, n_k,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_sb, stride_sh, stride_st, stride_cb, stride_ch, heads, group, list_group,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, INNER: gl.constexpr, CAUSAL: gl.constexpr,
    LISTED: gl.constexpr, TAIL: gl.constexpr, SAME: gl.constexpr, HAS_LSE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = desc_q.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    rows_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows_o: gl.constexpr = gl.SliceLayout(1, o_layout)
    tile = gl.num_programs(0) - 1 - gl.program_id(0)  # long tiles first
    batch = gl.program_id(1) // heads
    head = gl.program_id(1) % heads
    kv = head // group
    q_off = batch.to(gl.int64) * stride_qb + head.to(gl.int64) * stride_qh
    k_off = batch.to(gl.int64) * stride_kb + kv.to(gl.int64) * stride_kh
    k_row = (k_off // stride_kn).to(gl.int32)
    if SAME:  # keys and values lie alike, heads as whole rows: fewer numbers to keep in registers
        v_row = k_row
        k_col = 0
        v_col = 0
    else:
        v_off = batch.to(gl.int64) * stride_vb + kv.to(gl.int64) * stride_vh
        v_row = (v_off // stride_vn).to(gl.int32)
        k_col = (k_off % stride_kn).to(gl.int32)
        v_col = (v_off % stride_vn).to(gl.int32)

    q_smem = gl.allocate_shared_memory(dtype, [BM, D], desc_q.layout)
    k_smem = gl.allocate_shared_memory(dtype, [2, BN, D], desc_k.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, BN, D], desc_v.layout)
    q_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_bar, count=1)
    mbarrier.init(bars.index(0), count=1)
    mbarrier.init(bars.index(1), count=1)
    fence_async_shared()

    first = tile * BM + n_k - n_q  # position of the first row
    starts = starts_ptr
    if LISTED:
        listing = head // list_group
        starts = starts_ptr + batch.to(gl.int64) * stride_sb + listing.to(gl.int64) * stride_sh + tile.to(gl.int64) * stride_st
        count = gl.load(counts_ptr + batch * stride_cb + listing * stride_ch + tile) * INNER
    elif CAUSAL:
        count = gl.cdiv(gl.maximum(gl.minimum(first + BM, n_k), 0), BN)
    else:
        count = gl.cdiv(n_k, BN)
    q_row = (q_off // stride_qn).to(gl.int32) + tile * BM
    mbarrier.expect(q_bar, desc_q.block_type.nbytes + desc_k.block_type.nbytes)
    tma.async_copy_global_to_shared(desc_q, [q_row, (q_off % stride_qn).to(gl.int32)], q_bar, q_smem)
    tma.async_copy_global_to_shared(desc_k, [k_row + tile_begin(starts, 0, count, BN, INNER, LISTED), k_col], q_bar, k_smem.index(0))
    fetch(desc_k, desc_v, k_row, k_col, v_row, v_col, bars, k_smem, v_smem, 0, starts, count, BN, INNER, LISTED)
    # the steps at the end of the list that some row doesn't see whole
    whole_until = (gl.minimum(first, n_k - 1) if CAUSAL else n_k - 1) - (BN - 1)
    cut = 0
    at = tile_begin(starts, 0, count, BN, INNER, LISTED)
    while (cut < count) & (at > whole_until):
        cut += 1
        at = tile_begin(starts, cut, count, BN, INNER, LISTED)

    position = first + gl.arange(0, BM, layout=rows_s)
    keys = gl.arange(0, BN, layout=gl.SliceLayout(0, s_layout))
    m = gl.full([BM], float("-inf"), gl.float32, rows_s)
    total = gl.zeros([BM], gl.float32, rows_s)
    o = gl.zeros([BM, D], gl.float32, o_layout)
    zero = gl.zeros([BM, BN], gl.float32, s_layout)
    mbarrier.wait(q_bar, 0)
    for j in range(0, cut):
        begin = tile_begin(starts, j, count, BN, INNER, LISTED)
        s = warpgroup_mma(q_smem, k_smem.index(j % 2).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        p, forget, m, total = weigh(s, m, total, scale, begin, position, keys, n_k, True, CAUSAL)
        o = o * gl.convert_layout(forget, rows_o)[:, None]
        mbarrier.wait(bars.index(j % 2), (j // 2) & 1)
        if TAIL:
            blank_tail(v_smem.index(j % 2), begin, n_k, BN, D, num_warps)
        o = warpgroup_mma(gl.convert_layout(p.to(dtype), p_layout), v_smem.index(j % 2), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=[o])
        gl.thread_barrier()
        fetch(desc_k, desc_v, k_row, k_col, v_row, v_col, bars, k_smem, v_smem, j + 1, starts, count, BN, INNER, LISTED)

    if cut < count:
        s = warpgroup_mma(q_smem, k_smem.index(cut % 2).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        gl.thread_barrier()
        # the keys of step cut + 2 take the place of those of step cut; their values' place has been free for a step
        fetch(desc_k, desc_v, k_row, k_col, v_row, v_col, bars, k_smem, v_smem, cut + 1, starts, count, BN, INNER, LISTED)
        weights, forget, m, total = weigh(s, m, total, scale, 0, position, keys, n_k, False, CAUSAL)
        o = o * gl.convert_layout(forget, rows_o)[:, None]
        p = gl.convert_layout(weights.to(dtype), p_layout)
        for j in range(cut + 1, count):
            mbarrier.wait(bars.index((j - 1) % 2), ((j - 1) // 2) & 1)
            s_next = warpgroup_mma(q_smem, k_smem.index(j % 2).permute((1, 0)), zero, use_acc=False, is_async=True)
            o_next = warpgroup_mma(p, v_smem.index((j - 1) % 2), o, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_next])
            weights, forget, m, total = weigh(s, m, total, scale, 0, position, keys, n_k, False, CAUSAL)
            o = warpgroup_mma_wait(0, deps=[o_next])
            gl.thread_barrier()
            fetch(desc_k, desc_v, k_row, k_col, v_row, v_col, bars, k_smem, v_smem, j + 1, starts, count, BN, INNER, LISTED)
            o = o * gl.convert_layout(forget, rows_o)[:, None]
            p = gl.convert_layout(weights.to(dtype), p_layout)
        last = count - 1
        mbarrier.wait(bars.index(last % 2), (last // 2) & 1)
        o = warpgroup_mma(p, v_smem.index(last % 2), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=[o])
    read = total > 0.0
    scale_back = gl.convert_layout(gl.where(read, 1.0 / gl.where(read, total, 1.0), 0.0), rows_o)
    o = gl.where((scale_back > 0.0)[:, None], o * scale_back[:, None], 0.0)
    begin = (gl.num_programs(0) - 1 - block_index(0)) * BM
    base = block_index(1).to(gl.int64) * n_q  # (batch * heads + head) * n_q
    query = begin + gl.arange(0, BM, layout=rows_o)
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    gl.store(out_ptr + (base + query)[:, None] * D + cols[None, :], o.to(dtype), mask=(query < n_q)[:, None])
    if HAS_LSE:
        lse = gl.where(read, (m + gl.log2(gl.where(read, total, 1.0))) / 1.4426950408889634, float("-inf"))
        query_s = begin + gl.arange(0, BM, layout=rows_s)
        gl.store(lse_ptr + base + query_s, lse, mask=query_s < n_q)


def takes(q: Tensor, k: Tensor, v: Tensor, lists: Lists | None, scale: float) -> bool:
    """Whether this kernel runs the problem: its shapes and strides, on a Hopper GPU. Caps and biases are the caller's to rule out."""
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] != v.shape[-1] or q.shape[-1] not in (64, 128) or scale < 0:
        return False
    if lists is not None:
        tiles = lists.block_q == BLOCK_M and lists.block_k % BLOCK_N == 0 and lists.starts.shape[-1] > 0
        if not tiles or lists.tokens.shape[-1] > 0 or lists.log_weight is not None:
            return False
    return all(rows_layout(x, x.shape[-1]) is not None for x in (q, k, v))


def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists | None, strides: tuple[int, ...], *, causal: bool, scale: float, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Fills out `(B, Hq, Nq, D)` and, unless it is empty, lse `(B, Hq, Nq)`. strides: `list_strides` of the lists."""
    batch, heads, n_q, dim = q.shape
    element = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16

    def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
        layout = rows_layout(x, dim)
        assert layout is not None
        return TensorDescriptor(x, *layout, [rows, dim], gl.NVMMASharedLayout.get_default_for([rows, dim], element))

    list_heads = 1 if lists is None else max(lists.starts.shape[1], lists.tokens.shape[1])
    n_k = k.shape[2]
    hopper_kernel[(ceil_div(n_q, BLOCK_M), batch * heads)](
        descriptor(q, BLOCK_M), descriptor(k, BLOCK_N), descriptor(v, BLOCK_N), out, lse,
        q if lists is None else lists.starts, q if lists is None else lists.start_counts, scale * LOG2E, n_q, n_k,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides[:5], heads, heads // k.shape[1], heads // list_heads,
        BM=BLOCK_M, BN=BLOCK_N, D=dim, INNER=1 if lists is None else lists.block_k // BLOCK_N, CAUSAL=causal,
        LISTED=lists is not None, TAIL=n_k % BLOCK_N != 0 or (lists is not None and not lists.aligned),
        SAME=k.stride() == v.stride() and all(k.stride(i) % k.stride(2) == 0 for i in (0, 1)), HAS_LSE=lse.numel() > 0, num_warps=WARPS,
    )  # fmt: skip
