"""Index arithmetic under Selection: lists from masks, masks from lists, and pair counts in closed form."""

from __future__ import annotations

import torch
from torch import Tensor


def list_true(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The positions of the True entries of `mask (..., n)`, ascending, as int32 ids `(..., m)` and counts `(...)`.

    m is the largest count; entries past a row's count hold n.
    """
    n = mask.shape[-1]
    counts = mask.sum(-1, dtype=torch.int32)
    longest = int(counts.max()) if counts.numel() else 0
    # a stable sort on "absent" moves the present positions to the front in ascending order
    ids = torch.sort((~mask).to(torch.uint8), dim=-1, stable=True).indices[..., :longest].to(torch.int32)
    return fill_past(ids, counts, n), counts


def fill_past(ids: Tensor, counts: Tensor, value: int | float) -> Tensor:
    """`ids (..., m)` with every entry at or past `counts (...)` set to `value`."""
    past = torch.arange(ids.shape[-1], device=ids.device) >= counts.unsqueeze(-1)
    return ids.masked_fill(past, value)


def cover(starts: Tensor, length: int, n: int) -> Tensor:
    """True where an interval `[start, start + length)` covers a key: `starts (..., m)` (start >= n: none) to `(..., n)` bool."""
    edges = torch.zeros(*starts.shape[:-1], n + 1, dtype=torch.int32, device=starts.device)
    ones = torch.ones_like(starts, dtype=torch.int32)
    begin, end = starts.long().clamp(max=n), (starts.long() + length).clamp(max=n)
    edges.scatter_add_(-1, begin, ones)
    edges.scatter_add_(-1, end, -ones)
    return edges[..., :n].cumsum(-1) > 0


def mark(ids: Tensor, n: int) -> Tensor:
    """True at the listed ids: `ids (..., m)` (id >= n: none) to `(..., n)` bool."""
    marks = torch.zeros(*ids.shape[:-1], n + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter_(-1, ids.long().clamp(max=n), True)[..., :n]


def _pairs_before(row: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Sum over rows p < row of the keys of [start, end) that are <= p."""
    length = end - start
    inside = (row - start).clamp(min=0)
    inside = torch.minimum(inside, length)
    return inside * (inside + 1) // 2 + (row - end).clamp(min=0) * length


def causal_pairs(first_row: Tensor, last_row: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Pairs (p, j) with `first_row <= p < last_row`, `start <= j < end` and `j <= p`; int64, broadcasting."""
    return _pairs_before(last_row, start, end) - _pairs_before(first_row, start, end)


def row_tiles(n_q: int, block_q: int, first_position: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and one-past-last query position of each query tile, int64 `(Tq,)` each."""
    first = torch.arange(0, n_q, block_q, device=device)
    return first + first_position, (first + block_q).clamp(max=n_q) + first_position


def sorted_unique(
    ids: Tensor, counts: Tensor | None, weight: Tensor | None, n: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sort each row, drop what lies outside [0, n) and repeats, and say how many are left."""
    ids = ids.to(torch.int32)
    if counts is not None:
        ids = fill_past(ids, counts, n)
    ids = ids.masked_fill((ids < 0) | (ids >= n), n)
    for _ in range(2):  # the second sort moves the repeats found by the first to the end
        ids, order = torch.sort(ids, dim=-1, stable=True)
        weight = None if weight is None else torch.gather(weight, -1, order)
        repeated = ids[..., 1:] == ids[..., :-1]
        ids = torch.cat([ids[..., :1], ids[..., 1:].masked_fill(repeated, n)], dim=-1)
    counts = (ids < n).sum(-1, dtype=torch.int32)
    longest = int(counts.max()) if counts.numel() else 0
    return ids[..., :longest], counts, None if weight is None else weight[..., :longest].float()


def listed_pairs(
    ids: Tensor, counts: Tensor, length: int, first_row: Tensor, last_row: Tensor, n_k: int, rows: int
) -> Tensor:
    """Pairs (p, j) with j <= p of rows `first_row <= p < last_row (T,)`, at most `rows` of them, and keys j of `[id, id + length)`.

    ids: `(B, H, T, M)` ascending and at least `length` apart, or one list `(B, H, 1, M)`; the first `counts (B, H, T)` of each count.
    int64 `(B, H)`. Lists are searched, not gone through: what ends before the first row is read by every row, and only the few that
    reach into the tile's own rows are looked at.
    """
    batch, heads, lists, longest = ids.shape
    tiles, ends = counts.shape[2], counts.unsqueeze(-1)
    first, last = first_row.unsqueeze(-1), last_row.unsqueeze(-1)
    together = tiles // max(lists, 1)  # tiles that look into the same list, side by side
    bound = (first - length + 1).to(ids.dtype).view(lists, together).expand(batch, heads, -1, -1).contiguous()
    whole = torch.searchsorted(ids.contiguous(), bound, right=True).view(batch, heads, tiles, 1).minimum(ends)
    seen = whole * length * (last - first)
    some = min(longest, max(0, (rows + length - 3) // length + 1))
    if some:
        at = whole + torch.arange(some, device=ids.device)
        places = at.clamp(max=longest - 1).view(batch, heads, lists, together * some)
        begin = ids.gather(-1, places).view(at.shape).long()
        pairs = causal_pairs(first, last, begin, (begin + length).clamp(max=n_k))
        seen = seen + pairs.masked_fill_(at >= ends, 0).sum(-1, keepdim=True)
    return seen.sum((-1, -2))
