"""Attention over a neighbourhood: reorder, attend over the lists, order back."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from saccade.core import Selection
from saccade.parts.static.gridlists import GridLists, grid_lists
from saccade.parts.static.masked_product import same_width, with_key_bits, with_row_bits, without_bits
from saccade.parts.static.neighborhood import Neighborhood

Attend = Callable[[Tensor, Tensor, Tensor, Selection], Tensor]
CPU_ROWS, GPU_ROWS, GPU_KEYS = 64, 128, 64  # rows of a query tile and keys of a key tile that an executor likes


def grid_attention(
    q: Tensor, k: Tensor, v: Tensor, hood: Neighborhood, attend: Attend, *, extra: int = 0, tile: tuple[int, ...] | None = None,
    key_tile: tuple[int, ...] | None = None,
) -> Tensor:  # fmt: skip
    """Output `(B, Hq, N, Dv)` for the N queries of the grid over k, v of N + `extra` keys, the extra ones last and read by all.

    attend: runs softmax attention over a selection, with the scale of the D channels of q. tile: coordinates of a query tile along
    each axis; key_tile: the same for keys, None to let them lie and read them one by one. Both change speed, never the result.
    """
    lists = grid_lists(hood, tile or query_tile(hood, CPU_ROWS), key_tile, extra, str(q.device))
    return over_lists(q, k, v, lists, attend)


def over_lists(q: Tensor, k: Tensor, v: Tensor, lists: GridLists, attend: Attend) -> Tensor:
    """Reorder q, k and v as the lists say, attend, and put the rows back."""
    q = q.index_select(2, lists.rows)
    n, width = k.shape[2] - lists.extra, v.shape[-1]
    k, more_k, v, more_v = k[:, :, :n], k[:, :, n:], v[:, :, :n], v[:, :, n:]
    if lists.keys is not None:
        k, v = k.index_select(2, lists.keys), v.index_select(2, lists.keys)
    pieces_k, pieces_v = [k], [v]
    if lists.row_bits is not None and lists.key_bits is not None:
        bits = lists.row_bits.shape[1]
        q = with_row_bits(q, lists.row_bits)
        marked = with_key_bits(k, lists.key_bits)
        pieces_k, pieces_v = ([without_bits(k, bits), marked], [v, v]) if lists.twice else ([marked], [v])
        more_k = without_bits(more_k, bits)
    if lists.extra:
        pieces_k, pieces_v = [*pieces_k, more_k], [*pieces_v, more_v]
    if len(pieces_k) > 1:
        k, v = torch.cat(pieces_k, 2), torch.cat(pieces_v, 2)
    else:
        k, v = pieces_k[0], pieces_v[0]
    out = attend(q, k, v if lists.row_bits is None else same_width(v, k), lists.selection)
    return out[..., :width].index_select(2, lists.places)


def query_tile(hood: Neighborhood, rows: int) -> tuple[int, ...]:
    """Coordinates of a query tile along each axis, about `rows` in all.

    A tile starts as one stride group (whose rows share their window, so nothing must be masked), or a divisor of it; then it grows
    along axes whose windows span them, and after that along the shortest side. Along causal axes windows end at each query, so a
    tile has one coordinate there as long as others can grow.
    """
    extents = hood.extents((0,) * hood.rank)
    full = [w == n and not c for w, n, c in zip(hood.window, extents, hood.causal, strict=True)]
    tile = [1 if c else min(s, n) for s, n, c in zip(hood.stride, extents, hood.causal, strict=True)]
    while math.prod(tile) > 2 * rows:
        longest = max(range(hood.rank), key=lambda a: tile[a])
        tile[longest] //= _least_divisor(tile[longest])
    # rows along an axis that all of them read whole share their gathered keys at no cost, so there may be more of them
    for free, most in ((full, 4 * rows), ([not c for c in hood.causal], rows), ([True] * hood.rank, rows)):
        while math.prod(tile) <= most // 2:
            open_axes = [a for a in range(hood.rank) if free[a] and tile[a] < extents[a]]
            if not open_axes:
                break
            axis = min(open_axes, key=lambda a: (tile[a], -a))
            tile[axis] = min(2 * tile[axis], extents[axis])
    return tuple(tile)


def _least_divisor(n: int) -> int:
    return next((p for p in range(2, n + 1) if n % p == 0), 1)


def tiles_for(hood: Neighborhood, device: torch.device) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Query and key tiles that suit a device: a CPU gathers single keys as fast as tiles, a GPU wants tiles of keys."""
    if device.type == "cpu":
        return query_tile(hood, CPU_ROWS), None
    plain = Neighborhood.of(hood.grid, hood.window, 1, hood.dilation)
    return query_tile(hood, GPU_ROWS), query_tile(plain, GPU_KEYS)
