"""Forward kernel for Hopper GPUs, in Gluon: dense attention, and tiles of 64 keys or multiples read by tiles of 128 queries.

Four warps hold 128 queries, so that two programs share a multiprocessor. Keys and values come by tensor memory access into rings of
shared memory, last tile first: tiles cut by the diagonal or by the end of the keys come first, one at a time. Of the others, the matrix
units work on the values of one while the exponentials of the next are computed:

    start  S_j = Q K_j^T         start  O += P_(j-1) V_(j-1)         wait S_j, softmax -> P_j         wait O, rescale

What Triton's own pipelining does not do is start the second product before the softmax: it waits for each product where it stands.
Everything else (caps, biases, single keys, other tiles and devices) is the portable kernel's.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from saccade.ops.attend.triton.launch import LOG2E, Lists, rows_layout

BLOCK_M, BLOCK_N, STAGES, WARPS = 128, 64, 2, 4


@gluon.jit
def tile_begin(starts, i, count, BN: gl.constexpr, INNER: gl.constexpr, LISTED: gl.constexpr):
    """First key of the i-th step, counted from the end; any key for a step there isn't."""
    back = gl.maximum(count - 1 - i, 0)
    if LISTED:
        return gl.load(starts + back // INNER) + (back % INNER) * BN
    else:
        return back * BN


@gluon.jit
def fetch(desc, row, col, bars, smem, i, wanted, STAGES: gl.constexpr):
    slot = i % STAGES
    mbarrier.expect(bars.index(slot), desc.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(desc, [row, col], bars.index(slot), smem.index(slot), pred=wanted)


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
def hopper_kernel(
    desc_q, desc_k, desc_v, out_ptr, lse_ptr, starts_ptr, counts_ptr, scale, n_q, n_k,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_sb, stride_sh, stride_st, stride_cb, stride_ch, heads, group, list_group,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, INNER: gl.constexpr, CAUSAL: gl.constexpr,
    LISTED: gl.constexpr, TAIL: gl.constexpr, HAS_LSE: gl.constexpr, num_warps: gl.constexpr,
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
    v_off = batch.to(gl.int64) * stride_vb + kv.to(gl.int64) * stride_vh
    k_row = (k_off // stride_kn).to(gl.int32)
    v_row = (v_off // stride_vn).to(gl.int32)
    k_col = (k_off % stride_kn).to(gl.int32)
    v_col = (v_off % stride_vn).to(gl.int32)

    q_smem = gl.allocate_shared_memory(dtype, [BM, D], desc_q.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, D], desc_k.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, D], desc_v.layout)
    q_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_bar, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_bars.index(i), count=1)
        mbarrier.init(v_bars.index(i), count=1)
    fence_async_shared()
    mbarrier.expect(q_bar, desc_q.block_type.nbytes)
    q_row = (q_off // stride_qn).to(gl.int32) + tile * BM
    tma.async_copy_global_to_shared(desc_q, [q_row, (q_off % stride_qn).to(gl.int32)], q_bar, q_smem)

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
    for i in gl.static_range(STAGES):
        begin = tile_begin(starts, i, count, BN, INNER, LISTED)
        fetch(desc_k, k_row + begin, k_col, k_bars, k_smem, i, i < count, STAGES)
        fetch(desc_v, v_row + begin, v_col, v_bars, v_smem, i, i < count, STAGES)
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
        slot = j % STAGES
        phase = (j // STAGES) & 1
        begin = tile_begin(starts, j, count, BN, INNER, LISTED)
        mbarrier.wait(k_bars.index(slot), phase)
        s = warpgroup_mma(q_smem, k_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        p, forget, m, total = weigh(s, m, total, scale, begin, position, keys, n_k, True, CAUSAL)
        o = o * gl.convert_layout(forget, rows_o)[:, None]
        mbarrier.wait(v_bars.index(slot), phase)
        if TAIL:
            blank_tail(v_smem.index(slot), begin, n_k, BN, D, num_warps)
        o = warpgroup_mma(gl.convert_layout(p.to(dtype), p_layout), v_smem.index(slot), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=[o])
        gl.thread_barrier()
        following = tile_begin(starts, j + STAGES, count, BN, INNER, LISTED)
        fetch(desc_k, k_row + following, k_col, k_bars, k_smem, j + STAGES, j + STAGES < count, STAGES)
        fetch(desc_v, v_row + following, v_col, v_bars, v_smem, j + STAGES, j + STAGES < count, STAGES)

    if cut < count:
        ahead = tile_begin(starts, cut + STAGES, count, BN, INNER, LISTED)
        mbarrier.wait(k_bars.index(cut % STAGES), (cut // STAGES) & 1)
        s = warpgroup_mma(q_smem, k_smem.index(cut % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        gl.thread_barrier()
        fetch(desc_k, k_row + ahead, k_col, k_bars, k_smem, cut + STAGES, cut + STAGES < count, STAGES)
        weights, forget, m, total = weigh(s, m, total, scale, 0, position, keys, n_k, False, CAUSAL)
        o = o * gl.convert_layout(forget, rows_o)[:, None]
        p = gl.convert_layout(weights.to(dtype), p_layout)
        for j in range(cut + 1, count):
            mbarrier.wait(k_bars.index(j % STAGES), (j // STAGES) & 1)
            s_next = warpgroup_mma(q_smem, k_smem.index(j % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_bars.index((j - 1) % STAGES), ((j - 1) // STAGES) & 1)
            o_next = warpgroup_mma(p, v_smem.index((j - 1) % STAGES), o, is_async=True)
            following = tile_begin(starts, j + STAGES, count, BN, INNER, LISTED)
            s = warpgroup_mma_wait(1, deps=[s_next])
            weights, forget, m, total = weigh(s, m, total, scale, 0, position, keys, n_k, False, CAUSAL)
            o = warpgroup_mma_wait(0, deps=[o_next])
            gl.thread_barrier()
            fetch(desc_v, v_row + ahead, v_col, v_bars, v_smem, j - 1 + STAGES, j - 1 + STAGES < count, STAGES)
            fetch(desc_k, k_row + following, k_col, k_bars, k_smem, j + STAGES, j + STAGES < count, STAGES)
            ahead = following
            o = o * gl.convert_layout(forget, rows_o)[:, None]
            p = gl.convert_layout(weights.to(dtype), p_layout)
        last = count - 1
        mbarrier.wait(v_bars.index(last % STAGES), (last // STAGES) & 1)
        o = warpgroup_mma(p, v_smem.index(last % STAGES), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=[o])
    read = total > 0.0
    scale_back = gl.convert_layout(gl.where(read, 1.0 / gl.where(read, total, 1.0), 0.0), rows_o)
    o = gl.where((scale_back > 0.0)[:, None], o * scale_back[:, None], 0.0)
    query = tile * BM + gl.arange(0, BM, layout=rows_o)
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    row = (batch * heads + head).to(gl.int64) * n_q + query
    gl.store(out_ptr + row[:, None] * D + cols[None, :], o.to(dtype), mask=(query < n_q)[:, None])
    if HAS_LSE:
        lse = gl.where(read, (m + gl.log2(gl.where(read, total, 1.0))) / 1.4426950408889634, float("-inf"))
        query_s = tile * BM + gl.arange(0, BM, layout=rows_s)
        gl.store(lse_ptr + (batch * heads + head).to(gl.int64) * n_q + query_s, lse, mask=query_s < n_q)


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
    hopper_kernel[(triton.cdiv(n_q, BLOCK_M), batch * heads)](
        descriptor(q, BLOCK_M), descriptor(k, BLOCK_N), descriptor(v, BLOCK_N), out, lse,
        q if lists is None else lists.starts, q if lists is None else lists.start_counts, scale * LOG2E, n_q, n_k,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides[:5], heads, heads // k.shape[1], heads // list_heads,
        BM=BLOCK_M, BN=BLOCK_N, D=dim, STAGES=STAGES, INNER=1 if lists is None else lists.block_k // BLOCK_N, CAUSAL=causal,
        LISTED=lists is not None, TAIL=n_k % BLOCK_N != 0 or (lists is not None and not lists.aligned),
        HAS_LSE=lse.numel() > 0, num_warps=WARPS,
    )  # fmt: skip
