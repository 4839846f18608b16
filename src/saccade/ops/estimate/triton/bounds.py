"""Upper bounds of q.k over pages from their channel-wise range, and pages that grow."""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.estimate.triton.common import empty, operands, padded_dim, per_head
from saccade.ops.gpu import next_power_of_two


@triton.jit
def _bound(queries, lows, highs):
    """(rows, pages) from queries (rows, D) and bounds (D, pages): a positive entry takes the maximum, a negative one the minimum."""
    zero = tl.zeros_like(queries)
    up = tl.where(queries > 0, queries, zero)
    down = tl.where(queries < 0, queries, zero)
    found = tl.dot(up, highs, input_precision="ieee")
    return tl.dot(down, lows, found, input_precision="ieee")


@triton.jit
def _rows(
    q, low, high, out, q_b, q_h, q_n, l_b, l_h, l_n, u_b, u_h, u_n, group, kv_heads, n_q, pages, dim,
    BM: tl.constexpr, BP: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1).to(tl.int64)
    b, kv = pid // kv_heads, pid % kv_heads
    # the queries of all heads of the group are rows over the same pages
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    there = m < group * n_q
    head = kv * group + m // n_q
    i = (m % n_q).to(tl.int64)
    page = tl.program_id(0) * BP + tl.arange(0, BP)
    d = tl.arange(0, DIM)
    at = q + b * q_b + head * q_h + i * q_n
    queries = tl.load(at[:, None] + d[None, :], mask=there[:, None] & (d < dim)[None, :], other=0.0)
    inside = (page < pages)[None, :] & (d < dim)[:, None]
    p = page.to(tl.int64)[None, :]
    highs = tl.load(high + b * u_b + kv * u_h + p * u_n + d[:, None], mask=inside, other=0.0)
    lows = tl.load(low + b * l_b + kv * l_h + p * l_n + d[:, None], mask=inside, other=0.0)
    found = _bound(queries, lows, highs)
    to = ((b * kv_heads * group + head) * n_q + i) * pages
    tl.store(out + to[:, None] + page[None, :], found, mask=there[:, None] & (page < pages)[None, :])


@triton.jit
def _tiles(
    q, low, high, out, q_b, q_h, q_n, l_b, l_h, l_n, u_b, u_h, u_n, group, heads, n_q, pages, dim, block, page_size, tiles, offset,
    CAUSAL: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1).to(tl.int64)
    b, head = pid // heads, pid % heads
    kv = head // group
    tile = tl.program_id(2)
    page = tl.program_id(0) * BP + tl.arange(0, BP)
    d = tl.arange(0, DIM)
    last = tl.minimum(tile * block + block, n_q)
    ends = last
    if CAUSAL:
        # nothing to do where the first page is not visible
        ends = tl.where(tl.program_id(0) * BP * page_size < last + offset, last, 0)
    inside = (page < pages)[None, :] & (d < dim)[:, None]
    p = page.to(tl.int64)[None, :]
    highs = tl.load(high + b * u_b + kv * u_h + p * u_n + d[:, None], mask=inside, other=0.0)
    lows = tl.load(low + b * l_b + kv * l_h + p * l_n + d[:, None], mask=inside, other=0.0)
    best = tl.full((BP,), float("-inf"), tl.float32)
    for i0 in range(tile * block, ends, BM):
        i = i0 + tl.arange(0, BM)
        at = q + b * q_b + head * q_h + i.to(tl.int64) * q_n
        queries = tl.load(at[:, None] + d[None, :], mask=(i < last)[:, None] & (d < dim)[None, :], other=0.0)
        found = tl.where((i < last)[:, None], _bound(queries, lows, highs), float("-inf"))
        best = tl.maximum(best, tl.max(found, axis=0))
    if CAUSAL:
        best = tl.where(page * page_size < last + offset, best, float("-inf"))
    tl.store(out + (pid * tiles + tile) * pages + page, best, mask=page < pages)


