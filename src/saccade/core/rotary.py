"""The rotary embedding: how keys turn with their positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """How a model turns keys by position: angle of pair i at position p is `p * inv_freq[i]`.

    inv_freq: float32 `(pairs,)`; channel i is paired with channel i + pairs ("half" layout), or 2i with 2i + 1 (`interleaved`).
    Channels after the first 2 * pairs carry no position.
    """

    inv_freq: Tensor
    interleaved: bool = False


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """x `(..., D)` with its pairs of channels turned by angles of which cos and sin are given, `(..., pairs)` each, in the dtype of x;
    channels after the first 2 * pairs stay as they are."""
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :pairs], turned[..., pairs:])
    # a pass over memory each, and two for both products would be four
    first, second = (a * cos).addcmul_(b, sin, value=-1), (b * cos).addcmul_(a, sin)
    if not interleaved:
        return torch.cat([first, second, rest.expand(*first.shape[:-1], -1)], -1)
    both = torch.stack([first, second], -1).flatten(-2)
    return torch.cat([both, rest.expand(*both.shape[:-1], -1)], -1) if rest.shape[-1] else both
