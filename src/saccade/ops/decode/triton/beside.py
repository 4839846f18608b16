"""The kernel of `decode_beside`: a program takes the queries of one key/value head."""
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.core import Partial
from saccade.ops.decode.triton.launch import by_rows
from saccade.ops.decode.triton.tile import LN2, narrow, normalised, step
from saccade.ops.gpu import next_power_of_two

BLOCK = 32  # tokens of a step


@triton.jit
def _tile(window, new, place, j, c, w_n, TURNED: tl.constexpr, WIDTH: tl.constexpr):
    """Entries j of a window, the newest from where it comes from: `(j, c)`, or `(c, j)` if TURNED."""
    if TURNED:
        old = tl.load(window + j[None, :] * w_n + c[:, None], mask=(j < place)[None, :] & (c < WIDTH)[:, None], other=0.0)
        own = tl.load(new + c[:, None] + 0 * j[None, :], mask=(j == place)[None, :] & (c < WIDTH)[:, None], other=0.0)
    else:
        old = tl.load(window + j[:, None] * w_n + c[None, :], mask=(j < place)[:, None] & (c < WIDTH)[None, :], other=0.0)
        own = tl.load(new + c[None, :] + 0 * j[:, None], mask=(j == place)[:, None] & (c < WIDTH)[None, :], other=0.0)
    return tl.where((j == place)[None, :] if TURNED else (j == place)[:, None], own, old)


@triton.jit
def _beside(
    q, k, v, keys, values, place_ptr, others, others_lse, out, scale, cap, q_b, q_h, k_b, k_h, v_b, v_h, keys_b, keys_h, keys_n, values_b,
    values_h, values_n, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, OTHERS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // KV_HEADS, pid % KV_HEADS
    place = tl.load(place_ptr)
    k, v = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    keys, values = keys + b * keys_b + h * keys_h, values + b * values_b + h * values_h
    r, d, c = tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    head = h * GROUP + r
    rows = b * KV_HEADS * GROUP + head
    own = tl.load(q + b * q_b + head[:, None] * q_h + d[None, :], mask=(r < GROUP)[:, None] & (d < D)[None, :], other=0.0)
    m = tl.full([ROWS], -float("inf"), tl.float32)
    sums = tl.zeros([ROWS, BLOCK_N], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    if OTHERS:
        # attention over the others is a sum of weights that is 1 at its log-sum-exp
        m = tl.load(others_lse + rows, mask=r < GROUP, other=-float("inf")).to(tl.float32) / LN2
        first = (tl.arange(0, BLOCK_N) == 0)[None, :] & (m > -float("inf"))[:, None]
        sums = tl.where(first, 1.0, 0.0)
        acc = tl.load(others + rows[:, None] * DV + c[None, :], mask=(r < GROUP)[:, None] & (c < DV)[None, :], other=0.0).to(tl.float32)
        acc = tl.where((m > -float("inf"))[:, None], acc, 0.0)
    for begin in range(0, place + 1, BLOCK_N):
        j = begin + tl.arange(0, BLOCK_N)
        key = _tile(keys, k, place, j, d, keys_n, True, D)
        value = _tile(values, v, place, j, c, values_n, False, DV)
        m, sums, acc = step(own, key, value, (j <= place)[None, :], 0.0, m, sums, acc, scale, cap, SOFTCAP, False, PRECISION)
    tl.store(keys + place * keys_n + d, tl.load(k + d, mask=d < D), mask=d < D)
    tl.store(values + place * values_n + c, tl.load(v + c, mask=c < DV), mask=c < DV)
    value, _ = normalised(m, sums, acc)
    tl.store(out + rows[:, None] * DV + c[None, :], narrow(value, out.dtype.element_ty), mask=(r < GROUP)[:, None] & (c < DV)[None, :])


def beside(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, place: Tensor, others: Partial | None, scale: float, softcap: float
) -> Tensor:
    """See `saccade.ops.decode.beside.decode_beside`; softcap 0: none."""
    if keys.stride(3) != 1 or values.stride(3) != 1:
        raise ValueError("decode_beside: the channels of keys and values must be side by side in memory")
    q, k, v = by_rows(q), by_rows(k), by_rows(v)
    (batch, heads, _, dim), kv_heads, width = q.shape, keys.shape[1], values.shape[3]
    out = torch.empty(batch, heads, 1, width, dtype=q.dtype, device=q.device)
    found = None if others is None else (others.out.contiguous(), others.lse)
    lse = out if found is None or found[1] is None else found[1].contiguous()
    if out.numel():
        _beside[(batch * kv_heads,)](
            q, k, v, keys, values, place, out if found is None else found[0], lse, out, scale, softcap or 1.0, q.stride(0), q.stride(1),
            *k.stride()[:2], *v.stride()[:2], *keys.stride()[:3], *values.stride()[:3], KV_HEADS=kv_heads, GROUP=heads // kv_heads, D=dim,
            DV=width, ROWS=max(16, next_power_of_two(heads // kv_heads)), BLOCK_N=BLOCK, BLOCK_D=max(16, next_power_of_two(dim)),
            BLOCK_DV=max(16, next_power_of_two(width)), OTHERS=others is not None, SOFTCAP=softcap > 0,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=4,
        )  # fmt: skip
    return out
