"""What a Selection keeps, tile by tile, and the attention mass on it: without a map of queries by keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.core import Selection
from saccade.core.tilemath import cover, mark
from saccade.evaluate.maps import row_counts
from saccade.parts.probe import row_probabilities

SAMPLED_ROWS = 512
LISTED = 1 << 24  # spread list entries of all heads that are held at a time
ROWS = 32  # sampled rows whose probabilities are held at a time
MOST_TILES = 1 << 27  # tiles of all heads whose sums are held for the mass of a selection of whole tiles


def listed(selection: Selection, tiles: slice | Tensor) -> Tensor:
    """Keys listed for some query tiles of a selection of batch 1, before causality: `(H, tiles, n_k)` bool."""
    whole = cover(selection.starts[0, :, tiles], selection.block_k, selection.n_k)
    return whole | mark(selection.tokens_of(tiles)[0], selection.n_k)


def kept_shares(selection: Selection, tile: int) -> Tensor:
    """Share of the visible pairs of each `tile` x `tile` cell that a causal selection reads: float32 `(H, R, R)`, 0 above the diagonal.

    As many queries as keys. Works through runs of query tiles, whose lists are spread over the keys: at most LISTED entries at a time,
    or one row of cells.
    """
    n, block, heads = selection.n_k, selection.block_q, selection.heads
    cells = math.ceil(n / tile)
    run = max(1, LISTED // (heads * n) * block // tile)
    return torch.cat([_cell_rows(selection, tile, first, min(first + run, cells)) for first in range(0, cells, run)], dim=1)


def _cell_rows(selection: Selection, tile: int, first: int, last: int) -> Tensor:
    """Rows first ... last - 1 of the cells, `(H, last - first, R)`."""
    n, block, device = selection.n_k, selection.block_q, selection.device
    begin, end = first * tile, min(last * tile, n)
    base = begin // block
    keys = pad(listed(selection, slice(base, (end - 1) // block + 1)), (0, -n % tile))
    rows = torch.arange(begin, end, device=device)
    cell_of, tile_of = rows // tile - first, rows // block - base
    # left of the diagonal every pair is visible, so the rows of a query tile count at once
    weights = torch.zeros(last - first, keys.shape[1], device=device)
    weights.index_put_((cell_of, tile_of), torch.ones(1, device=device), accumulate=True)
    counts = weights @ keys.unflatten(-1, (-1, tile)).sum(-1, dtype=torch.float32)
    counts = counts / (torch.bincount(cell_of) * tile)[:, None]
    # on it each row sees the keys up to its own
    columns = (rows // tile * tile)[:, None] + torch.arange(tile, device=device)
    own = (keys[:, tile_of[:, None], columns] & (columns <= rows[:, None])).sum(-1, dtype=torch.float32)
    seen = (rows % tile + 1).float()
    shares = torch.zeros(2, last - first, device=device)[:, None].repeat(1, keys.shape[0], 1)
    shares[0].index_add_(1, cell_of, own)
    shares[1].index_add_(1, cell_of, seen.expand(keys.shape[0], -1))
    places = torch.arange(first, last, device=device)
    counts[:, places - first, places] = shares[0] / shares[1]
    return counts.masked_fill(torch.arange(counts.shape[-1], device=device) > places[:, None], 0.0)


def whole_tiles(selection: Selection, tile: int, heads: int) -> tuple[int, int] | None:
    """Tile sizes (queries, keys) whose sums give the mass on a selection exactly and, pooled, maps of `tile`; None where none do.

    None: single keys, tiles that begin anywhere, or tiles so small that there are too many.
    """
    if not selection.aligned or selection.log_weight is not None or bool(selection.token_counts.any()):
        return None
    rows, columns = math.gcd(tile, selection.block_q), math.gcd(tile, selection.block_k)
    count = heads * math.ceil(selection.n_q / rows) * math.ceil(selection.n_k / columns)
    return (rows, columns) if count <= MOST_TILES else None


def mass_of_tiles(selection: Selection, sums: Tensor, rows: int, columns: int) -> Tensor:
    """Attention mass on a selection of whole tiles, the mean over queries: `(Hq,)`, exact.

    sums: probabilities `(Hq, Tq, Tk)` over tiles of `rows` x `columns` tokens, which divide the selection's own.
    """
    ids = selection.starts[0].long() // selection.block_k
    chosen = mark(ids.masked_fill(selection.starts[0] >= selection.n_k, selection.n_k), math.ceil(selection.n_k / selection.block_k))
    chosen = chosen.repeat_interleave(selection.block_q // rows, 1)[:, : sums.shape[1]]
    chosen = chosen.repeat_interleave(selection.block_k // columns, 2)[..., : sums.shape[2]]
    group = sums.shape[0] // chosen.shape[0]
    return (sums.unflatten(0, (-1, group)) * chosen.unsqueeze(1)).sum((2, 3)).flatten() / selection.n_q


def sampled_rows(n: int, count: int, seed: int = 0) -> Tensor:
    """`count` query rows (all, where there are no more), int64 ascending: one at random in each of as many equal runs."""
    if n <= count:
        return torch.arange(n)
    edges = torch.arange(count + 1) * n // count
    draws = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return edges[:-1] + (draws * (edges[1:] - edges[:-1])).long()


def mass_of_rows(selection: Selection, q: Tensor, k: Tensor, rows: Tensor, *, scale: float, softcap: float | None = None) -> Tensor:
    """Attention mass of the given query rows on what the selection lists for them, their mean: `(Hq,)`.

    q `(1, Hq, N, D)`, k `(1, Hk, N, D)`, rows `(m,)` ascending. The rows are exact; with all rows so is the result.
    """
    total = torch.zeros(q.shape[1], device=q.device)
    for part in rows.split(ROWS):
        seen = int(part[-1]) + 1
        weights = row_probabilities(q[:, :, :seen], k[:, :, :seen], part.to(q.device), scale=scale, softcap=softcap)[0]
        keys = listed(selection, (part // selection.block_q).to(q.device))[..., :seen]
        group = q.shape[1] // keys.shape[0]
        total += (weights.unflatten(0, (-1, group)) * keys.unsqueeze(1)).sum((2, 3)).flatten().float()
    return total / rows.shape[0]


def mean_mass(sums: Tensor, n: int, tile: int) -> Tensor:
    """Tile sums `(H, R, R)` as a query's mean mass on each run of keys: every row sums to 1."""
    return sums / row_counts(n, tile).to(sums.device)[:, None]
