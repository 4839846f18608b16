"""Entries of a cache out of the accelerator's memory: kept on the host, fetched as they are read.

Where the model computes on a CUDA device, host memory is pinned and rows travel on a stream of their own, so that the device goes on
meanwhile; elsewhere they are plain CPU tensors. What stays on the device counts as `kv_bytes`, what lies on the host as `host_bytes`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from saccade.cache.parted import Part, PartedSegment, shared
from saccade.cache.segment import Segment
from saccade.cache.stores import PlainStore, Store, held, take
from saccade.core import Rotary
from saccade.parts.rotary import turn
from saccade.parts.rows import pick_rows


@lru_cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


def to_host(x: Tensor) -> Tensor:
    """A copy of x in host memory, pinned where x lies on a CUDA device."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")
    return host.copy_(x)


@dataclass(frozen=True)
class Fetch:
    """Rows on their way to the device. stream: the one that carries them, None where they are there already."""

    rows: Tensor
    stream: Any = None

    @classmethod
    def begin(cls, host: Tensor, device: torch.device) -> Fetch:
        """Send a fresh host tensor."""
        if device.type != "cuda":
            return cls(host.to(device))
        stream = _side_stream(device)
        with torch.cuda.stream(stream):
            return cls((host if host.is_pinned() else host.pin_memory()).to(device, non_blocking=True), stream)

    def result(self) -> Tensor:
        """The rows, for work on the current stream."""
        if self.stream is not None:
            current = torch.cuda.current_stream(self.rows.device)
            current.wait_stream(self.stream)
            self.rows.record_stream(current)
        return self.rows


@dataclass(frozen=True)
class OffloadedStore(Store):
    """entries `(B, H, n, d)` on the host. device: where they are read."""

    entries: Tensor
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> OffloadedStore:
        """A copy of x `(B, H, n, d)`, to be read on x's device."""
        return cls(to_host(x), x.device)

    @property
    def host(self) -> Tensor:
        """The entries on the host, also where a saved cache was read to the device."""
        if self.entries.device.type != "cpu":
            object.__setattr__(self, "entries", to_host(self.entries))
        return self.entries

    @property
    def length(self) -> int:
        return self.entries.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes on the device: none."""
        return 0

    @property
    def host_bytes(self) -> int:
        return held(self.entries)

    def read(self, begin: int, end: int) -> Tensor:
        part = self.host[:, :, begin:end]
        return part if self.device.type == "cpu" else Fetch.begin(part.contiguous(), self.device).result()

    def gather(self, slots: Tensor) -> Tensor:
        return self.pick(slots).result()

    def pick(self, indices: Tensor) -> Fetch:
        """Entries `indices (B, H, m)` int64 of every row and head, `(B, H, m, d)`."""
        return Fetch.begin(pick_rows(self.host, indices.cpu()), self.device)

    def pick_runs(self, rows: Tensor, heads: Tensor, starts: Tensor, run: int) -> Fetch:
        """`run` entries from each of `starts (M,)` on, of batch rows `rows (M,)` and heads `heads (M,)`: `(M, run, d)`."""
        b, h, s = (x.cpu().unsqueeze(-1) for x in (rows, heads, starts))
        return Fetch.begin(self.host[b, h, s + torch.arange(run)], self.device)

    def take_rows(self, rows: Tensor) -> OffloadedStore:
        taken = take(self.host, rows.cpu())
        return OffloadedStore(taken.pin_memory() if self.device.type == "cuda" else taken, self.device)


class OffloadedSegment(PartedSegment):
    """The oldest entries of a layer, in their order: the first few may stay on the device, the others lie on the host.

    begin: place in the sequence of the first entry. With a rotary embedding the keys are stored before it.
    """

    def __init__(self, parts: tuple[Part, ...], begin: int) -> None:
        super().__init__(parts)
        self.begin = begin

    @classmethod
    def of(
        cls, keys: Tensor, values: Tensor, side: dict[str, Tensor], *, begin: int, near: int = 0, rotary: Rotary | None = None
    ) -> OffloadedSegment:
        """keys `(B, H, n, D)`, values `(B, H, n, Dv)`, side with "positions" `(B, H, n)`; the first `near` entries stay on the device."""
        n = keys.shape[2]
        if not 0 <= near <= n or not n:
            raise ValueError(f"{near} of {n} entries are to stay on the device: give at least one entry, and no more than there are")
        places = torch.arange(begin, begin + n, device=keys.device, dtype=torch.int32)[None, None]
        if rotary is not None:
            keys = turn(keys, -places, rotary)
        parts = []
        for first, last, make in ((0, near, lambda x: PlainStore(x.clone())), (near, n, OffloadedStore.of)):
            if first < last:
                here = slice(first, last)
                parts.append(Part(
                    keys=make(keys[:, :, here]), values=make(values[:, :, here]), positions=shared(side["positions"][:, :, here]),
                    counts=torch.full(keys.shape[:2], last - first), dims=(keys.shape[-1], values.shape[-1]),
                    places=None if rotary is None else places[:, :, here].expand(keys.shape[0], -1, -1).clone(), rotary=rotary,
                ))  # fmt: skip
        return cls(tuple(parts), begin)

    @property
    def end(self) -> int:
        """Place in the sequence after the last entry."""
        return self.begin + self.length

    @property
    def host_bytes(self) -> int:
        """Bytes held on the host."""
        return host_bytes(*(store for part in self.parts for store in (part.keys, part.values)))

    def begin_pick(self, rows: Tensor, places: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Start to fetch the entries of batch rows `rows (M,)` at `places (M,)` int64 of the sequence, all of them inside.

        The result, when called, gives keys `(M, H, D)` as they are stored and values `(M, H, Dv)`.
        """
        begun: list[tuple[Tensor, Fetch, Fetch]] = []
        offset = places - self.begin
        for part in self.parts:
            inside = ((offset >= 0) & (offset < part.keys.length)).nonzero().squeeze(-1)
            if inside.numel():
                keys, values = (_begin_rows(store, rows[inside], offset[inside]) for store in (part.keys, part.values))
                begun.append((inside, keys, values))
            offset = offset - part.keys.length

        def finish() -> tuple[Tensor, Tensor]:
            found = [(inside, keys.result(), values.result()) for inside, keys, values in begun]
            if len(found) == 1:
                return found[0][1], found[0][2]
            keys, values = (found[0][i].new_empty(len(places), *found[0][i].shape[1:]) for i in (1, 2))
            for inside, k, v in found:
                keys[inside], values[inside] = k, v
            return keys, values

        return finish

    def take_rows(self, rows: Tensor) -> OffloadedSegment:
        new = copy.copy(self)
        new.parts = tuple(part.take_rows(rows) for part in self.parts)
        return new

    def before(self, position: int) -> OffloadedSegment:
        new = super().before(position)
        assert isinstance(new, OffloadedSegment)
        # a part that lost all of its own is gone, but an empty segment still has its first
        new.parts = tuple(part for part in new.parts if bool((part.counts > 0).any())) or new.parts[:1]
        return new


