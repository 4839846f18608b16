"""Tile maxima of logits estimated from smoothed codes of few bits: what SALE (arXiv 2505.24179) reads its tiles by.

    value of a tile = max_ij (q_step_i k_step_j (a_i . b_j) + k_add_j) + row_i        steps and additions hold the scale of the logits

The products run on 8-bit tensor cores at four times the rate at which a core can touch their results, so what is done per pair decides:
one multiply-add and one maximum. All else waits until less is left. A thread first reduces its own columns; then comes what belongs to a
row; then its rows; and only then its warp, in one instruction. For this the rows are dealt to the warps so that a warp holds whole tiles.

Codes of 4 bits are float8 where the device multiplies float8, so that results need no conversion. That is exact: the codes are whole
numbers up to 7, so sums over up to 256 columns are whole numbers below 2^14. Hopper adds float8 products with 14 significant bits.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.gpu import interpreting, multiprocessors, next_power_of_two

ASSEMBLY = tl.constexpr(torch.version.hip is None and not interpreting())  # the interpreter has none
LEAST_Q, LEAST_K = 16, 8  # rows and columns that the threads of a warp hold side by side


@triton.jit
def _ordered(x):
    """Floats as integers of the same order, and back."""
    return x ^ ((x >> 31) & 0x7FFFFFFF)


@triton.jit
def _third(a, b, c):
    """The maximum of three whole numbers, which is one instruction where the compiler is shown that it can be."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "{ .reg .s32 t; max.s32 t, $1, $2; max.s32 $0, t, $3; }", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    return tl.maximum(tl.maximum(a, b), c)


@triton.jit
def _eights(x, TIMES: tl.constexpr):
    """The maximum over the last axis, of 8 TIMES whole numbers, in an order in which one instruction takes two of them at a time."""
    x = tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2], TIMES, 2, 2, 2))
    left, right = tl.split(x)
    a, b = tl.split(left)
    c, d = tl.split(right)
    a, e = tl.split(a)
    b, f = tl.split(b)
    c, g = tl.split(c)
    d, h = tl.split(d)
    return tl.max(_third(_third(_third(tl.maximum(a, b), c, d), e, f), g, h), axis=3)


