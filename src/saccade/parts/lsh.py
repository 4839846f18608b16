"""Angular hashing: vectors that point the same way fall into the same bucket, and neighbouring buckets differ in one bit."""

from __future__ import annotations

import torch
from torch import Tensor


def gray_rank(codes: Tensor, bits: int) -> Tensor:
    """The place of each code, integers below `2^bits`, in the Gray sequence, in which neighbours differ in one bit; same shape."""
    rank, shift = codes, 1
    while shift < bits:
        rank = rank ^ (rank >> shift)
        shift *= 2
    return rank


def angular_buckets(x: Tensor, directions: Tensor) -> Tensor:
    """Bucket of each vector of x `(B, H, N, D)` by the signs of its products with directions `(..., D, r)`: int64 `(B, H, N)` below 2^r.

    directions broadcasts over B and H. Two vectors at the angle a share a bit with probability 1 - a / pi (hyperattention, section 2).
    """
    bits = directions.shape[-1]
    signs = (x.to(directions.dtype) @ directions) > 0
    codes = (signs.long() << torch.arange(bits, device=x.device)).sum(-1)
    return gray_rank(codes, bits)
