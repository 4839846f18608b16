"""The feed-forward half of a block."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """`W_down (silu(W_gate x) * W_up x)`, with the names of a Llama's MLP."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"a feed-forward layer of width {width} holds nothing: give at least 1")
        self.gate_proj, self.up_proj = (nn.Linear(dim, width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
