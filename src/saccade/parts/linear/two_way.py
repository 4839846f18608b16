"""What layers that read the whole sequence at once have in common: projections and heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.core import MixerShape, TokenMixer
from saccade.parts.linear.gates import heads_first


class TwoWay(TokenMixer):
    """Projections of q, k, v and of the output, with biases, and as many key heads as query heads.

    shared: q serves as k too. ValueError when the shape has fewer key heads.
    """

    causality = "bidirectional"

    def __init__(self, shape: MixerShape, *, shared: bool = False) -> None:
        super().__init__(shape)
        if shape.kv_heads != shape.heads:
            raise ValueError(f"kv_heads={shape.kv_heads}: each of this mixer's {shape.heads} heads has its own keys, leave out kv_heads")
        self.heads, self.width = shape.heads, shape.heads * shape.head_dim
        self.q_proj, self.v_proj = (nn.Linear(shape.dim, self.width) for _ in range(2))
        self.k_proj = None if shared else nn.Linear(shape.dim, self.width)
        self.o_proj = nn.Linear(self.width, shape.dim)

    def split(self, x: Tensor) -> Tensor:
        """`(B, N, H * D)` as `(B, H, N, D)`, in float32 at least."""
        return heads_first(x, self.heads).to(torch.promote_types(x.dtype, torch.float32))

    def joined(self, out: Tensor, x: Tensor) -> Tensor:
        """`(B, H, N, D)` as `(B, N, H * D)`, in the dtype of x."""
        return out.transpose(1, 2).flatten(2).to(x.dtype)
