"""Products of one query per head with many stored rows: what every cheap score is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.scratch import as_exact

CHUNK = 4 << 20  # bytes of stored rows turned to float32 at a time


def dots(q: Tensor, rows: Tensor) -> Tensor:
    """q `(B, Hq, E)` times rows `(B, Hk, n, E)`, Hk dividing Hq: `(B, Hq, n)` in float32 (float64 for float64).

    Rows are never repeated for the queries of a group. Half-precision rows are multiplied in float32: products
    rounded to 8 bits would tie.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, kv_heads, n, dim = rows.shape
    queries = q.to(exact).reshape(batch * kv_heads, q.shape[1] // kv_heads, dim)
    flat = rows.flatten(0, 1)
    if flat.dtype == exact:
        return (queries @ flat.mT).view(batch, q.shape[1], n)
    step = max(1, CHUNK // max(1, n * dim * exact.itemsize))
    pieces = zip(queries.split(step), flat.split(step), strict=True)
    return torch.cat([a @ as_exact(b, exact, "dots").mT for a, b in pieces]).view(batch, q.shape[1], n)
