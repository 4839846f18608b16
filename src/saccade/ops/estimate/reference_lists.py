"""Key lists of a vertical-slash pattern in plain torch: the oracle of the kernels that make them."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.tilemath import mark


def slash_tiles(offsets: Tensor, ends: Tensor, block: int) -> Tensor:
    """Starts of disjoint tiles of `block` keys that cover the key `i - o` of every row i of a query tile and every offset o.

    offsets: bool `(B, H, n_k)`, True at the chosen offsets; ends: `(Tq,)`, one past the last row of each tile of `block` rows (see
    `saccade.parts.lists.tile_ends`). Returns `(B, H, Tq, M)` int32 ascending, entries past the end of a list hold n_k.

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
    furthest = torch.gather(below, -1, ends.clamp(0, n_k).expand(shape))
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


def compact(ids: Tensor, keep: Tensor, n_k: int) -> Tensor:
    """The entries of ascending `ids (..., m)` for which `keep` holds, moved to the front: `(..., longest)`, past the end n_k."""
    counts = keep.cumsum(-1, dtype=torch.int32)
    longest = int(counts[..., -1].max()) if keep.numel() else 0
    # entries that go share one slot behind the list, which is cut off
    slots = torch.where(keep, counts - 1, longest).long()
    kept = torch.full((*slots.shape[:-1], longest + 1), n_k, dtype=torch.int32, device=ids.device)
    return kept.scatter_(-1, slots, ids.to(torch.int32).expand(slots.shape))[..., :longest]


def outside(tokens: Tensor, starts: Tensor, ends: Tensor, block: int, n_k: int) -> Tensor:
    """The `tokens (B, H, m)` (ascending, past the end n_k) that each query tile must list beside its tiles: `(B, H, Tq, m')`.

    Those inside a tile of `starts (B, H, Tq, M)` and those at or after the query tile's end (`ends (Tq,)`) are left out.
    """
    b, h, tiles, _ = starts.shape
    edges = torch.cat([starts, starts.clamp(max=n_k - block) + block], dim=-1).to(torch.int32)
    row = tokens.expand(b, h, -1).contiguous()
    # tokens inside a tile stand side by side in the list: mark where they begin and end, then count
    found = torch.searchsorted(row, edges.flatten(2).contiguous()).view(edges.shape)
    real = (starts < n_k).to(torch.int32)
    change = torch.zeros(b, h, tiles, row.shape[-1] + 1, dtype=torch.int32, device=tokens.device)
    change.scatter_add_(-1, found, torch.cat([real, -real], dim=-1))
    inside = change[..., :-1].cumsum(-1, dtype=torch.int32) > 0
    listed = row.unsqueeze(2)
    keep = ~inside & (listed < ends.clamp(max=n_k).view(-1, 1))
    return compact(listed, keep, n_k)


def slash_lists(columns: Tensor, offsets: Tensor, ends: Tensor, block: int, n_k: int) -> tuple[Tensor, Tensor]:
    """(starts, tokens) as `saccade.ops.estimate.slash_lists` gives them."""
    starts = slash_tiles(mark(offsets, n_k), ends, block)
    return starts, outside(columns, starts, ends, block, n_k)
