"""One query per head times many stored rows: a tile of rows is read once for all query heads of its group.

Two halves of the same dtype multiply without error in float32, so the matrix units take them as they are; a float32 query is split in
three terms.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.estimate.triton.common import empty
from saccade.ops.gpu import ceil_div, interpreting, next_power_of_two

LEAST = 16  # rows and channels of the smallest product
BLOCK_N, BLOCK_E = 128, 64


@triton.jit
def _products(
    q, rows, out, q_b, q_h, q_e, r_b, r_h, r_n, r_e, kv_heads, group, n, dim, PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr, SAME: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1).to(tl.int64)
    b, h = pid // kv_heads, pid % kv_heads
    j = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    g, e = tl.arange(0, PADDED), tl.arange(0, BLOCK_E)
    own = q + b * q_b + (h * group + g)[:, None] * q_h
    stored = rows + b * r_b + h * r_h + j[None, :] * r_n
    sums = tl.zeros((PADDED, BLOCK_N), tl.float32)
    for first in range(0, dim, BLOCK_E):
        c = first + e
        x = tl.load(own + c[None, :] * q_e, mask=(g < group)[:, None] & (c < dim)[None, :], other=0.0)
        y = tl.load(stored + c[:, None] * r_e, mask=(j < n)[None, :] & (c < dim)[:, None], other=0.0)
        if not SAME:
            x, y = x.to(tl.float32), y.to(tl.float32)
        sums = tl.dot(x, y, sums, input_precision=PRECISION)
    to = out + ((b * kv_heads + h) * group + g)[:, None] * n + j[None, :]
    tl.store(to, sums, mask=(g < group)[:, None] & (j < n)[None, :])


def launch(q: Tensor, rows: Tensor) -> Tensor:
    batch, kv_heads, n, dim = rows.shape
    group = q.shape[1] // kv_heads
    out = empty(q, batch, q.shape[1], n)
    # the interpreter holds bfloat16 as bits that it can't multiply
    same = q.dtype == rows.dtype and not interpreting()
    _products[(ceil_div(n, BLOCK_N), batch * kv_heads)](
        q, rows, out, *q.stride(), *rows.stride(), kv_heads, group, n, dim, PADDED=max(LEAST, next_power_of_two(group)),
        BLOCK_N=BLOCK_N, BLOCK_E=min(BLOCK_E, max(LEAST, next_power_of_two(dim))), SAME=same,
        PRECISION="ieee" if same or interpreting() else "tf32x3", num_warps=4,
    )  # fmt: skip
    return out


@torch.library.custom_op("saccade::row_products", mutates_args=())
def products(q: Tensor, rows: Tensor) -> Tensor:
    """float32 `(B, Hq, n)` of q `(B, Hq, E)` and half-precision rows `(B, Hk, n, E)`."""
    return launch(q, rows)


@products.register_fake
def _(q: Tensor, rows: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:2], rows.shape[2]), dtype=torch.float32)
