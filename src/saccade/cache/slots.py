"""What a cache policy works on: a layer's full-precision entries, or those of one batch row."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.cache.counted import CountedSegment
from saccade.cache.segment import Rectangle, Segment
from saccade.cache.tail import Tail
from saccade.parts.merging import LOG_WEIGHT
from saccade.parts.rows import pick_rows


class Slots:
    """Entries `(B, H, n, ...)`, oldest first, without padding. Implements `saccade.core.StoredKV`.

    keys, values: as attention sees them. They differ from what is stored only where a model caches a latent (`stored`), then
    heads is 1 while keys have all heads. valid: bool `(B, heads, n)` where heads hold different numbers, else None. counted: what stands
    for dropped tokens; a policy may replace it.
    """

    def __init__(
        self, stored: Rectangle, keys: Tensor | None = None, values: Tensor | None = None, counted: CountedSegment | None = None
    ) -> None:
        self._stored = stored
        self.counted = self._counted_before = counted
        self.keys = stored.keys if keys is None else keys
        self.values = stored.values if values is None else values
        self.side = dict(stored.side)
        self._tail: Tail | None = None  # whose storage these entries are, as long as all changes are made in it
        self.sealed: list[Segment] = []
        self.moved = False  # entries were dropped, replaced or sealed
        self.reordered = False  # slots no longer stand for the same entries, sealed ones counted before the others

    @classmethod
    def over(cls, tail: Tail, counted: CountedSegment | None = None) -> Slots:
        """All entries of a tail without padding. `drop` and `write` then work in its storage, and at once."""
        new = cls(Rectangle(tail.keys, tail.values, tail.side), counted=counted)
        new._tail = tail if tail.real is None else None
        return new

    def to_tail(self) -> Tail:
        """What is now stored as a tail: the one that was opened, if all changes were made in it, else a new one."""
        if self._tail is None:
            return Tail(self.rectangle)
        self._tail.set_side(self.side_changes)
        return self._tail

    @property
    def heads(self) -> int:
        return self._stored.keys.shape[1]

    @property
    def length(self) -> int:
        return self._stored.keys.shape[2]

    @property
    def valid(self) -> Tensor | None:
        return self._stored.valid

    @property
    def recounted(self) -> bool:
        """Whether `counted` was replaced."""
        return self.counted is not self._counted_before

    @property
    def rectangle(self) -> Rectangle:
        """What is now stored, side arrays included."""
        return Rectangle(self._stored.keys, self._stored.values, self.side, self._stored.valid)

    @property
    def side_changes(self) -> dict[str, Tensor]:
        """Side arrays that were added or replaced since the entries were opened or last moved."""
        return {name: x for name, x in self.side.items() if self._stored.side.get(name) is not x}

    def keep(self, indices: Tensor, counts: Tensor | None = None) -> None:
        """Keep only these slots: `indices (B, heads, m)` int64, ascending; with `counts (B, heads)` the first counts of each."""
        expected = (*self._stored.keys.shape[:2],)
        if indices.ndim != 3 or tuple(indices.shape[:2]) != expected:
            raise ValueError(f"keep was given indices {tuple(indices.shape)}: expected (batch, heads, m) = {expected} and m")
        valid = None
        if counts is not None and bool((counts != indices.shape[2]).any()):
            valid = torch.arange(indices.shape[2], device=indices.device) < counts.unsqueeze(-1)
        stored = self._stored
        latent = self.keys is not stored.keys
        self.side = {name: torch.gather(x, 2, indices) for name, x in self.side.items()}
        self._stored = Rectangle(pick_rows(stored.keys, indices), pick_rows(stored.values, indices), self.side, valid)
        if latent:
            wide = indices.expand(-1, self.keys.shape[1], -1)
            self.keys, self.values = pick_rows(self.keys, wide), pick_rows(self.values, wide)
        else:
            self.keys, self.values = self._stored.keys, self._stored.values
        self._replaced()

    def drop(self, begin: int, count: int) -> None:
        """Drop the slots begin ... begin + count - 1 of every head; heads must hold equally many entries.

        A whole tail moves its first `begin` entries and no others, so dropping one entry behind a few costs as much as those few.
        """
        if begin < 0 or count < 0 or begin + count > self.length or self.valid is not None:
            ragged = " of heads that hold different numbers" if self.valid is not None else ""
            raise ValueError(f"drop({begin}, {count}) does not fit {self.length} entries{ragged}")
        tail = self._in_place()
        if tail is None:
            slots = torch.arange(self.length - count, device=self._stored.keys.device)
            self.keep((slots + count * (slots >= begin)).expand(*self._stored.keys.shape[:2], -1))
            return
        tail.set_side(self.side_changes)
        tail.drop(begin, count)
        self._read(tail)
        self.moved = self.reordered = True

    def write(self, begin: int, keys: Tensor | None = None, values: Tensor | None = None, side: dict[str, int] | None = None) -> None:
        """Replace the stored keys, or values, or both `(B, H, m, ...)` of m slots from `begin` on; side: a number for each of side arrays,
        of which new ones have 0 elsewhere. Costs as much as m entries in a whole tail."""
        new = {name: x for name, x in (("keys", keys), ("values", values)) if x is not None}
        end = begin + max((x.shape[2] for x in new.values()), default=0)
        old = {name: getattr(self._stored, name) for name in new}
        for name, x in new.items():
            if x.shape != old[name][:, :, begin:end].shape or x.dtype != old[name].dtype:
                raise ValueError(
                    f"write({begin}) was given {name} {x.dtype} {tuple(x.shape)}: they don't fit {old[name].dtype} {tuple(old[name].shape)}"
                )
        for name, number in (side or {}).items():
            x = self.side.get(name)
            self.side[name] = torch.zeros_like(self.side["positions"]) if x is None else x if self._in_place() is not None else x.clone()
            self.side[name][:, :, begin:end].fill_(number)
        if self._in_place() is None:
            self.rewrite(**{name: torch.cat([old[name][:, :, :begin], x, old[name][:, :, end:]], 2) for name, x in new.items()})
            return
        for name, x in new.items():
            old[name][:, :, begin:end] = x
        self.moved = self.reordered = True

    def _in_place(self) -> Tail | None:
        """The tail whose storage may be changed, if there is one; autograd must not see its inputs change."""
        return None if self._stored.keys.requires_grad or self._stored.values.requires_grad else self._tail

    def _read(self, tail: Tail) -> None:
        self._stored = Rectangle(tail.keys, tail.values, tail.side)
        self.keys, self.values, self.side = self._stored.keys, self._stored.values, dict(self._stored.side)

    def _replaced(self) -> None:
        """The entries lie in storage of their own, in which slots stand for others than before."""
        self._tail, self.moved, self.reordered = None, True, True

    def insert(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Entries that are back: keys, values `(B, heads, r, ...)` of tokens at `positions (B, heads, r)`; other side arrays get zeros.

        Entries then lie in the order of their positions.
        """
        stored, new = self._stored, positions.new_zeros(positions.shape)
        side = {name: torch.cat([x, (positions if name == "positions" else new).to(x.dtype)], 2) for name, x in self.side.items()}
        valid = None if stored.valid is None else torch.cat([stored.valid, torch.ones_like(positions, dtype=torch.bool)], 2)
        places = side["positions"]
        # gaps stay at the end
        places = places if valid is None else places.masked_fill(~valid, torch.iinfo(places.dtype).max)
        order = torch.sort(places, dim=-1, stable=True).indices
        self.side = {name: torch.gather(x, 2, order) for name, x in side.items()}
        self.keys, self.values = (
            pick_rows(torch.cat([old, more], 2), order) for old, more in ((stored.keys, keys), (stored.values, values))
        )
        self._stored = Rectangle(self.keys, self.values, self.side, None if valid is None else torch.gather(valid, 2, order))
        self._replaced()

    def rewrite(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        """Replace the stored keys, or values, or both by others of the same shape (merged, or turned to other positions)."""
        stored = self._stored
        if self.keys is not stored.keys:
            raise ValueError("a layer that caches latents has no keys or values per head to rewrite: choose a method that only drops")
        for name, new, old in (("keys", keys, stored.keys), ("values", values, stored.values)):
            if new is not None and (new.shape != old.shape or new.dtype != old.dtype):
                raise ValueError(f"rewrite was given {name} {new.dtype} {tuple(new.shape)}: expected {old.dtype} {tuple(old.shape)}")
        self.keys = stored.keys if keys is None else keys
        self.values = stored.values if values is None else values
        self._stored = Rectangle(self.keys, self.values, stored.side, stored.valid)
        self._replaced()

    def seal(self, segment: Segment, n: int) -> None:
        """Replace the n oldest entries by an encoded segment that holds them."""
        if not 0 < n <= self.length or segment.length != n:
            raise ValueError(f"seal({n}) with a segment of {segment.length} entries over {self.length}: the numbers must agree")
        if self.keys is not self._stored.keys:
            raise ValueError("a layer that caches latents can't be encoded entry by entry")
        if LOG_WEIGHT in self.side and bool(self.side[LOG_WEIGHT][:, :, :n].any()):
            raise ValueError("entries that stand for several tokens can't be encoded with their weights: leave count weights off")
        self.side = {name: x[:, :, n:].clone() for name, x in self.side.items()}
        keys, values = self._stored.keys[:, :, n:].clone(), self._stored.values[:, :, n:].clone()
        left = None if self.valid is None else self.valid[:, :, n:]
        self._stored = Rectangle(keys, values, self.side, None if left is None or bool(left.all()) else left)
        self.keys, self.values = keys, values
        self.sealed.append(segment)
        self._tail, self.moved = None, True
