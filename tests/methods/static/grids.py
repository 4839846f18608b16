"""Neighbourhoods pair by pair, from the card's formulas in plain Python, and dense attention under such a mask."""

from __future__ import annotations

import torch
from torch import Tensor


def axis_map(extent: int, window: int, stride: int, dilation: int, causal: bool) -> Tensor:
    """Which coordinate reads which along one axis, `(extent, extent)` bool."""
    pairs = torch.zeros(extent, extent, dtype=torch.bool)
    for x in range(extent):
        residue, i = x % dilation, x // dilation
        length = -(-(extent - residue) // dilation)
        if causal:
            leader = min(i // stride * stride + stride - 1, length - 1)
            begin, end = max(leader - window + 1, 0), i + 1
        else:
            leader = min(i // stride * stride + stride // 2, length - 1)
            begin = min(max(leader - window // 2, 0), length - window)
            end = begin + window
        for j in range(begin, end):
            pairs[x, residue + j * dilation] = True
    return pairs


def grid_map(grid, window, stride, dilation, causal) -> Tensor:
    """Which token reads which, `(N, N)` bool; the last axis runs fastest."""
    pairs = torch.ones(1, 1)
    for sizes in zip(grid, window, stride, dilation, causal, strict=True):
        pairs = torch.kron(pairs, axis_map(*sizes).float())
    return pairs.bool()


def masked_dense(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor) -> Tensor:
    """Attention with all N x N logits."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = (q @ k.mT) * q.shape[-1] ** -0.5
    return logits.masked_fill(~pairs, -torch.inf).softmax(-1) @ v


def qkv(n: int, *, heads: int = 4, kv_heads: int = 2, dim: int = 8, batch: int = 2, dtype=torch.float64, grad: bool = False):
    generator = torch.Generator().manual_seed(n)
    shapes = [(batch, heads, n, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, dim)]
    return tuple(torch.randn(*s, generator=generator, dtype=dtype).requires_grad_(grad) for s in shapes)
