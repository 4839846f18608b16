"""Pooling runs of tokens into one vector each."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pool_mean(x: Tensor, block: int) -> Tensor:
    """Mean of each run of `block` tokens, float32 (float64 for float64): `(..., N, D)` to `(..., ceil(N / block), D)`.

    The last run may be shorter; its mean is over the tokens it has.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    n = x.shape[-2]
    runs = math.ceil(n / block)
    padded = torch.nn.functional.pad(x.to(exact), (0, 0, 0, runs * block - n))
    sizes = (n - torch.arange(runs, device=x.device) * block).clamp(max=block)
    return padded.unflatten(-2, (runs, block)).sum(-2) / sizes.unsqueeze(-1)
