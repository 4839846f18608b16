"""Sealed parts of a cache layer: entries that no longer change, in a storage form of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Partial, merge
from saccade.ops import attend, decode
from saccade.parts.merging import LOG_WEIGHT
from saccade.parts.rows import pick_rows

CHUNK = 2048  # entries decoded at a time when a segment is read for attention


@dataclass(frozen=True)
class Rectangle:
    """Entries in plain form: keys `(B, H, n, D)`, values `(B, H, n, Dv)`, side arrays `(B, H, n)`; valid `(B, H, n)` bool or
    None when all are. Slots that are not valid hold anything."""

    keys: Tensor
    values: Tensor
    side: dict[str, Tensor]
    valid: Tensor | None = None


class Segment(ABC):
    """row: the batch row it belongs to, or None for all rows. encoded: whether policies leave it alone from now on."""

    row: int | None = None
    encoded: bool = False

    @property
    @abstractmethod
    def length(self) -> int:
        """Entries of the longest head."""

    @abstractmethod
    def lengths(self) -> list[list[int]]:
        """Entries per row and head."""

    @property
    @abstractmethod
    def kv_bytes(self) -> int:
        """Bytes held for keys and values, codes and their parameters included."""

    @property
    @abstractmethod
    def side_bytes(self) -> int:
        """Bytes held for positions and other side arrays."""

    @property
    def host_bytes(self) -> int:
        """Bytes held for keys and values in the host's memory, beside `kv_bytes`; 0 unless it is offloaded."""
        return 0

    @abstractmethod
    def read(self, begin: int, end: int) -> Rectangle:
        """Slots begin ... end - 1 in plain form (a copy)."""

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `(B, H, m, D)` and values `(B, H, m, Dv)` of slots `(B, H, m)` int64, in any order; only for heads of equal lengths.

        The default decodes CHUNK entries at a time and picks from them; forms that reach single entries override it.
        """
        found: tuple[Tensor, Tensor] | None = None
        for begin in range(0, self.length, CHUNK):
            end = min(begin + CHUNK, self.length)
            mine = ((slots >= begin) & (slots < end)).unsqueeze(-1)
            if found is None or bool(mine.any()):
                part, inside = self.read(begin, end), (slots - begin).clamp(0, end - begin - 1)
                new = (pick_rows(part.keys, inside), pick_rows(part.values, inside))
                found = new if found is None else (torch.where(mine, new[0], found[0]), torch.where(mine, new[1], found[1]))
        if found is None:
            raise ValueError("an empty segment has no entries to gather")
        return found

    @abstractmethod
    def take_rows(self, rows: Tensor) -> Segment:
        """These batch rows, for a segment of all rows."""

    @abstractmethod
    def bound_to(self, row: int) -> Segment:
        """The same entries as a segment of another batch row, for a row-bound segment."""

    @abstractmethod
    def before(self, position: int) -> Segment:
        """Only the entries of tokens before `position`."""

    def attend(self, q: Tensor, *, scale: float, softcap: float | None) -> Partial:
        """Attention of q `(B, Hq, m, D)` over all entries, with log-sum-exp. Decodes CHUNK entries at a time."""
        parts = []
        for begin in range(0, self.length, CHUNK):
            part = self.read(begin, min(begin + CHUNK, self.length))
            parts.append(attend_rectangle(q, part.keys, part.values, scale=scale, softcap=softcap))
        return merge(*parts)

    def attend_row(self, q: Tensor, row: int | None, *, scale: float, softcap: float | None) -> Partial:
        """The same for the queries of one batch row (batch size 1), where rows are run one by one; None: all rows."""
        if row is None or self.row == row:
            return self.attend(q, scale=scale, softcap=softcap)
        return self.take_rows(torch.tensor([row])).attend(q, scale=scale, softcap=softcap)


def attend_rectangle(q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None) -> Partial:
    """All of q over all of k and v, with log-sum-exp."""
    if q.shape[2] <= 16:
        return decode(q, k, v, scale=scale, softcap=softcap, return_lse=True)
    return attend(q, k, v, causal=False, scale=scale, softcap=softcap, return_lse=True)


class PackedSegment(Segment):
    """Ragged storage: the entries of (row, head) pairs one after another, each pair with its own number of them.

    keys `(total, D)`, values `(total, Dv)`, side arrays `(total,)`; offsets: B * H + 1 row numbers.
    """

    def __init__(self, keys: Tensor, values: Tensor, side: dict[str, Tensor], offsets: list[int], heads: int) -> None:
        self.keys, self.values, self.side, self.offsets, self.heads = keys, values, side, offsets, heads

    @classmethod
    def pack(cls, rows: list[Rectangle]) -> PackedSegment:
        """From one rectangle per batch row (each with batch size 1), dropping what is not valid."""
        offsets, keys, values = [0], [], []
        dtypes = {name: x.dtype for row in rows for name, x in row.side.items()}
        side: dict[str, list[Tensor]] = {name: [] for name in dtypes}
        for row in rows:
            # a row that a policy has not met yet lacks its side arrays: 0, as for new entries
            given = {name: row.side.get(name, row.side["positions"].new_zeros(1, dtype=dtypes[name])) for name in side}
            given = {name: x.expand(row.side["positions"].shape) for name, x in given.items()}
            for head in range(row.keys.shape[1]):
                kept = slice(None) if row.valid is None else row.valid[0, head]
                keys.append(row.keys[0, head][kept])
                values.append(row.values[0, head][kept])
                for name, pieces in side.items():
                    pieces.append(given[name][0, head][kept])
                offsets.append(offsets[-1] + keys[-1].shape[0])
        packed = {name: torch.cat(pieces) for name, pieces in side.items()}
        return cls(torch.cat(keys), torch.cat(values), packed, offsets, rows[0].keys.shape[1])

    @property
    def length(self) -> int:
        return max((n for row in self.lengths() for n in row), default=0)

    def lengths(self) -> list[list[int]]:
        counts = [b - a for a, b in zip(self.offsets, self.offsets[1:], strict=False)]
        return [counts[i : i + self.heads] for i in range(0, len(counts), self.heads)]

    @property
    def kv_bytes(self) -> int:
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    @property
    def side_bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.side.values())

    def _rows(self, row: int, head: int) -> slice:
        pair = row * self.heads + head
        return slice(self.offsets[pair], self.offsets[pair + 1])

    def read_row(self, row: int) -> Rectangle:
        """One batch row as a rectangle of its longest head, with `valid` where heads differ."""
        counts = self.lengths()[row]
        n = max(counts)
        pad = torch.nn.functional.pad

        def stack(x: Tensor) -> Tensor:
            pieces = [x[self._rows(row, head)] for head in range(self.heads)]
            return torch.stack([pad(p, (0, 0) * (p.ndim - 1) + (0, n - p.shape[0])) for p in pieces])[None]

        valid = None
        if min(counts) != n:
            valid = (torch.arange(n, device=self.keys.device) < torch.tensor(counts, device=self.keys.device)[:, None])[None]
        return Rectangle(stack(self.keys), stack(self.values), {name: stack(x) for name, x in self.side.items()}, valid)

    def read(self, begin: int, end: int) -> Rectangle:
        raise TypeError("a packed segment is read row by row: use read_row")

    def take_rows(self, rows: Tensor) -> PackedSegment:
        return PackedSegment.pack([self.read_row(int(row)) for row in rows])

    def bound_to(self, row: int) -> PackedSegment:
        raise TypeError("a packed segment holds all rows of the batch")

    def before(self, position: int) -> PackedSegment:
        rows = []
        for row in range(len(self.lengths())):
            part = self.read_row(row)
            kept = part.side["positions"] < position
            rows.append(Rectangle(part.keys, part.values, part.side, kept if part.valid is None else kept & part.valid))
        return PackedSegment.pack(rows)

    def attend_row(self, q: Tensor, row: int | None, *, scale: float, softcap: float | None) -> Partial:
        return (self if row is None else self.of_row(row)).attend(q, scale=scale, softcap=softcap)

    def of_row(self, row: int) -> PackedSegment:
        """Keys, values and weights of one batch row: a view, to be read and not kept."""
        first = row * self.heads
        begin, end = self.offsets[first], self.offsets[first + self.heads]
        offsets = [offset - begin for offset in self.offsets[first : first + self.heads + 1]]
        side = {name: x[begin:end] for name, x in self.side.items() if name == LOG_WEIGHT}
        return PackedSegment(self.keys[begin:end], self.values[begin:end], side, offsets, self.heads)

    def attend(self, q: Tensor, *, scale: float, softcap: float | None) -> Partial:
        if LOG_WEIGHT in self.side and bool(self.side[LOG_WEIGHT].any()):
            rows = [self._attend_weighted(q[b : b + 1], b, scale, softcap) for b in range(q.shape[0])]
            return Partial(torch.cat([p.out for p in rows]), torch.cat([p.lse for p in rows if p.lse is not None]))
        parts = [
            decode(
                q[:, :, i : i + 16], self.keys, self.values, offsets=self.offsets, kv_heads=self.heads, scale=scale,
                softcap=softcap, return_lse=True,
            )
            for i in range(0, q.shape[2], 16)
        ]  # fmt: skip
        return Partial(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts if p.lse is not None], 2))

    def _attend_weighted(self, q: Tensor, row: int, scale: float, softcap: float | None) -> Partial:
        """One row whose entries have weights: its heads side by side, what they lack masked."""
        part = self.read_row(row)
        bias = part.side[LOG_WEIGHT]
        bias = bias if part.valid is None else bias.masked_fill(~part.valid, -torch.inf)
        bias = bias.repeat_interleave(q.shape[1] // self.heads, 1).unsqueeze(2)
        return attend(q, part.keys, part.values, causal=False, scale=scale, softcap=softcap, bias=bias, return_lse=True)
