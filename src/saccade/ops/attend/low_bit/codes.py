"""Rounding to 8 bits and back, in plain torch; the kernels round alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops.attend.low_bit.problem import LowBit

LIMIT = {"int8": 127.0, "fp8": 448.0}  # the largest number of the format
QUERY_ROWS = 32  # queries that share a step
WEIGHT_SCALE = 256.0  # weights, at most 1, are multiplied by it before they are rounded to float8


class Rounded(NamedTuple):
    """What the products are taken of, dequantised. q `(B, Hq, Nq, D)`, k without the mean key, v: float32 (float64 for float64).

    row: q.kbar `(B, Hq, Nq)`, not rounded, or None without smoothing.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    row: Tensor | None


def to_float8(x: Tensor) -> Tensor:
    """x, at most 448 in magnitude, rounded to the nearest float8 e4m3 number; the dtype stays."""
    return x.to(torch.float32).clamp(-LIMIT["fp8"], LIMIT["fp8"]).to(torch.float8_e4m3fn).to(x.dtype)


def rounded(x: Tensor, rows: int, kind: str) -> Tensor:
    """x `(B, H, N, D)`, float32 or float64, rounded: `rows` tokens share the step max|x| / LIMIT."""
    n = x.shape[2]
    blocks = torch.nn.functional.pad(x, (0, 0, 0, -n % rows)).unflatten(2, (-1, rows))
    step = blocks.abs().amax((-1, -2), keepdim=True) / LIMIT[kind]
    codes = blocks / torch.where(step > 0, step, 1.0)
    codes = to_float8(codes) if kind == "fp8" else torch.floor(codes + 0.5).clamp(-127, 127)
    return (codes * step).flatten(2, 3)[:, :, :n]


def rounded_values(v: Tensor, pv: str) -> Tensor:
    """v `(B, H, N, Dv)`, float32 or float64, as the product with the weights sees it."""
    if pv == "fp16":
        return v.to(torch.float16).to(v.dtype)
    if pv == "same" or v.shape[2] == 0:
        return v
    step = v.abs().amax(2, keepdim=True) / LIMIT["fp8"]
    return to_float8(v / torch.where(step > 0, step, 1.0)) * step


def of(case: LowBit) -> Rounded:
    p = case.problem
    exact = torch.float64 if p.q.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(exact) for x in (p.q, p.k, p.v))
    row = None
    if case.smooth and k.shape[2]:
        mean = p.k.mean(2, dtype=exact)
        k = k - mean.unsqueeze(2)
        row = (p.layout.to_groups(q) @ mean[:, :, None, :, None]).squeeze(-1).flatten(1, 2)
    return Rounded(rounded(q, QUERY_ROWS, case.qk), rounded(k, case.block_k, case.qk), rounded_values(v, case.pv), row)
