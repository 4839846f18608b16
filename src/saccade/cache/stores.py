"""How the keys or the values of a sealed part lie in memory: as they are, or in packed codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from saccade.ops.decode import Packed
from saccade.ops.quant import affine_parameters, encode, hadamard, pack_words
from saccade.parts.rows import pick_rows


class Store(ABC):
    """Entries `(B, H, n, d)` that no longer change."""

    @property
    @abstractmethod
    def length(self) -> int:
        """n."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of storage, parameters included."""

    @abstractmethod
    def read(self, begin: int, end: int) -> Tensor:
        """Entries begin ... end - 1, `(B, H, end - begin, d)`."""

    @abstractmethod
    def gather(self, slots: Tensor) -> Tensor:
        """Entries `slots (B, H', m)` int64 of each row and head, `(B, H', m, d)`; H' is H, or any number where H is 1."""

    @abstractmethod
    def take_rows(self, rows: Tensor) -> Store:
        """These batch rows."""


@dataclass(frozen=True)
class PlainStore(Store):
    """The entries themselves, `(B, H, n, d)`."""

    entries: Tensor

    @property
    def length(self) -> int:
        return self.entries.shape[2]

    @property
    def nbytes(self) -> int:
        return held(self.entries)

    def read(self, begin: int, end: int) -> Tensor:
        return self.entries[:, :, begin:end]

    def gather(self, slots: Tensor) -> Tensor:
        return rows_at(self.entries, slots)

    def take_rows(self, rows: Tensor) -> PlainStore:
        return PlainStore(take(self.entries, rows))

    def by_head(self) -> PlainStore:
        """Every head as a row of its own: `(B * H, 1, n, d)`."""
        return PlainStore(_rows_of_heads(self.entries))


@dataclass(frozen=True)
class CodedStore(Store):
    """Codes that the fused decode op reads, times `factor (B, H, 1, d)` for each channel where one is given. dtype: of what is read."""

    packed: Packed
    dtype: torch.dtype
    factor: Tensor | None = None

    @property
    def length(self) -> int:
        return self.packed.length

    @property
    def nbytes(self) -> int:
        tensors = (getattr(self.packed, f.name) for f in fields(self.packed))
        return held(*(x for x in tensors if isinstance(x, Tensor)), self.factor)

    def read(self, begin: int, end: int) -> Tensor:
        return self._scaled(self.packed.read(begin, end, self._wide))

    def gather(self, slots: Tensor) -> Tensor:
        return self._scaled(packed_at(self.packed, slots).read(dtype=self._wide))

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _scaled(self, x: Tensor) -> Tensor:
        return (x if self.factor is None else x * self.factor.to(x.dtype)).to(self.dtype)

    def take_rows(self, rows: Tensor) -> CodedStore:
        return self._mapped(lambda x: take(x, rows))

    def by_head(self) -> CodedStore:
        """Every head as a row of its own, `(B * H, 1, n, d)`: the same storage, but for parameters that heads share."""
        return self._mapped(_rows_of_heads)

    def times_factor(self, out: Tensor) -> Tensor:
        """What attention over the codes gave, `(B, Hq, m, d)`, in the channels' own size."""
        if self.factor is None:
            return out
        return (out.unflatten(1, (self.factor.shape[1], -1)) * self.factor.unsqueeze(2)).flatten(1, 2).to(out.dtype)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> CodedStore:
        """With other rows; a codebook serves all."""
        by_row = ("codes", "scale", "zero", "outlier_index", "outlier_delta")
        changed = {name: change(x) for name in by_row if (x := getattr(self.packed, name)) is not None}
        return CodedStore(replace(self.packed, **changed), self.dtype, None if self.factor is None else change(self.factor))


def by_channel(x: Tensor, bits: int, group: int | None = None) -> CodedStore:
    """x `(B, H, n, d)` with one scale and zero for each channel of `group` tokens (default: of all)."""
    return CodedStore(Packed.of(x, bits, granularity="channel", group=x.shape[2] if group is None else group), x.dtype)


