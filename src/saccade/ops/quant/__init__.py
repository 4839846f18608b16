"""quant: numbers in few bits, and those bits packed into real bytes.

    affine      code = clamp(round((x - zero) / scale), 0, 2^bits - 1),   x' = zero + scale * code
                zero = min x, scale = (max x - zero) / (2^bits - 1) over the reduced axes or over groups of one axis
    symmetric   code = round(x / scale) + 2^(bits-1),   x' = scale * (code - 2^(bits-1)),   scale = max |x| / (2^(bits-1) - 1)

|x' - x| <= scale / 2 inside the range, up to rounding of the arithmetic (float32; float64 for float64) and of parameters
kept in the dtype of x. Where all values are equal the scale is 0 and they are restored exactly.
Codebooks (`codebook`, `codebook_encode`, `codebook_decode`) replace the even steps by any ascending levels; `split_outliers` takes the
few values that would widen every range; `hadamard` rotates outliers away.
Packed, code i takes the bits [i * bits, (i + 1) * bits) of its row, lowest bit first: n codes take ceil(n * bits / 8) bytes.
In words (`pack_words`), each 16 bits hold 16 // bits codes, lowest first, and no code lies across two words: for 1, 2, 4 and 8 bits those
are the same bytes, 3 bits take 3.2, 5 and 6 and 7 bits take 5.3, 8 and 8. Kernels read words.
impl: "auto" (kernels in Triton for CUDA tensors, outside of torch.compile), "torch" or "triton". Kernels take float32, float16 and
bfloat16 and no gradients, and give what the definition gives on a CPU, bit for bit: what is not a number has code 0.
Checks that read values from the tensors (codes that don't fit, values that aren't finite) run for CPU tensors unless `check` says
otherwise: on a GPU they would wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops.quant import reference
from saccade.ops.quant.choice import NARROW, kernel_asked, kernel_takes, narrow
from saccade.ops.quant.codebook import codebook, codebook_decode, codebook_encode, split_outliers
from saccade.ops.quant.hadamard import hadamard
from saccade.ops.quant.sets import Sets, by_axes, by_parameters

BITS = (1, 2, 3, 4, 8)  # what caches offer; packing takes 1 to 8
_WHOLE = (1, 2, 4, 8)  # of which no code lies across two bytes
_TAKEN = "float32, float16 and bfloat16 on one device, no gradients and up to four axes that lie apart"

__all__ = [
    "BITS", "Affine", "Symmetric", "affine_parameters", "affine_quantise", "codebook", "codebook_decode", "codebook_encode",
    "dequantise", "encode", "hadamard", "pack", "pack_words", "packed_bytes", "quantise_rows", "split_outliers",
    "symmetric_dequantise", "symmetric_quantise", "unpack", "unpack_words", "word_bytes",
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
    _check_bits(bits, range(1, 9))
    return reference.packed_bytes(n, bits)


def pack(codes: Tensor, bits: int, *, check: bool | None = None, impl: str = "auto") -> Tensor:
    """Codes `(..., n)` uint8, each below 2^bits, as bytes `(..., ceil(n * bits / 8))` uint8; 1 to 8 bits.

    Raises TypeError for another dtype and ValueError for a code that does not fit.
    """
    _check_codes(codes, bits, check)
    return _packed(codes, bits, impl, words=False)


def unpack(packed: Tensor, bits: int, n: int, *, impl: str = "auto") -> Tensor:
    """The inverse of `pack`: `(..., ceil(n * bits / 8))` uint8 to `(..., n)` uint8."""
    _check_bits(bits, range(1, 9))
    _check_bytes(packed, "packed codes")
    if packed.shape[-1] != reference.packed_bytes(n, bits):
        raise ValueError(
            f"{packed.shape[-1]} bytes a row do not hold {n} codes of {bits} bits: expected {reference.packed_bytes(n, bits)}"
        )
    return _unpacked(packed, bits, n, impl, words=False)


def word_bytes(n: int, bits: int) -> int:
    """Bytes that n codes of `bits` bits take in words."""
    _check_bits(bits, range(1, 9))
    return 2 * -(-n // (16 // bits))


def pack_words(codes: Tensor, bits: int, *, check: bool | None = None, impl: str = "auto") -> Tensor:
    """Codes `(..., n)` uint8, each below 2^bits, in words: bytes `(..., 2 * ceil(n / (16 // bits)))` uint8. Errors as in `pack`."""
    _check_codes(codes, bits, check)
    return _packed(codes, bits, impl, words=True)


def unpack_words(packed: Tensor, bits: int, n: int, *, impl: str = "auto") -> Tensor:
    """The inverse of `pack_words`: `(..., n)` uint8."""
    _check_bytes(packed, "packed codes")
    if packed.shape[-1] != word_bytes(n, bits):
        raise ValueError(f"{packed.shape[-1]} bytes a row do not hold {n} codes of {bits} bits in words: expected {word_bytes(n, bits)}")
    return _unpacked(packed, bits, n, impl, words=True)


def affine_parameters(
    x: Tensor, bits: int, dims: int | Sequence[int] = -1, *, group: int | None = None, clip: float = 1.0,
    check: bool | None = None, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(scale, zero) of asymmetric quantisation of x; see `affine_quantise`."""
    _check_bits(bits, range(1, 9))
    split, axes, dim = _split(x, dims, group, clip)
    walk = _walk("affine_parameters", impl, split, axes)
    if walk is None:
        scale, zero = reference.affine_parameters(split, bits, axes, clip)
    else:
        from saccade.ops.quant.triton import parameters

        scale, zero = (_per_set(p, split, axes) for p in parameters(*walk, bits, clip, symmetric=False))
    _check_finite(check, scale, zero)
    return _squeezed(scale, dim), _squeezed(zero, dim)


