"""Keys rebuilt from factors, turned, and attended to, a tile at a time: what is rebuilt never leaves the multiprocessor.

A rank that is no power of two is taken in two pieces, R = R1 + R2 (160 = 128 + 32), so that no padding is multiplied. Both channels of a
rotated pair are held in tiles of their own: products with `first` and `second` basis columns, which turn without being taken apart.
"""
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from saccade.core import Selection
from saccade.ops.decode.low_rank import LowRankKeys
from saccade.ops.decode.triton.launch import Result, by_rows, fixed_size
from saccade.ops.decode.triton.plan import Config, Shape, splits
from saccade.ops.decode.triton.tile import (
    LOG2E,
    SIMULATED,
    logits_of,
    narrow,
    normalised,
    product,
    program,
    rows,
    share,
    soften,
    store,
)
from saccade.ops.gpu import next_power_of_two

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST = 256
MOST = 32768  # basis entries of a head, which stay in shared memory


def config(dtype: torch.dtype, entries: int) -> Config:
    """entries: of a head's basis, padded."""
    if dtype == torch.float32:
        return Config(32, 8, 1, 1)
    return Config(64, 4, 2, 2 if entries <= MOST // 2 else 1)


@triton.jit
def _columns(base, rank, cols, ok, stride_r, RANK: tl.constexpr):
    """Entries `rank` x `cols` of a basis."""
    return tl.load(base + rank[:, None] * stride_r + cols[None, :], mask=(rank < RANK)[:, None] & ok[None, :], other=0.0)


@triton.jit
def _sine_cosine(angle):
    """(sin, cos), the angle first brought near 0, where fast instructions are accurate: 2 pi is taken off in three parts, the first two
    so short that their multiples are exact."""
    turns = tl.floor(angle * 0.15915494309189535 + 0.5)
    angle = (angle - turns * 6.28125) - turns * 0.001934051513671875 - turns * 1.255665914356996e-06
    if SIMULATED:
        sin = tl.sin(angle)
        cos = tl.cos(angle)
    else:
        sin = libdevice.fast_sinf(angle)
        cos = libdevice.fast_cosf(angle)
    return sin, cos


@triton.jit
def _rebuilt(a1, a2, b1, b2, R2: tl.constexpr, PRECISION: tl.constexpr):
    """Factors times basis columns, `(N, columns)` float32."""
    k = product(a1, b1, tl.zeros([a1.shape[0], b1.shape[1]], tl.float32), PRECISION)
    if R2 > 0:
        k = product(a2, b2, k, PRECISION)
    return k


@triton.jit
def _take(
    ids, there, keep, weight, q_first, q_second, q_rest, f1, f2, s1, s2, r1, r2, a_base, v_base, p_base, t_base, u_base, inv_freq,
    top, sums, acc, scale, cap, stride_an, stride_vn, stride_pn, stride_tn, RANK: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr, DV: tl.constexpr, TABLE: tl.constexpr, SOFTCAP: tl.constexpr, WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One tile of keys `ids (N,)`, not read where not `there`; keep `(M or 1, N)`."""
    row = ids.to(tl.int64)
    rank = tl.arange(0, R1)
    pair = tl.arange(0, BLOCK_P)
    columns = tl.arange(0, BLOCK_DV)
    a1 = tl.load(a_base + row[:, None] * stride_an + rank[None, :], mask=there[:, None] & (rank < RANK)[None, :], other=0.0)
    v = tl.load(v_base + row[:, None] * stride_vn + columns[None, :], mask=there[:, None] & (columns < DV)[None, :], other=0.0)
    a2 = a1
    if R2 > 0:
        more = R1 + tl.arange(0, R2)
        a2 = tl.load(a_base + row[:, None] * stride_an + more[None, :], mask=there[:, None] & (more < RANK)[None, :], other=0.0)
    first = _rebuilt(a1, a2, f1, f2, R2, PRECISION)
    second = _rebuilt(a1, a2, s1, s2, R2, PRECISION)
    if TABLE:
        ok = there[:, None] & (pair < PAIRS)[None, :]
        cos = tl.load(t_base + row[:, None] * stride_tn + pair[None, :], mask=ok, other=0.0).to(tl.float32)
        sin = tl.load(u_base + row[:, None] * stride_tn + pair[None, :], mask=ok, other=0.0).to(tl.float32)
    else:
        position = tl.load(p_base + row * stride_pn, mask=there, other=0).to(tl.float32)
        sin, cos = _sine_cosine(position[:, None] * inv_freq[None, :])
    turned = narrow(first * cos - second * sin, q_first.dtype)
    products = product(q_first, tl.trans(turned), tl.zeros([q_first.shape[0], turned.shape[0]], tl.float32), PRECISION)
    turned = narrow(second * cos + first * sin, q_first.dtype)
    products = product(q_second, tl.trans(turned), products, PRECISION)
    if REST > 0:
        rest = narrow(_rebuilt(a1, a2, r1, r2, R2, PRECISION), q_first.dtype)
        products = product(q_rest, tl.trans(rest), products, PRECISION)
    logits = logits_of(products, scale, cap, SOFTCAP)
    if WEIGHTED:
        logits += weight[None, :]
    logits = tl.where(keep, logits, -float("inf"))
    p, fade, top, sums = soften(logits, top, sums)
    return top, sums, product(narrow(p, v.dtype), v, acc * fade[:, None], PRECISION)


@triton.jit(do_not_specialize=["n", "starts", "tokens", "block_k"])
def low_rank(
    q_ptr, a_ptr, b_ptr, v_ptr, p_ptr, f_ptr, t_ptr, u_ptr, out_ptr, lse_ptr,
    start_ptr, start_count_ptr, token_ptr, token_count_ptr, weight_ptr, starts, tokens, block_k, scale, cap, n, m,
    stride_qb, stride_qh, stride_qm, stride_ab, stride_ah, stride_an, stride_bh, stride_br, stride_vb, stride_vh, stride_vn,
    stride_pb, stride_ph, stride_pn, stride_tb, stride_th, stride_tn,
    START_BATCH: tl.constexpr, START_HEADS: tl.constexpr, TOKEN_BATCH: tl.constexpr, TOKEN_HEADS: tl.constexpr, BLOCK_K: tl.constexpr,
    LISTED: tl.constexpr, TILED: tl.constexpr, SINGLE: tl.constexpr, WEIGHTED: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, ROW_BLOCKS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    RANK: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    TABLE: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, PARTIAL: tl.constexpr, WRITE_LSE: tl.constexpr,
    PRECISION: tl.constexpr, QT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid (batch * HEADS * TILES * ROW_BLOCKS, splits); lists as in `listed`, without LISTED all keys."""
    batch, head, tile, block = program(HEADS, TILES, ROW_BLOCKS)
    query_head, query, valid = rows(head, tile, block, m, GROUP, QT, BLOCK_M)
    batch = batch.to(tl.int64)
    kv_head = (head // (HEADS // KV_HEADS)).to(tl.int64)
    pair = tl.arange(0, BLOCK_P)
    in_pairs = pair < PAIRS
    if INTERLEAVED:
        one = pair * 2
        other = one + 1
    else:
        one = pair
        other = pair + PAIRS
    extra = tl.arange(0, BLOCK_E)
    in_rest = extra < REST

    q_row = q_ptr + batch * stride_qb + query_head[:, None].to(tl.int64) * stride_qh + query[:, None] * stride_qm
    q_first = tl.load(q_row + one[None, :], mask=valid[:, None] & in_pairs[None, :], other=0.0)
    q_second = tl.load(q_row + other[None, :], mask=valid[:, None] & in_pairs[None, :], other=0.0)
    b_base = b_ptr + kv_head * stride_bh
    rank = tl.arange(0, R1)
    f1 = _columns(b_base, rank, one, in_pairs, stride_br, RANK)
    s1 = _columns(b_base, rank, other, in_pairs, stride_br, RANK)
    f2 = f1
    s2 = s1
    if R2 > 0:
        more = R1 + tl.arange(0, R2)
        f2 = _columns(b_base, more, one, in_pairs, stride_br, RANK)
        s2 = _columns(b_base, more, other, in_pairs, stride_br, RANK)
    q_rest = q_first
    r1 = f1
    r2 = f1
    if REST > 0:
        q_rest = tl.load(q_row + 2 * PAIRS + extra[None, :], mask=valid[:, None] & in_rest[None, :], other=0.0)
        r1 = _columns(b_base, rank, 2 * PAIRS + extra, in_rest, stride_br, RANK)
        if R2 > 0:
            r2 = _columns(b_base, R1 + tl.arange(0, R2), 2 * PAIRS + extra, in_rest, stride_br, RANK)
    if TABLE:
        inv_freq = tl.zeros([BLOCK_P], tl.float32)
    else:
        inv_freq = tl.load(f_ptr + pair, mask=in_pairs, other=0.0)

    a_base = a_ptr + batch * stride_ab + kv_head * stride_ah
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    p_base = p_ptr + batch * stride_pb + kv_head * stride_ph
    t_base = t_ptr + batch * stride_tb + kv_head * stride_th
    u_base = u_ptr + batch * stride_tb + kv_head * stride_th
    seen = n - m + query + 1
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    size = block_k
    if BLOCK_K > 0:
        size = BLOCK_K
    if TILED or not LISTED:
        at = batch * 0
        count = n
        if LISTED:
            at = ((batch % START_BATCH) * START_HEADS + head // (HEADS // START_HEADS)) * TILES + tile
            count = tl.load(start_count_ptr + at).to(tl.int32) * size
        begin, end = share(count, BLOCK_N)
        for entry in range(begin, end, BLOCK_N):
            ids = entry + tl.arange(0, BLOCK_N)
            there = ids < end
            if LISTED:
                ids = tl.load(start_ptr + at * starts + ids // size, mask=there, other=0) + ids % size
                there = there & (ids < n)
            keep = there[None, :]
            if CAUSAL:
                keep = keep & (ids[None, :] < seen[:, None])
            top, sums, acc = _take(
                ids, there, keep, 0.0, q_first, q_second, q_rest, f1, f2, s1, s2, r1, r2, a_base, v_base, p_base, t_base, u_base,
                inv_freq, top, sums, acc, scale, cap, stride_an, stride_vn, stride_pn, stride_tn, RANK, R1, R2, PAIRS, REST, DV, TABLE,
                SOFTCAP, False, PRECISION, BLOCK_P, BLOCK_DV,
            )  # fmt: skip
    if SINGLE:
        at = ((batch % TOKEN_BATCH) * TOKEN_HEADS + head // (HEADS // TOKEN_HEADS)) * TILES + tile
        count = tl.load(token_count_ptr + at).to(tl.int32)
        begin, end = share(count, BLOCK_N)
        for entry in range(begin, end, BLOCK_N):
            entries = entry + tl.arange(0, BLOCK_N)
            ids = tl.load(token_ptr + at * tokens + entries, mask=entries < end, other=0)
            there = (entries < end) & (ids < n)
            keep = there[None, :]
            if CAUSAL:
                keep = keep & (ids[None, :] < seen[:, None])
            weight = 0.0
            if WEIGHTED:
                weight = tl.load(weight_ptr + at * tokens + entries, mask=there, other=0.0) * LOG2E
            top, sums, acc = _take(
                ids, there, keep, weight, q_first, q_second, q_rest, f1, f2, s1, s2, r1, r2, a_base, v_base, p_base, t_base, u_base,
                inv_freq, top, sums, acc, scale, cap, stride_an, stride_vn, stride_pn, stride_tn, RANK, R1, R2, PAIRS, REST, DV, TABLE,
                SOFTCAP, WEIGHTED, PRECISION, BLOCK_P, BLOCK_DV,
            )  # fmt: skip

    value, lse = normalised(top, sums, acc)
    row = (batch * (HEADS * GROUP) + query_head) * m + query
    store(value, lse, out_ptr, lse_ptr, row, valid, tl.arange(0, BLOCK_DV), DV, PARTIAL, WRITE_LSE)


def unsupported(q: Tensor, keys: LowRankKeys, v: Tensor) -> str | None:
    """Why the kernel can't run on this, or None."""
    if q.dtype not in DTYPES:
        return f"it takes float16, bfloat16 and float32, not {q.dtype}"
    rank, dim = keys.basis.shape[1:]
    if max(rank, dim, v.shape[-1]) > LARGEST or min(rank, v.shape[-1]) < 1:
        return f"it takes ranks and head dims of 1 to {LARGEST}, not {rank}, {dim} and {v.shape[-1]}"
    most = MOST // 2 if q.dtype == torch.float32 else MOST
    entries = _padded_rank(rank) * _padded_dim(dim, keys.turns.pairs if keys.turns else 0)
    if entries > most:
        return f"a head's basis of {rank} x {dim} numbers takes {entries} places, and {most} fit"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, keys.factors, keys.basis, v)):
        return "it has no backward, and gradients are asked for"
    return None


def attend(
    q: Tensor, keys: LowRankKeys, v: Tensor, selection: Selection | None, scale: float, softcap: float | None, want_lse: bool,
    chosen: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse, empty unless asked for). Keys must have turns."""
    t, s = keys.turns, selection
    assert t is not None
    lists = (None,) * 5 + (1, 1, False)
    if s is not None:
        s = s.own_lists()
        lists = (s.starts, s.start_counts, s.tokens, s.token_counts, s.log_weight, s.block_q, s.block_k, s.causal)
    args = (
        q, keys.factors, keys.basis, v, t.positions, t.inv_freq, t.cos, t.sin, t.interleaved, *lists, scale, softcap, want_lse
    )  # fmt: skip
    # a torch operator costs more time than a short decode step
    return torch.ops.saccade.decode_low_rank(*args) if torch.compiler.is_compiling() else launch(*args, chosen)


def launch(
    q: Tensor, factors: Tensor, basis: Tensor, v: Tensor, positions: Tensor | None, inv_freq: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, starts: Tensor | None, start_counts: Tensor | None, tokens: Tensor | None,
    token_counts: Tensor | None, log_weight: Tensor | None, block_q: int, block_k: int, causal: bool, scale: float,
    softcap: float | None, want_lse: bool, chosen: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, factors, basis, v = (by_rows(x) for x in (q, factors, basis, v))
    batch, heads, m, dim = q.shape
    kv_heads, n, value_dim, rank = v.shape[1], v.shape[2], v.shape[3], basis.shape[1]
    table = cos is not None
    if cos is not None and sin is not None:
        if cos.stride() != sin.stride() or cos.stride(-1) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
        pairs, turn_strides = cos.shape[-1], (0, 0, 0, *_strides(cos))
    else:
        assert positions is not None and inv_freq is not None
        pairs, turn_strides = inv_freq.numel(), (*_strides(positions), 0, 0, 0)
    basis_strides = (0 if basis.shape[0] == 1 else basis.stride(0), basis.stride(1))
    listed = starts is not None and tokens is not None
    list_heads, keys = kv_heads, n
    starts_shape, tokens_shape = (1, 1, 1, 0), (1, 1, 1, 0)
    if starts is not None and tokens is not None and start_counts is not None and token_counts is not None:
        list_heads = heads if max(starts.shape[1], tokens.shape[1]) > kv_heads else kv_heads
        keys = max(starts.shape[-1] * block_k, tokens.shape[-1])
        starts_shape, tokens_shape = starts.shape, tokens.shape
        starts, start_counts, tokens, token_counts = (x.contiguous() for x in (starts, start_counts, tokens, token_counts))
        log_weight = None if log_weight is None else log_weight.contiguous()
    block_q = min(block_q, m) if listed else m
    query_tiles = -(-m // block_q) if m else 1
    shape = Shape.of(heads // list_heads, block_q)
    first = _first_piece(rank)
    chosen = chosen or config(q.dtype, _padded_rank(rank) * _padded_dim(dim, pairs))
    programs = batch * list_heads * query_tiles * shape.row_blocks
    result = Result(q, value_dim, splits(programs, keys, q, chosen), want_lse)
    if programs == 0 or value_dim == 0:
        return result.out, result.lse
    none = q  # any tensor where nothing is read
    low_rank[(programs, result.parts)](
        q, factors, basis, v, none if positions is None else positions, none if inv_freq is None else inv_freq,
        none if cos is None else cos, none if sin is None else sin, result.part, result.part_lse,
        none if starts is None else starts, none if start_counts is None else start_counts, none if tokens is None else tokens,
        none if token_counts is None else token_counts, none if log_weight is None else log_weight, starts_shape[-1], tokens_shape[-1],
        block_k, scale, softcap or 1.0, n, m, *q.stride()[:3], *_strides(factors), *basis_strides, *v.stride()[:3], *turn_strides,
        START_BATCH=starts_shape[0], START_HEADS=starts_shape[1], TOKEN_BATCH=tokens_shape[0], TOKEN_HEADS=tokens_shape[1],
        BLOCK_K=fixed_size(block_k), LISTED=listed, TILED=listed and starts_shape[-1] > 0, SINGLE=listed and tokens_shape[-1] > 0,
        WEIGHTED=log_weight is not None, HEADS=list_heads, KV_HEADS=kv_heads, GROUP=shape.group, TILES=query_tiles,
        ROW_BLOCKS=shape.row_blocks, D=dim, DV=value_dim, RANK=rank, R1=first, R2=_padded_rank(rank) - first, PAIRS=pairs,
        REST=dim - 2 * pairs, INTERLEAVED=interleaved, TABLE=table, CAUSAL=causal and m > 1, SOFTCAP=softcap is not None,
        **result.flags(), PRECISION="ieee" if q.dtype == torch.float32 else "tf32", QT=block_q, BLOCK_M=shape.block_m,
        BLOCK_N=chosen.block_n, BLOCK_P=_padded(pairs), BLOCK_E=_padded(dim - 2 * pairs), BLOCK_DV=_padded(value_dim),
        num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    return result.finish()


def _strides(x: Tensor) -> list[int]:
    """Strides of batch, head and token; 0 where one entry serves all."""
    return [0 if x.shape[i] == 1 else x.stride(i) for i in (0, 1)] + [x.stride(2)]


def _padded(n: int) -> int:
    return max(16, next_power_of_two(n))


def _first_piece(rank: int) -> int:
    """The largest power of two in `rank`, or all of it where one more piece would not save anything."""
    whole = _padded(rank)
    half = whole // 2
    return whole if half < 16 or half + _padded(rank - half) >= whole else half


def _padded_rank(rank: int) -> int:
    first = _first_piece(rank)
    return first if first >= rank else first + _padded(rank - first)


def _padded_dim(dim: int, pairs: int) -> int:
    rest = dim - 2 * pairs
    return 2 * _padded(pairs) + (_padded(rest) if rest else 0)


# Annotations of an operator are read by torch, which doesn't take all forms of them.
@torch.library.custom_op("saccade::decode_low_rank", mutates_args=())
def _op(
    q: Tensor, factors: Tensor, basis: Tensor, v: Tensor, positions: Optional[Tensor], inv_freq: Optional[Tensor],  # noqa: UP045
    cos: Optional[Tensor], sin: Optional[Tensor], interleaved: bool, starts: Optional[Tensor],  # noqa: UP045
    start_counts: Optional[Tensor], tokens: Optional[Tensor], token_counts: Optional[Tensor],  # noqa: UP045
    log_weight: Optional[Tensor], block_q: int, block_k: int, causal: bool, scale: float, softcap: Optional[float],  # noqa: UP045
    want_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return launch(
        q, factors, basis, v, positions, inv_freq, cos, sin, interleaved, starts, start_counts, tokens, token_counts, log_weight, block_q,
        block_k, causal, scale, softcap, want_lse,
    )  # fmt: skip


@_op.register_fake
def _(
    q, factors, basis, v, positions, inv_freq, cos, sin, interleaved, starts, start_counts, tokens, token_counts, log_weight, block_q,
    block_k, causal, scale, softcap, want_lse,
):  # fmt: skip
    return q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3] if want_lse else (0,), dtype=torch.float32)
