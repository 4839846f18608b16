"""The last few tokens of every row: what short convolutions and windows keep."""

from __future__ import annotations

import torch
from torch import Tensor


def last_tokens(before: Tensor, new: Tensor, lengths: Tensor | None) -> Tensor:
    """The last w tokens `(B, w, ...)` of before `(B, w, ...)` followed by new `(B, N, ...)`.

    lengths: `(B,)` how many of the new tokens of each row are real, the first ones; None: all.
    """
    w = before.shape[1]
    if lengths is None and new.shape[1] >= w:
        return new[:, new.shape[1] - w :].clone()
    joined = torch.cat([before, new], dim=1)
    if lengths is None:
        return joined[:, joined.shape[1] - w :].clone()
    index = lengths[:, None] + torch.arange(w, device=new.device)
    return joined.gather(1, index.reshape(*index.shape, *(1,) * (new.ndim - 2)).expand(-1, -1, *new.shape[2:]))
