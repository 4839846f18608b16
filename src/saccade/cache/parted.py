"""A sealed segment of parts, each with its own storage form: the parts' attention outputs are merged.

Softmax attention does not ask for the order of its keys, so entries of one kind lie together, whatever their places in the sequence:
what was quantised finely, what coarsely, what stayed as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from saccade.cache.segment import CHUNK, Rectangle, Segment, attend_rectangle
from saccade.cache.stores import CodedStore, PlainStore, Store, held, take
from saccade.core import Partial, Rotary, merge
from saccade.ops import attend
from saccade.ops.decode import decode, decode_quantised
from saccade.ops.gpu import runs_on
from saccade.parts.rotary import turn
from saccade.parts.rows import pick_rows

FEW = 16  # queries that the decode ops take

Encoder = Callable[[Tensor, Tensor], tuple[Store, Store]]  # keys and values `(B, H, n, ...)` to what holds them


@dataclass(frozen=True, kw_only=True)
class Part:
    """Entries `(B, H, n, ...)`, ascending by position; of each row and head the first `counts (B, H)` (int64, on the CPU) count.

    positions `(B, H or 1, n)` int32. places, rotary: keys are stored before the rotary embedding and belong at these places
    `(B, H or 1, n)`. key_channels, value_channels `(B, H, d)` int16 ascending: only these are stored, the others are zero; dims: how
    many channels a key and a value have.
    """

    keys: Store
    values: Store
    positions: Tensor
    counts: Tensor
    dims: tuple[int, int]
    places: Tensor | None = None
    rotary: Rotary | None = None
    key_channels: Tensor | None = None
    value_channels: Tensor | None = None

    @cached_property
    def sizes(self) -> list[list[int]]:
        """`counts` as plain numbers, asked for once: a step waits for no tensor."""
        return self.counts.tolist()

    @cached_property
    def ends(self) -> Tensor | None:
        """What an op is told of the counts, int32 on the device of the entries: `(B,)`, `(B * H,)` where heads differ, None for all."""
        if all(n == self.keys.length for row in self.sizes for n in row):
            return None
        counts = self.counts if self.uneven else self.counts[:, 0]
        return counts.flatten().to(self.positions.device, torch.int32)

    @cached_property
    def uneven(self) -> bool:
        """Whether heads of a row hold different numbers of entries."""
        return any(len(set(row)) > 1 for row in self.sizes)

    def stored_fields(self) -> dict[str, Any]:
        """What is saved: not what was found out."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def read_keys(self, begin: int, end: int) -> Tensor:
        """Stored channels of keys begin ... end - 1 as attention sees them."""
        keys = self.keys.read(begin, end)
        if self.rotary is None or self.places is None:
            return keys
        return turn(keys, self.places[:, :, begin:end], self.rotary)

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys as attention sees them and values of entries `slots (B, H, m)`, in all channels."""
        keys, values = self.keys.gather(slots), self.values.gather(slots)
        if self.rotary is not None and self.places is not None:
            keys = turn(keys, self.places.expand(-1, slots.shape[1], -1).gather(2, slots), self.rotary)
        keys = keys if self.key_channels is None else _spread(keys, self.key_channels, self.dims[0])
        return keys, values if self.value_channels is None else _spread(values, self.value_channels, self.dims[1])

    def attend(self, q: Tensor, *, scale: float, softcap: float | None) -> Partial:
        """Attention of q `(B, Hq, m, D)` over the part, with log-sum-exp."""
        if self.key_channels is not None:
            q = _gathered(q, self.key_channels)
        result = self._at_once(q, scale, softcap)
        if result is None:
            spans = [(begin, min(begin + CHUNK, self.keys.length)) for begin in range(0, self.keys.length, CHUNK)]
            result = merge(*(self._span(q, begin, end, scale, softcap) for begin, end in spans))
        if self.value_channels is None:
            return result
        return Partial(_spread(result.out, _for_queries(self.value_channels, q.shape[1]), self.dims[1]), result.lse)

    def _at_once(self, q: Tensor, scale: float, softcap: float | None) -> Partial | None:
        """Everything read as it lies, in one call and without asking the device for a value; None where no op takes it so."""
        if self.rotary is not None or q.shape[2] > FEW:
            return None
        if not self.uneven:
            return _read_stores(q, self.keys, self.values, self.ends, scale, softcap)
        if not isinstance(self.keys, PlainStore | CodedStore) or not isinstance(self.values, PlainStore | CodedStore):
            return None
        # ops are told one length a row, so every head is a row
        shape = self.counts.shape
        rows = q.unflatten(1, (shape[1], -1)).flatten(0, 1)
        found = _read_stores(rows, self.keys.by_head(), self.values.by_head(), self.ends, scale, softcap)
        if found is None or found.lse is None:
            return None
        return Partial(*(x.unflatten(0, shape).flatten(1, 2) for x in (found.out, found.lse)))

    def _span(self, q: Tensor, begin: int, end: int, scale: float, softcap: float | None) -> Partial:
        keys, values = self.read_keys(begin, end).to(q.dtype), self.values.read(begin, end).to(q.dtype)
        if all(n >= end for row in self.sizes for n in row):
            return attend_rectangle(q, keys, values, scale=scale, softcap=softcap)
        # rows or heads that hold less than others are masked by a bias
        gone = torch.arange(begin, end, device=q.device) >= self.counts.to(q.device).unsqueeze(-1)
        bias = torch.zeros(gone.shape, device=q.device).masked_fill_(gone, -torch.inf)
        bias = bias.repeat_interleave(q.shape[1] // bias.shape[1], dim=1).unsqueeze(2)
        return attend(q, keys, values, causal=False, scale=scale, softcap=softcap, bias=bias, return_lse=True)

    def take_rows(self, rows: Tensor) -> Part:
        tensors = {"positions": self.positions, "counts": self.counts, "places": self.places}
        tensors |= {"key_channels": self.key_channels, "value_channels": self.value_channels}
        picked = {name: take(x, rows) for name, x in tensors.items() if x is not None}
        return replace(self, keys=self.keys.take_rows(rows), values=self.values.take_rows(rows), **picked)

    def before(self, position: int) -> Part:
        left = (self.positions < position).sum(-1).cpu()
        return replace(self, counts=torch.minimum(self.counts.cpu(), left.expand_as(self.counts)))

    @property
    def kv_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + held(self.key_channels, self.value_channels)

    @property
    def side_bytes(self) -> int:
        return held(self.positions, self.places)


class PartedSegment(Segment):
    """Entries in parts. Read in the order of their positions. After `before` nothing is encoded again and no storage is freed."""

    encoded = True

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self._order: tuple[tuple[Part, ...], Tensor] | None = None
        self._known: tuple[tuple[Part, ...], list[list[int]]] | None = None

    @classmethod
    def by_class(
        cls, keys: Tensor, values: Tensor, side: dict[str, Tensor], classes: Tensor, encoders: Sequence[Encoder],
        *, places: Tensor | None = None, rotary: Sequence[Rotary | None] | None = None,
    ) -> PartedSegment:  # fmt: skip
        """One part for each class of entries that is not empty.

        keys `(B, H, n, D)`, values `(B, H, n, Dv)`, side with "positions" `(B, H, n)`. classes `(B, n)` integers: of each slot, for
        all heads, or `(B, H, n)`; an entry of a class without an encoder is left out. Rows and heads may have a class unequally
        often: the part is as long as its longest head, filled up with copies of a head's last entry. places, rotary: see Part; the
        encoder of a class whose `rotary` is not None gets keys before the rotary embedding. Raises ValueError where nothing is left.
        """
        batch, heads, n = keys.shape[:3]
        if tuple(classes.shape) not in {(batch, n), (batch, heads, n)}:
            raise ValueError(
                f"classes have shape {tuple(classes.shape)}: expected one for each row and slot of {tuple(keys.shape)} keys, or for each "
                "row, head and slot"
            )
        classes = classes if classes.ndim == 3 else classes.unsqueeze(1)
        parts = []
        for index, encoder in enumerate(encoders):
            chosen = classes == index
            counts = chosen.sum(-1)
            longest = int(counts.max()) if counts.numel() else 0
            if not longest:
                continue
            order = torch.sort((~chosen).to(torch.uint8), dim=-1, stable=True).indices
            last = torch.minimum(torch.arange(longest, device=order.device), (counts - 1).clamp(min=0).unsqueeze(-1))
            slots = order.gather(2, last).expand(batch, heads, longest)
            turned = None if rotary is None else rotary[index]
            own = None if turned is None or places is None else places.gather(2, slots)
            k, v = pick_rows(keys, slots), pick_rows(values, slots)
            if own is not None and turned is not None:
                k = turn(k, -own, turned)
            key_store, value_store = encoder(k, v)
            parts.append(Part(
                keys=key_store, values=value_store, positions=shared(side["positions"].gather(2, slots)),
                counts=counts.cpu().expand(batch, heads).clone(), dims=(keys.shape[-1], values.shape[-1]),
                places=None if own is None else shared(own), rotary=turned if own is not None else None,
            ))  # fmt: skip
        if not parts:
            raise ValueError(f"no class of the {n} entries has an encoder: there is nothing to seal")
        return cls(parts)

    @property
    def length(self) -> int:
        return max((n for row in self._lengths for n in row), default=0)

    @property
    def _lengths(self) -> list[list[int]]:
        """Found once for the same parts: every step asks for it."""
        if self._known is None or self._known[0] is not self.parts:
            by_row = zip(*(part.sizes for part in self.parts), strict=True)
            self._known = (self.parts, [[sum(own) for own in zip(*rows, strict=True)] for rows in by_row])
        return self._known[1]

    def lengths(self) -> list[list[int]]:
        return [list(row) for row in self._lengths]

    @property
    def kv_bytes(self) -> int:
        return sum(part.kv_bytes for part in self.parts)

    @property
    def side_bytes(self) -> int:
        return sum(part.side_bytes for part in self.parts) + (0 if self._order is None else held(self._order[1]))

    def stored_fields(self) -> dict[str, Any]:
        """The contents, to be saved."""
        return {**vars(self), "_order": None, "_known": None}

    @property
    def order(self) -> Tensor:
        """Where the entries lie: int32 `(B, H or 1, n)`, of each slot the number of its entry, those of all parts counted in a row.

        Past a head's own entries come others. Made when it is first asked for, and held.
        """
        if self._order is None or self._order[0] is not self.parts:
            counts = torch.stack([part.counts for part in self.parts])
            heads = 1 if all(part.positions.shape[1] == 1 for part in self.parts) and bool((counts == counts[:, :, :1]).all()) else None
            places = []
            for part, own in zip(self.parts, counts, strict=True):
                n = part.keys.length
                shown = part.positions[:, :, :n].expand(-1, own.shape[1], -1)[:, :heads]
                gaps = torch.arange(n, device=shown.device) >= own[:, :heads].to(shown.device).unsqueeze(-1)
                places.append(shown.masked_fill(gaps, torch.iinfo(shown.dtype).max))
            order = torch.sort(torch.cat(places, 2), dim=-1, stable=True).indices[..., : self.length]
            self._order = (self.parts, order.to(torch.int32))
        return self._order[1]

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Slots of each head in the order of their positions."""
        if len(self.parts) == 1:
            return self.parts[0].gather(slots)
        at, base = self.order.expand(-1, slots.shape[1], -1).gather(2, slots).long(), 0
        keys = values = None
        for part in self.parts:
            n = part.keys.length
            mine = ((at >= base) & (at < base + n)).unsqueeze(-1)
            if keys is None or values is None or bool(mine.any()):
                found = part.gather((at - base).clamp(0, n - 1))
                keys = found[0] if keys is None else torch.where(mine, found[0], keys)
                values = found[1] if values is None else torch.where(mine, found[1], values)
            base += n
        assert keys is not None and values is not None
        return keys, values

    def read(self, begin: int, end: int) -> Rectangle:
        """Slots begin ... end - 1 of each head in the order of their positions."""
        if not 0 <= begin < end <= self.length:
            raise ValueError(f"slots {begin} to {end} are not a range inside a segment of {self.length}")
        shape = self.parts[0].counts.shape
        slots = torch.arange(begin, end, device=self.parts[0].positions.device).expand(*shape, -1)
        keys, values = self.gather(slots)
        positions = torch.cat([part.positions[:, :, : part.keys.length].expand(-1, shape[1], -1) for part in self.parts], 2)
        lying = slots if len(self.parts) == 1 else self.order[..., begin:end].expand(-1, shape[1], -1).long()
        side = {"positions": positions.gather(2, lying)}
        if all(n >= end for row in self._lengths for n in row):
            return Rectangle(keys, values, side)
        return Rectangle(keys, values, side, slots < torch.tensor(self._lengths, device=slots.device).unsqueeze(-1))

    def attend(self, q: Tensor, *, scale: float, softcap: float | None) -> Partial:
        return merge(*(part.attend(q, scale=scale, softcap=softcap) for part in self.parts))

    def take_rows(self, rows: Tensor) -> PartedSegment:
        return PartedSegment([part.take_rows(rows) for part in self.parts])

    def bound_to(self, row: int) -> PartedSegment:
        """Shares its storage with this segment: sealed entries never change."""
        new = copy.copy(self)
        new.row = row
        return new

    def before(self, position: int) -> PartedSegment:
        new = copy.copy(self)
        new.parts = tuple(part.before(position) for part in self.parts)
        return new


