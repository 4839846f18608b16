"""The other rule for a mass: the largest set that does not exceed it, without the entry that crosses."""

from __future__ import annotations

import torch
from torch import Tensor


def count_within(weights: Tensor, share: Tensor) -> Tensor:
    """How many of the largest `weights (..., n)`, non-negative and summing to 1, hold at most `share (...)` together: int64 `(...)`.

    One at least; all n from a share of 1 on. `choose_top_p` and `Mass` keep one more, the one that crosses. Sums are float64.
    Source: spargeattn, arXiv 2502.18137, algorithm 1 (its top-p).
    """
    sums = weights.double().sort(dim=-1, descending=True).values.cumsum(-1)
    count = (sums <= share.double().unsqueeze(-1)).sum(-1).clamp(min=1)
    # the sum of all is 1 up to rounding only
    return torch.where(share >= 1, weights.shape[-1], count)
