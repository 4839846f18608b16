"""The score map reduced over tiles as it is made: maxima of logits (exact, or from int8 products), or sums of probabilities.

A program holds one run of queries and walks over the keys; each product is reduced at once to one value per tile.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.estimate.triton.common import LOG2E, capped, operands, padded_dim, per_head
from saccade.ops.gpu import multiprocessors, next_power_of_two


@triton.jit
def _walk(
    begin, end, queries, k, k_n, k_steps, k_add, out, columns, q_step, q_add, relative, limit, there, tile_there, n_k, dim, scale, cap,
    MASKED: tl.constexpr, TOTAL: tl.constexpr, INT: tl.constexpr, ADD: tl.constexpr, CAP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SUB_Q: tl.constexpr, SUB_K: tl.constexpr, DIM: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Keys [begin, end), a multiple of BN long unless MASKED. out points at the first tile of the run, rows of `columns` values."""
    d = tl.arange(0, DIM)
    tile_q = tl.arange(0, BM // SUB_Q)
    tile_k = tl.arange(0, BN // SUB_K)
    for j0 in range(begin, end, BN):
        j = j0 + tl.arange(0, BN)
        at = k + j.to(tl.int64)[None, :] * k_n + d[:, None]
        if MASKED:
            keys = tl.load(at, mask=(j < n_k)[None, :] & (d < dim)[:, None], other=0)
        elif WHOLE:
            keys = tl.load(at)
        else:
            keys = tl.load(at, mask=(d < dim)[:, None], other=0)
        if INT:
            steps = tl.load(k_steps + j, mask=j < n_k, other=0.0)
            z = tl.dot(queries, keys, out_dtype=tl.int32).to(tl.float32) * steps[None, :]
            if ADD:
                z = z * q_step[:, None] + tl.load(k_add + j, mask=j < n_k, other=0.0)[None, :]
        else:
            z = tl.dot(queries, keys, input_precision="ieee")
        if TOTAL:
            z = z * scale
            if CAP:
                z = capped(z, cap)
            z = tl.exp2(z * LOG2E - relative[:, None])
            if MASKED:
                z = tl.where(j[None, :] < limit[:, None], z, 0.0)
            part = tl.sum(tl.reshape(z, (BM, BN // SUB_K, SUB_K)), axis=2)
            part = tl.where(there[:, None], part, 0.0)
            value = tl.sum(tl.reshape(part, (BM // SUB_Q, SUB_Q, BN // SUB_K)), axis=1)
        else:
            if MASKED:
                z = tl.where(j[None, :] < limit[:, None], z, float("-inf"))
            part = tl.max(tl.reshape(z, (BM, BN // SUB_K, SUB_K)), axis=2)
            # what is the same for a whole row, and what never falls, can wait until its maximum is found
            seen = there[:, None] & (part > float("-inf"))
            part = tl.where(seen, part, 0.0)
            if INT:
                if ADD:
                    part = part + q_add[:, None]
                else:
                    part = part * q_step[:, None]
            part = part * scale
            if CAP:
                part = capped(part, cap)
            part = tl.where(seen, part - relative[:, None], float("-inf"))
            value = tl.max(tl.reshape(part, (BM // SUB_Q, SUB_Q, BN // SUB_K)), axis=1)
        column = j0 // SUB_K + tile_k
        to = out + tile_q.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(to, value, mask=tile_there[:, None] & (column < columns)[None, :])


@triton.jit
def _reduce(
    q, k, relative, q_steps, k_steps, q_add, k_add, out, q_b, q_h, q_n, k_b, k_h, k_n, group, heads, n_q, n_k, dim, rows, columns, offset,
    scale, cap, runs, CAUSAL: tl.constexpr, TOTAL: tl.constexpr, INT: tl.constexpr, ADD: tl.constexpr, RELATIVE: tl.constexpr,
    CAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SUB_Q: tl.constexpr, SUB_K: tl.constexpr, DIM: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    # late rows see the most keys: they begin first
    run = tl.num_programs(0) - 1 - tl.program_id(0)
    pid = tl.program_id(1).to(tl.int64)
    b, head = pid // heads, pid % heads
    kv = head // group
    kv_heads = heads // group
    i0 = run * BM
    i = i0 + tl.arange(0, BM)
    there = i < n_q
    d = tl.arange(0, DIM)
    at = q + b * q_b + head * q_h + i.to(tl.int64)[:, None] * q_n + d[None, :]
    queries = tl.load(at, mask=there[:, None] & (d < dim)[None, :], other=0)

    row = pid * n_q + i
    base = tl.zeros((BM,), tl.float32)
    if RELATIVE:
        base = tl.load(relative + row, mask=there, other=0.0)
        # a row that sees no key has no value to be compared
        base = tl.where(base > float("-inf"), base, 0.0)
        if TOTAL:
            base = base * LOG2E
    step = base
    add = base
    if INT:
        step = tl.load(q_steps + row, mask=there, other=0.0)
        if ADD:
            add = tl.load(q_add + row, mask=there, other=0.0)
    keys = k + b * k_b + kv * k_h
    key_steps = k_steps
    key_add = k_add
    if INT:
        key_steps = k_steps + (b * kv_heads + kv) * n_k
        if ADD:
            key_add = k_add + pid * n_k

    limit = tl.zeros((BM,), tl.int32) + n_k
    whole = n_k
    seen = n_k
    if CAUSAL:
        limit = tl.minimum(i + offset + 1, n_k)
        whole = tl.maximum(tl.minimum(i0 + offset + 1, n_k), 0)
        seen = tl.maximum(tl.minimum(tl.minimum(i0 + BM, n_q) + offset, n_k), 0)
    whole = whole // BN * BN
    # this program's share of the keys, in whole steps
    per = tl.cdiv(tl.cdiv(n_k, BN), runs) * BN
    begin = tl.program_id(2) * per
    end = tl.minimum(begin + per, seen)
    middle = tl.maximum(tl.minimum(end, whole), begin)
    tile = run * (BM // SUB_Q)
    tile_there = tile + tl.arange(0, BM // SUB_Q) < rows
    to = out + (pid * rows + tile) * columns
    _walk(
        begin, middle, queries, keys, k_n, key_steps, key_add, to, columns, step, add, base, limit, there, tile_there, n_k, dim, scale, cap,
        False, TOTAL, INT, ADD, CAP, BM, BN, SUB_Q, SUB_K, DIM, WHOLE,
    )  # fmt: skip
    _walk(
        middle, end, queries, keys, k_n, key_steps, key_add, to, columns, step, add, base, limit, there, tile_there, n_k, dim, scale, cap,
        True, TOTAL, INT, ADD, CAP, BM, BN, SUB_Q, SUB_K, DIM, WHOLE,
    )  # fmt: skip


# products of float32 run on the plain cores, unrolled over the head dim: small steps and many threads keep them in registers
FLOAT32 = {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 1}
FLOAT32_WIDE = FLOAT32 | {"BN": 32}


def config(dim: int, integers: bool, itemsize: int) -> dict[str, int]:
    """Queries and keys of a step. Chosen by what a step holds: 128 rows, 128 keys, fewer where entries are wide."""
    if integers:
        return {"BM": 128, "BN": 64, "num_warps": 4 if dim <= 128 else 8, "num_stages": 3}
    if itemsize == 4:
        return dict(FLOAT32 if dim <= 128 else FLOAT32_WIDE)
    return {"BM": 128, "BN": 128 if dim <= 64 else 64, "num_warps": 8 if dim > 128 else 4, "num_stages": 3 if dim <= 128 else 2}


def launch(
    q: Tensor, k: Tensor, relative: Tensor | None, q_steps: Tensor | None, k_steps: Tensor | None, q_add: Tensor | None,
    k_add: Tensor | None, block_q: int, block_k: int, causal: bool, offset: int, scale: float, cap: float, total: bool,
    config_: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    q, k = operands(q, k)
    b, heads, n_q, dim = q.shape
    kv_heads, n_k = k.shape[1:3]
    integers = q_steps is not None
    width = padded_dim(dim)
    sizes = config(width, integers, q.element_size()) | (config_ or {})
    sizes["BM"] = min(sizes["BM"], max(16, next_power_of_two(n_q)))
    sizes["BN"] = min(sizes["BN"], max(32 if integers else 16, next_power_of_two(n_k)))
    bm, bn = sizes["BM"], sizes["BN"]
    # tiles wider than a step are put together afterwards
    sub_q, sub_k = min(block_q, bm), min(block_k, bn)
    times_q, times_k = block_q // sub_q, block_k // sub_k
    rows, columns = math.ceil(n_q / block_q) * times_q, math.ceil(n_k / block_k) * times_k
    out = torch.full((b, heads, rows, columns), 0.0 if total else -torch.inf, dtype=torch.float32, device=q.device)
    steps = triton.cdiv(n_q, bm)
    runs = max(1, min(triton.cdiv(n_k, 4 * bn), triton.cdiv(4 * multiprocessors(q), steps * b * heads)))
    none = out
    _reduce[(steps, b * heads, runs)](
        q, k, *(none if x is None else x for x in (relative, q_steps, k_steps, q_add, k_add)), out, *per_head(q), *per_head(k),
        heads // kv_heads, heads, n_q, n_k, dim, rows, columns, offset, scale, cap if cap else 1.0, runs, CAUSAL=causal, TOTAL=total,
        INT=integers, ADD=q_add is not None, RELATIVE=relative is not None, CAP=bool(cap), SUB_Q=sub_q, SUB_K=sub_k, DIM=width,
        WHOLE=dim == width, **sizes,
    )  # fmt: skip
    if times_q * times_k == 1:
        return out
    fine = out.view(b, heads, rows // times_q, times_q, columns // times_k, times_k)
    return fine.sum((3, 5)) if total else fine.amax((3, 5))


@torch.library.custom_op("saccade::estimate_tile_reduce", mutates_args=())
def reduce(
    q: Tensor, k: Tensor, relative: Tensor | None, q_steps: Tensor | None, k_steps: Tensor | None, q_add: Tensor | None,
    k_add: Tensor | None, block_q: int, block_k: int, causal: bool, offset: int, scale: float, cap: float, total: bool,
) -> Tensor:  # fmt: skip
    """`(B, Hq, Tq, Tk)` float32: the maximum over each tile of the visible `logit_ij - relative_i`, or with `total` the sum of its exp.

    q, k: values, or int8 with their steps `(B, H, N)` and what smoothing adds to rows and columns, `(B, Hq, N)`. Last axes contiguous,
    everything but q and k contiguous. offset: position of query 0. cap: 0 for none. Blocks are powers of two.
    """
    return launch(q, k, relative, q_steps, k_steps, q_add, k_add, block_q, block_k, causal, offset, scale, cap, total)


@reduce.register_fake
def _(
    q: Tensor, k: Tensor, relative: Tensor | None, q_steps: Tensor | None, k_steps: Tensor | None, q_add: Tensor | None,
    k_add: Tensor | None, block_q: int, block_k: int, causal: bool, offset: int, scale: float, cap: float, total: bool,
) -> Tensor:  # fmt: skip
    tiles = ((q.shape[2] + block_q - 1) // block_q, (k.shape[2] + block_k - 1) // block_k)
    return q.new_empty((*q.shape[:2], *tiles), dtype=torch.float32)