def affine_quantise(
    x: Tensor, bits: int, dims: int | Sequence[int] = -1, *, group: int | None = None, clip: float = 1.0,
    check: bool | None = None, impl: str = "auto",
) -> Affine:  # fmt: skip
    """Asymmetric min/max quantisation of x (finite, floating point), round to nearest, 1 to 8 bits.

    dims: the axes over which one (scale, zero) is shared. group: split the one axis in `dims` into runs of this many entries, each
    with parameters of its own. clip: factor on min and max; values beyond are clamped.
    Raises ValueError for values that are not finite and for a group that does not divide its axis.
    """
    _check_bits(bits, range(1, 9))
    split, axes, dim = _split(x, dims, group, clip)
    walk = _walk("affine_quantise", impl, split, axes)
    if walk is None:
        scale, zero = affine_parameters(x, bits, dims, group=group, clip=clip, check=check, impl="torch")
        return Affine(encode(x, scale, zero, bits, impl="torch"), scale, zero)
    from saccade.ops.quant.triton import quantise

    codes, *found = quantise(*walk, bits, clip, symmetric=False)
    scale, zero = (_per_set(p, split, axes) for p in found)
    _check_finite(check, scale, zero)
    return Affine(codes.view(x.shape), _squeezed(scale, dim), _squeezed(zero, dim))


