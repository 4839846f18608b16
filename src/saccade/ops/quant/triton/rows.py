"""Rows made codes and packed in one go."""
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.gpu import ceil_div, next_power_of_two
from saccade.ops.quant.triton.common import to_bfloat16

TILE = 2048  # values a program works on, unless one row has more


# rows of a growing cache or of one new token: the kernel is not compiled for each number of them
@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["x_b", "x_h", "x_n"])
def _quantise_rows(
    x, columns, codes, ranges, x_b, x_h, x_n, x_e, heads, n, DIM: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr,
    PICKED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = 8 // BITS
    MOST: tl.constexpr = 2**BITS - 1
    pid = tl.program_id(1).to(tl.int64)
    r, c, byte = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH * PER), tl.arange(0, WIDTH)
    at = c.to(tl.int64)
    if PICKED:
        at = tl.load(columns + (pid % heads) * DIM + c, mask=c < DIM, other=0)
    inside = (r < n)[:, None] & (c < DIM)[None, :]
    row = x + (pid // heads) * x_b + (pid % heads) * x_h + r.to(tl.int64) * x_n
    value = tl.load(row[:, None] + at[None, :] * x_e, mask=inside, other=0.0).to(tl.float32)
    lost = tl.max((value != value).to(tl.int32), axis=1) > 0
    low = tl.min(tl.where(inside, value, float("inf")), axis=1)
    high = tl.max(tl.where(inside, value, float("-inf")), axis=1)
    low, high = tl.where(lost, float("nan"), low), tl.where(lost, float("nan"), high)
    low, high = tl.where(r < n, low, 0.0), tl.where(r < n, high, 0.0)
    apart = high - low
    # a comparison keeps what is not a number, a maximum would not
    step = tl.div_rn(tl.where(apart < 0, 0.0, apart), tl.zeros_like(apart) + MOST)
    if ranges.dtype.element_ty == tl.bfloat16:
        step = to_bfloat16(step)
    scale = step.to(ranges.dtype.element_ty)
    step = scale.to(tl.float32)
    safe = tl.where(step > 0, step, 1.0)
    code = tl.div_rn(value - low[:, None], tl.broadcast_to(safe[:, None], (ROWS, WIDTH * PER)))
    code = tl.where(code == code, tl.minimum(tl.maximum(code, 0.0), MOST), 0.0)
    # adding and taking away 1.5 * 2^23 leaves the nearest whole number, the even one of two
    code = (code + 12582912.0) - 12582912.0
    # where the step is 0 no value is as much as half away from the lowest: code 0, without asking
    whole = tl.where(inside, code, 0.0).to(tl.int32)
    lanes = tl.reshape(whole << ((c % PER) * BITS)[None, :], (ROWS, WIDTH, PER))
    packed = tl.sum(lanes, axis=2)
    line = pid * n + r
    tl.store(codes + line[:, None] * BYTES + byte[None, :], packed.to(tl.uint8), mask=(r < n)[:, None] & (byte < BYTES)[None, :])
    tl.store(ranges + line * 2, scale, mask=r < n)
    tl.store(ranges + line * 2 + 1, low.to(ranges.dtype.element_ty), mask=r < n)


def quantise_rows(x: Tensor, bits: int, columns: Tensor | None, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Packed codes and ranges of rows x `(B, H, n, D)`, of their `columns (H, d)` int64 only; rows: of a program, a power of two."""
    batch, heads, n, dim = x.shape
    picked = columns is not None
    dim = columns.shape[1] if columns is not None else dim
    count = ceil_div(dim * bits, 8)
    codes = torch.empty((batch, heads, n, count), dtype=torch.uint8, device=x.device)
    ranges = torch.empty((batch, heads, n, 2), dtype=x.dtype, device=x.device)
    if codes.numel():
        width = next_power_of_two(count)
        rows = rows or min(next_power_of_two(n), max(1, TILE * bits // (8 * width)))
        _quantise_rows[(ceil_div(n, rows), batch * heads)](
            x, columns.contiguous() if columns is not None else x, codes, ranges, *x.stride(), heads, n, DIM=dim, BYTES=count, BITS=bits,
            PICKED=picked, ROWS=rows, WIDTH=width, num_warps=4 if rows * width * 8 // bits >= 512 else 1,
        )  # fmt: skip
    return codes, ranges
