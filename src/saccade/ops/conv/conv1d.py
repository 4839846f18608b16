"""short_conv in torch, on any device: its own convolution for sequences, and a product for one token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.ops.conv import reference


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool) -> Tensor:
    """See `saccade.ops.conv.short_conv`. In the wider dtype of x and the weights; under autocast in that of autocast."""
    width = weight.shape[1]
    if not x.numel():  # torch's own takes no empty input
        return reference.short_conv(x, weight, bias, tail, silu)
    wide = torch.promote_types(x.dtype, weight.dtype)
    weight, bias = weight.to(wide).unsqueeze(1), None if bias is None else bias.to(wide)
    seen = F.pad(x, (0, 0, width - 1, 0)) if tail is None else torch.cat([tail, x], dim=1)
    y = F.conv1d(seen.to(wide).mT, weight, bias, groups=x.shape[2]).mT
    return (F.silu(y) if silu else y).to(x.dtype)


def step(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool) -> Tensor:
    """`short_conv` of x `(B, 1, C)`: few and small operations, which is what one token costs."""
    y = x * weight[:, -1] if tail is None else (torch.cat([tail, x], dim=1) * weight.mT).sum(1, keepdim=True)
    y = y if bias is None else y + bias
    return (F.silu(y) if silu else y).to(x.dtype)
