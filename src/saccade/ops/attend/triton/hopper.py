"""Forward kernel for Hopper GPUs, in Gluon: dense attention, and tiles of 64 keys or multiples read by tiles of 128 queries.

A program stays on its multiprocessor and works through tiles of 128 queries, with three groups of warps:

    producer (1 warp)           brings queries, keys and values by tensor memory access into rings of shared memory
    consumers (2 x 4 warps)     64 query rows each: S_j = Q K_j^T and O += P_(j-1) V_(j-1) in flight together, then softmax of S_j

While one consumer is at its exponentials the other has the tensor cores. A ring slot has a barrier that says "full" (the copy has landed)
and one that says "empty" (both consumers have read it). Keys come last tile first: those that the diagonal or the end of the keys cuts
come first, one at a time. Long query tiles go first, over as many heads as have their keys and values in the L2 cache together.
Queries and keys may be codes of 8 bits, with a step for 32 queries and one for the keys of a step (`attend_low_bit`).
Everything else (caps, biases, single keys, other tiles and devices) is the portable kernel's.
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from saccade.ops.attend.triton.launch import LOG2E, Lists, rows_layout
from saccade.ops.gpu import ceil_div, multiprocessors

BLOCK_M, WARPS = 128, 4
RINGS = ((128, 2), (64, 4))  # keys of a step, slots of a ring: the first that divides the tiles of a selection
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40
CACHED = 36 << 20  # bytes of keys and values that stay in the L2 cache


@gluon.jit
def tile_begin(starts, i, count, BN: gl.constexpr, INNER: gl.constexpr, LISTED: gl.constexpr):
    """First key of the i-th step, counted from the end; any key for a step there isn't."""
    back = gl.maximum(count - 1 - i, 0)
    if LISTED:
        return gl.load(starts + back // INNER) + (back % INNER) * BN
    else:
        return back * BN


@gluon.jit
def work_of(w, sizes, lists, BM: gl.constexpr, BN: gl.constexpr, INNER: gl.constexpr, CAUSAL: gl.constexpr, LISTED: gl.constexpr):
    """(query tile, batch, head, pointer to its key tiles, steps) of work item w; among `together` heads long tiles come first."""
    n_q, n_k, heads, _group, _list_group, tiles, together = sizes
    among = w % (tiles * together)
    tile = tiles - 1 - among // together
    rest = w // (tiles * together) * together + among % together
    batch = rest // heads
    head = rest % heads
    starts, counts, stride_sb, stride_sh, stride_st, stride_cb, stride_ch = lists
    if LISTED:
        listing = head // _list_group
        starts = starts + batch.to(gl.int64) * stride_sb + listing.to(gl.int64) * stride_sh + tile.to(gl.int64) * stride_st
        count = gl.load(counts + batch * stride_cb + listing * stride_ch + tile) * INNER
    elif CAUSAL:
        count = gl.cdiv(gl.maximum(gl.minimum((tile + 1) * BM + n_k - n_q, n_k), 0), BN)
    else:
        count = gl.cdiv(n_k, BN)
    return tile, batch, head, starts, count


@gluon.jit
def produce(
    descs, strides, sizes, lists, work, smem, bars,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, INNER: gl.constexpr, CAUSAL: gl.constexpr, LISTED: gl.constexpr,
):  # fmt: skip
    desc_q, desc_k, desc_v = descs
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn = strides
    q_smem, k_smem, v_smem = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    group = sizes[3]
    step = 0
    for w in range(gl.program_id(0), work, gl.num_programs(0)):
        turn = w // gl.num_programs(0)
        tile, batch, head, starts, count = work_of(w, sizes, lists, BM, BN, INNER, CAUSAL, LISTED)
        kv = head // group
        q_off = batch.to(gl.int64) * stride_qb + head.to(gl.int64) * stride_qh
        k_off = batch.to(gl.int64) * stride_kb + kv.to(gl.int64) * stride_kh
        v_off = batch.to(gl.int64) * stride_vb + kv.to(gl.int64) * stride_vh
        q_row = (q_off // stride_qn).to(gl.int32) + tile * BM
        q_col = (q_off % stride_qn).to(gl.int32)
        k_row = (k_off // stride_kn).to(gl.int32)
        k_col = (k_off % stride_kn).to(gl.int32)
        v_row = (v_off // stride_vn).to(gl.int32)
        v_col = (v_off % stride_vn).to(gl.int32)
        for half in gl.static_range(2):
            mbarrier.wait(q_empty.index(half), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(half), desc_q.block_type.nbytes)
            tma.async_copy_global_to_shared(desc_q, [q_row + half * (BM // 2), q_col], q_full.index(half), q_smem.index(half))
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
def blank_tail(v, begin, n_k, BN: gl.constexpr, D: gl.constexpr):
    """Zeros for the values past the last key, which are other data: their weights are 0, but 0 times a nan there would be nan.

    Both consumers write them; they write the same.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    if begin + BN > n_k:
        rows = begin + gl.arange(0, BN, layout=gl.SliceLayout(1, layout))
        x = v.load(layout)
        v.store(gl.where((rows < n_k)[:, None], x, 0.0))
        fence_async_shared()
        gl.thread_barrier()


@gluon.jit
def weigh(
    s, m, total, scale, step_at, begin, position, keys, n_k, BN: gl.constexpr, MASK: gl.constexpr, CAUSAL: gl.constexpr,
    CODES: gl.constexpr,
):  # fmt: skip
    """The online softmax of one tile of raw products: weights, what the older sums shrink to, and the new maximum and sum."""
    if CODES:
        scale = scale * gl.load(step_at + begin // BN)
        s = s.to(gl.float32)
    if MASK:
        s = s * scale[:, None] if CODES else s * scale
        limit = gl.minimum(position, n_k - 1) if CAUSAL else gl.minimum(position * 0 + n_k, n_k - 1)
        s = gl.where((begin + keys)[None, :] <= limit[:, None], s, float("-inf"))
        top = gl.maximum(m, gl.max(s, 1))
        # a row that has seen no key yet stays at -inf: shifted by 0, its weights are 0
        shift = gl.where(top == float("-inf"), 0.0, top)
        p = gl.exp2(s - shift[:, None])
    else:
        top = gl.maximum(m, gl.max(s, 1) * scale)
        shift = top
        p = gl.exp2((s * scale[:, None] if CODES else s * scale) - shift[:, None])
    forget = gl.exp2(m - shift)
    return p, forget, top, total * forget + gl.sum(p, 1)


@gluon.jit
def consume(
    WHICH: gl.constexpr, out, scale, steps, sizes, lists, work, smem, bars,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, INNER: gl.constexpr, CAUSAL: gl.constexpr,
    LISTED: gl.constexpr, TAIL: gl.constexpr, HAS_LSE: gl.constexpr, CODES: gl.constexpr,
):  # fmt: skip
    q_smem, k_smem, v_smem = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    out_ptr, lse_ptr = out
    n_q, n_k, heads, group = sizes[0], sizes[1], sizes[2], sizes[3]
    dtype: gl.constexpr = v_smem.dtype
    product: gl.constexpr = gl.int32 if q_smem.dtype == gl.int8 else gl.float32
    depth: gl.constexpr = 32 if CODES else 16
    ROWS: gl.constexpr = BM // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, depth])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    rows_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows_o: gl.constexpr = gl.SliceLayout(1, o_layout)
    keys = gl.arange(0, BN, layout=gl.SliceLayout(0, s_layout))
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    zero = gl.zeros([ROWS, BN], product, s_layout)
    q = q_smem.index(WHICH)
    step = 0
    for w in range(gl.program_id(0), work, gl.num_programs(0)):
        turn = w // gl.num_programs(0)
        tile, batch, head, starts, count = work_of(w, sizes, lists, BM, BN, INNER, CAUSAL, LISTED)
        first = tile * BM + WHICH * ROWS + n_k - n_q  # position of the first row
        # the steps at the end of the list that some row doesn't see whole
        whole_until = (gl.minimum(first, n_k - 1) if CAUSAL else n_k - 1) - (BN - 1)
        cut = 0
        at = tile_begin(starts, 0, count, BN, INNER, LISTED)
        while (cut < count) & (at > whole_until):
            cut += 1
            at = tile_begin(starts, cut, count, BN, INNER, LISTED)
        position = first + gl.arange(0, ROWS, layout=rows_s)
        factor = scale
        step_at = lse_ptr
        if CODES:
            q_steps, k_steps, q_count, k_count, query_rows = steps
            row = tile * BM + WHICH * ROWS + gl.arange(0, ROWS, layout=rows_s)
            q_at = q_steps + (batch * heads + head).to(gl.int64) * q_count
            factor = gl.load(q_at + row // query_rows, mask=row < n_q, other=0.0)
            step_at = k_steps + (batch * (heads // group) + head // group).to(gl.int64) * k_count
        m = gl.full([ROWS], float("-inf"), gl.float32, rows_s)
        total = gl.zeros([ROWS], gl.float32, rows_s)
        o = gl.zeros([ROWS, D], gl.float32, o_layout)
        mbarrier.wait(q_full.index(WHICH), turn & 1)
        for j in range(0, cut):
            begin = tile_begin(starts, j, count, BN, INNER, LISTED)
            slot = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(k_full.index(slot), phase)
            s = warpgroup_mma(q, k_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(slot), count=1)
            weights, forget, m, total = weigh(s, m, total, factor, step_at, begin, position, keys, n_k, BN, True, CAUSAL, CODES)
            o = o * gl.convert_layout(forget, rows_o)[:, None]
            mbarrier.wait(v_full.index(slot), phase)
            if TAIL:
                blank_tail(v_smem.index(slot), begin, n_k, BN, D)
            o = warpgroup_mma(gl.convert_layout(weights.to(dtype), p_layout), v_smem.index(slot), o, is_async=True)
            o = warpgroup_mma_wait(0, deps=[o])
            mbarrier.arrive(v_empty.index(slot), count=1)
            step += 1

        if cut < count:
            slot = step % STAGES
            mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
            s = warpgroup_mma(q, k_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(slot), count=1)
            begin = tile_begin(starts, cut, count, BN, INNER, LISTED) if CODES else 0
            weights, forget, m, total = weigh(s, m, total, factor, step_at, begin, position, keys, n_k, BN, False, CAUSAL, CODES)
            o = o * gl.convert_layout(forget, rows_o)[:, None]
            p = gl.convert_layout(weights.to(dtype), p_layout)
            step += 1
            for j in range(cut + 1, count):
                slot = step % STAGES
                before = (step - 1) % STAGES
                mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
                s_next = warpgroup_mma(q, k_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
                o_next = warpgroup_mma(p, v_smem.index(before), o, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s_next])
                mbarrier.arrive(k_empty.index(slot), count=1)
                begin = tile_begin(starts, j, count, BN, INNER, LISTED) if CODES else 0
                weights, forget, m, total = weigh(s, m, total, factor, step_at, begin, position, keys, n_k, BN, False, CAUSAL, CODES)
                o = warpgroup_mma_wait(0, deps=[o_next])
                mbarrier.arrive(v_empty.index(before), count=1)
                o = o * gl.convert_layout(forget, rows_o)[:, None]
                p = gl.convert_layout(weights.to(dtype), p_layout)
                step += 1
            last = (step - 1) % STAGES
            mbarrier.wait(v_full.index(last), ((step - 1) // STAGES) & 1)
            o = warpgroup_mma(p, v_smem.index(last), o, is_async=True)
            o = warpgroup_mma_wait(0, deps=[o])
            mbarrier.arrive(v_empty.index(last), count=1)
        mbarrier.arrive(q_empty.index(WHICH), count=1)
        read = total > 0.0
        scale_back = gl.convert_layout(gl.where(read, 1.0 / gl.where(read, total, 1.0), 0.0), rows_o)
        o = gl.where((scale_back > 0.0)[:, None], o * scale_back[:, None], 0.0)
        base = (batch * heads + head).to(gl.int64) * n_q
        query = tile * BM + WHICH * ROWS + gl.arange(0, ROWS, layout=rows_o)
        gl.store(out_ptr + (base + query)[:, None] * D + cols[None, :], o.to(dtype), mask=(query < n_q)[:, None])
        if HAS_LSE:
            lse = gl.where(read, (m + gl.log2(gl.where(read, total, 1.0))) / 1.4426950408889634, float("-inf"))
            query_s = tile * BM + WHICH * ROWS + gl.arange(0, ROWS, layout=rows_s)
            gl.store(lse_ptr + base + query_s, lse, mask=query_s < n_q)


@gluon.jit
def hopper_kernel(
    desc_q, desc_k, desc_v, out_ptr, lse_ptr, starts_ptr, counts_ptr, q_steps, k_steps, scale, n_q, n_k,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_sb, stride_sh, stride_st, stride_cb, stride_ch, heads, group, list_group, tiles, together, work,
    q_count, k_count, query_rows,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, INNER: gl.constexpr, CAUSAL: gl.constexpr,
    LISTED: gl.constexpr, TAIL: gl.constexpr, HAS_LSE: gl.constexpr, CODES: gl.constexpr,
    MORE: gl.constexpr, FEW: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    q_smem = gl.allocate_shared_memory(desc_q.dtype, [2, BM // 2, D], desc_q.layout)
    k_smem = gl.allocate_shared_memory(desc_q.dtype, [STAGES, BN, D], desc_k.layout)
    v_smem = gl.allocate_shared_memory(desc_v.dtype, [STAGES, BN, D], desc_v.layout)
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
    out = (out_ptr, lse_ptr)
    steps = (q_steps, k_steps, q_count, k_count, query_rows)
    descs = (desc_q, desc_k, desc_v)
    sizes = (n_q, n_k, heads, group, list_group, tiles, together)
    lists = (starts_ptr, counts_ptr, stride_sb, stride_sh, stride_st, stride_cb, stride_ch)
    strides = (stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn)
    smem = (q_smem, k_smem, v_smem)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (consume, (
                0, out, scale, steps, sizes, lists, work, smem, bars, BM, BN, D, STAGES, INNER, CAUSAL, LISTED, TAIL, HAS_LSE, CODES,
            )),
            (consume, (
                1, out, scale, steps, sizes, lists, work, smem, bars, BM, BN, D, STAGES, INNER, CAUSAL, LISTED, TAIL, HAS_LSE, CODES,
            )),
            (produce, (descs, strides, sizes, lists, work, smem, bars, BM, BN, STAGES, INNER, CAUSAL, LISTED)),
        ],
        [4, 1],
        [MORE, FEW],
    )


def takes(q: Tensor, k: Tensor, v: Tensor, lists: Lists | None, scale: float) -> bool:
    """Whether this kernel runs the problem: its shapes and strides, on a Hopper GPU. Caps and biases are the caller's to rule out."""
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] != v.shape[-1] or q.shape[-1] not in (64, 128) or scale < 0:
        return False
    if lists is not None:
        tiles = lists.block_q == BLOCK_M and lists.block_k % RINGS[-1][0] == 0 and lists.starts.shape[-1] > 0
        if not tiles or lists.tokens.shape[-1] > 0 or lists.log_weight is not None:
            return False
    return all(rows_layout(x, x.shape[-1]) is not None for x in (q, k, v))


class Codes(NamedTuple):
    """8-bit queries and keys `(B, H, padded N, D)` contiguous, their steps float32 `(B, H, count)`, keys' for `keys` tokens each.

    The factor on the logits, in powers of two, is part of the queries' steps.
    """

    q: Tensor
    k: Tensor
    q_steps: Tensor
    k_steps: Tensor
    query_rows: int
    keys: int


def takes_codes(v: Tensor, lists: Lists | None, keys: int, dim: int) -> bool:
    """Whether `forward` runs codes of `dim` columns with these values: steps of 128 or 64 keys that are whole tiles."""
    if keys not in (ring[0] for ring in RINGS) or dim != v.shape[-1] or rows_layout(v, dim) is None:
        return False
    if lists is not None and not (lists.aligned and lists.block_k % keys == 0):
        return False
    return takes(v, v, v, lists, 1.0)


ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv}


@functools.cache  # Triton works it out in Python, anew for each descriptor
def _swizzled(rows: int, dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, dim], ELEMENTS[dtype])


def tiles_of(x: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of tiles of `rows` rows of x `(B, H, N, D)`, which `rows_layout` takes."""
    layout, dim = rows_layout(x, x.shape[3]), x.shape[3]
    assert layout is not None
    return TensorDescriptor(x, *layout, [rows, dim], _swizzled(rows, dim, x.dtype))


def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists | None, strides: tuple[int, ...], *, causal: bool, scale: float, out: Tensor, lse: Tensor,
    codes: Codes | None = None,
) -> None:  # fmt: skip
    """Fills out `(B, Hq, Nq, D)` and, unless it is empty, lse `(B, Hq, Nq)`. strides: `list_strides` of the lists.

    With codes q and k give the shapes alone, and `scale` is not used.
    """
    batch, heads, n_q, dim = q.shape
    list_heads = 1 if lists is None else max(lists.starts.shape[1], lists.tokens.shape[1])
    fits = RINGS if lists is None else [ring for ring in RINGS if lists.block_k % ring[0] == 0]
    keys, stages = next(ring for ring in fits if codes is None or ring[0] == codes.keys)
    n_k, tiles = k.shape[2], ceil_div(n_q, BLOCK_M)
    work, group = tiles * batch * heads, heads // k.shape[1]
    read_q, read_k = (q, k) if codes is None else (codes.q, codes.k)
    together = group * cached_together(batch * k.shape[1], n_k * dim * (read_k.element_size() + v.element_size()))
    hopper_kernel[(min(multiprocessors(q), work),)](
        tiles_of(read_q, BLOCK_M // 2), tiles_of(read_k, keys), tiles_of(v, keys), out, lse,
        q if lists is None else lists.starts, q if lists is None else lists.start_counts,
        lse if codes is None else codes.q_steps, lse if codes is None else codes.k_steps, scale * LOG2E, n_q, n_k,
        *read_q.stride()[:3], *read_k.stride()[:3], *v.stride()[:3], *strides[:5], heads, group, heads // list_heads, tiles, together, work,
        0 if codes is None else codes.q_steps.shape[-1], 0 if codes is None else codes.k_steps.shape[-1],
        0 if codes is None else codes.query_rows,
        BM=BLOCK_M, BN=keys, D=dim, STAGES=stages, INNER=1 if lists is None else lists.block_k // keys, CAUSAL=causal,
        LISTED=lists is not None, TAIL=n_k % keys != 0 or (lists is not None and not lists.aligned), HAS_LSE=lse.numel() > 0,
        CODES=codes is not None, MORE=CONSUMER_REGISTERS, FEW=PRODUCER_REGISTERS, num_warps=WARPS,
    )  # fmt: skip


def cached_together(heads: int, size: int) -> int:
    """The most of `heads` key/value heads, a divisor, whose `size` bytes each fit the cache together; at least 1."""
    return max(m for m in range(1, heads + 1) if heads % m == 0 and (m == 1 or m * size <= CACHED))
