"""Pages of keys by their channel-wise range, and the upper bound that the range gives.

    U_p = sum_d max(q_d low_pd, q_d high_pd)  >=  q.k  for every key k of page p        (up to rounding)

Source: quest, arXiv 2406.10774, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.estimate import reference
from saccade.ops.estimate.common import Impl, TileGrid, check_block, check_heads, kernel_limits, note, rows_first, use_triton


def minmax_pages(k: Tensor, page: int, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """(low, high): minimum and maximum of each channel over each page of `page` keys, `(B, Hk, ceil(Nk / page), D)` in k's dtype.

    The last page is bounded by the keys it has. k `(B, Hk, Nk, D)`.
    """
    check_heads("minmax_pages", k, "k")
    check_block("minmax_pages", "page", page)
    fast = use_triton("minmax_pages", impl, k, kernel_limits(k))
    note("minmax_pages", "triton" if fast else "reference", k, 0, k.shape[2])
    if not fast or not k.numel():
        return reference.pool(k, page, "min"), reference.pool(k, page, "max")
    from saccade.ops.estimate.triton import pool as kernels

    _, high, low, _ = kernels.pool(rows_first(k), None, page, False, True, True, False)
    return low, high


def extend_pages(low: Tensor, high: Tensor, keys: Tensor, seen: int | Tensor, page: int, *, impl: Impl = "auto") -> None:
    """Take keys `(B, Hk, m, D)` that follow the first `seen` tokens into the bounds, in place.

    low, high: `(B, Hk, P, D)` with room for all `ceil((seen + m) / page)` pages; pages not begun may hold anything.
    seen: an int, or on a device an int tensor of one element, so that a captured graph can advance it; its room is not checked then.
    """
    check_heads("extend_pages", keys, "keys")
    check_block("extend_pages", "page", page)
    b, h, m, dim = keys.shape
    if low.shape != high.shape or low.ndim != 4 or (low.shape[0], low.shape[1], low.shape[3]) != (b, h, dim):
        raise ValueError(f"extend_pages: bounds {tuple(low.shape)} and {tuple(high.shape)} do not fit keys {tuple(keys.shape)}")
    if not low.dtype == high.dtype == keys.dtype:
        raise TypeError(f"extend_pages: bounds are {low.dtype} and {high.dtype}, keys {keys.dtype}: use one dtype")
    if isinstance(seen, int) and (seen < 0 or -(-(seen + m) // page) > low.shape[2]):
        raise ValueError(f"extend_pages: {seen} + {m} tokens do not fit {low.shape[2]} pages of {page}")
    unsupported = kernel_limits(keys)
    if low.stride(-1) != 1 or high.stride(-1) != 1:
        unsupported = "the kernel needs bounds whose last axis is contiguous"
    fast = use_triton("extend_pages", impl, keys, unsupported)
    note("extend_pages", "triton" if fast else "reference", keys, 0, m)
    if not keys.numel():
        return
    if not fast:
        reference.extend_pages(low, high, keys, int(seen), page)
        return
    from saccade.ops.estimate.triton import bounds

    if not isinstance(seen, Tensor):
        seen = torch.full((1,), seen, dtype=torch.int64, device=keys.device)
    bounds.extend(low, high, rows_first(keys), seen, page)


def page_bounds(q: Tensor, low: Tensor, high: Tensor, grid: TileGrid | None = None, *, impl: Impl = "auto") -> Tensor:
    """Upper bounds of q.k over pages, unscaled, float32 (float64): for each query `(B, Hq, Nq, P)`, or with a grid for each query tile.

    q `(B, Hq, Nq, D)`; low, high `(B, Hk, P, D)` from `minmax_pages`, Hk dividing Hq, in one dtype.
    grid: tiles of `grid.block_q` queries by pages of `grid.block_k` keys: the maximum over the tile's queries, `(B, Hq, Tq, P)`, with
    -inf where no pair is visible; the bounds of single queries are never held.
    """
    for name, x in (("q", q), ("low", low), ("high", high)):
        check_heads("page_bounds", x, name)
    if low.shape != high.shape or low.shape[0] != q.shape[0] or low.shape[3] != q.shape[3] or q.shape[1] % max(1, low.shape[1]):
        raise ValueError(f"page_bounds: pages {tuple(low.shape)} and {tuple(high.shape)} do not fit queries {tuple(q.shape)}")
    if not q.dtype == low.dtype == high.dtype:
        raise TypeError(f"page_bounds: q, low and high are {q.dtype}, {low.dtype}, {high.dtype}: use one dtype")
    if grid is not None and (grid.n_q, grid.columns) != (q.shape[2], low.shape[2]):
        raise ValueError(
            f"page_bounds: a grid of {grid.n_q} queries and {grid.columns} pages does not fit {q.shape[2]} queries and {low.shape[2]} pages"
        )
    fast = use_triton("page_bounds", impl, q, kernel_limits(q))
    note("page_bounds", "triton" if fast else "reference", q, q.shape[2], low.shape[2])
    if not fast or not q.numel() or not low.numel():
        return reference.page_bounds(q, low, high, grid)
    from saccade.ops.estimate.triton import bounds

    q, low, high = rows_first(q), rows_first(low), rows_first(high)
    if grid is None:
        return bounds.rows(q, low, high)
    return bounds.tiles(q, low, high, grid.block_q, grid.block_k, grid.n_k, grid.causal)