def host_bytes(*stores: Store) -> int:
    """Bytes that these stores hold on the host."""
    return sum(store.host_bytes for store in stores if isinstance(store, OffloadedStore))


def off_device(segments: list[Segment]) -> int:
    """Bytes that these segments hold on the host."""
    return sum(getattr(segment, "host_bytes", 0) for segment in segments)


def _begin_rows(store: Store, rows: Tensor, offsets: Tensor) -> Fetch:
    """Entries `(M, H, d)` of a store, of all heads."""
    if isinstance(store, OffloadedStore):
        return Fetch.begin(store.host[rows.cpu(), :, offsets.cpu()], store.device)
    return Fetch(store.read(0, store.length)[rows, :, offsets])


Loader = Callable[[Tensor, Tensor, Tensor], Callable[[], Sequence[Tensor]]]  # (batch rows, lists, units), each (M,), to tensors (M, ...)


class RecentUnits:
    """Units of an offloaded cache (chunks, blocks) that were read lately, held on the device; the least recently used make room.

    Each of the B x H lists has `capacity` slots of its own. loaded: units that were fetched so far. nbytes: of the units held.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.loaded, self.time = capacity, 0, 0
        self.table: Tensor | None = None  # (B, H, capacity): which unit a slot holds, -1 for none
        self.used: Tensor | None = None  # (B, H, capacity): when it was read last
        self.held: list[Tensor] = []  # (B, H, capacity, ...)

    def begin(self, ids: Tensor, load: Loader) -> Callable[[], list[Tensor]]:
        """Start to fetch those of the units `ids (B, H, K)` int64, different in a row, K <= capacity, that are not here.

        The result, when called, gives the tensors of all of them, `(B, H, K, ...)`. ValueError for more units than there is room for.
        """
        if ids.shape[-1] > self.capacity:
            raise ValueError(f"{ids.shape[-1]} units are read at once and there is room for {self.capacity}: make more room")
        if self.table is None or self.used is None:
            self.table = ids.new_full((*ids.shape[:2], self.capacity), -1)
            self.used = torch.zeros_like(self.table)
        self.time += 1
        same = ids.unsqueeze(-1) == self.table.unsqueeze(-2)
        hit, slot = same.any(-1), same.to(torch.uint8).argmax(-1)
        self.used.masked_fill_(same.any(-2), self.time)
        # units read now carry the newest time, so they stand behind all slots that may be given away
        free = torch.sort(self.used, dim=-1, stable=True).indices
        slot = torch.where(hit, slot, free.gather(-1, ((~hit).cumsum(-1) - 1).clamp(min=0)))
        rows, lists, missing = (~hit).nonzero(as_tuple=True)
        loading = None
        if rows.numel():
            at = slot[rows, lists, missing]
            self.table[rows, lists, at], self.used[rows, lists, at] = ids[rows, lists, missing], self.time
            self.loaded += rows.numel()
            loading = load(rows, lists, ids[rows, lists, missing])

        def finish() -> list[Tensor]:
            if loading is not None:
                found = loading()
                if not self.held:
                    self.held = [x.new_zeros(*ids.shape[:2], self.capacity, *x.shape[1:]) for x in found]
                for buffer, x in zip(self.held, found, strict=True):
                    buffer[rows, lists, slot[rows, lists, missing]] = x
            b, h = (torch.arange(n, device=ids.device) for n in ids.shape[:2])
            return [buffer[b[:, None, None], h[:, None], slot] for buffer in self.held]

        return finish

    def forget_from(self, unit: int) -> None:
        """Units from this number on are no longer what they were."""
        if self.table is not None and self.used is not None:
            gone = self.table >= unit
            self.table.masked_fill_(gone, -1)
            self.used.masked_fill_(gone, 0)

    @property
    def nbytes(self) -> int:
        return held(self.table, self.used, *self.held)

    def reorder(self, rows: Tensor) -> RecentUnits:
        """A copy with these batch rows."""
        new = copy.copy(self)
        new.table, new.used = (None if x is None else take(x, rows) for x in (self.table, self.used))
        new.held = [x.index_select(0, rows.to(x.device)) for x in self.held]
        return new