def _read_stores(
    q: Tensor, keys: Store, values: Store, lengths: Tensor | None, scale: float, softcap: float | None
) -> Partial | None:  # fmt: skip
    """Attention of few queries over all that the stores hold, in one call; None where no op reads the two as they are."""
    if isinstance(keys, PlainStore) and isinstance(values, PlainStore):
        # in plain torch pieces are as fast, and what has to be widened first is widened a piece at a time
        if not runs_on(q) or not keys.entries.dtype == values.entries.dtype == q.dtype:
            return None
        return decode(q, keys.entries, values.entries, lengths=lengths, scale=scale, softcap=softcap, return_lse=True)
    if not (isinstance(keys, CodedStore) and isinstance(values, CodedStore)) or keys.factor is not None:
        return None
    found = decode_quantised(q, keys.packed, values.packed, lengths=lengths, scale=scale, softcap=softcap, return_lse=True)
    return Partial(values.times_factor(found.out), found.lse)


def shared(x: Tensor) -> Tensor:
    """A side array `(B, H, n)` as `(B, 1, n)` where all heads agree; always a copy."""
    return x[:, :1].clone() if bool((x == x[:, :1]).all()) else x.clone()


def _for_queries(channels: Tensor, heads: int) -> Tensor:
    """Channels of key/value heads `(B, H, d)` for `heads` query heads, `(B, Hq, 1, d)` int64."""
    return channels.long().repeat_interleave(heads // channels.shape[1], dim=1).unsqueeze(2)


def _gathered(q: Tensor, channels: Tensor) -> Tensor:
    """q `(B, Hq, m, D)` in the channels that its group's keys have, `(B, Hq, m, d)`."""
    picked = _for_queries(channels, q.shape[1])
    return q.gather(3, picked.expand(-1, -1, q.shape[2], -1))


def _spread(x: Tensor, channels: Tensor, dim: int) -> Tensor:
    """x `(B, H, m, d)` in `channels`, `(B, H, d)` or `(B, H, 1, d)`, of `dim`; 0 in the others."""
    channels = (channels if channels.ndim == 4 else channels.unsqueeze(2)).long()
    return x.new_zeros(*x.shape[:3], dim).scatter(3, channels.expand_as(x), x)
