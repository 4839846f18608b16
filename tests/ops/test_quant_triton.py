"""Kernels of quant: bit for bit what the definition gives on a CPU, and no memory touched beside what they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saccade.ops.gpu import has_triton
from saccade.ops.quant import (
    affine_parameters,
    affine_quantise,
    codebook_decode,
    codebook_encode,
    dequantise,
    encode,
    pack,
    pack_words,
    symmetric_dequantise,
    symmetric_quantise,
    unpack,
    unpack_words,
)
from saccade.ops.quant.sets import by_axes
from tests.ops.memory import watched

if not has_triton():
    pytest.skip("kernels need Triton", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPE = (2, 2, 6, 8)
WAYS = [
    (-1, None), (-1, 4), (3, 1), (2, None), (2, 3), (2, 2), ((1, 3), None), ((0, 2), None), ((2, 3), None), ((0, 1, 2, 3), None), (0, None),
    ((0, 1, 3), None),
]  # fmt: skip
few = settings(max_examples=3, deadline=None, derandomize=True)
many = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True)
def _dirty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a kernel does not write shows, and so does what it reads or writes elsewhere."""
    empty, like = torch.empty, torch.empty_like

    def fill(made: Tensor) -> Tensor:
        return made.fill_(torch.nan if made.is_floating_point() else 85)

    monkeypatch.setattr(torch, "empty", lambda *args, **options: fill(empty(*args, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: fill(like(*args, **options)))
    with watched() if DEVICE == "cpu" else nullcontext():
        yield


def placed(x: Any) -> Any:
    """On the device, with the strides it has."""
    if not isinstance(x, Tensor) or DEVICE == "cpu":
        return x
    size = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.as_strided((size,), (1,)).to(DEVICE).as_strided(x.shape, x.stride())


def same(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What the definition gives, on a CPU, once the kernel has given the same."""
    expected = call(*args, **options, impl="torch")
    found = call(*(placed(x) for x in args), **options, impl="triton")
    for a, b in zip(*((y,) if isinstance(y, Tensor) else y for y in (found, expected)), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)
    return expected


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of many sizes, around many places."""
    generator = torch.Generator().manual_seed(seed)
    size, place = (torch.randn(*shape[:-1], 1, generator=generator) for _ in range(2))
    return (torch.randn(*shape, generator=generator) * size.exp() + place).to(dtype)


def laid(x: Tensor, layout: str) -> Tensor:
    """The same values in a larger or differently ordered memory."""
    if layout == "turned":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        return x.repeat(1, 1, 2, 1)[:, :, 3 : 3 + x.shape[2]]
    return x.repeat_interleave(2, dim=3)[..., ::2] if layout == "apart" else x


# -- ranges and codes --------------------------------------------------------------------------------------------------------


CASES = given(
    st.sampled_from(WAYS), st.integers(2, 8), st.sampled_from([1.0, 1.0, 0.6]), st.sampled_from(["whole", "turned", "sliced", "apart"]),
    st.integers(0, 10**6),
)  # fmt: skip


def compare(dtype: torch.dtype, way: Any, bits: int, clip: float, layout: str, seed: int) -> None:
    dims, group = way
    x = laid(normal(seed, *SHAPE, dtype=dtype), layout)
    x[0, 1, :, 3], x[1, :, 2] = 1.3, 0.0
    codes, scale, zero = same(affine_quantise, x, bits - 1, dims, group=group, clip=clip)
    same(encode, x, scale, zero, bits - 1)
    same(dequantise, codes, scale, zero)
    found = same(symmetric_quantise, x, bits, dims, group=group, clip=clip)
    same(symmetric_dequantise, *found, bits)


@pytest.mark.parametrize("dtype", DTYPES)
@few
@CASES
def test_kernels_give_what_the_definition_gives(dtype: torch.dtype, way: Any, bits: int, clip: float, layout: str, seed: int) -> None:
    compare(dtype, way, bits, clip, layout, seed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@many
@CASES
def test_kernels_give_it_in_many_cases(dtype: torch.dtype, way: Any, bits: int, clip: float, layout: str, seed: int) -> None:
    compare(dtype, way, bits, clip, layout, seed)


def test_sets_too_long_for_a_program_are_measured_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("LONGEST", 64), ("LONGEST_ACROSS", 32), ("TILE", 64)):
        monkeypatch.setattr(f"saccade.ops.quant.sets.{name}", size)
    x = normal(0, 2, 400, 3, dtype=torch.bfloat16).abs() + 1  # so that a 0 beyond the end would show
    for dims in ((1,), (0, 1)):
        walk = by_axes(x, dims)
        assert walk is not None and not walk[1].fits
        same(affine_quantise, x, 3, dims)
    x[0, :, 1] = 9.0  # rounded, its clipped minimum passes its clipped maximum
    same(affine_quantise, x, 3, 1, clip=0.7)
    same(symmetric_quantise, x[:, :100].half(), 5, (1, 2), clip=0.7)
    x[1, 300, 2] = torch.nan
    assert int(same(affine_parameters, x, 3, 1, check=False)[0].isnan().sum()) == 1


def test_nothing_beyond_the_end_of_a_set_counts() -> None:
    x = normal(7, 5, 7).abs() + 1
    for values in (x, -x):
        same(affine_quantise, values, 4, 0)
        same(affine_quantise, values, 4, 1)


def test_a_clipped_range_that_rounding_turns_round_is_empty() -> None:
    x = torch.linspace(0.1, 9, 40).bfloat16().unsqueeze(1).expand(40, 3)
    assert not same(affine_quantise, x, 4, clip=0.7).scale.all()


def test_axes_of_any_number_and_parameters_of_any_shape() -> None:
    assert same(affine_quantise, normal(1, 40), 4, 0, group=8).scale.shape == (5,)
    same(symmetric_quantise, normal(2, 2, 2, 3, 2, 8), 4, 3)
    same(affine_quantise, normal(2, 2, 2, 3, 2, 8).transpose(0, 4), 4, (0, 1))
    x, wide = normal(3, 2, 3, 8), normal(4, 2, 3, 8).abs()
    for scale, zero in ((wide, x.roll(1)), (wide[0, 0, 0], x[0, 0, :1]), (wide[:, :, :2], x[:1, :1, :1]), (wide[0], x[0, :1])):
        codes = same(encode, x, scale, zero, 4)
        same(dequantise, codes, scale, zero, torch.bfloat16)
        same(dequantise, codes.float() / 2, scale, zero)
    assert same(encode, x[:0], wide[:0], wide[:0], 4).numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_quotients_at_and_beside_halves_are_rounded_as_a_division_is(dtype: torch.dtype) -> None:
    """Steps of every size that a dtype has, values that are an odd number of half steps and the numbers next to it."""
    steps = torch.randn(24, generator=torch.Generator().manual_seed(0)).abs() + 1
    powers = torch.linspace(-148, 120, 24) if dtype != torch.float16 else torch.linspace(-24, 15, 24)
    scale = (steps.double() * 2.0 ** powers.round().double()).to(dtype).unsqueeze(-1)
    halves = (scale.double() * (torch.arange(-2, 516) * 0.5)).float()
    below, above = (torch.nextafter(halves, torch.full_like(halves, end)) for end in (-torch.inf, torch.inf))
    x = torch.cat([halves, below, above, torch.tensor([[torch.inf, -torch.inf, torch.nan, 3e38, 1e-45]]).expand(24, 5)], dim=1)
    zero = torch.zeros_like(scale)
    for bits in (8, 3):
        same(encode, x, scale, zero, bits)
    odd = torch.tensor([0.0, -1.0, torch.inf, torch.nan]).to(dtype).unsqueeze(-1)
    same(encode, x[20:], odd, zero[:4], 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_what_the_definition_makes_of_it(dtype: torch.dtype) -> None:
    x = normal(5, 6, 8, dtype=dtype)
    x[0, 3], x[1, 3], x[2, 5], x[3, :2] = torch.inf, -torch.inf, torch.nan, torch.tensor([torch.inf, -torch.inf])
    x[4] = torch.finfo(dtype).max * torch.tensor([1.0, -1, 1, 0, 0, 1, 1, 1])
    x[5] = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * torch.arange(8)  # steps below what the dtype holds
    for quantise in (affine_quantise, symmetric_quantise):
        same(quantise, x, 2, check=False)
        same(quantise, x, 8, check=False)
        for impl in ("triton", "torch"):
            with pytest.raises(ValueError, match="not all finite"):
                quantise(placed(x), 4, check=True, impl=impl)


# -- packing -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_bytes_and_words_are_those_of_the_definition(bits: int) -> None:
    for n in (7, 20):  # codes over the edges of bytes; rows that are taken as one, or by four codes
        codes = torch.randint(0, 1 << bits, (4, n), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
        for inwards, outwards in ((pack, unpack), (pack_words, unpack_words)):
            same(outwards, same(inwards, codes, bits), bits, n)
    assert pack(placed(codes[:0]), bits, impl="triton").numel() == 0


def test_packed_views_and_what_takes_more_than_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saccade.ops.quant.triton.packing.MOST", 48)
    codes = torch.randint(0, 8, (6, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)[1:6:2, 1:21]
    for inwards, outwards in ((pack, unpack), (pack_words, unpack_words)):
        packed = same(inwards, codes, 3)
        same(outwards, torch.cat([packed[:, :1], packed], -1)[:, 1:], 3, 20)
    packed = same(pack, codes[:, :16], 3)
    same(unpack, torch.cat([packed[0, :1], packed.flatten()])[1:].view(3, 6), 3, 16)  # begins between two words
    with pytest.raises(ValueError, match="does not fit 2 bits"):
        pack(torch.tensor([4], dtype=torch.uint8, device=DEVICE), 2, impl="triton", check=True)


# -- codebooks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_codebooks_are_those_of_the_definition(dtype: torch.dtype) -> None:
    x = normal(6, 3, 33, dtype=dtype)
    x[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for count in (2, 8, 100):
        for shape in ((count,), (3, count)):
            levels = normal(count, *shape).sort(-1).values
            row = levels.view(-1, count)[-1]
            x[2, : min(count - 1, 33)] = ((row[1:] + row[:-1]) / 2).to(dtype)[:33]  # as near to two levels
            codes = same(codebook_encode, x, levels.to(dtype) if count == 8 else levels)
            same(codebook_decode, codes, levels, dtype)
    same(codebook_encode, x.T, levels[0])


# -- choice ------------------------------------------------------------------------------------------------------------------


def test_what_kernels_do_not_take_is_refused() -> None:
    x, codes = torch.randn(3, 8, device=DEVICE), torch.zeros(3, 8, dtype=torch.uint8, device=DEVICE)
    for wrong in (x.double(), x.clone().requires_grad_()):
        for call in (affine_quantise, affine_parameters, symmetric_quantise):
            with pytest.raises(ValueError, match=rf'{call.__name__}: impl "triton" takes float32.*; use impl "auto"'):
                call(wrong, 4, impl="triton")
        with pytest.raises(ValueError, match='encode: impl "triton" takes'):
            encode(x, wrong[:, :1], wrong[:, :1], 4, impl="triton")
        with pytest.raises(ValueError, match='dequantise: impl "triton" takes'):
            dequantise(codes, wrong[:, :1], wrong[:, :1], impl="triton")
        with pytest.raises(ValueError, match='codebook_decode: impl "triton" takes'):
            codebook_decode(codes, wrong[0], impl="triton")
    with pytest.raises(ValueError, match="two levels"):
        codebook_encode(x, x[0, :1], impl="triton")
    with pytest.raises(ValueError, match='impl "triton" takes'):
        affine_quantise(torch.randn(2, 2, 2, 2, 2, 2, 2, device=DEVICE), 4, (0, 2, 4, 6), impl="triton")
    for call, given_ in ((pack, codes), (affine_quantise, x), (symmetric_quantise, x)):
        with pytest.raises(ValueError, match="impl 'fast' is not one of auto, torch, triton"):
            call(given_, 4, impl="fast")


def test_auto_still_has_gradients() -> None:
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    codes, scale, zero = affine_quantise(x, 4)
    dequantise(codes, scale, zero).sum().backward()
    assert x.grad is not None and bool(x.grad.any())
