"""The gated attention unit around one narrow head: what stands before and after it in mega and chela."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GatedUnit(nn.Module):
    """`u, z, r, c = W m`,  `q, k = silu(z) g + b`,  `v = silu(W_v x)`,  then `sigmoid(u) (silu(c + W_h (silu(r) out)) - x)`.

    Tokens x and their context m are `(B, N, dim)`; q and k have `narrow` channels, v has `width`."""

    def __init__(self, dim: int, narrow: int, width: int) -> None:
        super().__init__()
        self.narrow, self.splits = narrow, [dim, narrow, width, dim]
        self.v_proj, self.in_proj, self.h_proj = nn.Linear(dim, width), nn.Linear(dim, sum(self.splits)), nn.Linear(width, dim)
        self.scales, self.shifts = nn.Parameter(1 + 0.02 * torch.randn(2, narrow)), nn.Parameter(torch.zeros(2, narrow))

    def enter(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """q, k `(B, N, narrow)`, v `(B, N, width)` and the gates (update, reset, candidate)."""
        update, z, reset, candidate = self.in_proj(context).split(self.splits, dim=-1)
        z = F.silu(z)
        q, k = (z * scale + shift for scale, shift in zip(self.scales, self.shifts, strict=True))
        return q, k, F.silu(self.v_proj(x)), (update.sigmoid(), F.silu(reset), candidate)

    def leave(self, out: Tensor, x: Tensor, gates: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """y `(B, N, dim)`, which is to be added to x."""
        update, reset, candidate = gates
        return update * (F.silu(candidate + self.h_proj(reset * out)) - x)
