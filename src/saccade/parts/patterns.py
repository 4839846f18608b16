"""Shapes of sparse attention maps as key lists: local band, A-shape, vertical-slash, whole blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.tilemath import list_true
from saccade.ops.estimate import slash_lists
from saccade.ops.estimate.reference_lists import compact
from saccade.parts.lists import KeyLists, run_tiles


def a_shape(initial: Tensor, local: Tensor, ends: Tensor, block: int, n_k: int) -> KeyLists:
    """The first `initial` keys and each query's last `local` ones, itself included; int64 `(B, H)` each. All rows of a query tile
    read what any of them needs.

    ends `(Tq,)` as from `tile_ends`. The initial keys are tiles as far as they fill them, then single keys.
    """
    initial, local = (size.unsqueeze(-1) for size in torch.broadcast_tensors(initial, local))
    last = ends.clamp(max=n_k)
    whole = initial // block * block
    near = torch.maximum(ends - block - local + 1, whole)
    first = run_tiles(torch.zeros_like(near), torch.minimum(whole, last).expand_as(near), block, n_k)
    starts = torch.cat([first, run_tiles(near, last.expand_as(near), block, n_k)], dim=-1).sort(-1).values
    rest = whole.unsqueeze(-1) + torch.arange(block, device=ends.device)
    keep = (rest < initial.unsqueeze(-1)) & (rest < torch.minimum(near, last).unsqueeze(-1))
    return KeyLists(starts, compact(rest.expand(keep.shape), keep, n_k))


def band_and_columns(columns: Tensor, width: int, ends: Tensor, block: int) -> KeyLists:
    """Each query's last `width` keys, itself included, and chosen columns: bool `(B, H, n_k)`."""
    n_k = columns.shape[-1]
    begin = (ends - block - width + 1).clamp(min=0)
    shape = (*columns.shape[:2], ends.shape[0])
    starts = run_tiles(begin, ends.clamp(max=n_k), block, n_k).expand(*shape, -1)
    # the band reaches from `begin` to the newest row, so what a tile lists beside it is the front part of one list
    ids, _ = list_true(columns & (torch.arange(n_k, device=columns.device) < begin[-1]))
    counts = torch.searchsorted(ids, begin.to(torch.int32).expand(shape).contiguous(), out_int32=True)
    return KeyLists(starts, ids.unsqueeze(2), counts)


def vertical_slash(columns: Tensor, offsets: Tensor, ends: Tensor, block: int) -> KeyLists:
    """Chosen columns and chosen diagonals (offset = query position - key position), bool `(B, H, n_k)` each."""
    return listed_slash(list_true(columns)[0], list_true(offsets)[0], ends, block, columns.shape[-1])


def listed_slash(columns: Tensor, offsets: Tensor, ends: Tensor, block: int, n_k: int) -> KeyLists:
    """The same from ascending ids int32 `(B, H, m)` of the columns and of the diagonals, past the end n_k.

    Diagonals become tiles, columns outside them stay single keys: nothing is listed twice.
    """
    return KeyLists(*slash_lists(columns, offsets, ends, block=block, n_k=n_k))


def blocks(chosen: Tensor, block: int, n_k: int) -> KeyLists:
    """Chosen blocks of keys of each query tile, bool `(B, H, Tq, ceil(n_k / block))`."""
    ids, _ = list_true(chosen)
    starts = (ids.long() * block).clamp(max=n_k).to(torch.int32)
    return KeyLists(starts, starts.new_empty(*starts.shape[:3], 0))
