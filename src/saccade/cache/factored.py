"""A sealed segment of low-rank codes: of each token one code for the keys of all heads and one for the values.

    c = (y - y0) E,   y' = c B + y0,   y the keys before the rotary embedding, or the values, of all heads side by side

Keys are rebuilt a tile at a time and turned to their places as they are read. Value codes are averaged by the attention weights first, and
the average is taken through B. Codes may be held in few bits. Source: cskv, arXiv 2409.10593.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from saccade.cache.parted import shared
from saccade.cache.segment import CHUNK, Rectangle
from saccade.cache.stores import CodedStore, PlainStore, Store, held, take
from saccade.cache.uniform import UniformSegment
from saccade.core import Partial, Rotary, merge
from saccade.ops.decode import Packed, decode_low_rank
from saccade.parts.factors import beside
from saccade.parts.rotary import turn

FEW = 16  # queries that the decode ops take


@dataclass(frozen=True, kw_only=True)
class Maps:
    """down `(H * D, r)`, up `(H, r, D)`, and offset `(H, 1, D)` or None: y0, which codes leave out.

    Made offline: all segments of a layer share them, and they are not counted as a segment's own.
    """

    down: Tensor
    up: Tensor
    offset: Tensor | None

    @classmethod
    def of(cls, down: Tensor, up: Tensor, offset: Tensor, heads: int) -> Maps:
        """From down `(H * D, r)`, up `(r, H * D)` and offset `(H * D,)`."""
        by_head = up.unflatten(1, (heads, -1)).transpose(0, 1).contiguous()
        return cls(down=down, up=by_head, offset=offset.view(heads, 1, -1) if bool(offset.any()) else None)

    def codes(self, x: Tensor) -> Tensor:
        """Of entries `(B, H, n, D)`: `(B, 1, n, r)`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        own = x.to(wide) if self.offset is None else x.to(wide) - self.offset.to(wide)
        return (beside(own) @ self.down.to(wide)).to(x.dtype).unsqueeze(1)

    def entries(self, codes: Tensor) -> Tensor:
        """Of codes `(B, 1 or H, n, r)`, a head's own or those of all heads: `(B, H, n, D)`."""
        wide = torch.promote_types(codes.dtype, torch.float32)
        own = codes.to(wide) @ self.up.to(wide)
        return (own if self.offset is None else own + self.offset.to(wide)).to(codes.dtype)

    @property
    def nbytes(self) -> int:
        return held(*(getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True, kw_only=True)
class FactoredContent:
    """Codes `(B, 1, n, r)` of keys and values with their maps. rotary, places `(B, H or 1, n)`: keys were coded before the embedding."""

    keys: Store
    values: Store
    key_maps: Maps
    value_maps: Maps
    rotary: Rotary | None = None
    places: Tensor | None = None


class FactoredSegment(UniformSegment):
    def __init__(self, content: FactoredContent, positions: Tensor) -> None:
        super().__init__(positions, content.key_maps.up.shape[0])
        self.content = content

    @classmethod
    def encode(
        cls, keys: Tensor, values: Tensor, positions: Tensor, key_maps: Maps, value_maps: Maps, *, rotary: Rotary | None,
        places: Tensor, bits: int | None = None, block: int = 32,
    ) -> FactoredSegment:  # fmt: skip
        """keys `(B, H, n, D)` as attention sees them, values `(B, H, n, Dv)`, positions and places `(B, H, n)`.

        bits: of a code's numbers, None for "as they are": those of keys share a scale and zero by channel over `block` tokens, those of
        values by token over the numbers that fall to one head, r / H.
        """
        heads = keys.shape[1]
        plain = keys if rotary is None else turn(keys, -places, rotary)
        key_codes, value_codes = key_maps.codes(plain), value_maps.codes(values)
        stores: tuple[Store, Store] = (PlainStore(key_codes), PlainStore(value_codes))
        if bits is not None:
            by_channel, by_token = in_bits(key_codes, value_codes, bits, block, heads)
            stores = (CodedStore(by_channel, keys.dtype), CodedStore(by_token, values.dtype))
        return cls(FactoredContent(
            keys=stores[0], values=stores[1], key_maps=key_maps, value_maps=value_maps, rotary=rotary,
            places=None if rotary is None else shared(places),
        ), positions)  # fmt: skip

    @property
    def kv_bytes(self) -> int:
        return self.content.keys.nbytes + self.content.values.nbytes

    @property
    def side_bytes(self) -> int:
        return super().side_bytes + held(self.content.places)

    def read(self, begin: int, end: int) -> Rectangle:
        c, positions = self.content, self.span(begin, end)
        keys = c.key_maps.entries(c.keys.read(begin, end))
        if c.rotary is not None and c.places is not None:
            keys = turn(keys, c.places[:, :, begin:end], c.rotary)
        return Rectangle(keys, c.value_maps.entries(c.values.read(begin, end)), {"positions": positions})

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        c = self.content
        keys = c.key_maps.entries(c.keys.gather(slots))
        if c.rotary is not None and c.places is not None:
            keys = turn(keys, c.places.expand(-1, self.heads, -1).gather(2, slots), c.rotary)
        return keys, c.value_maps.entries(c.values.gather(slots))

    def attend(self, q: Tensor, *, scale: float, softcap: float | None) -> Partial:
        # an offset of the keys would have to be turned with each of them
        if q.shape[2] > FEW or self.content.key_maps.offset is not None:
            return super().attend(q, scale=scale, softcap=softcap)
        # codes in few bits are unpacked a piece at a time
        step = self.n if isinstance(self.content.keys, PlainStore) else CHUNK
        found = merge(*(self._span(q, i, min(i + step, self.n), scale, softcap) for i in range(0, self.n, step)))
        share = q.shape[1] // self.heads
        out = self.content.value_maps.entries(found.out.unflatten(1, (-1, share)).flatten(2, 3))
        return Partial(out.reshape(*q.shape[:3], -1), found.lse)

    def _span(self, q: Tensor, begin: int, end: int, scale: float, softcap: float | None) -> Partial:
        """Attention weights over a span, and the value codes they average, `(B, Hq, m, r)`."""
        c = self.content
        places = None if c.places is None else c.places[:, :, begin:end]
        return decode_low_rank(
            q, c.keys.read(begin, end).to(q.dtype), c.key_maps.up.to(q.dtype),
            c.values.read(begin, end).to(q.dtype).expand(-1, self.heads, -1, -1), rotary=c.rotary, positions=places, scale=scale,
            softcap=softcap, return_lse=True,
        )  # fmt: skip

    def take_rows(self, rows: Tensor) -> FactoredSegment:
        new, c = self._picked(rows), self.content
        new.content = replace(
            c, keys=c.keys.take_rows(rows), values=c.values.take_rows(rows), places=None if c.places is None else take(c.places, rows)
        )
        return new


def in_bits(key_codes: Tensor, value_codes: Tensor, bits: int, block: int, heads: int) -> tuple[Packed, Packed]:
    """Codes `(B, 1, n, r)` quantised: of keys by channel over `block` tokens, of values by token over r / heads numbers."""
    return (
        Packed.of(key_codes, bits, granularity="channel", group=block),
        Packed.of(value_codes, bits, granularity="token", group=max(1, value_codes.shape[-1] // heads)),
    )
