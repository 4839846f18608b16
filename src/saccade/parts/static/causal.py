"""Causal neighbourhoods in one dimension, for decoders: tokens keep their order, so an executor's own causality ends each window.

Rows of a query tile have windows with different beginnings unless the stride is the tile. The keys that some rows of a tile read and
others do not are read from copies of the keys in front of the sequence, which carry the bits of `masked_product`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from saccade.core import Selection
from saccade.parts.static.gridattend import Attend
from saccade.parts.static.masked_product import same_width, with_key_bits, with_row_bits, without_bits

ROWS = 32  # fewest rows of a query tile


def window_starts(positions: Tensor, window: int, stride: int, length: int | None = None) -> Tensor:
    """First key of the window of each position: `max(c - window + 1, 0)` with the leader c = the last of its stride group.

    length: the leader of an unfinished last group is length - 1 (as on a grid); None: as if the sequence went on.
    """
    leader = positions // stride * stride + stride - 1
    if length is not None:
        leader = leader.clamp(max=length - 1)
    return (leader - window + 1).clamp(min=0)


@dataclass(frozen=True, eq=False)
class CausalLists:
    """Lists for queries at the last n_q of n_k positions. pad: rows put in front so that tiles begin at multiples of their size.
    row_bits `(pad + n_q, R)`, key_bits `(n_k, R)`: see `masked_product`; None where the lists are exact. With bits, copies of the
    keys stand in front of them."""

    pad: int
    row_bits: Tensor | None
    key_bits: Tensor | None
    selection: Selection


@lru_cache(maxsize=32)
def causal_lists(n_q: int, n_k: int, window: int, stride: int, length: int | None, device: str) -> CausalLists:
    """Lists for a window and stride in tokens, `length` as in `window_starts`."""
    tile = stride if stride >= ROWS else stride * math.ceil(ROWS / stride)
    while tile > 4 * ROWS and tile % 2 == 0:
        tile //= 2
    pad = (n_k - n_q) % tile
    rows = n_q + pad
    first = torch.arange(n_k - rows, n_k, tile, device=device)
    positions = torch.arange(n_k - rows, n_k, device=device)
    starts = window_starts(positions, window, stride, length)
    low, core = starts[::tile], starts[(torch.arange(len(first), device=device) * tile + tile - 1).clamp(max=rows - 1)]
    end = (first + tile).clamp(max=n_k)
    longest = int((end - core).max())
    tiles = core.unsqueeze(1) + torch.arange(0, longest, tile, device=device)
    tiles = tiles.masked_fill(tiles >= end.unsqueeze(1), n_k)
    fringe = int((core - low).max())
    if not fringe:
        return CausalLists(pad, None, None, _selection(rows, n_k, tile, tiles, tiles[:, :0]))
    tokens = low.unsqueeze(1) + torch.arange(fringe, device=device)
    # natural keys stand behind the copies
    selection = _selection(
        rows, 2 * n_k, tile, (tiles + n_k).clamp(max=2 * n_k), tokens.masked_fill(tokens >= core.unsqueeze(1), 2 * n_k)
    )
    own = torch.arange(len(first), device=device).repeat_interleave(tile)[:rows]
    residue = torch.arange(fringe, device=device)
    # the key of each residue among the `fringe` keys from low on; a row may not read those before its start or after itself
    key_of = low[own].unsqueeze(1) + (residue - low[own].unsqueeze(1)) % fringe
    key_bits = torch.nn.functional.one_hot(torch.arange(n_k, device=device) % fringe, fringe).bool()
    forbidden = (key_of < starts.unsqueeze(1)) | (key_of > positions.unsqueeze(1))
    return CausalLists(pad, forbidden, key_bits, selection)


def _selection(n_q: int, n_k: int, tile: int, starts: Tensor, tokens: Tensor) -> Selection:
    starts, tokens = (x.to(torch.int32)[None, None] for x in (starts, tokens))
    return Selection(
        n_q=n_q, n_k=n_k, block_q=tile, block_k=tile, starts=starts, start_counts=(starts < n_k).sum(-1, dtype=torch.int32),
        tokens=tokens, token_counts=(tokens < n_k).sum(-1, dtype=torch.int32),
        aligned=not bool(((starts % tile != 0) & (starts < n_k)).any()),
    )  # fmt: skip


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, attend: Attend, *, window: int, stride: int = 1, dilation: int = 1, whole_grid: bool = False,
) -> Tensor:  # fmt: skip
    """Output `(B, Hq, n_q, Dv)`; the queries are the last n_q of n_k positions.

    whole_grid: the sequence ends with its last key, as on a grid (see `window_starts`). With a dilation the residues become rows
    of the batch.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    if dilation > 1:
        return _dilated(q, k, v, attend, window=window, stride=stride, dilation=dilation, whole_grid=whole_grid)
    lists = causal_lists(n_q, n_k, window, stride, n_k if whole_grid else None, str(q.device))
    width = v.shape[-1]
    if lists.pad:
        q = torch.nn.functional.pad(q, (0, 0, lists.pad, 0))
    if lists.row_bits is not None and lists.key_bits is not None:
        q = with_row_bits(q, lists.row_bits)
        k = torch.cat([with_key_bits(k, lists.key_bits), without_bits(k, lists.row_bits.shape[1])], 2)
        v = same_width(torch.cat([v, v], 2), k)
    return attend(q, k, v, lists.selection)[:, :, lists.pad :, :width]


