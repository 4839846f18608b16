"""Key lists of query tiles: what patterns produce, head by head, and what becomes one Selection for the layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.core import Selection
from saccade.core.tilemath import fill_past
from saccade.ops.estimate import best_ids


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
        there = self.starts < n_k
        return Selection(
            n_q=n_q, n_k=n_k, block_q=block_q or block, block_k=block, starts=self.starts, tokens=self.tokens,
            start_counts=there.sum(-1, dtype=torch.int32),
            token_counts=(self.tokens < n_k).sum(-1, dtype=torch.int32) if self.token_counts is None else self.token_counts,
            aligned=not bool(((self.starts % block != 0) & there).any()),
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


def best_listed(scores: Tensor, counts: Tensor) -> Tensor:
    """The `counts (B or 1, H)` highest of each row of `scores (B, H, n)`: ascending int32 `(B, H, longest)`, past the end n.

    Ties go to the lower position, a nan counts as the highest score. Counts on the CPU save a question to the device.
    """
    n = scores.shape[-1]
    most = min(n, int(counts.max()))
    ids = best_ids(scores, most)
    if not bool((counts >= most).all()):
        # the best of the best: only as many as the longest row lists are put in order
        order = torch.sort(scores.gather(-1, ids), dim=-1, descending=True, stable=True).indices
        past = torch.arange(most, device=ids.device) >= counts.to(ids.device).unsqueeze(-1)
        ids = ids.gather(-1, order).masked_fill(past, n).sort(-1).values
    return ids.to(torch.int32)


def hits(mask: Tensor) -> Tensor:
    """The positions of the True entries of `mask (..., n)`, ascending, int32 `(..., longest)`, past the end n.

    The same as `list_true`, for masks with few entries: the work goes with those that are True.
    """
    n = mask.shape[-1]
    found = mask.flatten(0, -2).nonzero()[:, 1].to(torch.int32)
    counts = mask.sum(-1)
    longest = int(counts.max()) if counts.numel() else 0
    listed = torch.full((*mask.shape[:-1], longest), n, dtype=torch.int32, device=mask.device)
    # they are found row by row, as the front parts of the rows take them in
    return listed.masked_scatter_(torch.arange(longest, device=mask.device) < counts.unsqueeze(-1), found)


def join_heads(parts: Sequence[tuple[Tensor, KeyLists]], n_k: int) -> KeyLists:
    """Lists of different heads put together: `(head indices (h,), lists of those heads)` in, lists of all heads out."""
    if len(parts) == 1:
        return parts[0][1]
    joined = []
    own = [(heads, lists.own_lists(n_k)) for heads, lists in parts]
    for pieces in ([(heads, lists.starts) for heads, lists in own], [(heads, lists.tokens) for heads, lists in own]):
        batch, longest = (max(piece.shape[i] for _, piece in pieces) for i in (0, 3))
        shape = (batch, sum(piece.shape[1] for _, piece in pieces), pieces[0][1].shape[2], longest)
        whole = torch.full(shape, n_k, dtype=torch.int32, device=pieces[0][1].device)
        for heads, piece in pieces:
            whole[:, heads, :, : piece.shape[3]] = piece
        joined.append(whole)
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
