"""Rotary embedding of queries and keys by their positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.core import Rotary
from saccade.parts.rotary import turn


class RotaryEmbedding(nn.Module):
    """Channel i of the first half of a head is paired with channel i of the second; at position p
    pair i turns by `p * theta^(-2 i / D)`."""

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 2 or theta <= 0:
            raise ValueError(f"head_dim={head_dim}, theta={theta}: a rotary embedding needs an even head_dim and a positive theta")
        self.pairs, self.theta = head_dim // 2, theta

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x `(B, H, N, D)` turned to positions `(B, N)`."""
        powers = torch.arange(self.pairs, dtype=torch.float64, device=x.device) / self.pairs
        return turn(x, positions.unsqueeze(1), Rotary(self.theta**-powers))
