"""Softmax attention that also gathers how the values move with the keys, in one streamed pass.

    p_ij = softmax_j(scale q_i.k_j),    t_ij = r_i.k_j
    mean_i = sum_j p_ij v_j,    slope_i = sum_j p_ij t_ij,    product_i = sum_j p_ij t_ij v_j
    Cov_p(v, k) r_i = product_i - slope_i mean_i

The four sums (the denominator is the fourth) share the running maximum of flash attention; tiles of queries and keys are computed again
for the gradient, so memory grows with N and not with N^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saccade.parts.linear.window import NEVER

QUERIES, KEYS = 128, 256  # of a tile


def moments(
    q: Tensor, k: Tensor, v: Tensor, r: Tensor, own: Tensor, places: Tensor, *, scale: float | None = None, window: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean `(B, Hq, N, Dv)`, slope `(B, Hq, N, 1)`, product `(B, Hq, N, Dv)`) as above, in float32 at least.

    q, r `(B, Hq, N, D)` at places own `(B, N)` int; k `(B, Hk, M, D)`, v `(B, Hk, M, Dv)`, Hk dividing Hq, at places `(B or 1, M)` int,
    NEVER where there is no token. A query reads keys at places up to its own, and with a window no further back than `window - 1`.
    scale: default `D ** -0.5`. A query that reads nothing gets 0. Differentiable once.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    q, r = (x.to(wide).unflatten(1, (k.shape[1], groups)) for x in (q, r))
    places = places.expand(q.shape[0], -1)
    mean, slope, product = _Moments.apply(
        q, k.to(wide), v.to(wide), r, own, places, q.shape[-1] ** -0.5 if scale is None else scale, window
    )  # pyright: ignore[reportGeneralTypeIssues]
    return mean.flatten(1, 2), slope.flatten(1, 2), product.flatten(1, 2)


def covariance(
    q: Tensor, k: Tensor, v: Tensor, r: Tensor, own: Tensor, places: Tensor, *, scale: float | None = None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """(mean, Cov_p(v, k) r), both `(B, Hq, N, Dv)`; arguments as in `moments`."""
    mean, slope, product = moments(q, k, v, r, own, places, scale=scale, window=window)
    return mean, product - slope * mean


def _tiles(own: Tensor, places: Tensor, window: int | None) -> Iterator[tuple[slice, list[tuple[slice, Tensor]]]]:
    """For each tile of queries, the tiles of keys that some of them see, with masks `(B, 1, 1, queries, keys)`."""
    seen = places.masked_fill(places == NEVER, -1)
    parts = [slice(j, min(j + KEYS, places.shape[1])) for j in range(0, places.shape[1], KEYS)]
    ends = [(int(places[:, part].amin()), int(seen[:, part].amax())) for part in parts]
    for i in range(0, own.shape[1], QUERIES):
        rows = slice(i, min(i + QUERIES, own.shape[1]))
        at = own[:, rows, None]
        first, last = int(at.amin()), int(at.amax())
        wanted = []
        for part, (low, high) in zip(parts, ends, strict=True):
            if low > last or (window is not None and high <= first - window):
                continue
            there = places[:, None, part]
            mask = there <= at
            if window is not None:
                mask = mask & (there > at - window)
            wanted.append((part, mask[:, None, None]))
        yield rows, wanted


class _Moments(torch.autograd.Function):
    """q, r `(B, Hk, G, N, D)`, k, v `(B, Hk, M, ...)`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, r: Tensor, own: Tensor, places: Tensor, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, product = (q.new_zeros(*q.shape[:-1], v.shape[-1]) for _ in range(2))
        slope, lse = (q.new_zeros(*q.shape[:-1], 1) for _ in range(2))
        for rows, parts in _tiles(own, places, window):
            top = q.new_full((*q[:, :, :, rows].shape[:-1], 1), float("-inf"))
            total, first = torch.zeros_like(top), torch.zeros_like(top)
            plain, crossed = torch.zeros_like(mean[:, :, :, rows]), torch.zeros_like(mean[:, :, :, rows])
            for part, mask in parts:
                s, t = _scores(q, k, rows, part) * scale, _scores(r, k, rows, part)
                s = s.masked_fill(~mask, float("-inf"))
                new = torch.maximum(top, s.amax(-1, keepdim=True))
                level = new.masked_fill(new == float("-inf"), 0.0)
                rest, e = (top - level).exp(), (s - level).exp()
                et = e * t
                total, first = rest * total + e.sum(-1, keepdim=True), rest * first + et.sum(-1, keepdim=True)
                plain, crossed = rest * plain + _read(e, v, part), rest * crossed + _read(et, v, part)
                top = new
            safe = total.masked_fill(total == 0, 1.0)
            mean[:, :, :, rows], slope[:, :, :, rows], product[:, :, :, rows] = plain / safe, first / safe, crossed / safe
            lse[:, :, :, rows] = top.masked_fill(total == 0, 0.0) + safe.log()
        ctx.save_for_backward(q, k, v, r, own, places, lse, mean, slope, product)
        ctx.scale, ctx.window = scale, window
        return mean, slope, product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, r, own, places, lse, mean, slope, product = ctx.saved_tensors
        g_mean, g_slope, g_product = grads
        dq, dk, dv, dr = (torch.zeros_like(x) for x in (q, k, v, r))
        # what a weight's gradient is on average over its row, which the softmax takes off
        level = (g_mean * mean).sum(-1, keepdim=True) + g_slope * slope + (g_product * product).sum(-1, keepdim=True)
        for rows, parts in _tiles(own, places, ctx.window):
            at = (slice(None), slice(None), slice(None), rows)
            for part, mask in parts:
                t = _scores(r, k, rows, part)
                p = (_scores(q, k, rows, part) * ctx.scale - lse[at]).masked_fill(~mask, float("-inf")).exp()
                by_t = g_slope[at] + _scores(g_product, v, rows, part)
                ds = p * (_scores(g_mean, v, rows, part) + t * by_t - level[at]) * ctx.scale
                dt = p * by_t
                dq[at] += _read(ds, k, part)
                dr[at] += _read(dt, k, part)
                dk[:, :, part] += _back(ds, q[at]) + _back(dt, r[at])
                dv[:, :, part] += _back(p, g_mean[at]) + _back(p * t, g_product[at])
        return dq, dk, dv, dr, None, None, None, None


def _scores(x: Tensor, y: Tensor, rows: slice, part: slice) -> Tensor:
    """`(B, Hk, G, queries, keys)` of x `(B, Hk, G, N, C)` and y `(B, Hk, M, C)`."""
    x = x[:, :, :, rows]
    return (x.flatten(2, 3) @ y[:, :, part].mT).unflatten(2, x.shape[2:4])


def _read(weights: Tensor, x: Tensor, part: slice) -> Tensor:
    return (weights.flatten(2, 3) @ x[:, :, part]).unflatten(2, weights.shape[2:4])


def _back(weights: Tensor, x: Tensor) -> Tensor:
    """The sum over queries and groups: `(B, Hk, keys, C)`."""
    return weights.flatten(2, 3).mT @ x.flatten(2, 3)
