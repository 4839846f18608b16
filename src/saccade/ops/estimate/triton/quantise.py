"""Queries and keys as small integers with one step per token (or group of tokens), smoothed by their means."""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.estimate.triton.common import empty, padded_dim, per_head
from saccade.ops.gpu import next_power_of_two

LEAST_DIM = 32  # int8 tensor cores multiply 32 columns at a time


@triton.jit
def _quantise(
    x, mean, others, codes, steps, dots, x_b, x_h, x_n, heads, n, dim, count, most,
    MEAN: tl.constexpr, RAW: tl.constexpr, GROUP: tl.constexpr, FLOAT8: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DIM)
    inside = (r < n)[:, None] & (d < dim)[None, :]
    at = x + (pid // heads) * x_b + (pid % heads) * x_h + r.to(tl.int64)[:, None] * x_n + d[None, :]
    raw = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    rows = raw
    if MEAN:
        centre = tl.load(mean + pid * dim + d, mask=d < dim, other=0.0)
        rows = tl.where(inside, raw - centre[None, :], 0.0)
    peak = tl.max(tl.abs(rows), axis=1)
    if GROUP > 1:
        shared = tl.max(tl.reshape(peak, (ROWS // GROUP, GROUP)), axis=1)
        peak = tl.reshape(tl.broadcast_to(shared[:, None], (ROWS // GROUP, GROUP)), (ROWS,))
    step = tl.div_rn(peak, tl.zeros_like(peak) + most)
    safe = tl.where(step > 0, step, 1.0)
    code = tl.floor(tl.div_rn(rows, tl.broadcast_to(safe[:, None], (ROWS, DIM))) + 0.5)
    code = tl.minimum(tl.maximum(code, -most), most)
    # columns past `dim` hold zeros, so the products need no mask
    to = codes + (pid * n + r)[:, None] * DIM + d[None, :]
    if FLOAT8:
        tl.store(to, code.to(tl.float8e4nv), mask=(r < n)[:, None])
    else:
        tl.store(to, code.to(tl.int32).to(tl.int8), mask=(r < n)[:, None])
    tl.store(steps + pid * n + r, step, mask=r < n)
    for o in range(0, count):
        other = tl.load(others + (pid * count + o) * dim + d, mask=d < dim, other=0.0)
        product = tl.sum(raw * other[None, :], axis=1) if RAW else tl.sum(rows * other[None, :], axis=1)
        tl.store(dots + (pid * count + o) * n + r, product, mask=r < n)


class Codes(NamedTuple):
    """q `(B, Hq, Nq, E)`, k `(B, Hk, Nk, E)`: int8 or float8 with steps `(B, H, N)` float32, or values without; what to add to a row,
    q_i.kbar `(B, Hq, Nq)`, and to a column, qbar.(k_j - kbar) `(B, Hq, Nk)`, or None."""

    q: Tensor
    k: Tensor
    q_step: Tensor | None
    k_step: Tensor | None
    q_add: Tensor | None
    k_add: Tensor | None


def multiplies_float8(x: Tensor) -> bool:
    """Whether the device of x multiplies float8 e4m3 numbers, as the interpreter does."""
    if not x.is_cuda:
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (8, 9)


def launch(
    x: Tensor, mean: Tensor | None, others: Tensor | None, raw: bool, bits: int, group: int, float8: bool,
    config_: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    b, h, n, dim = x.shape
    width = padded_dim(dim, LEAST_DIM)
    count = 0 if others is None else others.shape[2]
    codes, steps = empty(x, b, h, n, width, dtype=torch.float8_e4m3fn if float8 else torch.int8), empty(x, b, h, n)
    dots = empty(x, b, h, count, n)
    sizes = {"ROWS": max(group, min(next_power_of_two(n), 8192 // width)), "num_warps": 4} | (config_ or {})
    _quantise[(triton.cdiv(n, sizes["ROWS"]), b * h)](
        x, steps if mean is None else mean, steps if others is None else others, codes, steps, dots, *per_head(x), h, n, dim, count,
        float((1 << (bits - 1)) - 1), MEAN=mean is not None, RAW=raw, GROUP=group, FLOAT8=float8, DIM=width, **sizes,
    )  # fmt: skip
    return codes, steps, dots


@torch.library.custom_op("saccade::estimate_quantise", mutates_args=())
def quantise(
    x: Tensor, mean: Tensor | None, others: Tensor | None, raw: bool, bits: int, group: int, float8: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers of x - mean `(B, H, N, D)`, padded to E columns, their steps, and products with others `(B, H, c, D)`: `(B, H, c, N)`.

    float8: the integers, of 4 bits, are float8 e4m3 numbers, else int8.
    raw: the products are those of x, not of x - mean. mean `(B, H, D)` and others float32, contiguous; x's last axis contiguous.
    """
    return launch(x, mean, others, raw, bits, group, float8)


@quantise.register_fake
def _(
    x: Tensor, mean: Tensor | None, others: Tensor | None, raw: bool, bits: int, group: int, float8: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    b, h, n, dim = x.shape
    count = 0 if others is None else others.shape[2]
    return (
        x.new_empty((b, h, n, padded_dim(dim, LEAST_DIM)), dtype=torch.float8_e4m3fn if float8 else torch.int8),
        x.new_empty((b, h, n), dtype=torch.float32), x.new_empty((b, h, count, n), dtype=torch.float32),
    )  # fmt: skip


def quantise_pair(q: Tensor, k: Tensor, bits: int, group: int, smooth: bool, float8: bool = False) -> Codes:
    """Both sides of the products, with what smoothing adds."""
    if not smooth:
        q_codes, q_step, _ = quantise(q, None, None, False, bits, group, float8)
        k_codes, k_step, _ = quantise(k, None, None, False, bits, group, float8)
        return Codes(q_codes, k_codes, q_step, k_step, None, None)
    heads, kv_heads = q.shape[1], k.shape[1]
    q_mean, k_mean = q.mean(2, dtype=torch.float32), k.mean(2, dtype=torch.float32)
    k_of_q = k_mean.repeat_interleave(heads // kv_heads, dim=1).unsqueeze(2).contiguous()
    q_codes, q_step, q_add = quantise(q, q_mean, k_of_q, True, bits, group, float8)
    k_codes, k_step, k_add = quantise(k, k_mean, q_mean.unflatten(1, (kv_heads, -1)).contiguous(), False, bits, group, float8)
    return Codes(q_codes, k_codes, q_step, k_step, q_add.squeeze(2), k_add.flatten(1, 2))
