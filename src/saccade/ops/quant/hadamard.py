"""The Walsh-Hadamard transform: an orthonormal rotation that spreads outliers over all channels."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.quant.choice import kernel_asked, kernel_takes, narrow

LARGEST_TILE = 1024  # the longest axis that the kernel takes; longer ones run in torch


def hadamard(x: Tensor, impl: str = "auto") -> Tensor:
    """x `(..., n)` times the Hadamard matrix of size n over sqrt(n), in natural order; n a power of two.

    It is its own inverse. Computed in float32 (float64 for float64) and given in the dtype of x. impl: "auto", "torch" or "triton"
    (n <= 1024, no gradients). Raises ValueError where n is not a power of two.
    """
    n = x.shape[-1] if x.ndim else 0
    if not x.is_floating_point():
        raise TypeError(f"hadamard takes a floating-point tensor, not {x.dtype}")
    if n < 1 or n & (n - 1):
        raise ValueError(f"the Hadamard transform needs a power of two, not a last axis of {n}: pad it, or rotate parts of it")
    takes = f"up to {LARGEST_TILE} channels, no float64 and no gradients"
    if kernel_asked("hadamard", impl, x) and kernel_takes("hadamard", impl, n <= LARGEST_TILE and narrow(x), takes):
        from saccade.ops.quant.triton import butterfly

        return butterfly(x)
    return _torch(x)


def _torch(x: Tensor) -> Tensor:
    """Sums and differences of neighbours, moved to the two halves: after log2(n) rounds each channel is back in its place."""
    n = x.shape[-1]
    y = x if x.dtype == torch.float64 else x.float()
    for _ in range(n.bit_length() - 1):
        pairs = y.unflatten(-1, (-1, 2))
        y = torch.cat([pairs[..., 0] + pairs[..., 1], pairs[..., 0] - pairs[..., 1]], dim=-1)
    return (y * n**-0.5).to(x.dtype)
