"""Key lists of query tiles: what patterns produce, head by head, and what becomes one Selection for the layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.core import Selection
from saccade.core.tilemath import fill_past


class KeyLists(NamedTuple):
    """Keys read by each query tile: tiles of `block` keys from `starts (B, H, Tq, M)` on, and single `tokens (B, H, Tq, M')`.

    Both int32, ascending, entries past the end of a list hold n_k; tiles are disjoint and no token lies inside one. With `token_counts
    (B, H, Tq)` int32 the tokens are one list `(B, H, 1, M')`, of which each query tile reads that many, as a `Selection` has it.
    """

    starts: Tensor
    tokens: Tensor
    token_counts: Tensor | None = None

    def selection(self, *, n_q: int, n_k: int, block: int, block_q: int | None = None) -> Selection:
        """The Selection with key tiles of `block` and query tiles of `block_q` (default: the same).

        The lists hold what `Selection.from_parts` would have to sort out.
        """
        return Selection(
            n_q=n_q, n_k=n_k, block_q=block_q or block, block_k=block, starts=self.starts, tokens=self.tokens,
            start_counts=(self.starts < n_k).sum(-1, dtype=torch.int32),
            token_counts=(self.tokens < n_k).sum(-1, dtype=torch.int32) if self.token_counts is None else self.token_counts,
            aligned=not bool(((self.starts % block != 0) & (self.starts < n_k)).any()),
        )  # fmt: skip

    def own_lists(self, n_k: int) -> KeyLists:
        """The same with a token list for each query tile."""
        return self if self.token_counts is None else KeyLists(self.starts, fill_past(self.tokens, self.token_counts, n_k))


def tile_ends(n_q: int, n_k: int, block: int, device: torch.device | str = "cpu") -> Tensor:
    """One past the last position of each query tile, as if the last tile were whole: int64 `(Tq,)`."""
    return torch.arange(1, math.ceil(n_q / block) + 1, device=device) * block + n_k - n_q


def run_tiles(begin: Tensor, end: Tensor, block: int, n_k: int) -> Tensor:
    """Starts of the tiles that cover `[begin, end)` from the left: `(...)` int64 each to `(..., M)` int32; nothing where begin >= end."""
    longest = math.ceil(max(0, int((end - begin).max())) / block)
    starts = begin.unsqueeze(-1) + torch.arange(longest, device=begin.device) * block
    return starts.masked_fill(starts >= end.unsqueeze(-1).clamp(max=n_k), n_k).to(torch.int32)


def compact(ids: Tensor, keep: Tensor, n_k: int) -> Tensor:
    """The entries of ascending `ids (..., m)` for which `keep` holds, moved to the front: `(..., longest)`, past the end n_k."""
    counts = keep.cumsum(-1, dtype=torch.int32)
    longest = int(counts[..., -1].max()) if keep.numel() else 0
    # entries that go share one slot behind the list, which is cut off
    slots = torch.where(keep, counts - 1, longest).long()
    kept = torch.full((*slots.shape[:-1], longest + 1), n_k, dtype=torch.int32, device=ids.device)
    return kept.scatter_(-1, slots, ids.to(torch.int32).expand(slots.shape))[..., :longest]


def hits(mask: Tensor) -> Tensor:
    """The positions of the True entries of `mask (..., n)`, ascending, int32 `(..., longest)`, past the end n.

    The same as `list_true`, for masks with few entries: the work goes with those that are True.
    """
    n = mask.shape[-1]
    rows, found = mask.flatten(0, -2).nonzero(as_tuple=True)
    counts = mask.sum(-1).flatten()
    longest = int(counts.max()) if counts.numel() else 0
    slots = torch.arange(rows.shape[0], device=mask.device) - (counts.cumsum(0) - counts)[rows]
    listed = torch.full((counts.shape[0], longest), n, dtype=torch.int32, device=mask.device)
    listed[rows, slots] = found.to(torch.int32)
    return listed.view(*mask.shape[:-1], longest)


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


def join_heads(parts: Sequence[tuple[Tensor, KeyLists]], n_k: int) -> KeyLists:
    """Lists of different heads put together: `(head indices (h,), lists of those heads)` in, lists of all heads out."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.cat([heads for heads, _ in parts]).argsort()
    joined = []
    own = [lists.own_lists(n_k) for _, lists in parts]
    for pieces in ([lists.starts for lists in own], [lists.tokens for lists in own]):
        longest = max(piece.shape[-1] for piece in pieces)
        batch = max(piece.shape[0] for piece in pieces)
        same = [
            torch.nn.functional.pad(piece, (0, longest - piece.shape[-1]), value=n_k).expand(batch, -1, -1, -1)
            for piece in pieces
        ]
        joined.append(torch.cat(same, dim=1)[:, order])
    return KeyLists(*joined)


def open_rows(lists: KeyLists, *, n_q: int, n_k: int, last: int, block: int) -> KeyLists:
    """The same lists, but the query tiles that hold the `last` rows read every key."""
    whole = torch.arange(0, n_k, block, dtype=torch.int32, device=lists.starts.device)
    more = max(0, whole.shape[0] - lists.starts.shape[-1])
    starts = torch.nn.functional.pad(lists.starts, (0, more), value=n_k)
    whole = torch.nn.functional.pad(whole, (0, starts.shape[-1] - whole.shape[0]), value=n_k)
    tile = torch.arange(starts.shape[2], device=starts.device).unsqueeze(-1)
    opened = (tile + 1) * block > n_q - last
    starts = torch.where(opened, whole, starts)
    if lists.token_counts is None:
        return KeyLists(starts, torch.where(opened, n_k, lists.tokens))
    counts = lists.token_counts.masked_fill(opened.squeeze(-1), 0)
    return KeyLists(starts, fill_past(lists.tokens, counts.amax(-1, keepdim=True), n_k), counts)
