"""Column and diagonal sums of softmax rows: the second of two passes.

A program holds one run of keys for all heads of a group, multiplies it with the rows 64 at a time, and adds up probabilities as they come.
Diagonals: in a step of keys j0 ... j0 + BN - 1 and rows i, slot t takes the entry of row i at key `(t + i) mod BN`. Those that did not
wrap lie on one diagonal, offset `p0 - (j0 + t)` with p0 the position of row 0; those that did lie on the one BN further. Each step
writes both sums of its slots, and the two parts of a diagonal, from neighbouring steps, meet afterwards. No atomics: sums are the same
in every run.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.estimate.triton.common import LOG2E, capped, empty, operands, padded_dim, per_head
from saccade.ops.gpu import next_power_of_two


@triton.jit
def _columns(
    q, k, lse, positions, out, parts, q_b, q_h, q_n, k_b, k_h, k_n, group, kv_heads, m, n_k, dim, first, scale, cap, runs, wide,
    CAUSAL: tl.constexpr, LISTED: tl.constexpr, DIAGONALS: tl.constexpr, CAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1).to(tl.int64)
    b, kv = pid // kv_heads, pid % kv_heads
    j0 = tl.program_id(0) * BN
    j = j0 + tl.arange(0, BN)
    d = tl.arange(0, DIM)
    at = k + b * k_b + kv * k_h + j.to(tl.int64)[:, None] * k_n + d[None, :]
    keys = tl.load(at, mask=(j < n_k)[:, None] & (d < dim)[None, :], other=0.0)
    heads = kv_heads * group
    slot = tl.arange(0, BN)
    local = tl.arange(0, BM)
    turned = slot[:, None] + local[None, :]
    wrapped = turned >= BN
    source = tl.where(wrapped, turned - BN, turned)
    for g in range(0, group):
        head = kv * group + g
        column = tl.zeros((BN,), tl.float32)
        for r in range(0, runs):
            i = r * BM + local
            there = i < m
            rows = q + b * q_b + head * q_h + i.to(tl.int64)[None, :] * q_n + d[:, None]
            queries = tl.load(rows, mask=there[None, :] & (d < dim)[:, None], other=0.0)
            base = tl.load(lse + (b * heads + head) * m + i, mask=there, other=float("-inf"))
            # a row that sees no key, or that is not there, has no probabilities
            base = tl.where(base > float("-inf"), base * LOG2E, float("inf"))
            limit = tl.zeros((BM,), tl.int32) + n_k
            if CAUSAL:
                position = i + first
                if LISTED:
                    position = tl.load(positions + i, mask=there, other=0).to(tl.int32)
                limit = tl.minimum(position + 1, n_k)
            z = tl.dot(keys, queries, input_precision="ieee") * scale
            if CAP:
                z = capped(z, cap)
            p = tl.exp2(z * LOG2E - base[None, :])
            p = tl.where(j[:, None] < limit[None, :], p, 0.0)
            column += tl.sum(p, axis=1)
            if DIAGONALS:
                sheared = tl.gather(p, source, axis=0)
                near = tl.sum(tl.where(wrapped, 0.0, sheared), axis=1)
                far = tl.sum(tl.where(wrapped, sheared, 0.0), axis=1)
                to = ((b * heads + head) * runs + r) * 2 * wide + j
                tl.store(parts + to, near)
                tl.store(parts + to + wide, far)
        tl.store(out + (b * heads + head) * n_k + j, column, mask=j < n_k)


@triton.jit
def _diagonals(parts, out, n_k, first, runs, wide, BM: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Offset o of run r is slot `first + r BM - o` of what did not wrap, and slot `... + STEP` of what did."""
    pid = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for r in range(0, runs):
        slot = first + r * BM - o
        at = parts + (pid * runs + r) * 2 * wide
        total += tl.load(at + slot, mask=(slot >= 0) & (slot < wide) & (o < n_k), other=0.0)
        slot = slot + STEP
        total += tl.load(at + wide + slot, mask=(slot >= 0) & (slot < wide) & (o < n_k), other=0.0)
    tl.store(out + pid * n_k + o, total, mask=o < n_k)


BM = 64  # rows at a time; the diagonal parts are kept once per so many rows


def config(dim: int, itemsize: int, diagonals: bool) -> dict[str, int]:
    """BN must be at least BM."""
    if itemsize == 4:
        return {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 1}
    return {"BM": BM, "BN": 64 if diagonals or dim > 128 else 128, "num_warps": 8 if dim > 128 else 4, "num_stages": 2}


def launch_columns(
    q: Tensor, k: Tensor, lse: Tensor, positions: Tensor | None, first: int, causal: bool, scale: float, cap: float, diagonals: bool,
    config_: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, dict[str, int]]:  # fmt: skip
    q, k = operands(q, k)
    b, heads, m, dim = q.shape
    kv_heads, n_k = k.shape[1:3]
    width = padded_dim(dim)
    sizes = config(width, q.element_size(), diagonals) | (config_ or {})
    sizes["BM"] = min(sizes["BM"], max(16, next_power_of_two(m)))
    steps, runs = triton.cdiv(n_k, sizes["BN"]), triton.cdiv(m, sizes["BM"])
    wide = steps * sizes["BN"]
    out = empty(q, b, heads, n_k)
    parts = empty(q, b, heads, runs, 2, wide) if diagonals else empty(q, 0)
    _columns[(steps, b * kv_heads)](
        q, k, lse, lse if positions is None else positions, out, parts, *per_head(q), *per_head(k), heads // kv_heads, kv_heads, m,
        n_k, dim, first, scale, cap if cap else 1.0, runs, wide, CAUSAL=causal, LISTED=positions is not None, DIAGONALS=diagonals,
        CAP=bool(cap), DIM=width, **sizes,
    )  # fmt: skip
    return out, parts, sizes


def launch_diagonals(parts: Tensor, first: int, n_k: int, block_rows: int, step: int) -> Tensor:
    b, heads, runs, _, wide = parts.shape
    out = empty(parts, b, heads, n_k)
    _diagonals[(triton.cdiv(n_k, 1024), b * heads)](parts, out, n_k, first, runs, wide, BM=block_rows, STEP=step, BLOCK=1024, num_warps=4)
    return out


@torch.library.custom_op("saccade::estimate_row_sums", mutates_args=())
def row_sums(
    q: Tensor, k: Tensor, lse: Tensor, positions: Tensor | None, first: int, causal: bool, scale: float, cap: float, diagonals: bool
) -> tuple[Tensor, Tensor]:
    """(columns, diagonals or empty) `(B, Hq, Nk)` float32 of rows q `(B, Hq, m, D)` with their lse `(B, Hq, m)`. Last axes contiguous."""
    columns, parts, sizes = launch_columns(q, k, lse, positions, first, causal, scale, cap, diagonals)
    return columns, launch_diagonals(parts, first, k.shape[2], sizes["BM"], sizes["BN"]) if diagonals else parts


@row_sums.register_fake
def _(
    q: Tensor, k: Tensor, lse: Tensor, positions: Tensor | None, first: int, causal: bool, scale: float, cap: float, diagonals: bool
) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:2], k.shape[2])
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape if diagonals else (0,), dtype=torch.float32)
