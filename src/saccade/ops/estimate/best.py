"""Scores of single tokens or pages for one query per head, and the best of them: what decoding methods choose with.

    row_products    l_hj = q_h.r_j, every stored row read once for the query heads that share it
    best_ids        the c highest of a row, ascending, ties to the lower index, with nothing sorted
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.estimate.common import Impl, exact, note, use_triton
from saccade.ops.estimate.groups import Reduce, check_reduce, over_group, rows_of
from saccade.ops.scratch import as_exact

CHUNK = 4 << 20  # bytes of stored rows turned to float32 at a time
HALF = (torch.bfloat16, torch.float16)


def row_products(q: Tensor, rows: Tensor, *, reduce: Reduce = "none", impl: Impl = "auto") -> Tensor:
    """q `(B, Hq, E)` times rows `(B, Hk, n, E)`, Hk dividing Hq: `(B, Hq, n)` in float32 (float64 for float64).

    Rows are never repeated for the queries of a group. Half-precision rows are multiplied in float32: products rounded to 8 bits would
    tie. reduce: "group_max" or "group_sum" over the query heads that share a row makes it `(B, Hk, n)`; the kernel writes no more.
    """
    batch, kv_heads, n, dim = rows.shape
    if q.ndim != 3 or q.shape[0] != batch or q.shape[2] != dim or q.shape[1] % kv_heads:
        raise ValueError(f"row_products: queries {tuple(q.shape)} do not fit rows {tuple(rows.shape)}: expected (B, heads, E)")
    check_reduce("row_products", reduce)
    known = rows.dtype in HALF and q.dtype in (*HALF, torch.float32)
    unsupported = None if known else f"the kernel takes float16 and bfloat16 rows, not {rows.dtype}"
    fast = use_triton("row_products", impl, rows, unsupported)
    note("row_products", "triton" if fast else "reference", rows, 1, n)
    if fast and n:
        from saccade.ops.estimate.triton.products import products

        return products(q, rows, reduce)
    wanted = exact(q)
    queries = q.to(wanted).reshape(batch * kv_heads, q.shape[1] // kv_heads, dim)
    flat = rows.flatten(0, 1)
    shape = batch, rows_of(q.shape[1], kv_heads, reduce), n
    if flat.dtype == wanted:
        return over_group(queries @ flat.mT, reduce).view(shape)
    step = max(1, CHUNK // max(1, n * dim * wanted.itemsize))
    pieces = zip(queries.split(step), flat.split(step), strict=True)
    return torch.cat([over_group(a @ as_exact(b, wanted, "dots").mT, reduce) for a, b in pieces]).view(shape)


def best_ids(scores: Tensor, count: int, *, impl: Impl = "auto") -> Tensor:
    """Positions of the `count` highest scores of each row of `(..., n)`, ascending, int64 `(..., count)`.

    Ties go to the lower position. A nan counts as the highest score: what it stands for is read, not lost. No host synchronisation on a
    GPU.
    """
    n = scores.shape[-1]
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"best_ids: count {count!r} is not a whole number of at least 0")
    unsupported = None if scores.dtype in (torch.float32, *HALF) else f"the kernel takes float32 and halves, not {scores.dtype}"
    fast = use_triton("best_ids", impl, scores, unsupported)
    note("best_ids", "triton" if fast else "reference", scores.reshape(-1, 1, n) if scores.ndim < 2 else scores, 1, n)
    if count >= n or count == 0:
        return torch.arange(min(n, count), device=scores.device).expand(*scores.shape[:-1], -1)
    if fast:
        from saccade.ops.estimate.triton.best import best

        return best(scores.reshape(-1, n), count).view(*scores.shape[:-1], count)
    found = _partitioned(scores, count) if scores.device.type == "cpu" else _selected(scores, count)
    if found is None:
        # ties at the border, or a nan: only a stable sort puts the lower position first
        found = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count].sort(-1).values
    return found.view(*scores.shape[:-1], count)


def _selected(scores: Tensor, count: int) -> Tensor | None:
    """The ids, `(rows * count,)`, if in each row just `count` entries are at or above its `count`-th highest; else None."""
    last = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    # a nan is below nothing, so no row has fewer, and one with more can't hide behind it
    found = (scores < last).logical_not_().nonzero()[:, -1]
    return found if found.numel() == last.numel() * count else None


def _partitioned(scores: Tensor, count: int) -> Tensor | None:
    """The same in CPU memory, `(rows, count)`: numpy finds the edge and lists what is above it several times faster than torch."""
    try:
        import numpy as np
    except ImportError:
        return _selected(scores, count)
    n = scores.shape[-1]
    # halves are no numbers to numpy, or slow ones; float32 keeps their order
    rows = (scores.float() if scores.dtype in HALF else scores).detach().reshape(-1, n).numpy()
    edge = np.partition(rows, n - count, axis=-1)[:, n - count : n - count + 1]  # a nan is the highest here too
    below = rows < edge
    found = np.flatnonzero(np.logical_not(below, out=below))
    if found.size != rows.shape[0] * count:
        return None
    return torch.from_numpy(found.reshape(-1, count) - np.arange(0, rows.size, n)[:, None])