def by_token(x: Tensor, bits: int, group: int, *, clip: float = 1.0, rotate: bool = False) -> CodedStore:
    """x `(B, H, n, d)` with one scale and whole zero point for `group` channels of a token (all, where d is less).

    With s the step and a the minimum, both after the range was shrunk by `clip`: code = clamp(round(x / s) + z, 0, 2^bits - 1),
    z = -round(a / s), x' = s (code - z) (akvq-vl, step 5). rotate: the channels are turned by the Hadamard transform first.
    """
    x, dtype = hadamard(x) if rotate else x, x.dtype
    group = min(group, x.shape[-1])
    scale, low = affine_parameters(x, bits, -1, group=group, clip=clip)
    wide = torch.promote_types(dtype, torch.float32)
    step = scale.to(wide)
    # a constant vector has no step, and stands at its minimum
    zero = torch.where(step > 0, step * (low.to(wide) / torch.where(step > 0, step, 1.0)).round(), low.to(wide)).to(dtype)
    return CodedStore(Packed(
        codes=pack_words(encode(x, scale, zero, bits), bits), bits=bits, dim=x.shape[-1], scale=scale, zero=zero, granularity="token",
        group=group, rotated=rotate,
    ), dtype)  # fmt: skip


def channel_factor(values: Tensor) -> Tensor:
    """zipcache's `c = sqrt(max_t |V[t]|)` for each channel of values `(B, H, n, d)`: `(B, H, 1, d)`; 1 where all are 0."""
    wide = torch.promote_types(values.dtype, torch.float32)
    factor = values.abs().amax(2, keepdim=True).to(wide).sqrt().to(values.dtype)
    return torch.where(factor > 0, factor, 1.0)


def by_token_over_heads(x: Tensor, bits: int, factor: Tensor) -> CodedStore:
    """x `(B, H, n, d)` divided by `factor (B, H, 1, d)`, with one scale and zero for each token over all heads and channels."""
    return _divided(x, bits, factor, (1, 3))


def by_token_in_heads(x: Tensor, bits: int, factor: Tensor) -> CodedStore:
    """The same with a scale and zero in each head: entries of one place need not be of one token in all heads then."""
    return _divided(x, bits, factor, (3,))


def _divided(x: Tensor, bits: int, factor: Tensor, axes: tuple[int, ...]) -> CodedStore:
    wide, size = torch.promote_types(x.dtype, torch.float32), (*x.shape[:3], 1)
    scale, zero = affine_parameters(x / factor, bits, axes)
    # the quotient is not rounded before its code is found
    codes = encode(x.to(wide) / factor.to(wide), scale, zero, bits)
    packed = Packed(
        codes=pack_words(codes, bits), bits=bits, dim=x.shape[-1], scale=scale.expand(size), zero=zero.expand(size), granularity="token",
        group=x.shape[-1],
    )  # fmt: skip
    return CodedStore(packed, x.dtype, factor)


def rows_at(x: Tensor, slots: Tensor) -> Tensor:
    """Entries `slots (B, H', m)` of x `(B, H' or 1, n, d)`: `(B, H', m, d)`."""
    return pick_rows(x.expand(-1, slots.shape[1], -1, -1), slots)


def packed_at(packed: Packed, slots: Tensor) -> Packed:
    """The codes of some tokens with the parameters that belong to them, as a Packed of its own: `slots (B, H', m)` int64.

    Tokens of one group no longer lie together, so with granularity "channel" each has its parameters beside it (a group of 1).
    """
    by_channel = packed.granularity == "channel"
    own = slots // packed.group if by_channel else slots
    picked = {name: rows_at(x, own) for name in ("scale", "zero") if (x := getattr(packed, name)) is not None}
    picked |= {name: rows_at(x, slots) for name in ("outlier_index", "outlier_delta") if (x := getattr(packed, name)) is not None}
    return replace(packed, codes=rows_at(packed.codes, slots), group=1 if by_channel else packed.group, **picked)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Batch rows of x; what all heads share stays stored once."""
    rows = rows.to(x.device)
    if x.ndim > 1 and x.shape[1] > 1 and x.stride(1) == 0:
        return x[:, :1].index_select(0, rows).expand(len(rows), *x.shape[1:])
    return x.index_select(0, rows)


def _rows_of_heads(x: Tensor) -> Tensor:
    """x `(B, H, ...)` as `(B * H, 1, ...)`."""
    return x.flatten(0, 1).unsqueeze(1)


def held(*tensors: Tensor | None) -> int:
    """Bytes of the storage behind these tensors."""
    return sum(x.untyped_storage().nbytes() for x in tensors if x is not None)
