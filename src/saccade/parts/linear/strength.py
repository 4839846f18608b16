"""Write strengths of the delta rule."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WriteStrength(nn.Module):
    """`beta = top * sigmoid(W x)`, one number per token and head: top 1, or 2 where the transition may have negative eigenvalues."""

    def __init__(self, dim: int, heads: int, top: float = 1.0) -> None:
        super().__init__()
        if not 0 < top <= 2:
            raise ValueError(f"a write strength of up to {top} makes the delta rule unstable: give more than 0 and at most 2")
        self.top = top
        self.project = nn.Linear(dim, heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, N)` in float32 at least."""
        return self.top * self.project(x).to(torch.promote_types(x.dtype, torch.float32)).sigmoid().mT
