"""A learned feature map that keeps how long queries and keys are: long ones stay peaked, short ones flat."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.parts.linear.features import FeatureMap


class NormPreserving(FeatureMap):
    """`[softmax(x^), softmax(-x^)]` with `x^ = |x| y / |y|`, `y = W (x - 2 u (u.x))`, u a unit vector and W a matrix for every head.

    So |x^| = |x|, and only the direction is learned. W is the identity at first, u drawn. floor: smallest feature. Computed in float32 at
    least. Source: still.
    """

    def __init__(self, heads: int, dim: int, floor: float = 1e-12) -> None:
        super().__init__()
        self.floor = floor
        self.weight = nn.Parameter(torch.eye(dim).repeat(heads, 1, 1))
        self.mirror = nn.Parameter(torch.nn.functional.normalize(torch.randn(heads, 1, dim), dim=-1))

    def width(self, dim: int) -> int:
        return 2 * dim

    def turned(self, x: Tensor) -> Tensor:
        """x^ of x `(B, H, N, D)`, as long as x, in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x, u = x.to(wide), torch.nn.functional.normalize(self.mirror.to(wide), dim=-1)
        y = (x - 2 * (x * u).sum(-1, keepdim=True) * u) @ self.weight.to(wide).mT
        # the root's slope at 0 has no value
        ratio = x.square().sum(-1, keepdim=True).clamp(min=1e-24) / y.square().sum(-1, keepdim=True).clamp(min=1e-24)
        return y * ratio.sqrt()

    def forward(self, x: Tensor) -> Tensor:
        y = self.turned(x)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1).clamp(min=self.floor)
