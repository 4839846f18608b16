"""Tokens of an image or a video in the order of a Hilbert curve: neighbours in the order are neighbours in space."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def hilbert_order(shape: Sequence[int]) -> Tensor:
    """Row-major token numbers of a grid in the order in which a Hilbert curve visits them: int64 `(prod(shape),)`.

    shape: sides of the grid, e.g. (frames, height, width). `x[..., order, :]` puts tokens into curve order, `order.argsort()` takes them
    back. Sides need not be powers of two: the curve runs through the smallest cube around the grid, and what lies outside is left out
    (steps across a gap are then longer than 1). Blocks of tokens along the curve are more alike than rows of pixels (spargeattn,
    arXiv 2502.18137, section 3.6).
    """
    if not shape or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"hilbert_order({list(shape)}): the sides of a grid are whole numbers from 1 on")
    places = torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(-1, len(shape))
    bits = max(1, math.ceil(math.log2(max(shape))))
    return torch.argsort(_index(places.unbind(-1), bits), stable=True)


def _index(axes: Sequence[Tensor], bits: int) -> Tensor:
    """How far along the curve through the cube of side `2^bits` each point lies.

    Source: Skilling, Programming the Hilbert curve (2004): undo the rotations from the highest bit on, then Gray-decode.
    """
    x = list(axes)
    for bit in range(bits - 1, 0, -1):
        low = (1 << bit) - 1
        for i in range(len(x)):
            turned = (x[i] >> bit & 1).bool()
            swap = torch.where(turned, 0, (x[0] ^ x[i]) & low)
            x[i] = x[i] ^ swap
            x[0] = torch.where(turned, x[0] ^ low, x[0] if i == 0 else x[0] ^ swap)
    for i in range(1, len(x)):
        x[i] = x[i] ^ x[i - 1]
    flip = torch.zeros_like(x[0])
    for bit in range(bits - 1, 0, -1):
        flip = torch.where((x[-1] >> bit & 1).bool(), flip ^ ((1 << bit) - 1), flip)
    index = torch.zeros_like(x[0])
    for bit in range(bits - 1, -1, -1):
        for axis in x:
            index = index << 1 | (axis ^ flip) >> bit & 1
    return index
