"""One pass over tokens: mean, maximum, minimum and self-similarity of every block."""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.estimate.triton.common import empty, per_head
from saccade.ops.gpu import next_power_of_two


@triton.jit
def _pool(
    x, shift, mean, high, low, similarity, x_b, x_h, x_n, heads, n, dim, block, units,
    MEAN: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, SIMILARITY: tl.constexpr, SHIFT: tl.constexpr,
    UNITS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1).to(tl.int64)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    d = tl.arange(0, DIM)
    base = x + (pid // heads) * x_b + (pid % heads) * x_h
    total = tl.zeros((UNITS, DIM), tl.float32)
    directions = tl.zeros((UNITS, DIM), tl.float32)
    highest = tl.full((UNITS, DIM), float("-inf"), tl.float32)
    lowest = tl.full((UNITS, DIM), float("inf"), tl.float32)
    moved = tl.zeros((DIM,), tl.float32)
    if SHIFT:
        moved = tl.load(shift + pid * dim + d, mask=d < dim, other=0.0).to(tl.float32)
    for r0 in range(0, block, ROWS):
        r = r0 + tl.arange(0, ROWS)
        token = unit[:, None] * block + r[None, :]
        there = (r < block)[None, :] & (token < n)
        inside = there[:, :, None] & (d < dim)[None, None, :]
        at = base + token.to(tl.int64)[:, :, None] * x_n + d[None, None, :]
        rows = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if SHIFT:
            rows = tl.where(inside, rows - moved[None, None, :], 0.0)
        if MEAN:
            total += tl.sum(rows, axis=1)
        if HIGH:
            highest = tl.maximum(highest, tl.max(tl.where(inside, rows, float("-inf")), axis=1))
        if LOW:
            lowest = tl.minimum(lowest, tl.min(tl.where(inside, rows, float("inf")), axis=1))
        if SIMILARITY:
            length = tl.sqrt(tl.sum(rows * rows, axis=2))
            inverse = tl.where(length > 0, 1.0 / tl.where(length > 0, length, 1.0), 0.0)
            directions += tl.sum(rows * inverse[:, :, None], axis=1)
    size = tl.maximum(tl.minimum(n - unit * block, block), 1).to(tl.float32)
    to = (pid * units + unit)[:, None] * dim + d[None, :]
    keep = (unit < units)[:, None] & (d < dim)[None, :]
    if MEAN:
        tl.store(mean + to, total / size[:, None], mask=keep)
    if HIGH:
        tl.store(high + to, highest.to(high.dtype.element_ty), mask=keep)
    if LOW:
        tl.store(low + to, lowest.to(low.dtype.element_ty), mask=keep)
    if SIMILARITY:
        value = tl.sum(directions * directions, axis=1) / (size * size)
        tl.store(similarity + pid * units + unit, value, mask=unit < units)


def config(block: int, dim: int) -> dict[str, int]:
    """Tokens in flight per program: about 8192 entries, in one block or several small ones."""
    width = max(16, next_power_of_two(dim))
    rows = min(next_power_of_two(block), max(1, 8192 // width))
    return {"UNITS": max(1, min(16, 8192 // (width * rows))), "ROWS": rows, "DIM": width, "num_warps": 4}


def launch(
    x: Tensor, shift: Tensor | None, block: int, mean: bool, high: bool, low: bool, similarity: bool, config_: dict[str, int] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, h, n, dim = x.shape
    units = math.ceil(n / block)

    def out(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return empty(x, *(shape if wanted else (0,)), dtype=dtype)

    found = (
        out(mean, b, h, units, dim), out(high, b, h, units, dim, dtype=x.dtype), out(low, b, h, units, dim, dtype=x.dtype),
        out(similarity, b, h, units),
    )  # fmt: skip
    sizes = config(block, dim) | (config_ or {})
    _pool[(triton.cdiv(units, sizes["UNITS"]), b * h)](
        x, x if shift is None else shift, *found, *per_head(x), h, n, dim, block, units,
        MEAN=mean, HIGH=high, LOW=low, SIMILARITY=similarity, SHIFT=shift is not None, **sizes,
    )  # fmt: skip
    return found


@torch.library.custom_op("saccade::estimate_pool", mutates_args=())
def pool(
    x: Tensor, shift: Tensor | None, block: int, mean: bool, high: bool, low: bool, similarity: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean, high, low `(B, H, T, D)`, similarity `(B, H, T)`), those not asked for empty. x's last axis and shift are contiguous."""
    return launch(x, shift, block, mean, high, low, similarity)


@pool.register_fake
def _(
    x: Tensor, shift: Tensor | None, block: int, mean: bool, high: bool, low: bool, similarity: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, h, n, dim = x.shape
    units = (n + block - 1) // block
    none = (0,)
    return (
        x.new_empty((b, h, units, dim) if mean else none, dtype=torch.float32), x.new_empty((b, h, units, dim) if high else none),
        x.new_empty((b, h, units, dim) if low else none), x.new_empty((b, h, units) if similarity else none, dtype=torch.float32),
    )  # fmt: skip