def quantise_rows(
    x: Tensor, bits: int, *, columns: Tensor | None = None, check: bool | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(packed, ranges) of rows x `(B, H, n, D)`: what `pack` and `affine_quantise` make of each row, in one kernel on a GPU.

    columns: `(H, d)` int64, which columns of each head are taken, in this order; None takes all, d = D.
    packed: uint8 `(B, H, n, packed_bytes(d, bits))`; ranges: `(B, H, n, 2)` in the dtype of x, the scale and the zero of each row.
    impl: "auto", "torch" or "triton" (1, 2, 4 and 8 bits, float32, float16 and bfloat16, no gradients). The kernel gives the numbers
    that the definition gives on a CPU; not a number becomes code 0. Errors as in `affine_quantise`, and for columns that don't fit.
    """
    _check_bits(bits, range(1, 9))
    if x.ndim != 4 or not x.is_floating_point() or (columns is None and not x.shape[-1]):
        raise ValueError(f"quantise_rows takes floating-point rows (batch, heads, n, channels), not {x.dtype} {tuple(x.shape)}")
    given = None if columns is None else (columns.ndim, columns.dtype, *columns.shape[:1])
    if columns is not None and (given != (2, torch.int64, x.shape[1]) or not columns.shape[1]):
        raise ValueError(f"columns {columns.dtype} {tuple(columns.shape)} do not fit {x.shape[1]} heads: expected int64 ({x.shape[1]}, d)")
    takes = "1, 2, 4 and 8 bits, float32, float16 and bfloat16 and no gradients"
    if kernel_asked("quantise_rows", impl, x) and kernel_takes("quantise_rows", impl, bits in _WHOLE and narrow(x), takes):
        from saccade.ops.quant.triton import quantise_rows as fused

        packed, ranges = fused(x, bits, columns)
        _check_finite(check, ranges)
        return packed, ranges
    if columns is not None:
        x = x.gather(-1, columns.unsqueeze(1).expand(x.shape[0], -1, x.shape[2], -1))
    codes, scale, zero = affine_quantise(x, bits, check=check, impl=impl)
    return pack(codes, bits, check=False, impl=impl), torch.cat([scale, zero], dim=-1)


def symmetric_quantise(
    x: Tensor, bits: int, dims: int | Sequence[int] = -1, *, group: int | None = None, clip: float = 1.0,
    check: bool | None = None, impl: str = "auto",
) -> Symmetric:  # fmt: skip
    """Symmetric quantisation of x, 2 to 8 bits: 0 stays 0. Arguments as in `affine_quantise`."""
    _check_bits(bits, range(2, 9))
    split, axes, dim = _split(x, dims, group, clip)
    walk = _walk("symmetric_quantise", impl, split, axes)
    if walk is None:
        scale = reference.symmetric_scale(split, bits, axes, clip)
        _check_finite(check, scale)
        codes = reference.symmetric_encode(split, scale, bits).reshape(x.shape)
        return Symmetric(codes, _squeezed(scale, dim))
    from saccade.ops.quant.triton import quantise

    codes, scale, _ = quantise(*walk, bits, clip, symmetric=True)
    scale = _per_set(scale, split, axes)
    _check_finite(check, scale)
    return Symmetric(codes.view(x.shape), _squeezed(scale, dim))


def encode(x: Tensor, scale: Tensor, zero: Tensor, bits: int, *, impl: str = "auto") -> Tensor:
    """Codes uint8 of x for given parameters, each broadcastable to x or with one entry per group of an axis."""
    _check_bits(bits, range(1, 9))
    walk = _walk_by("encode", impl, x, (scale, zero), narrow(x, scale, zero))
    if walk is not None:
        from saccade.ops.quant.triton import encode as kernel

        view, sets, (scale, zero) = walk
        return kernel(view, sets, bits, scale, zero, torch.empty(x.shape, dtype=torch.uint8, device=x.device))
    scale, zero = (_spread(p, x.shape) for p in (scale, zero))
    return reference.encode(x, scale, zero, bits)


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype | None = None, *, impl: str = "auto") -> Tensor:
    """`zero + scale * codes` in `dtype` (default: the scale's); scale and zero as `affine_quantise` gave them."""
    dtype = scale.dtype if dtype is None else dtype
    y = _decoded("dequantise", codes, (scale, zero), 0, dtype, impl)
    if y is not None:
        return y
    scale, zero = (_spread(p, codes.shape) for p in (scale, zero))
    return reference.decode(codes, scale, zero, dtype)


def symmetric_dequantise(
    codes: Tensor, scale: Tensor, bits: int, dtype: torch.dtype | None = None, *, impl: str = "auto"
) -> Tensor:
    """`scale * (codes - 2^(bits-1))` in `dtype` (default: the scale's)."""
    _check_bits(bits, range(2, 9))
    dtype, middle = scale.dtype if dtype is None else dtype, 1 << (bits - 1)
    y = _decoded("symmetric_dequantise", codes, (scale,), middle, dtype, impl)
    if y is not None:
        return y
    wide = reference.exact(scale)
    return ((codes.to(wide) - middle) * _spread(scale, codes.shape).to(wide)).to(dtype)


def _walk(op: str, impl: str, x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Sets] | None:
    """How a kernel is to walk along x, where one is to run."""
    if not kernel_asked(op, impl, x) or not x.numel():
        return None
    walk = by_axes(x, axes) if narrow(x) else None
    return walk if kernel_takes(op, impl, walk is not None, _TAKEN) else None


def _walk_by(
    op: str, impl: str, x: Tensor, parameters: tuple[Tensor, ...], fits: bool
) -> tuple[Tensor, Sets, tuple[Tensor, ...]] | None:
    """The same where parameters are given."""
    if not kernel_asked(op, impl, x) or not x.numel():
        return None
    walk = by_parameters(x, *parameters) if fits else None
    return walk if kernel_takes(op, impl, walk is not None, _TAKEN) else None


def _decoded(op: str, codes: Tensor, parameters: tuple[Tensor, ...], middle: int, dtype: torch.dtype, impl: str) -> Tensor | None:
    """The numbers, where a kernel is to make them."""
    fits = dtype in NARROW and (narrow(codes, *parameters) or (narrow(*parameters) and _bytes_beside(codes, parameters[0])))
    walk = _walk_by(op, impl, codes, parameters, fits)
    if walk is None:
        return None
    from saccade.ops.quant.triton import decode

    view, sets, (scale, *zero) = walk
    return decode(view, sets, scale, zero[0] if zero else None, middle, dtype)


def _bytes_beside(codes: Tensor, parameter: Tensor) -> bool:
    return codes.dtype == torch.uint8 and codes.device == parameter.device


def _per_set(parameter: Tensor, x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A flat parameter in the shape of x, its reduced axes of size 1."""
    return parameter.view([1 if axis in axes else size for axis, size in enumerate(x.shape)])


def _squeezed(parameter: Tensor, dim: int | None) -> Tensor:
    return parameter if dim is None else parameter.squeeze(dim)


def _packed(codes: Tensor, bits: int, impl: str, *, words: bool) -> Tensor:
    if kernel_asked("pack", impl, codes) and codes.numel():
        from saccade.ops.quant.triton import pack as kernel

        return kernel(codes, bits, words)
    return reference.pack_words(codes, bits) if words else reference.pack(codes, bits)


def _unpacked(packed: Tensor, bits: int, n: int, impl: str, *, words: bool) -> Tensor:
    if kernel_asked("unpack", impl, packed) and packed.numel():
        from saccade.ops.quant.triton import unpack as kernel

        return kernel(packed, bits, n, words)
    return reference.unpack_words(packed, bits, n) if words else reference.unpack(packed, bits, n)


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


def _check_codes(codes: Tensor, bits: int, check: bool | None) -> None:
    _check_bits(bits, range(1, 9))
    _check_bytes(codes, "codes")
    if _wanted(check, codes) and bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits: codes go up to {(1 << bits) - 1}")


def _wanted(check: bool | None, x: Tensor) -> bool:
    return x.device.type == "cpu" if check is None else check


def _check_finite(check: bool | None, *parameters: Tensor) -> None:
    if _wanted(check, parameters[0]) and not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise ValueError("the values to quantise are not all finite, or span more than their dtype holds: look for inf and nan")
