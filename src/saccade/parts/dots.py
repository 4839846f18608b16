"""Products of one query per head with many stored rows, what every cheap score is made of, and sums of rows by weight."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.estimate import Reduce, row_products
from saccade.ops.scratch import as_exact

CHUNK = 4 << 20  # bytes of stored rows turned to float32 at a time


def dots(q: Tensor, rows: Tensor, reduce: Reduce = "none") -> Tensor:
    """q `(B, Hq, E)` times rows `(B, Hk, n, E)`, Hk dividing Hq: `(B, Hq, n)` in float32 (float64 for float64); see `row_products`.

    reduce: "group_max" or "group_sum" over the query heads of a group, as in `heads.reduce_heads`: `(B, Hk, n)`.
    """
    return row_products(q, rows, reduce=reduce)


def weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    """weights `(B, Hq, n)` float32 or float64 times v `(B, Hk, n, Dv)`: `(B, Hq, Dv)` in the dtype of the weights.

    Values are never repeated for the heads of a group; half precision is turned to the weights' dtype a few heads at a time.
    """
    batch, kv_heads, n, dim = v.shape
    grouped = weights.reshape(batch * kv_heads, -1, n)
    flat = v.flatten(0, 1)
    if flat.dtype == weights.dtype:
        return (grouped @ flat).view(batch, weights.shape[1], dim)
    step = max(1, CHUNK // max(1, n * dim * weights.itemsize))
    pieces = zip(grouped.split(step), flat.split(step), strict=True)
    return torch.cat([a @ as_exact(b, weights.dtype, "dots") for a, b in pieces]).view(batch, weights.shape[1], dim)
