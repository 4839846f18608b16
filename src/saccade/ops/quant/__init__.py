"""quant: numbers in few bits, and those bits packed into real bytes.

    affine      code = clamp(round((x - zero) / scale), 0, 2^bits - 1),   x' = zero + scale * code
                zero = min x, scale = (max x - zero) / (2^bits - 1) over the reduced axes or over groups of one axis
    symmetric   code = round(x / scale) + 2^(bits-1),   x' = scale * (code - 2^(bits-1)),   scale = max |x| / (2^(bits-1) - 1)

|x' - x| <= scale / 2 inside the range, up to rounding of the arithmetic (float32; float64 for float64) and of parameters
kept in the dtype of x. Where all values are equal the scale is 0 and they are restored exactly.
Packed, code i takes the bits [i * bits, (i + 1) * bits) of its row, lowest bit first: n codes take ceil(n * bits / 8) bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops.quant import reference

BITS = (1, 2, 3, 4, 8)

__all__ = [
    "BITS", "Affine", "Symmetric", "affine_parameters", "affine_quantise", "dequantise", "encode", "pack", "packed_bytes",
    "symmetric_dequantise", "symmetric_quantise", "unpack",
]  # fmt: skip


class Affine(NamedTuple):
    """codes: uint8, the shape of x. scale, zero: dtype of x, one entry per reduced set (reduced axes have size 1 or, with groups,
    the number of groups)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


class Symmetric(NamedTuple):
    """codes: uint8, 2^(bits-1) stands for 0. scale: as in Affine."""

    codes: Tensor
    scale: Tensor


def packed_bytes(n: int, bits: int) -> int:
    """Bytes that n codes of `bits` bits take."""
    _check_bits(bits, BITS)
    return reference.packed_bytes(n, bits)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `(..., n)` uint8, each below 2^bits, as bytes `(..., ceil(n * bits / 8))` uint8; bits of 1, 2, 3, 4 or 8.

    Raises TypeError for another dtype and ValueError for a code that does not fit.
    """
    _check_bits(bits, BITS)
    _check_bytes(codes, "codes")
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits: codes go up to {(1 << bits) - 1}")
    return reference.pack(codes, bits)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`: `(..., ceil(n * bits / 8))` uint8 to `(..., n)` uint8."""
    _check_bits(bits, BITS)
    _check_bytes(packed, "packed codes")
    if packed.shape[-1] != reference.packed_bytes(n, bits):
        raise ValueError(
            f"{packed.shape[-1]} bytes a row do not hold {n} codes of {bits} bits: expected {reference.packed_bytes(n, bits)}"
        )
    return reference.unpack(packed, bits, n)


