"""Tokens as an image: their places on a map, depthwise convolutions over it, and rotary embedding by row and column."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.parts.linear.rotary import RotaryEmbedding

Grid = tuple[int, int]


def image_grid(n: int, grid: Sequence[int] | None) -> Grid:
    """(height, width) of a map of n tokens, row after row.

    grid: (height, width); (0, width) for as many rows as the tokens need, the last of which may be short; None for a square.
    Raises ValueError when n does not fit.
    """
    if grid is None:
        side = math.isqrt(n)
        if side * side != n:
            raise ValueError(f"{n} tokens make no square image: give grid=(height, width), or (0, width) for as many rows as there are")
        return side, side
    height, width = grid
    if height == 0:
        return -(-n // width), width
    if height * width != n:
        raise ValueError(f"{n} tokens don't fill an image of {height} x {width}: give grid=(height, width) with {n} places")
    return height, width


def check_grid(grid: Sequence[int] | None) -> None:
    """ValueError unless grid is None, (height, width) or (0, width)."""
    if grid is not None and (len(grid) != 2 or grid[0] < 0 or grid[1] < 1):
        raise ValueError(f"grid={grid}: give (height, width), (0, width) for as many rows as there are, or None for a square")


def check_kernel(kernel: int) -> None:
    """ValueError unless kernel is odd, or 0 for none."""
    if kernel < 0 or (kernel and kernel % 2 == 0):
        raise ValueError(f"kernel={kernel}: give an odd width in tokens, 0 for no convolution")


def as_map(x: Tensor, grid: Grid) -> Tensor:
    """Tokens `(B, N, C)` as `(B, C, height, width)`, 0 where a short last row ends."""
    height, width = grid
    return F.pad(x, (0, 0, 0, height * width - x.shape[1])).mT.unflatten(-1, (height, width))


def as_tokens(image: Tensor, n: int) -> Tensor:
    """The first n places of `(B, C, height, width)` as tokens `(B, n, C)`."""
    return image.flatten(2).mT[:, :n]


class GridConv(nn.Module):
    """Depthwise convolution of tokens over their map, of kernel x kernel places around each, zeros outside.

    channels: of the weights; x may have a multiple of them, whose parts (heads) then share the weights.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, N, C)` of x `(B, N, C)`."""
        n, parts = x.shape[1], x.shape[2] // self.channels
        y = self.conv(as_map(x, grid).unflatten(1, (parts, self.channels)).flatten(0, 1))
        return as_tokens(y.unflatten(0, (-1, parts)).flatten(1, 2), n)


class AxialRotary(nn.Module):
    """The first half of a head's channels is turned by the row of its token, the second half by the column."""

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"head_dim={head_dim}: turning by row and column needs a multiple of 4")
        self.turn = RotaryEmbedding(head_dim // 2, theta)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """x `(B, H, N, D)` with tokens row after row."""
        places = torch.arange(x.shape[2], device=x.device)[None]
        rows, columns = x.chunk(2, dim=-1)
        return torch.cat([self.turn(rows, places // grid[1]), self.turn(columns, places % grid[1])], dim=-1)
