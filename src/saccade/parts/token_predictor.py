"""Small modules that say of each token's hidden state whether deeper layers are to keep it: two logits, (keep, drop).

    text:    norm -> linear to d, GELU -> MLP                                          each token by itself
    images:  the same up to the MLP, with two transformer blocks between, and half of the d features replaced by their mean over the images

Source: dynamic-llava, arXiv 2412.00876, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.before(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class TokenPredictor(nn.Module):
    """width: of the hidden states. dim: d. heads: of the blocks. blocks: 2 for images, 0 for text."""

    def __init__(self, width: int, dim: int, heads: int, blocks: int) -> None:
        super().__init__()
        if dim % heads or dim % 2:
            raise ValueError(f"a predictor of {dim} features can't have {heads} heads: give an even number that they divide")
        self.norm, self.into = nn.LayerNorm(width), nn.Linear(width, dim)
        self.blocks = nn.ModuleList(_Block(dim, heads) for _ in range(blocks))
        self.hidden, self.last = nn.Linear(dim, dim // 2), nn.Linear(dim // 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states `(B, n, width)` to log softmax of (keep, drop), `(B, n, 2)`, float32."""
        x = F.gelu(self.into(self.norm(x.to(self.into.weight.dtype))))
        for block in self.blocks:
            x = block(x)
        if len(self.blocks):
            half = x.shape[-1] // 2
            x = torch.cat([x[..., :half], x[..., half:].mean(1, keepdim=True).expand(-1, x.shape[1], -1)], -1)
        return self.last(F.gelu(self.hidden(x))).log_softmax(-1)

    @classmethod
    def read(cls, tensor: Callable[[str], Tensor], kind: str, heads: int) -> TokenPredictor:
        """The predictor of a kind ("image", "instruction", "output") from a plan's tensors."""
        blocks = 2 if kind == "image" else 0
        weight = tensor(f"{kind}.into.weight")
        with torch.device("meta"):
            made = cls(weight.shape[1], weight.shape[0], heads, blocks)
        made.load_state_dict({name: tensor(f"{kind}.{name}") for name in made.state_dict()}, assign=True)
        return made.requires_grad_(False)
