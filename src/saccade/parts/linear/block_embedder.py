"""Blocks of tokens as one vector each, and attention among the few vectors that this takes. Source: block-transformer, arXiv 2406.02657."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from saccade.core import MixerShape
from saccade.parts.linear.feedforward import SwiGLU
from saccade.parts.linear.gates import heads_first
from saccade.parts.linear.partial import partial_softmax

Embedding = Literal["concat", "sum", "cls"]


class OpenAttention(nn.Module):
    """Softmax attention without a mask or positions: every vector reads all vectors of a source."""

    def __init__(self, shape: MixerShape) -> None:
        super().__init__()
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        width = shape.heads * shape.head_dim
        self.q_proj, self.o_proj = nn.Linear(shape.dim, width, bias=False), nn.Linear(width, shape.dim, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(shape.dim, shape.kv_heads * shape.head_dim, bias=False) for _ in range(2))

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """`(B, n, dim)` of x `(B, n, dim)` over source `(B, m, dim)`."""
        q = heads_first(self.q_proj(x), self.heads)
        k, v = (heads_first(one(source), self.kv_heads) for one in (self.k_proj, self.v_proj))
        every = torch.ones(x.shape[1], source.shape[1], dtype=torch.bool, device=x.device)
        return self.o_proj(partial_softmax(q, k, v, every).out.to(x.dtype).transpose(1, 2).flatten(2))


class BlockEmbedder(nn.Module):
    """One vector for `length` tokens.

    kind: "concat": a map to dim / length channels for each token, joined. "sum": a map to dim channels for each token, added up (their
    order is lost). "cls": a learned vector that reads the tokens, with their places added, through `layers` layers of attention in all
    directions and feed-forward layers of this width. ValueError where dim can't be split among the tokens.
    """

    def __init__(self, shape: MixerShape, length: int, kind: Embedding, *, layers: int, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "concat" and shape.dim % length:
            raise ValueError(f"{shape.dim} channels can't be split among {length} tokens: change dim or length, or use another embedder")
        self.project = nn.Linear(shape.dim, shape.dim // length if kind == "concat" else shape.dim, bias=False)
        if kind == "cls":
            self.first, self.places = nn.Parameter(torch.randn(shape.dim)), nn.Parameter(torch.randn(length, shape.dim))
            self.layers = nn.ModuleList(_Layer(shape, width) for _ in range(layers))
            self.norm = nn.RMSNorm(shape.dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)` of blocks x `(..., length, dim)`."""
        x = self.project(x)
        if self.kind == "concat":
            return x.flatten(-2)
        if self.kind == "sum":
            return x.sum(-2)
        rows = (x + self.places.to(x.dtype)).flatten(0, -3)
        rows = torch.cat([self.first.to(x.dtype).expand(rows.shape[0], 1, -1), rows], dim=1)
        for layer in self.layers:
            rows = layer(rows)
        return self.norm(rows[:, 0]).unflatten(0, x.shape[:-2])


class _Layer(nn.Module):
    def __init__(self, shape: MixerShape, width: int) -> None:
        super().__init__()
        self.norm, self.feed_norm = (nn.RMSNorm(shape.dim, eps=1e-6) for _ in range(2))
        self.attention = OpenAttention(shape)
        self.feed_forward = SwiGLU(shape.dim, width) if width else None

    def forward(self, x: Tensor) -> Tensor:
        given = self.norm(x)
        x = x + self.attention(given, given)
        return x if self.feed_forward is None else x + self.feed_forward(self.feed_norm(x))
