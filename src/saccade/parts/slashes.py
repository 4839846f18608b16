"""Diagonals as key tiles: an offset o that every query i reads at key i - o becomes one tile-wide run of keys per query tile."""

from __future__ import annotations

import torch
from torch import Tensor


def slash_tiles(offsets: Tensor, ends: Tensor, block: int) -> Tensor:
    """Starts of disjoint tiles of `block` keys that cover the key `i - o` of every row i of a query tile and every offset o.

    offsets: bool `(B, H, n_k)`, True at the chosen offsets; ends: `(Tq,)`, one past the last row of each tile of `block` rows (see
    `tile_ends`). Returns `(B, H, Tq, M)` int32 ascending, entries past the end of a list hold n_k.

    In a tile that ends at e, offset o < e touches exactly the keys `[a, a + block)` with `a = max(e - o, block) - block`. Walking
    through them from the left, a run that reaches past the tiles so far is covered by one more, which begins where the run does
    or where the last tile ends (minference, arXiv 2407.02490, Algorithm 2). The walk below goes from tile to tile, not from offset
    to offset, and for all query tiles at once, in the coordinate `u = e - block - start`, in which they share one table.
    """
    n_k = offsets.shape[-1]
    places = torch.arange(n_k, device=offsets.device).expand_as(offsets)
    # below[u]: the greatest chosen offset < u, or -1
    below = places.masked_fill(~offsets, -1).cummax(-1).values
    below = torch.nn.functional.pad(below, (1, 0), value=-1)
    shape = (*offsets.shape[:2], ends.shape[0])
    furthest = torch.gather(below, -1, ends.clamp(max=n_k).expand(shape))
    # offsets that reach before the first key share the tile that begins with it
    u = torch.minimum(furthest, ends - block)
    alive = furthest >= 0
    starts: list[Tensor] = []
    while bool(alive.any()):
        start = ends - block - u
        starts.append(torch.where(alive & (start < n_k), start, n_k))
        uncovered = torch.gather(below, -1, u.clamp(min=0))
        alive = alive & (uncovered >= 0)
        u = torch.minimum(uncovered, u - block)
    if not starts:
        return torch.empty(*shape, 0, dtype=torch.int32, device=offsets.device)
    return torch.stack(starts, dim=-1).to(torch.int32)
