"""FLatten, focused linear attention: an elementwise power turns queries and keys towards their largest channels and keeps their length.

    f(x) = |x| x^p / |x^p|,   p = 3,   phi(q) = f((relu(q) + 1e-6) / softplus(c)),   phi(k) the same of k + e
    o_i = phi(q_i) (mean_j phi(k_j) v_j^T) / (phi(q_i).mean_j phi(k_j) + 1e-6),    y = W_o (o + conv_5x5(v))

c: learned per channel, 0 at first; e: a learned position of every token. Lengths are those over all channels, before the heads are split.
The convolution, shared by the heads, restores the rank that D features limit.

Source: flatten, arXiv 2308.00442.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core import Info, Mixer, MixerShape, TokenMixer, register
from saccade.parts.linear.features import feature_map
from saccade.parts.linear.gates import heads_first
from saccade.parts.linear.grid import Grid, as_map, check_grid, check_kernel, image_grid
from saccade.parts.linear.image import ImageLinear


@register
@dataclass(frozen=True, kw_only=True)
class Flatten(Mixer):
    """grid: (height, width) of the image in tokens, (0, width) for as many rows as there are, None for a square. power: p.
    over: lengths over "all" channels or each "head". positions: learned positions on the keys, as many as the grid has places, or the
    shape's max_length. kernel: width of the convolution on the values in tokens, 0 for none. reduce: keys and values come from a map that
    many times smaller on each side (a strided convolution and a layer norm); values are stretched to all tokens before their convolution.
    """

    grid: tuple[int, int] | None = None
    power: float = 3.0
    over: Literal["all", "head"] = "all"
    positions: bool = True
    kernel: int = 5
    reduce: int = 1

    info = Info(
        slug="flatten", phase="mixer", needs=frozenset({"training"}), causality="bidirectional", tiny={"grid": (0, 8)},
        variants=({"over": "head", "positions": False, "kernel": 0}, {"reduce": 2, "grid": (0, 5), "power": 4}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_grid(self.grid)
        check_kernel(self.kernel)
        if self.power < 1 or self.reduce < 1:
            raise ValueError(f"power={self.power}, reduce={self.reduce}: give at least 1")
        if self.over not in ("all", "head"):
            raise ValueError(f"over={self.over!r} is not 'all' or 'head'")

    def build(self, shape: MixerShape) -> TokenMixer:
        return FlattenMixer(shape, self)


class FlattenMixer(ImageLinear):
    """The layer. scale `(H * D,)`: c. position `(places, H * D)`: e."""

    def __init__(self, shape: MixerShape, method: Flatten) -> None:
        super().__init__(shape, grid=method.grid, kernel=method.kernel, per_head=True)
        self.method, r = method, method.reduce
        self.focus = feature_map("power", power=method.power)
        self.scale = nn.Parameter(torch.zeros(self.width))
        self.position = self.smaller = self.norm_smaller = None
        if r > 1:
            self.smaller, self.norm_smaller = nn.Conv2d(shape.dim, shape.dim, r, stride=r), nn.LayerNorm(shape.dim)
        if method.positions:
            places = prod(-(-side // r) for side in method.grid) if method.grid and method.grid[0] else shape.max_length
            if places is None:
                raise ValueError("flatten learns a position for every token: give grid=(height, width), max_length, or positions=False")
            self.position = nn.Parameter(0.02 * torch.randn(places, self.width))

    def places(self, n: int) -> Grid:
        return super().places(n) if self.smaller is None else image_grid(n, self.grid)

    def project(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        assert self.k_proj is not None
        source = x
        if self.smaller is not None and self.norm_smaller is not None:
            # a side that is no multiple is filled up with zeros
            sides = [-side % self.method.reduce for side in grid]
            source = self.norm_smaller(self.smaller(F.pad(as_map(x, grid), (0, sides[1], 0, sides[0]))).flatten(2).mT)
        k = self.k_proj(source)
        if self.position is not None:
            if k.shape[1] > len(self.position):
                raise ValueError(f"{k.shape[1]} keys are more than the {len(self.position)} learned positions: give a larger max_length")
            k = k + self.position[: k.shape[1]]
        return self.q_proj(x), k, self.v_proj(source)

    def maps(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        scale = F.softplus(self.scale.to(q.dtype)).unflatten(0, (self.heads, 1, -1))
        return self._focused(q / scale), self._focused(k / scale)

    def _focused(self, x: Tensor) -> Tensor:
        if self.method.over == "head":
            return self.focus(x)
        return heads_first(self.focus(x.transpose(1, 2).flatten(2)), self.heads)

    def around(self, v: Tensor, x: Tensor, grid: Grid) -> Tensor | None:
        if v.shape[1] != x.shape[1]:
            v = F.interpolate(v.mT, size=x.shape[1], mode="linear").mT
        return super().around(v, x, grid)
