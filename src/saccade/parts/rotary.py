"""Moving keys to other positions: rotary angles add up."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import Rotary, rotate


def turn(x: Tensor, shift: Tensor | int, rotary: Rotary) -> Tensor:
    """Keys `x (..., n, D)` moved by `shift` positions: rope(k, p) becomes rope(k, p + shift).

    shift: one number, or integers that broadcast to `(..., n)`. Turned in float32 (float64 for float64 keys) and
    returned in x's dtype. Channels after the first 2 * pairs stay as they are. Raises ValueError when x has fewer
    channels than the rotary embedding turns.
    """
    pairs = rotary.inv_freq.numel()
    if 2 * pairs > x.shape[-1]:
        raise ValueError(f"the rotary embedding turns {2 * pairs} channels and the keys have only {x.shape[-1]}")
    exact = torch.promote_types(x.dtype, torch.float32)
    # far into a stream the angle itself needs more digits than float32 has
    steps = torch.as_tensor(shift, device=x.device).to(torch.float64)
    angles = steps.unsqueeze(-1) * rotary.inv_freq.to(x.device, torch.float64)
    cos, sin = angles.cos().to(exact), angles.sin().to(exact)
    return rotate(x.to(exact), cos, sin, interleaved=rotary.interleaved).to(x.dtype)
