"""Linearised relative positions: queries and keys doubled so that their product depends on the distance between tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Lrpe(nn.Module):
    """`x -> [x cos(p theta), x sin(p theta)]`, so that `q'_t . k'_s = sum_c q_c k_c cos((p_t - p_s) theta_c)`; theta is learned, one per
    head and channel, `base^(-c / C)` at first.

    grid: sizes of the axes of an image or video, the last one fastest; the channels are parted among the axes, each by the index along its
    own. Empty: one axis, the position itself. Source: transnormerllm, lightnet (MD-LRPE).
    """

    def __init__(self, heads: int, dim: int, grid: Sequence[int] = (), base: float = 10000.0) -> None:
        super().__init__()
        axes = max(len(grid), 1)
        if dim < axes or any(size < 1 for size in grid):
            raise ValueError(f"{dim} channels on a grid of {tuple(grid)}: give a channel or more for each axis, and sizes of at least 1")
        self.grid, share = tuple(grid), dim / axes
        self.theta = nn.Parameter((base ** -((torch.arange(dim) % share) / share)).repeat(heads, 1))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """`(B, H, N, 2 D)` of x `(B, H, N, D)` at positions `(B, N)`; H may be a multiple of the heads that have angles."""
        places = positions.unsqueeze(-1)
        if self.grid:
            steps = torch.tensor(self.grid, device=x.device).flip(0).cumprod(0).flip(0)
            places = places % steps // (steps // torch.tensor(self.grid, device=x.device))
        # the axis of each channel
        axis = torch.arange(x.shape[-1], device=x.device) * places.shape[-1] // x.shape[-1]
        theta = self.theta.double().repeat_interleave(x.shape[1] // self.theta.shape[0], 0)
        angle = places.double()[..., axis].unsqueeze(1) * theta.unsqueeze(1)
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.cat([x * angle.cos().to(wide), x * angle.sin().to(wide)], dim=-1).to(x.dtype)
