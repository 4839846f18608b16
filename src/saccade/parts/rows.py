"""Picking entries of a cache by row, faster than an elementwise gather."""

from __future__ import annotations

import torch
from torch import Tensor


def pick_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Entries `indices (B, H, m)` int64 of every row and head of x `(B, H, n, D)`: `(B, H, m, D)`, a copy.

    Works on views into larger buffers, such as a growing cache, without copying them first.
    """
    batch, heads, n, dim = x.shape
    steps = x.stride()
    if n == 0 or dim == 0 or steps[3] != 1 or steps[2] == 0 or any(step % dim for step in steps[:3]):
        return torch.gather(x, 2, indices.unsqueeze(-1).expand(*indices.shape, dim))
    # entries lie `dim` apart or a multiple of it: one list of rows serves all heads, and each is copied in one go
    last = sum((size - 1) * step for size, step in zip(x.shape[:3], steps[:3], strict=True)) // dim
    flat = x.as_strided((last + 1, dim), (dim, 1), x.storage_offset())
    first = torch.arange(batch, device=x.device)[:, None] * (steps[0] // dim)
    first = first + torch.arange(heads, device=x.device) * (steps[1] // dim)
    rows = first.unsqueeze(-1) + indices * (steps[2] // dim)
    return flat.index_select(0, rows.flatten()).view(*indices.shape, dim)
