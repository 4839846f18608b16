"""One query per head times many stored rows: a tile of rows is read once for all query heads of its group.

Two halves of the same dtype multiply without error in float32, so the matrix units take them as they are. A float32 query is the sum of
three terms that they take too; a tile of queries has rows to spare for them. Where the heads of a group are reduced to one score, only
that one is written.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.estimate.groups import rows_of
from saccade.ops.estimate.triton.common import empty
from saccade.ops.gpu import ceil_div, interpreting, next_power_of_two

LEAST = 16  # rows and channels of the smallest product
BLOCK_N, BLOCK_E = 128, 64  # rows and channels of a tile; where rows are short, as many more as fill TILE
TILE, MOST = 8192, 512
TERMS = 4  # rows of a tile for each head of a float32 query: three terms, and zeros
WIDEST = 32  # rows of a tile whose left operand may be computed, not loaded
SIGNIFICANT = {torch.bfloat16: -(1 << 16), torch.float16: -(1 << 13)}  # bits of a term: of bfloat16, or of tf32, which holds a float16


@triton.jit
def _higher(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def over_group(scores, there, REDUCE: tl.constexpr):
    """Scores (heads, tokens) reduced to one a token: their sum over the heads that are `there`, or the highest, nan where one is nan.

    The other rows of a "group_max" have to repeat a head's scores.
    """
    if REDUCE == "group_sum":
        one = tl.sum(tl.where(there[:, None], scores, 0.0), axis=0)
    else:
        one = tl.reduce(scores, 0, _higher)
    return one


@triton.jit
def _short(x, KEPT: tl.constexpr):
    """The leading bits of a float32: a number that the matrix units take without rounding."""
    return (x.to(tl.int32, bitcast=True) & KEPT).to(tl.float32, bitcast=True)


@triton.jit
def _add_piece(
    sums, own, stored, first, term, q_e, r_e, DIM: tl.constexpr, BLOCK_E: tl.constexpr, TERMS: tl.constexpr, KEPT: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums plus the products over channels `first` to `first + BLOCK_E`."""
    c = first + tl.arange(0, BLOCK_E)
    if DIM % BLOCK_E == 0:
        x, y = tl.load(own + c[None, :] * q_e), tl.load(stored + c[:, None] * r_e)
    else:
        x = tl.load(own + c[None, :] * q_e, mask=(c < DIM)[None, :], other=0.0)
        y = tl.load(stored + c[:, None] * r_e, mask=(c < DIM)[:, None], other=0.0)
    if TERMS > 1:
        x = x.to(tl.float32)
        high = _short(x, KEPT)
        middle = _short(x - high, KEPT)
        low = x - high - middle
        x = tl.where(term == 0, high, tl.where(term == 1, middle, tl.where(term == 2, low, 0.0)))
    if WIDE:
        x, y = x.to(tl.float32), y.to(tl.float32)
    else:
        x = x.to(y.dtype)
    return tl.dot(x, y, sums, input_precision=PRECISION)


@triton.jit(do_not_specialize_on_alignment=["n"])
def _products(
    q, rows, out, q_b, q_h, q_e, r_b, r_h, r_n, r_e, kv_heads, group, n, DIM: tl.constexpr, TERMS: tl.constexpr, HEADS: tl.constexpr,
    KEPT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1).to(tl.int64)
    b, h = pid // kv_heads, pid % kv_heads
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    j, m = tl.arange(0, BLOCK_N), tl.arange(0, TERMS * HEADS)
    left = (n - start).to(tl.int32)
    # rows past the group repeat its last head, columns past the end the last row: nothing is masked but what is written
    own = q + b * q_b + (h * group + tl.minimum(m % HEADS, group - 1))[:, None] * q_h
    stored = rows + b * r_b + h * r_h + start * r_n + (tl.minimum(j, left - 1) * r_n)[None, :]
    term = (m // HEADS)[:, None]
    sums = tl.zeros((TERMS * HEADS, BLOCK_N), tl.float32)
    if DIM <= BLOCK_E:
        sums = _add_piece(sums, own, stored, 0, term, q_e, r_e, DIM, BLOCK_E, TERMS, KEPT, WIDE, PRECISION)
    else:
        for first in range(0, DIM, BLOCK_E):
            sums = _add_piece(sums, own, stored, first, term, q_e, r_e, DIM, BLOCK_E, TERMS, KEPT, WIDE, PRECISION)
    if TERMS > 1:
        # a row that holds an infinity: the first term says what becomes of it, the others would cancel it
        sums = tl.where((term > 0) & ~(tl.abs(sums) < float("inf")), 0.0, sums)
        sums = tl.sum(tl.reshape(sums, (TERMS, HEADS, BLOCK_N)), axis=0)
    g = tl.arange(0, HEADS)
    if REDUCE == "none":
        to = out + ((b * kv_heads + h) * group + g)[:, None] * n + (start + j)[None, :]
        tl.store(to, sums, mask=(g < group)[:, None] & (j < left)[None, :])
    else:
        tl.store(out + (b * kv_heads + h) * n + start + j, over_group(sums, g < group, REDUCE), mask=j < left)


def launch(q: Tensor, rows: Tensor, reduce: str = "none", block: int | None = None) -> Tensor:
    """block: rows of a program, a power of two of at least 16."""
    batch, kv_heads, n, dim = rows.shape
    group = q.shape[1] // kv_heads
    out = empty(q, batch, rows_of(q.shape[1], kv_heads, reduce), n)
    channels, heads = min(BLOCK_E, max(LEAST, next_power_of_two(dim))), next_power_of_two(group)
    same, bfloat16 = q.dtype == rows.dtype, rows.dtype == torch.bfloat16
    terms = 1 if same or TERMS * heads > WIDEST else TERMS
    # the interpreter holds bfloat16 as bits that it can't multiply
    wide = interpreting() or not (same or (terms > 1 and bfloat16))
    precision = "ieee" if interpreting() or not wide else "tf32" if terms > 1 else "tf32x3"
    block = block or min(MOST, max(BLOCK_N, TILE // channels))
    _products[(ceil_div(n, block), batch * kv_heads)](
        q, rows, out, *q.stride(), *rows.stride(), kv_heads, group, n, DIM=dim, TERMS=terms, HEADS=max(LEAST // terms, heads),
        KEPT=SIGNIFICANT[rows.dtype], WIDE=wide, PRECISION=precision, BLOCK_N=block, BLOCK_E=channels, REDUCE=reduce, num_warps=4,
    )  # fmt: skip
    return out


@torch.library.custom_op("saccade::row_products", mutates_args=())
def products(q: Tensor, rows: Tensor, reduce: str) -> Tensor:
    """float32 `(B, Hq, n)`, or `(B, Hk, n)` with a reduction, of q `(B, Hq, E)` and half-precision rows `(B, Hk, n, E)`."""
    return launch(q, rows, reduce)


@products.register_fake
def _(q: Tensor, rows: Tensor, reduce: str) -> Tensor:
    return q.new_empty((q.shape[0], rows_of(q.shape[1], rows.shape[1], reduce), rows.shape[2]), dtype=torch.float32)
