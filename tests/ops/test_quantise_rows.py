"""Rows quantised and packed in one kernel: bit for bit what the definition gives on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.ops.quant import affine_quantise, pack, packed_bytes, quantise_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADS, DIM = 3, 40


def rows(n: int, dtype: torch.dtype) -> Tensor:
    """`(2, 3, n, 40)`: of many sizes, some constant, with zeros."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(2, HEADS, n, DIM, generator=generator) * torch.randn(2, HEADS, n, 1, generator=generator).exp()
    x[0, 1, 0], x[1, 2, -1] = 1.3, 0.0
    return (x + torch.randn(2, HEADS, n, 1, generator=generator)).to(dtype)


def columns(d: int) -> Tensor:
    generator = torch.Generator().manual_seed(d)
    return torch.stack([torch.randperm(DIM, generator=generator)[:d] for _ in range(HEADS)])


def defined(x: Tensor, bits: int, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
    if chosen is not None:
        x = torch.stack([x[:, head][..., chosen[head]] for head in range(x.shape[1])], dim=1)
    codes, scale, zero = affine_quantise(x, bits, check=False)
    return pack(codes, bits), torch.cat([scale, zero], -1)


def check(x: Tensor, bits: int, chosen: Tensor | None, impl: str = "triton", device: str = DEVICE) -> None:
    placed = None if chosen is None else chosen.to(device)
    packed, ranges = (y.cpu() for y in quantise_rows(x.to(device), bits, columns=placed, impl=impl, check=False))
    codes, expected = defined(x, bits, chosen)
    assert ranges.dtype == x.dtype and packed.shape == codes.shape and ranges.shape == expected.shape
    assert torch.equal(ranges.nan_to_num(nan=-77.0), expected.nan_to_num(nan=-77.0))
    assert torch.equal(packed, codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", (1, 2, 4, 8))
def test_the_kernel_gives_the_codes_of_the_definition(bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def dirty(*args, **options) -> Tensor:  # what is not written shows
        made = empty(*args, **options)
        return made.fill_(torch.nan if made.is_floating_point() else 85)

    monkeypatch.setattr(torch, "empty", dirty)
    for n in (1, 7):
        for d in (1, 8, 13):
            check(rows(n, dtype), bits, columns(d))
        check(rows(n, dtype), bits, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_go_to_the_even_code(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 2.0]).to(dtype).expand(1, 1, 1, 8)
    packed, ranges = quantise_rows(x.to(DEVICE), 2, impl="triton")
    assert ranges.tolist() == [[[[1.0, 0.0]]]]
    assert packed.tolist() == [[[[0b10010000, 0b10111010]]]]
    check(x, 2, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_what_the_definition_makes_of_it(dtype: torch.dtype) -> None:
    x = rows(6, dtype)
    x[0, 0, 0, 3], x[0, 0, 1, 3], x[0, 1, 2, 5] = torch.inf, -torch.inf, torch.nan
    x[0, 0, 2, 3], x[0, 0, 2, 9], x[1, 1, 0] = torch.inf, -torch.inf, torch.inf
    for bits in (1, 4):
        check(x, bits, None)
        for impl in ("triton", "torch"):
            with pytest.raises(ValueError, match="not all finite"):
                quantise_rows(x.to(DEVICE), bits, impl=impl, check=True)


def test_many_rows_and_rows_that_lie_apart() -> None:
    """More rows than a program takes, and rows and channels of a larger array, in any order of its axes."""
    x = torch.randn(2, 150, HEADS, 2 * DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    check(x.transpose(1, 2)[..., ::2], 4, columns(6))
    check(x.transpose(1, 2)[:, :, 3:, :DIM], 8, None)
    check(x[:, :0].transpose(1, 2), 4, None)


@pytest.mark.parametrize("bits", (3, 4, 5))
def test_the_choice_of_a_way_changes_nothing(bits: int) -> None:
    for dtype in (torch.float64, torch.float32):
        check(rows(4, dtype), bits, columns(7), "torch", "cpu")  # torch divides by a number a little differently on a GPU
        if DEVICE == "cpu":
            check(rows(4, dtype), bits, columns(7), "auto")
    packed, ranges = quantise_rows(rows(4, torch.float32).requires_grad_().to(DEVICE), bits, columns=columns(7).to(DEVICE))
    assert packed.shape == (2, HEADS, 4, packed_bytes(7, bits)) and ranges.requires_grad


def test_refusals() -> None:
    x = rows(2, torch.float32).to(DEVICE)
    for wrong in (columns(4)[:2], columns(4).int(), columns(4)[0], columns(4)[:, :0]):
        with pytest.raises(ValueError, match=r"do not fit 3 heads: expected int64 \(3, d\)"):
            quantise_rows(x, 4, columns=wrong.to(DEVICE))
    with pytest.raises(ValueError, match="takes floating-point rows"):
        quantise_rows(x[0], 4)
    with pytest.raises(ValueError, match="takes floating-point rows"):
        quantise_rows(x.int(), 4)
    with pytest.raises(ValueError, match="impl 'fast' is not one of"):
        quantise_rows(x, 4, impl="fast")
    with pytest.raises(ValueError, match="bits=9"):
        quantise_rows(x, 9)
    for args in ((x, 3), (x.double(), 4), (x.clone().requires_grad_(), 4)):
        with pytest.raises(ValueError, match='impl "triton" takes 1, 2, 4 and 8 bits'):
            quantise_rows(*args, impl="triton")


def test_a_step_too_small_for_its_dtype_is_0_and_so_are_the_codes() -> None:
    check(torch.tensor([0.0, 6e-8, 1.2e-7, 0.0]).half().expand(1, 1, 1, 4), 8, None)
