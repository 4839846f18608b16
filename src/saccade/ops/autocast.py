"""What autocast does to the operands of an attention call."""

from __future__ import annotations

import torch
from torch import Tensor


def alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of one dtype: under autocast those that differ take its dtype, as they do in torch's own attention.

    There a norm or an exponential gives float32 beside the half precision of a projection. Outside of autocast they come back as they
    are, and what does not fit is refused by the call.
    """
    mixed = isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor) and not q.dtype == k.dtype == v.dtype
    if not mixed or not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)
