"""Products of one query per head with some of the stored rows."""

from __future__ import annotations

import torch
from torch import Tensor


def picked_dots(q: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """q `(B, Hq, E)` times the rows `ids (B, Hq, m)` int64 of `(B, Hk, n, E)`, Hk dividing Hq: `(B, Hq, m)` float32 (float64).

    Only the rows that are named are read; none is repeated for the queries of a group.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    (batch, kv_heads, _, dim), (_, heads, m) = rows.shape, ids.shape
    by_head = ids.reshape(batch, kv_heads, heads // kv_heads * m, 1).expand(-1, -1, -1, dim)
    picked = rows.gather(2, by_head).to(exact).view(batch, heads, m, dim)
    return (picked @ q.to(exact).unsqueeze(-1)).squeeze(-1)