def _dilated(
    q: Tensor, k: Tensor, v: Tensor, attend: Attend, *, window: int, stride: int, dilation: int, whole_grid: bool
) -> Tensor:
    n_q, n_k = q.shape[2], k.shape[2]
    front, back = (n_k - n_q) % dilation, -n_k % dilation
    if whole_grid and back and stride > 1:
        # residues of different lengths have different last leaders: each is run by itself
        out, rows = [], []
        for residue in range(dilation):
            own, keys = slice((residue - n_k + n_q) % dilation, None, dilation), slice(residue, None, dilation)
            rows.append(torch.arange(n_q, device=q.device)[own])
            if len(rows[-1]):
                part = (q[:, :, own], k[:, :, keys], v[:, :, keys])
                out.append(causal_attention(*part, attend, window=window, stride=stride, whole_grid=True))
        return torch.cat(out, 2).index_select(2, torch.cat(rows).argsort())
    batch = q.shape[0]

    def regroup(x: Tensor, before: int) -> Tensor:
        x = torch.nn.functional.pad(x, (0, 0, before, back)).unflatten(2, (-1, dilation))
        return x.permute(0, 3, 1, 2, 4).flatten(0, 1)

    # a key filled in behind the last one is in the future of every real query
    out = causal_attention(
        regroup(q, front), regroup(k, 0), regroup(v, 0), attend, window=window, stride=stride, whole_grid=whole_grid
    )
    return out.unflatten(0, (batch, dilation)).permute(0, 2, 3, 1, 4).flatten(2, 3)[:, :, front : front + n_q]


def exact_rows(n_q: int, n_k: int, window: int, stride: int, dilation: int, device: torch.device | str) -> Selection:
    """The same pattern row by row, in the order of the tokens: every query's keys one by one, n_q * window numbers."""
    positions = torch.arange(n_k - n_q, n_k, device=device)
    own = positions // dilation
    starts = window_starts(own, window, stride)
    keys = starts.unsqueeze(1) + torch.arange(int((own - starts).max()) + 1, device=device)
    tokens = (keys * dilation + (positions % dilation).unsqueeze(1)).masked_fill(keys > own.unsqueeze(1), n_k)
    return replace(_selection(n_q, n_k, 1, tokens[:, :0], tokens), aligned=True)
