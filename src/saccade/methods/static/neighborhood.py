"""Neighbourhood attention for images, video and sequences: a function and modules. Each token attends to a box of tokens around it.

Windows shift inward at borders, so that every token reads equally many keys; a zero-padded sliding window is another operator.
Sources: gna, arXiv 2504.16922 (strides), fna, arXiv 2403.04690 (stride 1, dilation, causal axes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from saccade.core import Selection, check_attention_inputs
from saccade.ops import attend
from saccade.ops.attend import Impl
from saccade.parts.static.causal import causal_attention
from saccade.parts.static.gridattend import grid_attention, tiles_for
from saccade.parts.static.neighborhood import Neighborhood

PerAxis = int | Sequence[int]


def neighborhood_attention(
    q: Tensor, k: Tensor, v: Tensor, *, grid: PerAxis, window: int | Sequence[int | None] | None, stride: PerAxis = 1,
    dilation: PerAxis = 1, causal: bool | Sequence[bool] = False, extra: int = 0, extra_side: Literal["first", "last"] = "last",
    scale: float | None = None, tile: PerAxis | None = None, key_tile: PerAxis | None = None, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Attention of q `(B, Hq, N + extra, D)` over k `(B, Hk, N + extra, D)`, v `(B, Hk, N + extra, Dv)`: `(B, Hq, N + extra, Dv)`.

    grid: extents of 1 to 3 axes with N tokens in all, the last axis running fastest. window: keys read along each axis (None: the
    whole axis). stride: queries that share a window, 1 ... window. dilation: distance of neighbours; window * dilation is at most the
    extent. causal: axes along which a window ends at its query. extra: tokens off the grid (text), at the `extra_side` of q, k and v:
    every token reads them, and they read everything. tile, key_tile: coordinates of a query or key tile along each axis (default: what
    suits the device; key_tile 1: keys are read one by one); they change speed, never the result. impl: see `saccade.ops.attend`.

    One number stands for all axes. Differentiable. Raises ValueError on shapes and sizes that don't fit.
    """
    check_attention_inputs(q, k, v)
    hood = Neighborhood.of(grid, window, stride, dilation, causal)
    if extra < 0 or extra_side not in ("first", "last"):
        raise ValueError(f"extra={extra}, extra_side={extra_side!r}: expected a number of tokens and 'first' or 'last'")
    wanted = hood.tokens + extra
    if q.shape[2] != wanted or k.shape[2] != wanted:
        raise ValueError(
            f"a grid {hood.grid} and {extra} extra tokens make {wanted} tokens, q has {q.shape[2]} and k has {k.shape[2]}: "
            "flatten the grid row by row"
        )
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if extra and extra_side == "first":
        q, k, v = (torch.cat([x[:, :, extra:], x[:, :, :extra]], 2) for x in (q, k, v))
        out = _with_extra(q, k, v, hood, extra, factor, _tile(hood, tile), _tile(hood, key_tile), impl)
        return torch.cat([out[:, :, -extra:], out[:, :, :-extra]], 2)
    return _with_extra(q, k, v, hood, extra, factor, _tile(hood, tile), _tile(hood, key_tile), impl)


def _with_extra(
    q: Tensor, k: Tensor, v: Tensor, hood: Neighborhood, extra: int, scale: float, tile: tuple[int, ...] | None,
    key_tile: tuple[int, ...] | None, impl: Impl,
) -> Tensor:  # fmt: skip
    def run(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
        return attend(q, k, v, selection, scale=scale, impl=impl).out

    if hood.rank == 1 and hood.causal[0] and not extra and tile is None and key_tile is None:
        return causal_attention(
            q, k, v, run, window=hood.window[0], stride=hood.stride[0], dilation=hood.dilation[0], whole_grid=True
        )
    own_tile, own_key_tile = tiles_for(hood, q.device)
    keys = own_key_tile if key_tile is None else key_tile
    keys = None if keys is None or max(keys) == 1 else keys
    n = hood.tokens
    # first, so that `last_run` tells of the sparse call
    text = [attend(q[:, :, n:], k, v, causal=False, scale=scale).out] if extra else []
    out = grid_attention(q[:, :, :n], k, v, hood, run, extra=extra, tile=tile or own_tile, key_tile=keys)
    return torch.cat([out, *text], 2) if extra else out


def _tile(hood: Neighborhood, tile: PerAxis | None) -> tuple[int, ...] | None:
    if tile is None:
        return None
    sizes = tuple(tile) if isinstance(tile, Sequence) else (tile,) * hood.rank
    if len(sizes) != hood.rank or any(isinstance(t, bool) or not isinstance(t, int) or t < 1 for t in sizes):
        raise ValueError(f"tile {tile} on a grid of {hood.rank} axes: expected one whole number of at least 1, or one for each axis")
    return tuple(min(t, n) for t, n in zip(sizes, hood.grid, strict=True))


class NeighborhoodAttention(nn.Module):
    """Multi-head neighbourhood attention on a grid of any size that holds the window: `(B, *grid, dim)` to the same shape.

    dim: channels, divided equally among `heads`. window, stride, dilation, causal: as in `neighborhood_attention`, one number or one
    for each of the module's axes. bias: whether the projections have one. `rank` is the number of axes.
    """

    rank: int

    def __init__(
        self, dim: int, heads: int, *, window: PerAxis, stride: PerAxis = 1, dilation: PerAxis = 1,
        causal: bool | Sequence[bool] = False, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"{dim} channels can't be shared by {heads} heads: make dim a multiple of heads")
        self.heads = heads
        self.window, self.stride, self.dilation, self.causal = window, stride, dilation, causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.project = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x `(B, *grid, dim)`, channels last."""
        if x.ndim != self.rank + 2:
            raise ValueError(f"x has shape {tuple(x.shape)}: {type(self).__name__} takes (batch, {self.rank} axes, channels)")
        grid = tuple(x.shape[1:-1])
        q, k, v = self.qkv(x).flatten(1, -2).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = neighborhood_attention(
            q, k, v, grid=grid, window=self.window, stride=self.stride, dilation=self.dilation, causal=self.causal
        )
        return self.project(out.transpose(1, 2).flatten(2)).unflatten(1, grid)


class ImageNeighborhoodAttention(NeighborhoodAttention):
    """For images `(B, height, width, dim)`."""

    rank = 2


class VideoNeighborhoodAttention(NeighborhoodAttention):
    """For video `(B, frames, height, width, dim)`; causal=(True, False, False) keeps frames from reading later ones."""

    rank = 3
