"""The definition of `short_conv`, tap by tap."""

from __future__ import annotations

import torch
from torch import Tensor


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool) -> Tensor:
    """See `saccade.ops.conv.short_conv`. Computed in float32 at least."""
    (batch, n, channels), width = x.shape, weight.shape[1]
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    tail = x.new_zeros(batch, width - 1, channels) if tail is None else tail
    seen = torch.cat([tail, x], dim=1).to(wide)
    y = x.new_zeros(channels, dtype=wide) if bias is None else bias.to(wide)
    for j in range(width):
        y = y + weight[:, j].to(wide) * seen[:, j : j + n]
    return (y * torch.sigmoid(y) if silu else y).to(x.dtype)
