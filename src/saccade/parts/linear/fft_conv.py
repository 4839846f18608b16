"""Causal convolutions as long as the sequence, by Fourier transforms."""

from __future__ import annotations

import torch
from torch import Tensor


def fft_convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """`y_t = sum_{s <= t} kernel_{t-s} x_s` for every channel: x `(B, N, D)`, kernel `(D, M)`; y `(B, N, D)`.

    Both are filled with zeros, so that nothing comes round from the end. In the wider dtype of the two, float32 at least.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, kernel.dtype), torch.float32)
    n = x.shape[1]
    kernel = kernel[:, :n].to(wide)
    size = n + kernel.shape[1]
    product = torch.fft.rfft(x.to(wide).mT, n=size) * torch.fft.rfft(kernel, n=size)
    return torch.fft.irfft(product, n=size)[..., :n].mT
