"""Keys or values as codes of a shared codebook, with the values that fit none of it in a sparse list."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from saccade.cache.stores import Store, held, rows_at, take
from saccade.ops.quant import codebook_decode, codebook_encode, pack, unpack


@dataclass(frozen=True)
class SparseList:
    """Some entries of `(B, H, n, d)`, token by token: those of token t of row b are `offsets[b, t] ... offsets[b, t + 1] - 1`.

    offsets `(B, n + 1)` int32; channel `(total,)` int16 (int32 where H * d needs it): head * d + channel; values `(total,)`.
    """

    offsets: Tensor
    channel: Tensor
    values: Tensor

    @classmethod
    def of(cls, x: Tensor, mask: Tensor) -> SparseList:
        """The entries of x where mask, both `(B, H, n, d)`, is true."""
        flat = mask.transpose(1, 2).flatten(2)
        batch, n, width = flat.shape
        counts = torch.nn.functional.pad(flat.sum(-1).flatten().cumsum(0), (1, 0))
        first = torch.arange(batch, device=x.device).unsqueeze(-1) * n
        offsets = counts[first + torch.arange(n + 1, device=x.device)].to(torch.int32)
        channel = flat.nonzero()[:, 2].to(torch.int16 if width <= 2**15 else torch.int32)
        return cls(offsets, channel, x.transpose(1, 2).flatten(2)[flat])

    @cached_property
    def _on_host(self) -> Tensor:
        """The offsets where asking for them waits for no device: every step asks how many entries a range lists."""
        return self.offsets.cpu()

    def stored_fields(self) -> dict[str, Tensor]:
        """What is saved."""
        return {"offsets": self.offsets, "channel": self.channel, "values": self.values}

    def put(self, x: Tensor, begin: int) -> Tensor:
        """x `(B, H, m, d)`, tokens begin ... begin + m - 1, with the listed entries as they were."""
        m, dim = x.shape[2:]
        ends = self.offsets[:, begin : begin + m + 1].long()
        rows, tokens, places = [], [], []
        for row in range(x.shape[0]):
            first, last = int(self._on_host[row, begin]), int(self._on_host[row, begin + m])
            tokens.append(torch.arange(m, device=x.device).repeat_interleave(ends[row].diff(), output_size=last - first))
            rows.append(torch.full_like(tokens[-1], row))
            places.append(torch.arange(first, last, device=x.device))
        place, channel = torch.cat(places), self.channel.long()[torch.cat(places)]
        return x.index_put((torch.cat(rows), channel // dim, torch.cat(tokens), channel % dim), self.values[place].to(x.dtype))

    def put_at(self, x: Tensor, slots: Tensor) -> Tensor:
        """x `(B, H, m, d)`, the entries of tokens `slots (B, H, m)`, with those of them that are listed as they were."""
        batch, heads, m, dim = x.shape
        begin, end = (self.offsets.long().unsqueeze(1).expand(-1, heads, -1).gather(2, slots + i).flatten() for i in (0, 1))
        counts = end - begin
        # a token's list is that of all heads: each head looks for its own in it
        line = torch.arange(batch * heads * m, device=x.device).repeat_interleave(counts)
        place = torch.arange(len(line), device=x.device) + (begin - (counts.cumsum(0) - counts)).repeat_interleave(counts)
        channel = self.channel[place].long()
        own = channel // dim == line // m % heads
        line, place, channel = line[own], place[own], channel[own] % dim
        return x.reshape(-1, dim).index_put((line, channel), self.values[place].to(x.dtype)).view_as(x)

    def take_rows(self, rows: Tensor) -> SparseList:
        ends = self.offsets[rows.to(self.offsets.device)]
        picked = torch.cat([torch.arange(int(own[0]), int(own[-1]), device=ends.device) for own in ends])
        sizes = ends[:, -1] - ends[:, 0]
        offsets = ends - ends[:, :1] + (sizes.cumsum(0) - sizes).unsqueeze(-1)
        return SparseList(offsets.to(torch.int32), self.channel[picked], self.values[picked])

    @property
    def nbytes(self) -> int:
        return held(self.offsets, self.channel, self.values)


@dataclass(frozen=True)
class CodebookStore(Store):
    """`x = middle + half * level[code]`, and the listed outliers as they were, written last.

    codes `(B, H, n, bytes)`, bits to a code. levels `(2^bits,)`. middle, half: `(B, H, n, 1)` of each token, or `(H, 1, d)` of each
    channel: static ones, like the levels, belong to the calibration plan, are shared by all segments and not counted here.
    """

    codes: Tensor
    bits: int
    dim: int
    levels: Tensor
    middle: Tensor
    half: Tensor
    outliers: SparseList
    dtype: torch.dtype

    @classmethod
    def encode(
        cls, x: Tensor, bits: int, levels: Tensor, restored: Tensor, middle: Tensor, half: Tensor, outlier: Tensor
    ) -> CodebookStore:
        """x `(B, H, n, d)` in the nearest of `levels (2^bits,)` after normalisation; `restored (2^bits,)` is what codes mean when read.

        outlier `(B, H, n, d)` bool: kept apart. middle, half as in the class; a half of 0 restores the middle.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        unit = (x.to(wide) - middle.to(wide)) / torch.where(half > 0, half, 1.0).to(wide)
        codes = codebook_encode(unit, levels.to(x.device, wide))
        return cls(
            pack(codes, bits), bits, x.shape[-1], restored.to(x.device), middle, half, SparseList.of(x, outlier), x.dtype
        )  # fmt: skip

    @property
    def length(self) -> int:
        return self.codes.shape[2]

    @property
    def _by_token(self) -> bool:
        return self.middle.ndim == 4

    @property
    def nbytes(self) -> int:
        return held(self.codes) + self.outliers.nbytes + (held(self.middle, self.half) if self._by_token else 0)

    def read(self, begin: int, end: int) -> Tensor:
        middle, half = (x[:, :, begin:end] if self._by_token else x for x in (self.middle, self.half))
        return self.outliers.put(self._restored(self.codes[:, :, begin:end], middle, half), begin)

    def gather(self, slots: Tensor) -> Tensor:
        middle, half = (rows_at(x, slots) if self._by_token else x for x in (self.middle, self.half))
        return self.outliers.put_at(self._restored(rows_at(self.codes, slots), middle, half), slots)

    def _restored(self, codes: Tensor, middle: Tensor, half: Tensor) -> Tensor:
        """Without the outliers."""
        wide = torch.promote_types(self.dtype, torch.float32)
        levels = codebook_decode(unpack(codes, self.bits, self.dim), self.levels.to(wide))
        return (levels * half.to(wide) + middle.to(wide)).to(self.dtype)

    def take_rows(self, rows: Tensor) -> CodebookStore:
        middle, half = (take(x, rows) if self._by_token else x for x in (self.middle, self.half))
        return CodebookStore(
            take(self.codes, rows), self.bits, self.dim, self.levels, middle, half, self.outliers.take_rows(rows), self.dtype
        )