@triton.jit
def _extend(
    low, high, keys, seen, l_b, l_h, l_n, u_b, u_h, u_n, k_b, k_h, k_n, heads, m, dim, page, pages,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1).to(tl.int64)
    b, h = pid // heads, pid % heads
    before = tl.load(seen).to(tl.int64)
    at = before // page + tl.program_id(0)
    d = tl.arange(0, DIM)
    # tokens of this page among the new ones
    begin = tl.maximum(at * page - before, 0)
    end = tl.minimum((at + 1) * page - before, m)
    highest = tl.full((DIM,), float("-inf"), tl.float32)
    lowest = tl.full((DIM,), float("inf"), tl.float32)
    to_high = high + b * u_b + h * u_h + at * u_n + d
    to_low = low + b * l_b + h * l_h + at * l_n + d
    begun = (d < dim) & (at * page < before) & (at < pages)
    highest = tl.maximum(highest, tl.load(to_high, mask=begun, other=float("-inf")).to(tl.float32))
    lowest = tl.minimum(lowest, tl.load(to_low, mask=begun, other=float("inf")).to(tl.float32))
    for r0 in range(0, page, ROWS):
        r = begin + r0 + tl.arange(0, ROWS)
        inside = (r < end)[:, None] & (d < dim)[None, :]
        where = keys + b * k_b + h * k_h + r[:, None] * k_n + d[None, :]
        rows = tl.load(where, mask=inside, other=0.0).to(tl.float32)
        highest = tl.maximum(highest, tl.max(tl.where(inside, rows, float("-inf")), axis=0))
        lowest = tl.minimum(lowest, tl.min(tl.where(inside, rows, float("inf")), axis=0))
    keep = (d < dim) & (begin < end) & (at < pages)
    tl.store(to_high, highest.to(high.dtype.element_ty), mask=keep)
    tl.store(to_low, lowest.to(low.dtype.element_ty), mask=keep)


def config(rows: int, dim: int, itemsize: int) -> dict[str, int]:
    """Rows and pages of a program."""
    width = padded_dim(dim)
    if itemsize == 4:
        return {"BM": 16, "BP": 32, "DIM": width, "num_warps": 4}
    return {"BM": max(16, min(64, next_power_of_two(rows))), "BP": 64 if width <= 128 else 32, "DIM": width, "num_warps": 4}


def launch_rows(q: Tensor, low: Tensor, high: Tensor, config_: dict[str, int] | None = None) -> Tensor:
    q, low, high = operands(q, low, high)
    b, heads, n_q, dim = q.shape
    kv_heads, pages = low.shape[1:3]
    group = heads // kv_heads
    out = empty(q, b, heads, n_q, pages)
    sizes = config(group * n_q, dim, q.element_size()) | (config_ or {})
    grid = (triton.cdiv(pages, sizes["BP"]), b * kv_heads, triton.cdiv(group * n_q, sizes["BM"]))
    _rows[grid](q, low, high, out, *per_head(q), *per_head(low), *per_head(high), group, kv_heads, n_q, pages, dim, **sizes)
    return out


def launch_tiles(
    q: Tensor, low: Tensor, high: Tensor, block: int, page: int, n_k: int, causal: bool, config_: dict[str, int] | None = None
) -> Tensor:
    q, low, high = operands(q, low, high)
    b, heads, n_q, dim = q.shape
    pages, count = low.shape[2], math.ceil(n_q / block)
    out = empty(q, b, heads, count, pages)
    sizes = config(block, dim, q.element_size()) | (config_ or {})
    _tiles[(triton.cdiv(pages, sizes["BP"]), b * heads, count)](
        q, low, high, out, *per_head(q), *per_head(low), *per_head(high), heads // low.shape[1], heads, n_q, pages, dim, block, page, count,
        n_k - n_q, CAUSAL=causal, **sizes,
    )  # fmt: skip
    return out


@torch.library.custom_op("saccade::estimate_page_bounds", mutates_args=())
def rows(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`(B, Hq, Nq, P)` float32; last axes contiguous."""
    return launch_rows(q, low, high)


@rows.register_fake
def _(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:3], low.shape[2]), dtype=torch.float32)


@torch.library.custom_op("saccade::estimate_page_bounds_tiles", mutates_args=())
def tiles(q: Tensor, low: Tensor, high: Tensor, block: int, page: int, n_k: int, causal: bool) -> Tensor:
    """`(B, Hq, Tq, P)` float32, the maximum over each tile of `block` queries; last axes contiguous."""
    return launch_tiles(q, low, high, block, page, n_k, causal)


@tiles.register_fake
def _(q: Tensor, low: Tensor, high: Tensor, block: int, page: int, n_k: int, causal: bool) -> Tensor:
    return q.new_empty((*q.shape[:2], (q.shape[2] + block - 1) // block, low.shape[2]), dtype=torch.float32)


@torch.library.custom_op("saccade::estimate_extend_pages", mutates_args=("low", "high"))
def extend(low: Tensor, high: Tensor, keys: Tensor, seen: Tensor, page: int) -> None:
    """In place; `seen` is one integer on the device."""
    b, h, m, dim = keys.shape
    width = max(16, next_power_of_two(dim))
    # the new tokens begin anywhere in a page, so they may touch one page more than they fill
    _extend[(triton.cdiv(m, page) + 1, b * h)](
        low, high, keys, seen, *per_head(low), *per_head(high), *per_head(keys), h, m, dim, page, low.shape[2],
        ROWS=min(next_power_of_two(page), max(1, 4096 // width)), DIM=width, num_warps=4,
    )  # fmt: skip


@extend.register_fake
def _(low: Tensor, high: Tensor, keys: Tensor, seen: Tensor, page: int) -> None:
    return None