def affine_parameters(
    x: Tensor, bits: int, dims: int | Sequence[int] = -1, *, group: int | None = None, clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(scale, zero) of asymmetric quantisation of x; see `affine_quantise`."""
    _check_bits(bits, range(1, 9))
    split, axes, dim = _split(x, dims, group, clip)
    scale, zero = reference.affine_parameters(split, bits, axes, clip)
    _check_finite(scale, zero)
    return (scale, zero) if dim is None else (scale.squeeze(dim), zero.squeeze(dim))


def affine_quantise(
    x: Tensor, bits: int, dims: int | Sequence[int] = -1, *, group: int | None = None, clip: float = 1.0
) -> Affine:
    """Asymmetric min/max quantisation of x (finite, floating point), round to nearest, 1 to 8 bits.

    dims: the axes over which one (scale, zero) is shared. group: split the one axis in `dims` into runs of this many entries, each
    with parameters of its own. clip: factor on min and max; values beyond are clamped.
    Raises ValueError for values that are not finite and for a group that does not divide its axis.
    """
    scale, zero = affine_parameters(x, bits, dims, group=group, clip=clip)
    return Affine(encode(x, scale, zero, bits), scale, zero)


def symmetric_quantise(
    x: Tensor, bits: int, dims: int | Sequence[int] = -1, *, group: int | None = None, clip: float = 1.0
) -> Symmetric:
    """Symmetric quantisation of x, 2 to 8 bits: 0 stays 0. Arguments as in `affine_quantise`."""
    _check_bits(bits, range(2, 9))
    split, axes, dim = _split(x, dims, group, clip)
    scale = reference.symmetric_scale(split, bits, axes, clip)
    _check_finite(scale)
    middle, most = 1 << (bits - 1), (1 << (bits - 1)) - 1
    step = scale.to(reference.exact(x))
    steps = (split.to(step.dtype) / torch.where(step > 0, step, 1.0)).round_().clamp_(-most, most)
    codes = (steps + middle).to(torch.uint8).reshape(x.shape)
    return Symmetric(codes, scale if dim is None else scale.squeeze(dim))


def encode(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes uint8 of x for given parameters, each broadcastable to x or with one entry per group of an axis."""
    _check_bits(bits, range(1, 9))
    scale, zero = (_spread(p, x.shape) for p in (scale, zero))
    return reference.encode(x, scale, zero, bits)


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`zero + scale * codes` in `dtype` (default: the scale's); scale and zero as `affine_quantise` gave them."""
    scale, zero = (_spread(p, codes.shape) for p in (scale, zero))
    return reference.decode(codes, scale, zero, scale.dtype if dtype is None else dtype)


def symmetric_dequantise(codes: Tensor, scale: Tensor, bits: int, dtype: torch.dtype | None = None) -> Tensor:
    """`scale * (codes - 2^(bits-1))` in `dtype` (default: the scale's)."""
    _check_bits(bits, range(2, 9))
    wide = reference.exact(scale)
    steps = codes.to(wide) - (1 << (bits - 1))
    return (steps * _spread(scale, codes.shape).to(wide)).to(scale.dtype if dtype is None else dtype)


def _split(
    x: Tensor, dims: int | Sequence[int], group: int | None, clip: float
) -> tuple[Tensor, tuple[int, ...], int | None]:
    """x with the grouped axis split in two, the axes to reduce, and the axis to squeeze away afterwards (None without groups)."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"quantisation takes a floating-point tensor, not {getattr(x, 'dtype', type(x).__name__)}")
    if not 0 < clip <= 1:
        raise ValueError(f"clip={clip} is not a factor above 0 and at most 1")
    axes = tuple(sorted({d % x.ndim if -x.ndim <= d < x.ndim else -1 for d in ((dims,) if isinstance(dims, int) else dims)}))
    if not axes or axes[0] < 0:
        raise ValueError(f"dims={dims} does not name axes of a tensor of shape {tuple(x.shape)}")
    if any(x.shape[d] == 0 for d in axes):
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has no values along axes {axes}: there is no range to measure")
    if group is None:
        return x, axes, None
    if len(axes) != 1 or group < 1 or x.shape[axes[0]] % group:
        raise ValueError(f"groups of {group} do not divide axes {axes} of shape {tuple(x.shape)}: give one axis and a divisor of its size")
    return reference.grouped(x, axes[0], group), (axes[0] + 1,), axes[0] + 1


def _spread(parameter: Tensor, shape: torch.Size) -> Tensor:
    """A parameter tensor made broadcastable to `shape`: one entry per group is repeated over its group."""
    if parameter.ndim == len(shape):
        for dim, (have, want) in enumerate(zip(parameter.shape, shape, strict=True)):
            if have not in (1, want):
                if want % max(have, 1):
                    raise ValueError(f"parameters of shape {tuple(parameter.shape)} do not fit codes of shape {tuple(shape)}")
                parameter = parameter.repeat_interleave(want // have, dim=dim)
    return parameter


def _check_bits(bits: int, allowed: Sequence[int]) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in allowed:
        raise ValueError(f"bits={bits!r} is not one of {', '.join(map(str, allowed))}")


def _check_bytes(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.uint8 or x.ndim == 0:
        raise TypeError(f"{name} must be a uint8 tensor with at least one axis, not {getattr(x, 'dtype', type(x).__name__)}")


def _check_finite(*parameters: Tensor) -> None:
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise ValueError("the values to quantise are not all finite, or span more than their dtype holds: look for inf and nan")
