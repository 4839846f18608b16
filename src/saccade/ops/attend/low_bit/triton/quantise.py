"""Queries, keys and values to 8 bits: one program for each set of tokens that shares a step."""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.attend.low_bit.codes import LIMIT
from saccade.ops.gpu import ceil_div, next_power_of_two

SIMULATED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # the interpreter cuts digits off instead of rounding
LEAST_DIM = 32  # the matrix units multiply 32 columns of 8 bits at a time
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@triton.jit
def to_float8(x):
    """float32 x, at most 448 in magnitude, to the nearest float8 e4m3 number."""
    if SIMULATED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        # below 2^-6 numbers lie 2^-9 apart: adding 1.5 * 2^14 leaves no digits beyond those
        x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, bits.to(tl.float32, bitcast=True))
    return x.to(tl.float8e4nv)


@triton.jit
def _rows(
    x_ptr, mean_ptr, code_ptr, step_ptr, dot_ptr, stride_b, stride_h, stride_n, factor, limit, heads, group, n, padded,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, CENTRE: tl.constexpr, DOT: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BD)
    inside = (rows < n)[:, None] & (cols < D)[None, :]
    at = x_ptr + (pid // heads) * stride_b + (pid % heads) * stride_h + rows.to(tl.int64)[:, None] * stride_n + cols[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if CENTRE or DOT:
        # heads of a group share the mean key
        mean = tl.load(mean_ptr + (pid // group) * D + cols, mask=cols < D, other=0.0)
    if DOT:
        tl.store(dot_ptr + pid * n + rows, tl.sum(x * mean[None, :], 1) * factor, mask=rows < n)
    if CENTRE:
        x = tl.where(inside, x - mean[None, :], 0.0)
    peak = tl.max(tl.max(tl.abs(x), 1), 0)
    step = tl.div_rn(peak, limit)
    codes = tl.div_rn(x, tl.zeros_like(x) + tl.where(step > 0, step, 1.0))
    code_at = code_ptr + (pid * padded + rows)[:, None] * BD + cols[None, :]
    # rows past n and columns past D hold zeros, so the products need no mask for them
    if FLOAT8:
        codes = tl.minimum(tl.maximum(codes, -448.0), 448.0)
        tl.store(code_at, to_float8(codes))
    else:
        codes = tl.minimum(tl.maximum(tl.floor(codes + 0.5), -127.0), 127.0)
        tl.store(code_at, codes.to(tl.int32).to(tl.int8))
    tl.store(step_ptr + pid * (padded // ROWS) + tl.program_id(0), step)


@triton.jit
def _values(
    v_ptr, step_ptr, code_ptr, stride_b, stride_h, stride_n, heads, n, padded,
    DV: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BDV)
    inside = (rows < n)[:, None] & (cols < DV)[None, :]
    at = v_ptr + (pid // heads) * stride_b + (pid % heads) * stride_h + rows.to(tl.int64)[:, None] * stride_n + cols[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(step_ptr + pid * DV + cols, mask=cols < DV, other=0.0)
    x = tl.div_rn(x, tl.zeros_like(x) + tl.where(step > 0, step, 1.0)[None, :])
    codes = to_float8(tl.minimum(tl.maximum(x, -448.0), 448.0))
    # the matrix units read float8 values with the keys of a channel next to each other
    tl.store(code_ptr + (pid * BDV + cols)[:, None] * padded + rows[None, :], tl.trans(codes))


def quantise_rows(
    x: Tensor, mean: Tensor | None, rows: int, kind: str, *, group: int = 1, dot_scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes `(B, H, P, E)` of x `(B, H, N, D)` (last axis contiguous), padded with zeros to whole sets of `rows` tokens and a power of two
    of columns, steps `(B, H, P / rows)` float32, and with dot_scale the products `dot_scale * x.mean` `(B, H, N)` float32.

    mean `(B, H / group, D)` float32: taken off x, unless dot_scale is given.
    """
    batch, heads, n, dim = x.shape
    padded, width = ceil_div(n, rows) * rows, max(LEAST_DIM, next_power_of_two(dim))
    codes = torch.empty((batch, heads, padded, width), dtype=CODES[kind], device=x.device)
    steps = torch.empty((batch, heads, padded // rows), dtype=torch.float32, device=x.device)
    dots = torch.empty((batch, heads, n) if dot_scale is not None else (0,), dtype=torch.float32, device=x.device)
    _rows[(padded // rows, batch * heads)](
        x, steps if mean is None else mean, codes, steps, dots, *x.stride()[:3], float(dot_scale or 0.0), LIMIT[kind], heads, group, n,
        padded, D=dim, BD=width, ROWS=rows, CENTRE=mean is not None and dot_scale is None, DOT=dot_scale is not None,
        FLOAT8=kind == "fp8", num_warps=8 if rows * width > 8192 else 4,
    )  # fmt: skip
    return codes, steps, dots


def quantise_values(v: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Float8 codes `(B, Hk, E, P)` of v `(B, Hk, N, Dv)`, keys last and padded with zeros to whole sets of `rows`, and the step
    `(B, Hk, Dv)` of each channel."""
    batch, heads, n, dim = v.shape
    padded, width = ceil_div(n, rows) * rows, max(LEAST_DIM, next_power_of_two(dim))
    steps = torch.maximum(v.amax(2), -v.amin(2)).float() / LIMIT["fp8"]
    codes = torch.empty((batch, heads, width, padded), dtype=torch.float8_e4m3fn, device=v.device)
    _values[(padded // rows, batch * heads)](
        v, steps, codes, *v.stride()[:3], heads, n, padded, DV=dim, BDV=width, ROWS=rows, num_warps=8 if rows * width > 8192 else 4,
    )  # fmt: skip
    return codes, steps