@triton.jit
def _walk(
    begin, end, queries, k, k_steps, k_add, out, columns, q_step, row, limit, asked, n_k,
    MASKED: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SUB_Q: tl.constexpr, SUB_K: tl.constexpr,
    DIM: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Keys [begin, end) in whole steps, all of whose keys are there and seen unless MASKED.

    out points at the first tile of the run, rows of `columns` values, of which `asked` are wanted.
    """
    OWN: tl.constexpr = BM // (16 * WARPS)  # pieces of 16 rows that a warp holds
    TILES: tl.constexpr = OWN * 16 // SUB_Q
    ACROSS: tl.constexpr = BN // SUB_K
    d = tl.arange(0, DIM)
    n = tl.arange(0, BN)
    tile_q = tl.arange(0, WARPS * TILES)
    tile_k = tl.arange(0, ACROSS)
    offsets = n[None, :] * DIM + d[:, None]
    to = out + tile_q.to(tl.int64)[:, None] * columns + tile_k[None, :]
    front = k + begin.to(tl.int64) * DIM
    for j0 in range(begin, end, BN):
        j = j0 + n
        at = front + offsets
        front += BN * DIM
        # the small loads come first: they arrive while the products are made
        if MASKED:
            add = tl.load(k_add + j, mask=j < n_k, other=0.0)
            keys = tl.load(at, mask=(j < n_k)[None, :], other=0.0)
        else:
            add = tl.load(k_add + j)
            keys = tl.load(at)
        if GROUP >= 8:
            first = j0 + tl.arange(0, BN // GROUP) * GROUP
            step = tl.load(k_steps + first, mask=first < n_k, other=0.0) if MASKED else tl.load(k_steps + first)
        else:
            step = tl.load(k_steps + j, mask=j < n_k, other=0.0) if MASKED else tl.load(k_steps + j)
        if queries.dtype == tl.int8:
            z = tl.dot(queries, keys, out_dtype=tl.int32).to(tl.float32)
        else:
            z = tl.dot(queries, keys, out_dtype=tl.float32)
        if GROUP >= 8:
            both = q_step[:, None] * step[None, :]
            z = tl.reshape(z, (BM, BN // GROUP, GROUP)) * both[:, :, None] + tl.reshape(add, (1, BN // GROUP, GROUP))
        else:
            z = z * step[None, :] * q_step[:, None] + add[None, :]
        if MASKED:
            z = tl.reshape(z, (BM, BN))
            z = tl.where(j[None, :] < limit[:, None], z, float("-inf"))
        # of 8 columns a thread holds 2: over these and all of its eights in a tile
        z = tl.permute(tl.reshape(z, (BM, ACROSS, SUB_K // 8, 4, 2)), (0, 1, 3, 2, 4))
        z = tl.reshape(z.to(tl.int32, bitcast=True), (BM, ACROSS, 4, SUB_K // 4))
        z = (_eights(z, SUB_K // 32) if SUB_K >= 32 else tl.max(z, axis=3)).to(tl.float32, bitcast=True) + row[:, None, None]
        # of 16 rows it holds 2
        z = tl.max(tl.reshape(z, (TILES, SUB_Q // 16, WARPS, 2, 8, ACROSS, 4)), axis=3)
        z = tl.max(z, axis=1)
        lanes = tl.reshape(tl.permute(z, (1, 0, 3, 2, 4)), (WARPS * TILES, ACROSS, 32))
        # whole numbers have an instruction for the maximum over a warp
        top = tl.max(_ordered(lanes.to(tl.int32, bitcast=True)), axis=2)
        value = _ordered(top).to(tl.float32, bitcast=True)
        first_column = j0 // SUB_K
        tl.store(to + first_column, value, mask=first_column + tile_k[None, :] < asked[:, None])


@triton.jit
def _maxima(
    q, k, q_steps, k_steps, rows_add, k_add, reach, out, group, heads, n_q, n_k, rows, columns, offset, runs,
    CAUSAL: tl.constexpr, REACH: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SUB_Q: tl.constexpr,
    SUB_K: tl.constexpr, TIMES_Q: tl.constexpr, DIM: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    # late rows see the most keys: they begin first
    run = tl.num_programs(0) - 1 - tl.program_id(0)
    pid = tl.program_id(1).to(tl.int64)
    kv = pid // group  # heads of a batch entry are a multiple of the group
    i0 = run * BM
    # row p of the products is row r of piece m of warp w; a warp has its pieces one after another among the queries
    p = tl.arange(0, BM)
    OWN: tl.constexpr = BM // (16 * WARPS)
    i = i0 + (p // 16 % WARPS) * (16 * OWN) + p // (16 * WARPS) * 16 + p % 16
    there = i < n_q
    d = tl.arange(0, DIM)
    queries = tl.load(q + pid * n_q * DIM + i.to(tl.int64)[:, None] * DIM + d[None, :], mask=there[:, None], other=0.0)
    step = tl.load(q_steps + pid * n_q + i, mask=there, other=0.0)
    row = tl.load(rows_add + pid * n_q + i, mask=there, other=float("-inf"))

    keys = k + kv * n_k * DIM
    key_steps = k_steps + kv * n_k
    key_add = k_add + pid * n_k
    TILES: tl.constexpr = BM // SUB_Q
    tile = run * TILES + tl.arange(0, TILES)
    limit = tl.zeros((BM,), tl.int32) + n_k
    asked = tl.where(tile < rows, columns, 0)
    whole = n_k
    seen = n_k
    if CAUSAL:
        # no row sees a key from here on: how often the loop runs must not depend on memory, or ptxas takes its threads to part ways
        seen = tl.maximum(tl.minimum(tl.minimum(i0 + BM, n_q) + offset, n_k), 0)
    if REACH:
        asked = tl.load(reach + tile // TIMES_Q, mask=tile < rows, other=0).to(tl.int32) // SUB_K
    elif CAUSAL:
        limit = tl.minimum(i + offset + 1, n_k)
        whole = tl.maximum(tl.minimum(i0 + offset + 1, n_k), 0)
    whole = whole // BN * BN
    # this program's share of the keys, in whole steps
    per = tl.cdiv(tl.cdiv(n_k, BN), runs) * BN
    begin = tl.program_id(2) * per
    end = tl.minimum(begin + per, seen)
    middle = tl.maximum(tl.minimum(end, whole), begin)
    to = out + (pid * rows + run * TILES) * columns
    _walk(
        begin, middle, queries, keys, key_steps, key_add, to, columns, step, row, limit, asked, n_k,
        False, GROUP, BM, BN, SUB_Q, SUB_K, DIM, WARPS,
    )  # fmt: skip
    _walk(
        middle, end, queries, keys, key_steps, key_add, to, columns, step, row, limit, asked, n_k,
        True, GROUP, BM, BN, SUB_Q, SUB_K, DIM, WARPS,
    )  # fmt: skip


def config(dim: int) -> dict[str, int]:
    """256 queries for four warps, of which each holds a tile of 64; two programs on a multiprocessor: one multiplies, the other reduces."""
    return {"BM": 256, "BN": 64, "num_warps": 4, "num_stages": 4 if dim <= 128 else 2}


def supported(smooth: bool, block_q: int, block_k: int, cap: float) -> bool:
    """Whether the kernel takes the case: smoothed codes, no cap, and tiles that fill the threads of a warp."""
    return smooth and not cap and block_q >= LEAST_Q and block_k >= LEAST_K


def launch(
    q: Tensor, k: Tensor, relative: Tensor | None, q_steps: Tensor, k_steps: Tensor, q_add: Tensor, k_add: Tensor, reach: Tensor | None,
    block_q: int, block_k: int, bits: int, group: int, causal: bool, offset: int, scale: float, config_: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    b, heads, n_q, width = q.shape
    kv_heads, n_k = k.shape[1:3]
    sizes = config(width) | (config_ or {})
    warps = sizes["num_warps"]
    sizes["BM"] = min(sizes["BM"], max(16 * warps, next_power_of_two(n_q)))
    sizes["BN"] = min(sizes["BN"], max(32, next_power_of_two(n_k)))
    # tiles wider than what a warp or a step holds are put together afterwards
    sub_q, sub_k = min(block_q, sizes["BM"] // warps), min(block_k, sizes["BN"])
    times_q, times_k = block_q // sub_q, block_k // sub_k
    rows, columns = math.ceil(n_q / block_q) * times_q, math.ceil(n_k / block_k) * times_k
    out = torch.full((b, heads, rows, columns), -torch.inf, dtype=torch.float32, device=q.device)
    q_steps, k_add = q_steps * scale, k_add * scale
    # no sum of the loop is below -room
    most = float(width * ((1 << (bits - 1)) - 1) ** 2)
    room = q_steps.amax(-1) * k_steps.amax(-1).repeat_interleave(heads // kv_heads, 1) * most + k_add.abs().amax(-1)
    room = (room * 1.001 + 1e-30).unsqueeze(-1)
    # what is the same for a row, in one number; a row that sees no key has no value to be compared
    row = q_add * scale - room
    if relative is not None:
        row = row - relative.masked_fill(relative == -torch.inf, 0.0)
    steps = triton.cdiv(n_q, sizes["BM"])
    runs = max(1, min(triton.cdiv(n_k, 4 * sizes["BN"]), triton.cdiv(4 * multiprocessors(q), steps * b * heads)))
    _maxima[(steps, b * heads, runs)](
        q, k, q_steps, k_steps, row, k_add + room, out if reach is None else reach, out, heads // kv_heads, heads, n_q, n_k, rows,
        columns, offset, runs, CAUSAL=causal, REACH=reach is not None, GROUP=min(group, sub_k), SUB_Q=sub_q, SUB_K=sub_k, TIMES_Q=times_q,
        DIM=width, WARPS=warps, **sizes,
    )  # fmt: skip
    if times_q * times_k == 1:
        return out
    return out.view(b, heads, rows // times_q, times_q, columns // times_k, times_k).amax((3, 5))


@torch.library.custom_op("saccade::estimate_maxima", mutates_args=())
def maxima(
    q: Tensor, k: Tensor, relative: Tensor | None, q_steps: Tensor, k_steps: Tensor, q_add: Tensor, k_add: Tensor, reach: Tensor | None,
    block_q: int, block_k: int, bits: int, group: int, causal: bool, offset: int, scale: float,
) -> Tensor:  # fmt: skip
    """`(B, Hq, Tq, Tk)` float32: the maximum over each tile of the visible `logit_ij - relative_i`, -inf without a pair.

    q, k: codes, int8 or float8, with a step for each token `(B, H, N)`, the same for `group` tokens, and what smoothing adds to rows and
    columns, `(B, Hq, N)`; all contiguous. reach: int64 `(Tq,)`, see `tile_maxima`. offset: position of query 0. Blocks and group are
    powers of two, blocks at least 16 x 8.
    """
    return launch(q, k, relative, q_steps, k_steps, q_add, k_add, reach, block_q, block_k, bits, group, causal, offset, scale)


@maxima.register_fake
def _(
    q: Tensor, k: Tensor, relative: Tensor | None, q_steps: Tensor, k_steps: Tensor, q_add: Tensor, k_add: Tensor, reach: Tensor | None,
    block_q: int, block_k: int, bits: int, group: int, causal: bool, offset: int, scale: float,
) -> Tensor:  # fmt: skip
    tiles = ((q.shape[2] + block_q - 1) // block_q, (k.shape[2] + block_k - 1) // block_k)
    return q.new_empty((*q.shape[:2], *tiles), dtype=torch.float32)
