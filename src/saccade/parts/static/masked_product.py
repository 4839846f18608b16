"""Exact masks inside the product q.k: extra channels in which a row and a key it may not read meet.

A row carries a number near minus infinity at its forbidden bits and a key 1 at its own: a forbidden pair gets a logit far below
every real one, so that its weight is exactly 0, and an allowed pair gets its logit unchanged. Forward and backward need no code.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_row_bits(q: Tensor, forbidden: Tensor) -> Tensor:
    """q `(B, H, N, D)` with the forbidden bits `(N, R)` of its rows: `(B, H, N, D + R)`."""
    return torch.cat([q, _channels(q, forbidden, -_huge(q.dtype))], dim=-1)


def with_key_bits(k: Tensor, own: Tensor) -> Tensor:
    """k `(B, H, N, D)` with the bits `(N, R)` of its keys: `(B, H, N, D + R)`."""
    return torch.cat([k, _channels(k, own, 1.0)], dim=-1)


def without_bits(k: Tensor, bits: int) -> Tensor:
    """k `(B, H, N, D)` as keys that every row may read: `(B, H, N, D + bits)`."""
    return torch.nn.functional.pad(k, (0, bits))


def same_width(v: Tensor, like: Tensor) -> Tensor:
    """v with zero channels up to those of `like` where torch's fused CPU kernel is to run, which asks for equal widths; else v."""
    return torch.nn.functional.pad(v, (0, max(0, like.shape[-1] - v.shape[-1]))) if v.device.type == "cpu" else v


def _channels(x: Tensor, bits: Tensor, value: float) -> Tensor:
    return (bits.to(x.dtype) * value).expand(*x.shape[:2], -1, -1)


def _huge(dtype: torch.dtype) -> float:
    # the sum over a few axes must stay finite
    return 1e4 if dtype == torch.float16 else 1e30
