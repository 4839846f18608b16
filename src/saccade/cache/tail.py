"""The full-precision end of a cache layer: a rectangle that grows."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from saccade.cache.segment import Rectangle
from saccade.cache.sliding import Sliding
from saccade.ops.append import append_rows, quick
from saccade.parts.growing import Growing


class Tail:
    """keys `(B, H, n, D)`, values `(B, H, n, Dv)`, side arrays `(B, H, n)` ("positions" int32 among them), padding `(B, 1, n)`.

    A slot that is padding is never read; padding is None as long as none was seen.
    """

    def __init__(self, content: Rectangle, real: Tensor | None = None) -> None:
        self._keys, self._values = Growing(content.keys), Growing(content.values)
        self._side: dict[str, Growing] = {name: Growing(x) for name, x in content.side.items()}
        self._real = None if real is None else Growing(real.unsqueeze(1))
        self.fresh = 0  # entries appended since the last keep: their positions run on without gaps

    @property
    def n(self) -> int:
        return self._keys.n

    @property
    def keys(self) -> Tensor:
        return self._keys.view

    @property
    def values(self) -> Tensor:
        return self._values.view

    @property
    def side(self) -> dict[str, Tensor]:
        return {name: x.view for name, x in self._side.items()}

    @property
    def real(self) -> Tensor | None:
        """`(B, n)` bool, False at padding; None when there is none."""
        return None if self._real is None else self._real.view[:, 0]

    def append(self, k: Tensor, v: Tensor, positions: Tensor | int, real: Tensor | None) -> None:
        """Add k, v `(B, H, m, ...)` at `positions (m,)` or `(B, 1, m)`, or from a position on, one after the other; real `(B, m)` bool or
        None. Other side arrays get zeros."""
        batch, heads, m, _ = k.shape
        if real is not None and self._real is None:
            self._real = Growing(torch.ones(batch, 1, self.n, dtype=torch.bool, device=k.device))
        if self._real is not None:
            new = torch.ones(batch, m, dtype=torch.bool, device=k.device) if real is None else real
            self._real.append(new.unsqueeze(1))
        self.fresh += m
        if isinstance(positions, int) and self._append_run(k, v, positions):
            return
        if isinstance(positions, int):
            positions = torch.arange(positions, positions + m, device=k.device, dtype=torch.int32)
        self._keys.append(k)
        self._values.append(v)
        for name, x in self._side.items():
            new = positions if name == "positions" else positions.new_zeros(m)
            x.append(new.to(x.view.dtype).expand(batch, heads, m))

    def _append_run(self, k: Tensor, v: Tensor, first: int) -> bool:
        """The same in one kernel, for few tokens on a GPU, where keys, values and positions lie alike; whether it was done."""
        if self._side.keys() != {"positions"} or not quick(self.keys, [k, v]):
            return False
        places = self._side["positions"]
        (keys, at), (values, other), (line, third) = (x.extend(k.shape[2]) for x in (self._keys, self._values, places))
        if at == other == third and keys.shape[2] == values.shape[2] == line.shape[2]:
            append_rows([keys, values], [k, v], at, line, first)
            return True
        for x in (self._keys, self._values, places):
            x.truncate(x.n - k.shape[2])
        return False

    def room(self, m: int, seen: int) -> tuple[Tensor, Tensor]:
        """Where the next m tokens go, which stand at position `seen` and after: keys `(B, H, m, D)` and values `(B, H, m, Dv)`, to be
        written and then counted; what stands beside them is written already."""
        if self._real is not None:
            raise ValueError("there is no common room behind rows that are padded: run them one by one")
        for name, x in self._side.items():
            place = x.room(m)
            place.copy_(torch.arange(seen, seen + m, device=place.device)) if name == "positions" else place.zero_()
        return self._keys.room(m), self._values.room(m)

    def count(self, m: int = 1) -> None:
        """Take in m tokens that were written to the room behind the entries, or give as many back (m negative)."""
        for x in (self._keys, self._values, *self._side.values()):
            x.extend(m)
        self.fresh += m

    def twin(self, room: int) -> Tail:
        """A second tail over the same storage that counts its entries by itself: what both append lands in the same places, as long as
        it is not more than `room` entries."""
        for x in (self._keys, self._values, *self._side.values()):
            x.reserve(room)
        new = copy.copy(self)
        new._keys, new._values, new._real = copy.copy(self._keys), copy.copy(self._values), copy.copy(self._real)
        new._side = {name: copy.copy(x) for name, x in self._side.items()}
        return new

    def mark(self, name: str, last: Tensor) -> None:
        """Set a uint8 side array of the newest entries to `last (B, m)` in every head; older entries have 0 if it is new."""
        if name not in self._side:
            self._side[name] = Growing(torch.zeros_like(self.side["positions"], dtype=torch.uint8))
        self.side[name][:, :, -last.shape[1] :] = last.to(torch.uint8).unsqueeze(1)

    def set_side(self, changed: dict[str, Tensor]) -> None:
        """Add or replace side arrays."""
        self._side.update({name: Growing(x) for name, x in changed.items()})

    def set_side_by_row(self, changed: list[dict[str, Tensor]]) -> None:
        """The same from one set of arrays `(1, H, n)` per batch row, without its padding; what a row does not give stays, or is 0."""
        names = {name: x.dtype for row in changed for name, x in row.items()}
        for name, dtype in names.items():
            old = self._side.get(name)
            full = torch.zeros_like(self.side["positions"], dtype=dtype) if old is None else old.view.to(dtype, copy=True)
            for b, row in enumerate(changed):
                if name in row:
                    full[b, :, slice(None) if self.real is None else self.real[b]] = row[name][0]
            self._side[name] = Growing(full)

    def drop(self, begin: int, count: int) -> None:
        """Drop the entries begin ... begin + count - 1 of every head, where they lie: those before them are moved, if there is room, and
        no others. Not for a tail with padding."""
        if self._real is not None:
            raise ValueError("entries can't be dropped by slot where rows are padded: open one row at a time")
        self._keys, self._values = _sliding(self._keys), _sliding(self._values)
        side = {name: _sliding(x) for name, x in self._side.items()}
        for x in (self._keys, self._values, *side.values()):
            x.drop(begin, count)
        self._side.update(side)
        # what follows the gap still runs on
        self.fresh = min(self.fresh, self.n - begin)

    def truncate(self, n: int) -> None:
        for x in (self._keys, self._values, *self._side.values(), *([] if self._real is None else [self._real])):
            x.truncate(n)

    def take_rows(self, rows: Tensor) -> Tail:
        new = Tail.__new__(Tail)
        new._keys, new._values = self._keys.reorder(rows), self._values.reorder(rows)
        new._side = {name: x.reorder(rows) for name, x in self._side.items()}
        new._real = None if self._real is None else self._real.reorder(rows)
        new.fresh = self.fresh
        return new

    @property
    def kv_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    @property
    def side_bytes(self) -> int:
        return sum(x.nbytes for x in self._side.values()) + (0 if self._real is None else self._real.nbytes)


def _sliding(x: Growing) -> Sliding:
    return x if isinstance(x, Sliding) else Sliding(x.view)
