"""log-sum-exp of rows of the score map: the first of two passes."""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.estimate.triton.common import LN2, LOG2E, capped, empty, operands, padded_dim, per_head
from saccade.ops.gpu import multiprocessors, next_power_of_two


@triton.jit
def _walk(
    begin, end, queries, k, k_n, highest, total, limit, n_k, dim, scale, cap,
    MASKED: tl.constexpr, CAP: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Maximum (base 2) and sum of the rows over keys [begin, end), carried on."""
    d = tl.arange(0, DIM)
    for j0 in range(begin, end, BN):
        j = j0 + tl.arange(0, BN)
        at = k + j.to(tl.int64)[None, :] * k_n + d[:, None]
        if MASKED:
            keys = tl.load(at, mask=(j < n_k)[None, :] & (d < dim)[:, None], other=0.0)
        elif WHOLE:
            keys = tl.load(at)
        else:
            keys = tl.load(at, mask=(d < dim)[:, None], other=0.0)
        z = tl.dot(queries, keys, input_precision="ieee") * scale
        if CAP:
            z = capped(z, cap)
        z = z * LOG2E
        if MASKED:
            z = tl.where(j[None, :] < limit[:, None], z, float("-inf"))
        new = tl.maximum(highest, tl.max(z, axis=1))
        safe = tl.where(new > float("-inf"), new, 0.0)
        total = total * tl.exp2(highest - safe) + tl.sum(tl.exp2(z - safe[:, None]), axis=1)
        highest = new
    return highest, total


@triton.jit
def _lse(
    q, k, positions, out, q_b, q_h, q_n, k_b, k_h, k_n, group, kv_heads, m, n_k, dim, first, scale, cap, runs,
    CAUSAL: tl.constexpr, LISTED: tl.constexpr, CAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1).to(tl.int64)
    b, kv = pid // kv_heads, pid % kv_heads
    # the queries of all heads of the group are rows over the same keys
    x = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM + tl.arange(0, BM)
    there = x < group * m
    head = kv * group + x // m
    i = x % m
    d = tl.arange(0, DIM)
    at = q + b * q_b + head * q_h + i.to(tl.int64) * q_n
    queries = tl.load(at[:, None] + d[None, :], mask=there[:, None] & (d < dim)[None, :], other=0.0)
    limit = tl.zeros((BM,), tl.int32) + n_k
    if CAUSAL:
        position = i + first
        if LISTED:
            position = tl.load(positions + i, mask=there, other=0).to(tl.int32)
        limit = tl.maximum(tl.minimum(position + 1, n_k), 0)
    whole = tl.min(tl.where(there, limit, n_k), axis=0) // BN * BN
    seen = tl.max(tl.where(there, limit, 0), axis=0)
    per = tl.cdiv(tl.cdiv(n_k, BN), runs) * BN
    begin = tl.program_id(2) * per
    end = tl.minimum(begin + per, seen)
    middle = tl.maximum(tl.minimum(end, whole), begin)
    highest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    keys = k + b * k_b + kv * k_h
    highest, total = _walk(
        begin, middle, queries, keys, k_n, highest, total, limit, n_k, dim, scale, cap, False, CAP, BN, DIM, WHOLE
    )
    highest, total = _walk(middle, end, queries, keys, k_n, highest, total, limit, n_k, dim, scale, cap, True, CAP, BN, DIM, WHOLE)
    found = tl.where(total > 0, (highest + tl.log2(tl.where(total > 0, total, 1.0))) * LN2, float("-inf"))
    heads = kv_heads * group
    to = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) // kv_heads * heads + b * heads + head) * m + i
    tl.store(out + to, found, mask=there)


def config(dim: int, itemsize: int) -> dict[str, int]:
    if itemsize == 4:
        return {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 1}
    return {"BM": 128, "BN": 64, "num_warps": 4 if dim <= 128 else 8, "num_stages": 3 if dim <= 128 else 2}


def launch(
    q: Tensor, k: Tensor, positions: Tensor | None, first: int, causal: bool, scale: float, cap: float,
    config_: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    q, k = operands(q, k)
    b, heads, m, dim = q.shape
    kv_heads, n_k = k.shape[1:3]
    group = heads // kv_heads
    width = padded_dim(dim)
    sizes = config(width, q.element_size()) | (config_ or {})
    sizes["BM"] = min(sizes["BM"], max(16, next_power_of_two(group * m)))
    sizes["BN"] = min(sizes["BN"], max(16, next_power_of_two(n_k)))
    steps = triton.cdiv(group * m, sizes["BM"])
    runs = max(1, min(triton.cdiv(n_k, 4 * sizes["BN"]), triton.cdiv(4 * multiprocessors(q), steps * b * kv_heads)))
    out = empty(q, runs, b, heads, m)
    _lse[(steps, b * kv_heads, runs)](
        q, k, out if positions is None else positions, out, *per_head(q), *per_head(k), group, kv_heads, m, n_k, dim, first, scale,
        cap if cap else 1.0, runs, CAUSAL=causal, LISTED=positions is not None, CAP=bool(cap), DIM=width, WHOLE=dim == width, **sizes,
    )  # fmt: skip
    return out.squeeze(0) if runs == 1 else out.logsumexp(0)


@torch.library.custom_op("saccade::estimate_row_lse", mutates_args=())
def row_lse(q: Tensor, k: Tensor, positions: Tensor | None, first: int, causal: bool, scale: float, cap: float) -> Tensor:
    """`(B, Hq, m)` float32, -inf for a row that sees no key. Rows stand at `positions (m,)`, or from `first` on. Last axes contiguous."""
    return launch(q, k, positions, first, causal, scale, cap)


@row_lse.register_fake
def _(q: Tensor, k: Tensor, positions: Tensor | None, first: int, causal: bool, scale: float, cap: float) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)
