"""Output gates: what was read, multiplied by a function of the token itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OutputGate(nn.Module):
    """`y * act(W x)`: activation "sigmoid", "silu" or "none" (W x itself); rank: of W, None for a full matrix."""

    def __init__(self, dim: int, width: int, activation: str = "silu", rank: int | None = None) -> None:
        super().__init__()
        if activation not in ("sigmoid", "silu", "none"):
            raise ValueError(f"activation {activation!r} of an output gate is not known: use 'sigmoid', 'silu' or 'none'")
        self.activation = activation
        if rank is None:
            self.project: nn.Module = nn.Linear(dim, width, bias=False)
        else:
            self.project = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, width, bias=False))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """y `(B, N, width)`, x `(B, N, dim)`."""
        gate = self.project(x)
        if self.activation == "sigmoid":
            gate = torch.sigmoid(gate)
        elif self.activation == "silu":
            gate = F.silu(gate)
        return y * gate
