"""Turning keys: rotary angles add up, in both layouts, for part of the channels."""

from __future__ import annotations

import cmath

import pytest
import torch

from saccade.core import Rotary
from saccade.parts.rotary import turn

FREQUENCIES = torch.tensor([1.0, 0.3, 0.01])


def by_hand(x: list[float], position: float, interleaved: bool) -> list[float]:
    """Each pair is a complex number, multiplied by exp(i * position * frequency)."""
    out = list(x)
    for i, frequency in enumerate(FREQUENCIES.tolist()):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + 3)
        z = complex(x[a], x[b]) * cmath.exp(1j * position * frequency)
        out[a], out[b] = z.real, z.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [6, 9])
def test_turns_pairs_like_complex_numbers(interleaved: bool, dim: int) -> None:
    x = torch.randn(2, 3, 5, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotary = Rotary(FREQUENCIES, interleaved)
    shift = torch.randint(-50, 3000, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    got = turn(x, shift, rotary)
    for index in ((0, 0, 0), (1, 2, 4), (1, 0, 2)):
        expected = by_hand(x[index].tolist(), int(shift[index]), interleaved)
        assert got[index].tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(turn(x, 7, rotary), turn(x, torch.full((2, 3, 5), 7), rotary))
    assert (turn(turn(x, 900, rotary), -900, rotary) - x).abs().max() < 1e-12
    assert torch.equal(got[..., 6:], x[..., 6:])


def test_keeps_dtype_and_rounds_once() -> None:
    x = torch.randn(1, 2, 50, 6, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        assert torch.equal(turn(low, 1234, Rotary(FREQUENCIES)), turn(low.float(), 1234, Rotary(FREQUENCIES)).to(dtype))


def test_no_pairs_leave_keys_alone() -> None:
    x = torch.randn(1, 2, 5, 6)
    assert torch.equal(turn(x, 99, Rotary(FREQUENCIES[:0])), x)


def test_too_few_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="turns 6 channels and the keys have only 4"):
        turn(torch.zeros(1, 1, 1, 4), 1, Rotary(FREQUENCIES))
