"""Cases of `quant`: bandwidth of packing, unpacking and quantising, next to a plain copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.bench.case import Case, Check, Contestant, Field, Run, Settings, Skip, Work
from saccade.bench.exact import EqualCheck, SliceCheck
from saccade.ops import quant
from saccade.ops.gpu import has_triton

PART = 512  # rows of a checked slice


@dataclass(frozen=True)
class Shape:
    """Keys or values of a cache: (batch, heads, n, dim)."""

    n: int
    batch: int = 1
    heads: int = 8
    dim: int = 128


def _numbers(shape: Shape, s: Settings) -> Tensor:
    return s.normal(shape.batch, shape.heads, shape.n, shape.dim)


def _codes(shape: Shape, bits: int, s: Settings) -> Tensor:
    size = (shape.batch, shape.heads, shape.n, shape.dim)
    return torch.randint(0, 1 << bits, size, dtype=torch.uint8, device=s.device, generator=s.generator())


def _bytes(*tensors: Tensor) -> float:
    return float(sum(x.numel() * x.element_size() for x in tensors))


@dataclass(frozen=True)
class Entry:
    call: Callable[[], Any]
    bytes: float
    check: Check


def _part(x: Tensor) -> Tensor:
    return x[:1, :1, :PART]


def _pack(shape: Shape, s: Settings, bits: int, words: bool) -> Entry:
    codes = _codes(shape, bits, s)
    pack = quant.pack_words if words else quant.pack
    weights = 2 ** torch.arange(bits, device=s.device)

    def exact() -> list[Tensor]:
        """Bit by bit, in the order that the format names; words leave their highest bits empty."""
        part = _part(codes)
        bit = (part.unsqueeze(-1) & weights.to(torch.uint8)) > 0
        if words:
            each = 16 // bits
            whole = torch.nn.functional.pad(bit, (0, 0, 0, -part.shape[-1] % each)).unflatten(-2, (-1, each)).flatten(-2)
            flat = torch.nn.functional.pad(whole, (0, 16 - each * bits)).flatten(-2)
        else:
            flat = bit.flatten(-2)
        flat = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % 8)).unflatten(-1, (-1, 8))
        return [(flat * 2 ** torch.arange(8, device=s.device)).sum(-1).to(torch.uint8)]

    packed = pack(_part(codes), bits).shape[-1] * codes[..., 0].numel()
    return Entry(lambda: pack(codes, bits, impl=s.impl), codes.numel() + packed, EqualCheck(slices=lambda o: [_part(o[0])], exact=exact))


def _unpack(shape: Shape, s: Settings, bits: int, words: bool) -> Entry:
    codes = _codes(shape, bits, s)
    packed = (quant.pack_words if words else quant.pack)(codes, bits)
    unpack = quant.unpack_words if words else quant.unpack
    check = EqualCheck(slices=lambda o: [_part(o[0])], exact=lambda: [_part(codes)])
    return Entry(lambda: unpack(packed, bits, shape.dim, impl=s.impl), _bytes(codes, packed), check)


def _quantise(shape: Shape, s: Settings, bits: int, axis: int, symmetric: bool) -> Entry:
    x = _numbers(shape, s)
    group = min(128, shape.n) if axis == 2 else min(32, shape.dim)
    rows = max(group, PART // group * group)
    step = quant.symmetric_quantise if symmetric else quant.affine_quantise

    def restore(q: Any, dtype: torch.dtype) -> Tensor:
        """Numbers from codes: by repeating each parameter over its group."""
        scale = q.scale.to(dtype).repeat_interleave(group, dim=axis)
        if symmetric:
            return (q.codes.to(dtype) - (1 << (bits - 1))) * scale
        return q.codes.to(dtype) * scale + q.zero.to(dtype).repeat_interleave(group, dim=axis)

    def found(outputs: tuple[Tensor, ...]) -> list[Tensor]:
        return [restore(type_of(*outputs), torch.float64)[:1, :1, :rows]]

    def run(dtype: torch.dtype) -> list[Tensor]:
        return [restore(step(x[:1, :1, :rows].to(dtype), bits, axis, group=group), torch.float64)]

    type_of = quant.Symmetric if symmetric else quant.Affine
    made = step(x[:1, :1, :rows], bits, axis, group=group)
    parameters = _bytes(*made[1:]) / made.codes.numel() * x.numel()
    check = _Restored(x[:1, :1, :rows], found, run, s.dtype)
    return Entry(lambda: tuple(step(x, bits, axis, group=group, check=False, impl=s.impl)), _bytes(x) + x.numel() + parameters, check)


class _Restored:
    """How far restored numbers are from the given ones: allowed is 2 % more than the same in float64 arithmetic, plus the rounding of
    parameters to the dtype of the input (a code next to a tie may go either way)."""

    def __init__(
        self, x: Tensor, found: Callable[..., list[Tensor]], run: Callable[[torch.dtype], list[Tensor]], dtype: torch.dtype
    ) -> None:
        self.x, self.found, self.run, self.dtype = x.double(), found, run, dtype

    def judge(self, outputs: tuple[Tensor, ...]) -> tuple[float, float]:
        def off(y: Tensor) -> float:
            return float((y - self.x).norm() / self.x.norm())

        return off(self.found(outputs)[0]), 1.02 * off(self.run(torch.float64)[0]) + torch.finfo(self.dtype).eps


def _dequantise(shape: Shape, s: Settings, bits: int) -> Entry:
    x = _numbers(shape, s)
    group = min(32, shape.dim)
    codes, scale, zero = quant.affine_quantise(x, bits, 3, group=group, check=False)

    def run(dtype: torch.dtype) -> list[Tensor]:
        wide = [_part(y).to(dtype).repeat_interleave(group, dim=3) for y in (scale, zero)]
        return [_part(codes).to(dtype) * wide[0] + wide[1]]

    check = SliceCheck(slices=lambda o: [_part(o[0])], exact=lambda: run(torch.float64), plain=lambda: run(s.dtype))
    return Entry(lambda: quant.dequantise(codes, scale, zero, impl=s.impl), _bytes(codes, scale, zero, x), check)


def _hadamard(shape: Shape, s: Settings) -> Entry:
    x = _numbers(shape, s)

    def run(dtype: torch.dtype) -> list[Tensor]:
        matrix = torch.ones(1, 1, dtype=dtype, device=s.device)
        while matrix.shape[0] < shape.dim:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return [(_part(x).to(dtype) @ matrix) * shape.dim**-0.5]

    check = SliceCheck(slices=lambda o: [_part(o[0])], exact=lambda: run(torch.float64), plain=lambda: run(s.dtype))
    return Entry(lambda: quant.hadamard(x, s.impl), 2 * _bytes(x), check)


def _codebook_encode(shape: Shape, s: Settings, bits: int) -> Entry:
    x = _numbers(shape, s)
    levels = torch.linspace(-2, 2, 1 << bits, device=s.device)

    def exact() -> list[Tensor]:
        # equally near: the lower, which is what argmin gives
        return [(_part(x).double().unsqueeze(-1) - levels.double()).abs().argmin(-1).to(torch.uint8)]

    check = EqualCheck(slices=lambda o: [_part(o[0])], exact=exact)
    return Entry(lambda: quant.codebook_encode(x, levels, impl=s.impl), _bytes(x) + x.numel(), check)


FUNCTIONS: dict[str, Callable[[Shape, Settings], Entry]] = {
    **{f"pack {bits} bits": partial(_pack, bits=bits, words=False) for bits in (4, 2, 3, 8)},
    **{f"unpack {bits} bits": partial(_unpack, bits=bits, words=False) for bits in (4, 2, 3, 8)},
    "pack words 3 bits": partial(_pack, bits=3, words=True),
    "unpack words 3 bits": partial(_unpack, bits=3, words=True),
    "quantise 4 bits by channel": partial(_quantise, bits=4, axis=2, symmetric=False),
    "quantise 4 bits by token": partial(_quantise, bits=4, axis=3, symmetric=False),
    "quantise 8 bits symmetric": partial(_quantise, bits=8, axis=3, symmetric=True),
    "dequantise 4 bits": partial(_dequantise, bits=4),
    "hadamard": _hadamard,
    "codebook encode 3 bits": partial(_codebook_encode, bits=3),
}


def _build(what: str, shape: Shape, s: Settings) -> Field:
    if s.impl not in ("auto", "torch", "triton"):
        raise Skip(f"{what} has an implementation in torch and one in triton: --impl {s.impl} can't run")
    ran = s.impl if s.impl != "auto" else "triton" if s.cuda and has_triton() else "torch"
    entry = FUNCTIONS[what](shape, s)
    amount = Work(flops=None, bytes=entry.bytes, unit="byte")
    ours = Contestant(name="saccade", role="ours", work=amount, make=lambda: Run(call=entry.call, outputs=_as_tuple, impl=ran))
    half = int(entry.bytes / 2)

    def copy() -> Run:
        a, b = (torch.zeros(half, dtype=torch.uint8, device=s.device) for _ in range(2))
        return Run(call=lambda: b.copy_(a), impl="torch")

    plain = Contestant(name="copy", role="peer", work=Work(flops=None, bytes=2.0 * half, unit="byte"), make=copy, checked=False)
    return Field(contestants=[ours, plain], check=entry.check)


def _as_tuple(raw: Any) -> tuple[Tensor, ...]:
    return tuple(raw) if isinstance(raw, tuple) else (raw,)


def case(what: str, shape: Shape) -> Case:
    if what not in FUNCTIONS:
        raise ValueError(f"{what!r} is no function of quant: choose one of {', '.join(FUNCTIONS)}")
    if what.startswith("quantise") and shape.n > 128 and shape.n % 128:
        raise ValueError(f"channels are quantised in groups of 128 tokens: {shape.n} tokens are no multiple of it")
    numbers = shape.batch * shape.heads * shape.n * shape.dim
    return Case(family=what, shape=vars(shape).copy(), need=60.0 * numbers, build=partial(_build, what, shape))


def cases(grid: str, cuda: bool) -> list[Case]:
    if not cuda:
        shapes = [Shape(n, 1, 2, 32) for n in (512, 1024)] if grid == "quick" else [Shape(n) for n in (4096, 16384)]
    elif grid == "quick":
        shapes = [Shape(131072), Shape(32768)]
    else:
        shapes = [Shape(n) for n in (131072, 32768, 8192)] + [Shape(131072, batch=4)]
    return [case(what, shape) for shape in shapes for what in FUNCTIONS]
