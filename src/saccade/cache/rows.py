"""Single batch rows of a cache layer: taken out of it, joined, and put side by side again."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.cache.segment import PackedSegment, Rectangle, Segment
from saccade.cache.tail import Tail


def padded_tail(rows: list[Rectangle]) -> Tail:
    """One rectangle of rows with different numbers of entries, the shorter ones padded in front."""
    longest = max(row.keys.shape[2] for row in rows)

    def stack(pieces: list[Tensor]) -> Tensor:
        padded = [torch.nn.functional.pad(x, (0, 0) * (x.ndim - 3) + (longest - x.shape[2], 0)) for x in pieces]
        return torch.cat(padded)

    side = {name: stack([row.side[name] for row in rows]) for name in rows[0].side}
    lengths = torch.tensor([row.keys.shape[2] for row in rows], device=rows[0].keys.device)
    real = torch.arange(longest, device=lengths.device) >= (longest - lengths)[:, None]
    return Tail(Rectangle(stack([row.keys for row in rows]), stack([row.values for row in rows]), side), real)


def empty_tail(packed: PackedSegment, rows: int) -> Tail:
    """A tail of so many rows without entries, for what comes after ragged ones."""
    shape = (rows, packed.heads, 0)
    keys, values = (x.new_empty(*shape, x.shape[-1]) for x in (packed.keys, packed.values))
    return Tail(Rectangle(keys, values, {name: x.new_empty(shape) for name, x in packed.side.items()}))


def rows_of_segments(segments: list[Segment], rows: Tensor) -> list[Segment]:
    """The segments of these batch rows; those of a single row go along with it."""
    taken: list[Segment] = []
    for segment in segments:
        if segment.row is None:
            taken.append(segment.take_rows(rows))
        else:
            taken.extend(segment.bound_to(new) for new, old in enumerate(rows.tolist()) if old == segment.row)
    return taken


def row_of(tail: Tail, row: int) -> Rectangle:
    mine = slice(row, row + 1)
    kept: slice | Tensor = slice(None)
    if tail.real is not None:
        n = int(tail.real[row].sum())
        # left padding leaves one run at the end: a view, where picking would copy
        kept = slice(tail.n - n, None) if bool(tail.real[row, tail.n - n :].all()) else tail.real[row]
    side = {name: x[mine][:, :, kept] for name, x in tail.side.items()}
    return Rectangle(tail.keys[mine][:, :, kept], tail.values[mine][:, :, kept], side)


def row_of_rectangle(part: Rectangle, row: int) -> Rectangle:
    mine = slice(row, row + 1)
    valid = None if part.valid is None else part.valid[mine]
    return Rectangle(part.keys[mine], part.values[mine], {name: x[mine] for name, x in part.side.items()}, valid)


def joined(old: Rectangle, new: Rectangle) -> Rectangle:
    """Older entries followed by newer ones; where heads hold different numbers, the gaps are moved to the end."""
    side = {name: torch.cat([x, new.side[name]], 2) for name, x in old.side.items()}
    keys, values = torch.cat([old.keys, new.keys], 2), torch.cat([old.values, new.values], 2)
    if old.valid is None:
        return Rectangle(keys, values, side)
    valid = torch.cat([old.valid, torch.ones_like(new.side["positions"], dtype=torch.bool)], 2)
    order = torch.sort((~valid).to(torch.uint8), dim=-1, stable=True).indices

    def moved(x: Tensor) -> Tensor:
        return torch.gather(x, 2, order.unsqueeze(-1).expand(*order.shape, x.shape[-1]))

    moved_side = {name: torch.gather(x, 2, order) for name, x in side.items()}
    return Rectangle(moved(keys), moved(values), moved_side, torch.gather(valid, 2, order))
