"""A sealed segment in few bits, with a choice of bits per entry.

Every entry belongs to a class, in every key/value head on its own or for all heads together, and each class has its bits. Per class:
- keys: per channel. One (scale, zero) for each (row, head, channel), from the entries of the class.
- values: token by token, channel-separable. With `c = sqrt(max_t |V[t]|)` per channel of a head over all entries, `V / c` has one
  minimum and one span for each (row, token), over all heads and channels; the step is `span / (2^bits - 1)` with the bits of the
  class that the token has in that head. So a token that is salient in one head only needs no parameters of its own there,
  and the parameters are H * Dv + 2 T numbers a row, whatever the classes. The public code of ZipCache gathers each head's class
  first, so that one "token" of its min/max mixes different tokens of different heads; here it is the same token in every head.
- 16 bits means stored as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from saccade.cache.segment import CHUNK, Rectangle, Segment
from saccade.core import Partial, merge
from saccade.ops import attend
from saccade.ops.quant import BITS, affine_parameters, affine_quantise, dequantise, encode, pack, unpack
from saccade.parts.rows import pick_rows

RAW = 16
CLASSES = 4  # at most: two bits of membership


class QuantisedSegment(Segment):
    """Entries `(B, H, n, ...)` in classes of different bits; `encode` makes one. Read in slot order, a range at a time.

    side arrays are kept as they are (once, where all heads agree). After `before` the codes stay in place and `length` shrinks.
    """

    encoded = True

    def __init__(
        self, stores: list[ClassStore], members: Members, values: ValueScales | None, side: dict[str, Tensor], dtype: torch.dtype,
        limits: Tensor,
    ) -> None:  # fmt: skip
        self._stores, self._members, self._values = stores, members, values
        self._side, self._dtype, self._limits = side, dtype, limits

    @classmethod
    def encode(
        cls, keys: Tensor, values: Tensor, side: dict[str, Tensor], classes: Tensor, bits: Sequence[int]
    ) -> QuantisedSegment:
        """keys `(B, H, n, D)`, values `(B, H, n, Dv)`, side arrays `(B, H, n)` with ascending "positions".

        classes `(B, H or 1, n)` uint8: the class of each slot, in every row and head equally often. bits: of each class, 1, 2, 3,
        4, 8, or 16 for "as it is". Raises ValueError when these don't fit, or for keys or values that are not finite.
        """
        _check(keys, classes, bits)
        width = keys.shape[1]
        scales = None if all(b == RAW for b in bits) else ValueScales.measure(values)
        stores = []
        for index, b in enumerate(bits):
            chosen = classes == index
            count = int(chosen[0, 0].sum())
            if bool((chosen.sum(-1) != count).any()):
                raise ValueError(f"class {index} does not have the same number of entries in every row and head")
            slots = torch.sort((~chosen).to(torch.uint8), dim=-1, stable=True).indices[..., :count].expand(-1, width, -1)
            stores.append(ClassStore.encode(_pick(keys, slots), _pick(values, slots), slots, b, scales))
        limits = torch.full(keys.shape[:2], keys.shape[2])
        return cls(stores, Members.of(classes, len(bits)), scales, {k: _shared(x) for k, x in side.items()}, keys.dtype, limits)

    # -- facts -------------------------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        return int(self._limits.max()) if self._limits.numel() else 0

    def lengths(self) -> list[list[int]]:
        return self._limits.tolist()

    @property
    def kv_bytes(self) -> int:
        """Codes, scales, zero points and class membership."""
        own = 0 if self._values is None else self._values.nbytes
        return own + self._members.nbytes + sum(store.nbytes for store in self._stores)

    @property
    def side_bytes(self) -> int:
        return sum(_bytes(x) for x in self._side.values())

    @property
    def stores(self) -> tuple[ClassStore, ...]:
        """What each class of slots is stored in."""
        return tuple(self._stores)

    def classes(self) -> Tensor:
        """The class of each slot, an index into `stores`: `(B, H or 1, n)`."""
        return self._members.read(0, self.length)[0]

    # -- reading -----------------------------------------------------------------------------------------------------------

    def read(self, begin: int, end: int) -> Rectangle:
        if not 0 <= begin < end <= self.length:
            raise ValueError(f"slots {begin} to {end} are not a range inside a segment of {self.length}")
        batch, heads = self._limits.shape
        ids, starts = self._members.read(begin, end)
        ids = ids.expand(-1, heads, -1)
        m = end - begin
        pair = torch.arange(batch * heads, device=ids.device).view(batch, heads, 1)
        # each class is decoded as a rectangle of its longest head; `row` finds a slot's entry in those, one after another
        row = torch.zeros(batch, heads, m, dtype=torch.int64, device=ids.device)
        keys, values, base = [], [], 0
        for index, store in enumerate(self._stores):
            mine = ids == index
            nth = mine.cumsum(-1)
            longest = int(nth[..., -1].max())
            if not longest:
                continue
            row = torch.where(mine, base + pair * longest + nth - 1, row)
            base += batch * heads * longest
            first = starts[index].expand(-1, heads)
            keys.append(store.read_keys(first, longest))
            values.append(store.read_values(first, longest))
        k = _rows(keys, row)
        v = _rows(values, row)
        if self._values is not None:
            v = self._values.apply(v, ids, [store.bits for store in self._stores], slice(begin, end))
        side = {name: x[..., begin:end].expand(batch, heads, m).clone() for name, x in self._side.items()}
        limits = self._limits.to(ids.device)[..., None]
        valid = None if bool((self._limits >= end).all()) else torch.arange(begin, end, device=ids.device) < limits
        return Rectangle(k.to(self._dtype), v.to(self._dtype), side, valid)

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        ids, nth = self._members.at(slots)
        keys = values = None
        for index, store in enumerate(self._stores):
            mine = (ids == index).unsqueeze(-1)
            if store.keys.shape[2] and (keys is None or values is None or bool(mine.any())):
                found = store.at(nth.clamp(max=store.keys.shape[2] - 1))
                keys = found[0] if keys is None else torch.where(mine, found[0], keys)
                values = found[1] if values is None else torch.where(mine, found[1], values)
        assert keys is not None and values is not None
        if self._values is not None:
            values = self._values.apply(values, ids, [store.bits for store in self._stores], slots)
        return keys.to(self._dtype), values.to(self._dtype)

    def attend(self, q: Tensor, *, scale: float, softcap: float | None) -> Partial:
        if bool((self._limits == self.length).all()):
            return super().attend(q, scale=scale, softcap=softcap)
        parts = []
        for begin in range(0, self.length, CHUNK):  # cropped where heads hold different tokens: rare, so masked by a bias
            part = self.read(begin, min(begin + CHUNK, self.length))
            bias = None
            if part.valid is not None:
                bias = torch.zeros(part.valid.shape, device=q.device).masked_fill_(~part.valid, -torch.inf)
                bias = bias.repeat_interleave(q.shape[1] // bias.shape[1], dim=1).unsqueeze(2)
            parts.append(attend(
                q, part.keys, part.values, causal=False, scale=scale, softcap=softcap, bias=bias, return_lse=True
            ))  # fmt: skip
        return merge(*parts)

    # -- upkeep ------------------------------------------------------------------------------------------------------------

    def take_rows(self, rows: Tensor) -> QuantisedSegment:
        def take(x: Tensor) -> Tensor:
            return x.index_select(0, rows.to(x.device))

        return QuantisedSegment(
            [store.map(take) for store in self._stores], self._members.map(take),
            None if self._values is None else self._values.map(take), {name: take(x) for name, x in self._side.items()},
            self._dtype, take(self._limits),
        )  # fmt: skip

    def bound_to(self, row: int) -> QuantisedSegment:
        """Shares its storage with this segment: sealed entries never change."""
        new = copy.copy(self)
        new.row = row
        return new

    def before(self, position: int) -> QuantisedSegment:
        """Hides the last entries of each head; nothing is encoded again, and no storage is freed."""
        new = copy.copy(self)
        left = (self._side["positions"] < position).sum(-1).to(self._limits.device)
        new._limits = torch.minimum(self._limits, left.expand_as(self._limits))
        return new


@dataclass(frozen=True)
class ClassStore:
    """The entries of one class, in slot order: packed codes `(B, H, n_c, bytes)`, or the entries themselves for 16 bits.

    key_scale, key_zero `(B, H, 1, D)`; None for 16 bits and for an empty class.
    """

    bits: int
    dims: tuple[int, int]
    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    key_zero: Tensor | None = None

    @classmethod
    def encode(cls, keys: Tensor, values: Tensor, slots: Tensor, bits: int, scales: ValueScales | None) -> ClassStore:
        dims = (keys.shape[-1], values.shape[-1])
        if bits == RAW or scales is None or keys.shape[2] == 0:
            return cls(bits, dims, keys, values)
        codes, scale, zero = affine_quantise(keys, bits, 2)
        return cls(bits, dims, pack(codes, bits), pack(scales.encode(values, slots, bits), bits), scale, zero)

    def read_keys(self, first: Tensor, m: int) -> Tensor:
        """m entries from `first (B, H)` on, `(B, H, m, D)`; past the end of the class, anything."""
        return self._keys_of(_range(self.keys, first, m))

    def read_values(self, first: Tensor, m: int) -> Tensor:
        """The same for values, `(B, H, m, Dv)`: codes, still to be scaled, or entries of 16 bits."""
        return self._values_of(_range(self.values, first, m))

    def at(self, nth: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, as `read_keys` and `read_values` give them, of entries `nth (B, H, m)` int64."""
        return self._keys_of(pick_rows(self.keys, nth)), self._values_of(pick_rows(self.values, nth))

    def _keys_of(self, rows: Tensor) -> Tensor:
        if self.key_scale is None or self.key_zero is None:
            return rows
        wide = _wide(self.key_scale)
        return dequantise(unpack(rows, self.bits, self.dims[0]), self.key_scale, self.key_zero, wide)

    def _values_of(self, rows: Tensor) -> Tensor:
        return rows if self.bits == RAW else unpack(rows, self.bits, self.dims[1])

    def map(self, change: Callable[[Tensor], Tensor]) -> ClassStore:
        return replace(
            self, keys=change(self.keys), values=change(self.values),
            key_scale=None if self.key_scale is None else change(self.key_scale),
            key_zero=None if self.key_zero is None else change(self.key_zero),
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        return sum(_bytes(x) for x in (self.keys, self.values, self.key_scale, self.key_zero) if x is not None)


@dataclass(frozen=True)
class ValueScales:
    """channel `(B, H, 1, Dv)`: c. zero, span `(B, 1, n, 1)`: minimum and range of V / c of each token over heads and channels."""

    channel: Tensor
    zero: Tensor
    span: Tensor

    @classmethod
    def measure(cls, values: Tensor) -> ValueScales:
        channel = values.abs().amax(2, keepdim=True).to(_wide(values)).sqrt().to(values.dtype)
        channel = torch.where(channel > 0, channel, 1.0)
        # one level above zero makes the step the span
        span, zero = affine_parameters(values / channel, 1, (1, 3))
        return cls(channel, zero, span)

    def encode(self, values: Tensor, slots: Tensor, bits: int) -> Tensor:
        """Codes of `values (B, H, m, Dv)` that stand at `slots (B, H, m)`."""
        span, zero = self._at(slots)
        wide = _wide(values)
        return encode(values.to(wide) / self.channel.to(wide), span.to(wide) / ((1 << bits) - 1), zero.to(wide), bits)

    def apply(self, x: Tensor, ids: Tensor, bits: Sequence[int], slots: slice | Tensor) -> Tensor:
        """Values from codes `x (B, H, m, Dv)` of the classes `ids (B, H, m)` at slots, a range or `(B, H, m)`; entries of 16 bits pass."""
        wide = _wide(self.channel)
        levels = torch.tensor([1 if b == RAW else (1 << b) - 1 for b in bits], dtype=wide, device=ids.device)
        span, zero = self._at(slots)
        step = span.to(wide) / levels[ids.long()].unsqueeze(-1)
        restored = x.to(wide, copy=True).mul_(step).add_(zero.to(wide)).mul_(self.channel.to(wide))
        if RAW not in bits:
            return restored
        raw = torch.tensor([b == RAW for b in bits], device=ids.device)[ids.long()].unsqueeze(-1)
        return torch.where(raw, x.to(wide), restored)

    def _at(self, slots: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Span and zero of the tokens at slots, `(B, H or 1, m, 1)`."""
        if isinstance(slots, slice):
            return self.span[:, :, slots], self.zero[:, :, slots]
        span, zero = (x.squeeze(-1).expand(-1, slots.shape[1], -1).gather(2, slots).unsqueeze(-1) for x in (self.span, self.zero))
        return span, zero

    def map(self, change: Callable[[Tensor], Tensor]) -> ValueScales:
        return ValueScales(change(self.channel), change(self.zero), change(self.span))

    @property
    def nbytes(self) -> int:
        return _bytes(self.channel) + _bytes(self.zero) + _bytes(self.span)


@dataclass(frozen=True)
class Members:
    """Which class each slot belongs to: packed bits, and how many of each class stand before every CHUNK slots.

    bits `(B, H or 1, bytes)` uint8; before `(B, classes, H or 1, chunks)` int32.
    """

    bits: Tensor
    before: Tensor
    width: int

    @classmethod
    def of(cls, classes: Tensor, count: int) -> Members:
        width = 1 if count <= 2 else 2
        own = classes.unsqueeze(1) == torch.arange(count, device=classes.device).view(1, count, 1, 1)
        before = torch.nn.functional.pad(own, (0, -classes.shape[-1] % CHUNK)).unflatten(-1, (-1, CHUNK)).sum(-1)
        before = (before.cumsum(-1) - before).to(torch.int32)
        return cls(pack(classes, width), before, width)

    def read(self, begin: int, end: int) -> tuple[Tensor, list[Tensor]]:
        """Classes `(B, H or 1, end - begin)` uint8, and per class how many of its entries stand before `begin`, `(B, H or 1)`."""
        chunk = begin // CHUNK
        start = chunk * CHUNK
        n = end - start
        first = start * self.width // 8
        ids = unpack(self.bits[..., first : first + -(-n * self.width // 8)], self.width, n)
        skipped, ids = ids[..., : begin - start], ids[..., begin - start :]
        return ids, [self.before[:, c, :, chunk] + (skipped == c).sum(-1) for c in range(self.before.shape[1])]

    def at(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Classes of `slots (B, H, m)` uint8, and of each how many entries of its class stand before it, int64."""
        ids, own, whole = _byte_tables(self.width, self.bits.device)
        bits = self.bits.expand(-1, slots.shape[1], -1).long()
        byte, place = slots // ids.shape[1], slots % ids.shape[1]
        there = bits.gather(2, byte)
        found = ids[there, place]
        # one list per class of what stands before each byte; the slots' own class chooses among them
        before = torch.zeros_like(slots)
        for index in range(self.before.shape[1]):
            counts = whole[:, index][bits]
            before = torch.where(found == index, (counts.cumsum(-1) - counts).gather(2, byte), before)
        return found, before + own[there, place, found.long()]

    def map(self, change: Callable[[Tensor], Tensor]) -> Members:
        return Members(change(self.bits), change(self.before), self.width)

    @property
    def nbytes(self) -> int:
        return _bytes(self.bits) + _bytes(self.before)


@lru_cache(maxsize=8)
def _byte_tables(width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each value of a byte: the classes of its slots `(256, s)`, how many of each class stand before a slot in it `(256, s, c)`, and
    how many of each there are `(256, c)`."""
    with torch.inference_mode(False):  # tensors made in inference mode would not serve outside of it
        ids = unpack(torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(-1), width, 8 // width)
        each = torch.nn.functional.one_hot(ids.long(), 1 << width)
        return ids, each.cumsum(1) - each, each.sum(1)


def _check(keys: Tensor, classes: Tensor, bits: Sequence[int]) -> None:
    batch, heads, n = keys.shape[:3]
    if classes.dtype != torch.uint8 or tuple(classes.shape) not in {(batch, heads, n), (batch, 1, n)}:
        raise ValueError(
            f"classes are {classes.dtype} {tuple(classes.shape)}: expected uint8 ({batch}, {heads}, {n}) or ({batch}, 1, {n})"
        )
    if not 1 <= len(bits) <= CLASSES or any(b not in (*BITS, RAW) for b in bits):
        raise ValueError(f"bits={tuple(bits)}: give 1 to {CLASSES} classes of {', '.join(map(str, BITS))} or {RAW} bits each")
    if n == 0:
        raise ValueError("there are no entries to encode: seal at least one")
    if int(classes.max()) >= len(bits):
        raise ValueError(f"class {int(classes.max())} was given no bits: bits={tuple(bits)} name classes 0 to {len(bits) - 1}")


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _pick(x: Tensor, slots: Tensor) -> Tensor:
    """Rows `slots (B, H, m)` of x `(B, H, n, D)`."""
    return torch.gather(x, 2, slots.unsqueeze(-1).expand(*slots.shape, x.shape[-1]))


def _range(x: Tensor, first: Tensor, m: int) -> Tensor:
    """Rows first ... first + m - 1 of x `(B, H, n, D)`, each (row, head) from its own `first (B, H)`."""
    batch, heads, n, dim = x.shape
    if m == n and not bool(first.any()):
        return x
    rows = (first.unsqueeze(-1) + torch.arange(m, device=x.device)).clamp(max=n - 1)
    rows = rows + n * torch.arange(batch * heads, device=x.device).view(batch, heads, 1)
    return x.view(-1, dim).index_select(0, rows.flatten()).view(batch, heads, m, dim)


def _rows(parts: list[Tensor], row: Tensor) -> Tensor:
    """Row `row (B, H, m)` of the parts' rows, one part after another, `(B, H, m, D)`."""
    dim = parts[0].shape[-1]
    if len(parts) == 1 and parts[0].shape[:3] == row.shape:
        return parts[0]
    return torch.cat([p.reshape(-1, dim) for p in parts]).index_select(0, row.flatten()).view(*row.shape, dim)


def _shared(x: Tensor) -> Tensor:
    """A side array `(B, H, n)` as `(B, 1, n)` where all heads agree; always a copy."""
    return x[:, :1].clone() if bool((x == x[:, :1]).all()) else x.clone()


def _bytes(x: Tensor) -> int:
    return x.untyped_storage().nbytes()
