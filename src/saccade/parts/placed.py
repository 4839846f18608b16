"""What a plan holds, where a step needs it: copied to the device once and not at every step, for which a GPU would wait."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_held = WeakTensorKeyDictionary()  # a plan's tensor: its copies, which live as long as it does


def placed(x: Tensor, device: torch.device, dtype: torch.dtype | None = None, columns: int | None = None) -> Tensor:
    """The first `columns` of the last axis of x (None: all) on a device and in a dtype (None: that of x). x must not change afterwards."""
    columns, dtype = x.shape[-1] if columns is None else min(columns, x.shape[-1]), dtype or x.dtype
    if x.device == device and x.dtype == dtype:
        return x[..., :columns]
    copies: dict[tuple[torch.device, torch.dtype, int], Tensor] | None = _held.get(x)
    if copies is None:
        copies = _held[x] = {}
    key = device, dtype, columns
    if key not in copies:
        with torch.inference_mode(False):  # a tensor made in inference mode can't be used in training
            copies[key] = x[..., :columns].to(device, dtype)
    return copies[key]
