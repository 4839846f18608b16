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
    if lengths is None:
        return torch.cat([before[:, new.shape[1] :], new], dim=1)
    if not new.shape[1] or not w:
        return before.clone()
    # where each is in `new`; those in front of it are in `before`
    place = (lengths[:, None] - w + torch.arange(w, device=new.device)).view(-1, w, *(1,) * (new.ndim - 2))
    shape = (-1, -1, *new.shape[2:])
    old = before.gather(1, (place + w).clamp(max=w - 1).expand(shape))
    return torch.where(place < 0, old, new.gather(1, place.clamp(min=0).expand(shape)))
