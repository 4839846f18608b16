"""Packed: keys or values of a cache in few bits, as `decode_quantised` reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saccade.ops.quant import (
    affine_quantise,
    codebook,
    codebook_decode,
    codebook_encode,
    dequantise,
    hadamard,
    pack_words,
    split_outliers,
    symmetric_quantise,
    unpack_words,
    word_bytes,
)

Granularity = Literal["channel", "token"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """`x = scale * level + zero + outlier`, level being code (less 2^(bits-1) with `symmetric`) or, with a codebook, its entry.

    codes: uint8 `(B, Hk, n, word_bytes(dim, bits))`, packed along the channels by `quant.pack_words` (for 2, 4 and 8 bits these are
        the bytes of `quant.pack`, with a row of an even number of bytes). bits: 1 to 8. dim: channels.
    scale, zero: granularity "channel": `(B, Hk, ceil(n / group), dim)`, a channel of `group` tokens shares them; "token":
        `(B, Hk, n, ceil(dim / group))`, `group` channels of a token share them. zero None: no offset; scale None: 1, and no zero.
    codebook: levels `(2^bits,)` for all, or `(Hk, dim, 2^bits)`, each channel its own.
    outlier_index, outlier_delta: `(B, Hk, n, s)` integer channel (dim for none) and what is added there; a token has no channel twice.
    rotated: the channels were rotated by the Hadamard transform before quantisation (dim a power of two).
    """

    codes: Tensor
    bits: int
    dim: int
    scale: Tensor | None = None
    zero: Tensor | None = None
    granularity: Granularity = "channel"
    group: int = 128
    symmetric: bool = False
    codebook: Tensor | None = None
    outlier_index: Tensor | None = None
    outlier_delta: Tensor | None = None
    rotated: bool = False

    def __post_init__(self) -> None:
        if self.codes.ndim != 4 or self.codes.dtype != torch.uint8 or self.codes.shape[3] != word_bytes(self.dim, self.bits):
            raise ValueError(
                f"codes are {self.codes.dtype} {tuple(self.codes.shape)}: expected uint8 (B, Hk, n, {word_bytes(self.dim, self.bits)}) "
                f"for {self.dim} channels of {self.bits} bits"
            )
        if self.granularity not in ("channel", "token") or self.group < 1:
            raise ValueError(f"granularity {self.granularity!r} in groups of {self.group}: give channel or token, and at least 1")
        batch, heads, n, _ = self.codes.shape
        groups = (-(-n // self.group), self.dim) if self.granularity == "channel" else (n, -(-self.dim // self.group))
        for name, x in (("scale", self.scale), ("zero", self.zero)):
            if x is not None and x.shape != (batch, heads, *groups):
                raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {(batch, heads, *groups)}")
        if self.scale is None and self.zero is not None:
            raise ValueError("a zero point without a scale: give both")
        book = self.codebook
        if book is not None and (self.symmetric or book.shape not in {(1 << self.bits,), (heads, self.dim, 1 << self.bits)}):
            raise ValueError(
                f"the codebook has shape {tuple(book.shape)}: expected ({1 << self.bits},) or {(heads, self.dim, 1 << self.bits)}, and "
                "symmetric=False"
            )
        index, delta = self.outlier_index, self.outlier_delta
        if (index is None) != (delta is None) or (
            index is not None and delta is not None and (index.shape != delta.shape or index.shape[:3] != (batch, heads, n))
        ):
            raise ValueError(f"outliers need an index and a delta, both ({batch}, {heads}, {n}, s)")

    @classmethod
    def of(
        cls, x: Tensor, bits: int, *, granularity: Granularity = "channel", group: int = 128, symmetric: bool = False,
        nonuniform: bool = False, outliers: float = 0.0, rotate: bool = False, check: bool | None = None,
    ) -> Packed:  # fmt: skip
        """Quantise x `(B, Hk, n, dim)`, round to nearest.

        group: tokens ("channel") or channels ("token") that share parameters; the last group may be shorter.
        nonuniform: one codebook for all, fitted by k-means to x normalised by each group's range. outliers: share of each token's
        channels kept apart, exactly. rotate: by the Hadamard transform first. check as in `quant.pack`.
        """
        dim = x.shape[-1]
        x = hadamard(x) if rotate else x
        values = index = None
        dense = x
        if outliers > 0:
            dense, values, index = split_outliers(x, outliers)
        axis = 2 if granularity == "channel" else 3
        size = min(group, max(x.shape[axis], 1))
        # a short last group is filled up with its last entry, which changes no range
        short = -x.shape[axis] % size
        if short:
            dense = torch.cat([dense, dense.narrow(axis, x.shape[axis] - 1, 1).expand(*_with(x.shape, axis, short))], dim=axis)
        zero = book = None
        if nonuniform:
            _, span, zero = affine_quantise(dense, 1, axis, group=size, check=check)
            # one level above zero makes the step the span; the middle of it is the origin of the codebook
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            scale, zero = span / 2, (zero.to(wide) + span.to(wide) / 2).to(x.dtype)
            spread_scale, spread_zero = (p.to(wide).repeat_interleave(size, dim=axis) for p in (scale, zero))
            unit = ((dense.to(wide) - spread_zero) / torch.where(spread_scale > 0, spread_scale, 1.0)).clamp(-1, 1)
            book = codebook(unit.flatten(), bits)
            codes = codebook_encode(unit, book)
            book = book.to(x.dtype)
        elif symmetric:
            codes, scale = symmetric_quantise(dense, bits, axis, group=size, check=check)
        else:
            codes, scale, zero = affine_quantise(dense, bits, axis, group=size, check=check)
        packed = cls(
            codes=pack_words(codes[..., : x.shape[2], :dim], bits, check=check), bits=bits, dim=dim, scale=scale, zero=zero,
            granularity=granularity, group=size, symmetric=symmetric, codebook=book, rotated=rotate,
        )  # fmt: skip
        if values is None or index is None:
            return packed
        wide = torch.promote_types(x.dtype, torch.float32)
        delta = values.to(wide) - packed._stored(0, x.shape[2], wide).gather(-1, index.long())
        fields = {name: getattr(packed, name) for name in cls.__dataclass_fields__}
        return cls(**{**fields, "outlier_index": index, "outlier_delta": delta.to(x.dtype)})

    @property
    def length(self) -> int:
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        held = (self.codes, self.scale, self.zero, self.codebook, self.outlier_index, self.outlier_delta)
        return sum(x.numel() * x.element_size() for x in held if x is not None)

    def read(self, begin: int = 0, end: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Tokens begin ... end - 1 as `(B, Hk, end - begin, dim)`, rotated back if they were rotated; float32 arithmetic (float64
        for float64)."""
        x = self.read_stored(begin, end, dtype)
        return hadamard(x) if self.rotated else x

    def read_stored(self, begin: int = 0, end: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same without rotating back."""
        end = self.length if end is None else end
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x = self._stored(begin, end, wide)
        if self.outlier_index is not None and self.outlier_delta is not None:
            index, delta = (a[:, :, begin:end] for a in (self.outlier_index, self.outlier_delta))
            room = torch.nn.functional.pad(x, (0, 1))  # the last column takes the entries that are none
            x = room.scatter_add(-1, index.long(), delta.to(wide))[..., : self.dim]
        return x.to(dtype)

    def _stored(self, begin: int, end: int, wide: torch.dtype) -> Tensor:
        """Without outliers."""
        codes = unpack_words(self.codes[:, :, begin:end], self.bits, self.dim)
        if self.codebook is None:
            levels = codes.to(wide) - (1 << (self.bits - 1) if self.symmetric else 0)
        else:
            book = self.codebook.to(wide)
            # one for each channel, (Hk, dim, levels), stands beside codes with the channels before the tokens
            swap = book.ndim == 3
            levels = codebook_decode(codes.transpose(2, 3) if swap else codes, book)
            levels = levels.transpose(2, 3) if swap else levels
        if self.scale is None:
            return levels
        scale, zero = (None if p is None else self._parameters(p, begin, end) for p in (self.scale, self.zero))
        assert scale is not None
        if zero is None:
            return levels * scale.to(wide)
        return dequantise(levels, scale.to(wide), zero.to(wide), wide)

    def _parameters(self, p: Tensor, begin: int, end: int) -> Tensor:
        """Those of each number, broadcastable to `(B, Hk, end - begin, dim)`: what one group covers is not spread out."""
        if self.granularity == "channel":
            first, last = begin // self.group, max(end - 1, begin) // self.group
            return p[:, :, first : first + 1] if first == last else p[:, :, torch.arange(begin, end, device=p.device) // self.group]
        p = p[:, :, begin:end]
        return p if p.shape[3] == 1 else p[..., torch.arange(self.dim, device=p.device) // self.group]


def _with(shape: torch.Size, axis: int, size: int) -> tuple[int, ...]:
    return tuple(size if i == axis else n for i, n in enumerate(shape))
