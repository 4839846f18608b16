"""Relative positions as a Toeplitz product with exponentials, channel by channel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core import Call


class ExponentialToeplitz(nn.Module):
    """`y_tc = x_tc + a_c sum_s lambda_c^|t - s| x_sc`, s <= t where causal; lambda in (0, 1) and a are learned, a is 0 at first.

    grid: sizes of the axes of an image or video, the last one fastest: one such product along each axis in turn; both ways only.
    Computed by doubling: log2(N) passes over x, no N x N matrix. Source: lightnet (MD-TPE).
    """

    def __init__(self, dim: int, grid: Sequence[int] = (), bidirectional: bool = False) -> None:
        super().__init__()
        axes = max(len(grid), 1)
        self.grid, self.bidirectional = tuple(grid), bidirectional
        # from the last few tokens to the last few hundred
        self.logit = nn.Parameter(torch.linspace(0.0, 6.0, dim).repeat(axes, 1))
        self.weight = nn.Parameter(torch.zeros(axes, dim))

    def forward(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Tensor]]:
        """(y, what to keep) of x `(B, N, dim)`: "toeplitz" `(B, dim)`, the sum so far, where causal."""
        decay = nn.functional.logsigmoid(self.logit.to(torch.promote_types(x.dtype, torch.float32)))
        if not self.bidirectional:
            total = running(call.masked(x.unsqueeze(1)).squeeze(1), decay[0], past.get("toeplitz"))
            y = x + (self.weight[0] * total).to(x.dtype)
            if call.lengths is None:
                return y, {"toeplitz": total[:, -1]}
            before = past["toeplitz"].unsqueeze(1).to(total.dtype) if past else torch.zeros_like(total[:, :1])
            last = call.lengths[:, None, None].expand(-1, 1, x.shape[2])
            return y, {"toeplitz": torch.cat([before, total], dim=1).gather(1, last).squeeze(1)}
        x = call.masked(x.unsqueeze(1)).squeeze(1)
        if self.grid and math.prod(self.grid) != x.shape[1]:
            raise ValueError(f"{x.shape[1]} tokens are no grid of {' x '.join(map(str, self.grid))}: give as many tokens as it has places")
        y = x.unflatten(1, self.grid or (x.shape[1],))
        for axis in range(len(self.grid) or 1):
            line = y.movedim(axis + 1, -2)
            wide = line.to(decay.dtype)
            both = running(wide, decay[axis]) + running(wide.flip(-2), decay[axis]).flip(-2) - wide
            y = (line + (self.weight[axis] * both).to(x.dtype)).movedim(-2, axis + 1)
        return y.flatten(1, -2), {}


def running(x: Tensor, log_decay: Tensor, before: Tensor | None = None) -> Tensor:
    """`y_t = sum_{s<=t} e^((t-s) g) x_s + e^((t+1) g) before` over the second last axis: x `(..., N, C)`, g `(C,)`, before `(..., C)`."""
    y, shift, n = x.to(log_decay.dtype), 1, x.shape[-2]
    while shift < n:
        y = y + nn.functional.pad(y[..., : n - shift, :], (0, 0, shift, 0)) * (shift * log_decay).exp()
        shift *= 2
    if before is None:
        return y
    times = torch.arange(1, n + 1, device=x.device, dtype=log_decay.dtype)[:, None]
    return y + (times * log_decay).exp() * before.to(y.dtype).unsqueeze(-2)
