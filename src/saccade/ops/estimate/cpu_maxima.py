"""Tile maxima on a CPU, as one matrix product per run of tiles.

What is added to a logit, and what is taken from its row, become more columns of the operands; what is left is a product and a maximum,
over the rows of a tile first, where whole rows of numbers are compared. Only tiles on the diagonal need a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.ops.estimate.common import TileGrid, exact
from saccade.ops.scratch import scratch

ROWS, KEYS = 768, 1024  # of one product: its result stays in the cache of a core


def by_products(
    q: Tensor, k: Tensor, grid: TileGrid, offset: int, scale: float, less: Tensor | None, columns: Tensor | None, reach: Tensor | None
) -> Tensor:  # fmt: skip
    """The maximum over each tile of `scale * (q_i.k_j + columns_j) - less_i`, `(B, Hq, Tq, Tk)`, -inf without a visible pair.

    less `(B, Hq, Nq)`, columns `(B, Hq, Nk)`. reach: `(Tq,)`, how many first keys a tile asks about, as in `saccade.ops.estimate`.
    """
    batch, heads, kv_heads, wide = *q.shape[:2], k.shape[1], exact(q)
    left, right = _operands(q.to(wide), k.to(wide), grid, scale, less, columns)
    found = torch.full((batch, heads, grid.rows, grid.columns), -torch.inf, dtype=wide)
    whole, ends = _reaches(grid, offset, reach)
    if not grid.columns:
        return found
    share = heads // kv_heads
    by_group = found.unflatten(1, (kv_heads, share)).transpose(2, 3)  # (B, Hk, Tq, group, Tk), a view
    together, keys = max(1, ROWS // (share * grid.block_q)), max(1, KEYS // grid.block_k) * grid.block_k
    for at in range(batch * kv_heads):
        own, other, into = left.flatten(0, 1)[at], right.flatten(0, 1)[at], by_group[at // kv_heads, at % kv_heads]
        for begin in range(0, grid.rows, together):
            rows = own[begin : begin + together]
            last = min(whole[begin : begin + together])
            for first in range(0, last, keys):
                end = min(first + keys, last)
                into[begin : begin + together, :, first // grid.block_k : end // grid.block_k] = _reduced(rows, other[:, first:end], grid)
            for tile, end in enumerate(ends[begin : begin + together], start=begin):
                if last < end:
                    into[tile, :, last // grid.block_k : -(-end // grid.block_k)] = _edge(own, other, grid, tile, last, end, offset)
    return found


def _reaches(grid: TileGrid, offset: int, reach: Tensor | None) -> tuple[list[int], list[int]]:
    """For each tile of rows: how many first keys, in whole tiles, all its rows see, and how many any of them sees."""
    whole, ends = [], []
    for tile in range(grid.rows):
        begin, end = tile * grid.block_q, min((tile + 1) * grid.block_q, grid.n_q)
        seen = [min(max(offset + row + 1, 0), grid.n_k) if grid.causal else grid.n_k for row in (begin, end - 1)]
        whole.append(seen[0] // grid.block_k * grid.block_k)
        ends.append(seen[1])
    if reach is None:
        return whole, ends
    asked = reach.tolist()  # whole tiles, which all rows see where the order counts
    return [min(n, grid.n_k) // grid.block_k * grid.block_k for n in asked], [min(n, grid.n_k) for n in asked]


def _operands(q: Tensor, k: Tensor, grid: TileGrid, scale: float, less: Tensor | None, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """left `(B, Hk, Tq, group, block_q, D')`, -inf in the rows that only fill up the last tile, and right `(B, Hk, D', Nk)`."""
    kv_heads, share = k.shape[1], q.shape[1] // k.shape[1]
    row = q.new_zeros(q.shape[:3]) if less is None else -less.to(q.dtype)
    row = pad(row, (0, -grid.n_q % grid.block_q), value=-torch.inf)
    body = pad(q * scale, (0, 0, 0, -grid.n_q % grid.block_q))
    parts, others = [body, row.unsqueeze(-1)], [k, torch.ones_like(k[..., :1])]
    if columns is not None:
        # the heads of a group differ in what is added: each has a column of its own
        own = torch.eye(share, dtype=q.dtype).repeat(kv_heads, 1) * scale
        parts.insert(1, own[:, None].expand(*body.shape[:3], -1))
        others.insert(1, columns.to(q.dtype).unflatten(1, (kv_heads, share)).transpose(2, 3))
    left = torch.cat(parts, dim=-1).unflatten(1, (kv_heads, share)).unflatten(3, (grid.rows, grid.block_q))
    return left.transpose(2, 3).contiguous(), torch.cat(others, dim=-1).mT.contiguous()


def _reduced(rows: Tensor, keys: Tensor, grid: TileGrid) -> Tensor:
    """rows `(tiles, group, block_q, D')` times keys `(D', n)`, n whole tiles, over each tile: `(tiles, group, n / block_k)`."""
    size = (rows.shape[0] * rows.shape[1] * grid.block_q, keys.shape[1])
    out = torch.mm(rows.flatten(0, 2), keys, out=scratch("tile maxima", size, rows.dtype, rows.device))
    return out.view(*rows.shape[:2], grid.block_q, -1).amax(2).unflatten(-1, (-1, grid.block_k)).amax(-1)


def _edge(left: Tensor, right: Tensor, grid: TileGrid, tile: int, first: int, end: int, offset: int) -> Tensor:
    """The maxima of a tile of rows over keys first ... end - 1, of which not every row sees every one: `(group, tiles)`."""
    logits = left[tile] @ right[:, first:end]  # (group, block_q, keys)
    if grid.causal:
        places = torch.arange(grid.block_q) + tile * grid.block_q + offset
        logits.masked_fill_(torch.arange(first, end) > places.unsqueeze(-1), -torch.inf)
    best = pad(logits.amax(1), (0, -(end - first) % grid.block_k), value=-torch.inf)
    return best.unflatten(-1, (-1, grid.block_k)).amax(-1)
